"""Mesh shapes and which axis is sharded; eight devices are forced in a process of their own."""

import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.core.mesh import RULES, make_mesh, spec

MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))


def config(data=-1, fsdp=1, tensor=1):
  config = base.get_config()
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = data, fsdp, tensor
  return config


def test_default_is_all_devices_on_data():
  assert dict(make_mesh(config()).shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


def test_sizes_must_multiply_to_the_devices():
  with pytest.raises(UsageError, match="config.mesh is data=.*devices"):
    make_mesh(config(data=jax.device_count() + 1))
  with pytest.raises(UsageError, match="only one axis"):
    make_mesh(config(data=-1, fsdp=-1))


def test_every_rule_names_mesh_axes():
  for name, rule in RULES.items():
    axes = (rule,) if isinstance(rule, str) else (rule or ())
    assert set(axes) <= {"data", "fsdp", "tensor"}, name


@pytest.mark.parametrize("names,shape,expected", [
  (("embed", "mlp"), (8, 16), PartitionSpec("fsdp", "tensor")),
  (("layers", "embed", "heads"), (3, 8, 4), PartitionSpec(None, "fsdp", "tensor")),
  (("embed", "mlp"), (7, 16), PartitionSpec(None, "tensor")),  # 7 does not divide: replicated
  (("mlp", "vocab"), (8, 8), PartitionSpec("tensor", None)),  # a mesh axis is used once
  ((None, "norm"), (4, 4), PartitionSpec(None, None)),
])
def test_spec(names, shape, expected):
  assert spec(names, shape, MESH) == expected


def test_eight_devices_hold_the_rows():
  code = """
import jax, numpy as np
from vlm_jax.configs import base
from vlm_jax.core.mesh import make_mesh, row_sharding
config = base.get_config()
config.mesh.fsdp, config.mesh.tensor = 2, 2
mesh = make_mesh(config)
rows = jax.device_put(np.arange(32).reshape(8, 4), row_sharding(mesh))
print(dict(mesh.shape), {shard.data.shape for shard in rows.addressable_shards})
"""
  env = {**os.environ, "XLA_FLAGS": (os.environ.get("XLA_FLAGS", "")
                                     + " --xla_force_host_platform_device_count=8")}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                        timeout=300, check=True)
  assert done.stdout.strip() == "{'data': 2, 'fsdp': 2, 'tensor': 2} {(2, 4)}"
