"""Scores of answers against references: pure functions of text and numbers, no model."""
