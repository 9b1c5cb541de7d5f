"""Floor 3: vision encoders, found by module name."""
