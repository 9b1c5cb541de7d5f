"""Floor 4: one file, one strategy: layout, model, losses and stages."""
