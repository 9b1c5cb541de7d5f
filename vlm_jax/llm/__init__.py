"""Floor 3: language models, found by module name."""
