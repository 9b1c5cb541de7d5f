"""Which block sizes suit a call: by its lengths, its heads and the platform."""

import jax
import jax.numpy as jnp

from vlm_jax.ops.attention import pallas_tpu_layout

SHORT = 2048  # slots of a row


def block_sizes(
  length: int, keys: int, platform: str, *, sharing: int = 1, width: int = 128,
  dtype=jnp.bfloat16,
) -> tuple[int, int]:
  """Block sizes of queries and keys, for `make_plan`.

  On a CPU, rows of a few thousand slots hold documents of a hundred: what small blocks do not
  compute is worth more than what large ones gain. From there on its cores should share each
  product, which they do from about 512 x 256 and best at 512 x 320; queries of all heads of a group
  lie below each other. On a mesh every device has a core of its own, and nothing to share.
  Accelerators want more work in a step than 128 x 128.

  Args:
    length, keys: T and S.
    platform: "cpu", "gpu" or "tpu".
    sharing: query heads of a group, H // G.
    width: C.
    dtype: of q, k and v.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if platform == "tpu":
    device = mesh.abstract_device or jax.devices()[0]
    return pallas_tpu_layout.block_sizes(length, keys, width, dtype, device.device_kind)
  if platform == "gpu":
    most, unit = (512, 512), 128
  elif keys <= SHORT or mesh.size > 1:
    most, unit = (64, 128), 8
  else:
    most, unit = (max(64, min(256, 512 // sharing)), 512 if sharing == 1 else 320), 8
  even = lambda size, most: min(most, -(-size // unit) * unit)
  return even(length, most[0]), even(keys, most[1])
