"""Floor 6: `vlm-jax report`, one HTML file that shows a run and asks the network for nothing."""
