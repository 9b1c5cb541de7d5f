"""vlm_jax: every published way of joining image tokens and text tokens, in one readable loop."""

__version__ = "0.1.0"
