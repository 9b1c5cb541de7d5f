"""Recipes: one Python file each, `get_config(arg)`. `base.py` has every field."""
