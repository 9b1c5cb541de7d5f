"""Recipes: one Python file each, `get_config(arg)`. `base.py` has every field; `older.py` fills in
what the config of an older version lacks."""
