"""`python -m vlm_jax` is the console script `vlm-jax`."""

import sys

from vlm_jax.cli.main import main

if __name__ == "__main__":
  sys.exit(main())
