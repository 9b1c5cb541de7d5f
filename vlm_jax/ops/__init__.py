"""Floor 1: pure functions on arrays: attention, rotary positions, losses, gathers."""
