"""Generation: prompts laid out as in training, prefill and extend in one compiled function."""
