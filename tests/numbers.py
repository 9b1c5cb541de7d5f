"""How far two arrays are apart, as parity tests say it."""

import os

import numpy as np

# `launch/test.sh` compiles by them, except with --full; their sums differ between programs.
OLDER_EMITTERS = "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")


def error(ours, theirs) -> float:
  """max|a - b| / max|b| of one tensor."""
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def same(ours, theirs) -> bool:
  """Whether two programs compute the same bits, by the older emitters the same but for rounding."""
  return error(ours, theirs) <= (1e-6 if OLDER_EMITTERS else 0)
