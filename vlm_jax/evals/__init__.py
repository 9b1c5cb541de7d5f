"""Evaluations: what a model is asked, how answers are scored, and how sure the number is."""
