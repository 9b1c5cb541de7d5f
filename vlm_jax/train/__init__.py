"""Floor 5: the one loop that trains every strategy, and what keeps a run safe."""
