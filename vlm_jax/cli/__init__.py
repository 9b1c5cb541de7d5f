"""Floor 6: the command `vlm-jax`. Each file is a subcommand group; nothing imports them."""
