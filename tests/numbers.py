"""How far two arrays are apart, as parity tests say it."""

import numpy as np


def error(ours, theirs) -> float:
  """max|a - b| / max|b| of one tensor."""
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
