"""Floor 2: Linen blocks: linear layers, norms, attention, MLPs, stacks of layers."""
