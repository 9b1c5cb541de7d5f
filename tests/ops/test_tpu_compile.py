"""The TPU kernels go through the TPU's own compiler, and take the memory and cycles that we say.

No TPU is needed: libtpu compiles for one that is described. Nothing is run.
"""

import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from vlm_jax.ops.attention import pallas_tpu
from vlm_jax.ops.attention.pallas_tpu_layout import SMEM_BYTES, SPARE, VMEM_BYTES

ROOT = Path(__file__).parents[2]
KERNELS = {"forward", "dq", "dkv"}
GENERATIONS = ("v5e", "v5p", "v6e")
CORE = {"v5e": 2**27, "v5p": 2**26, "v6e": 2**27}  # VMEM, as jax's pltpu.get_tpu_info has it
HEADS = ((8, 8), (32, 8), (16, 1))
EVERYTHING = dict(classes=True, k_index=True, k_bias=True, soft_cap=30.0)
# Every option of each generation; of all together both lengths, all widths, all ratios of heads.
FEW = {
  "v5e": ((8192, 64, (8, 8), EVERYTHING), (32768, 256, (16, 1), {})),
  "v5p": ((8192, 128, (16, 1), EVERYTHING), (32768, 64, (32, 8), dict(batch=4))),
  "v6e": ((8192, 256, (32, 8), EVERYTHING),),
}
# Of each generation both lengths, all widths and all ratios of heads.
MORE = {
  "v5e": ((8192, 128, (32, 8), {}), (32768, 128, (8, 8), dict(classes=True))),
  "v5p": ((8192, 256, (8, 8), {}), (8192, 128, (32, 8), {})),
  "v6e": ((8192, 64, (16, 1), {}), (32768, 256, (16, 1), {}), (32768, 128, (8, 8), dict(batch=2))),
}


@pytest.fixture(autouse=True)
def _only_where_libtpu_is():
  if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("libtpu is only made for Linux on x86-64")


def case(generation: str, length: int, width: int, heads: tuple[int, int], **options) -> dict:
  return dict(generation=generation, length=length, width=width, heads=heads[0], groups=heads[1],
              **options)


def compile_for_tpu(folder: Path, cases: list[dict]) -> list[dict]:
  """What tests/ops/compile_for_tpu.py says about the cases; one process, one after the other."""
  command = [sys.executable, "-m", "tests.ops.compile_for_tpu", str(folder)]
  done = subprocess.run(command + [json.dumps(case) for case in cases], cwd=ROOT, text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stderr[-3000:]
  return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(report: dict) -> None:
  """Three kernels, within the memory that a kernel may plan with and that we say they take."""
  made, devices = report["case"], math.prod(report["case"]["mesh"][:2])
  assert set(report["vmem"]) == set(report["smem"]) == KERNELS, report
  blocks = made["length"] // report["block_q"], made["length"] // report["block_k"]
  assert report["block_q"] >= 512 and report["block_k"] >= 512
  said = pallas_tpu.vmem_bytes(report["block_q"], report["block_k"], made["width"], made["dtype"])
  # The compiler may also keep whole operands there: queries (8 heads of 8k slots: 16 MiB) and keys.
  slot = max(128, made["width"]) * jnp.dtype(made["dtype"]).itemsize
  operands = made["length"] * (made["heads"] + made["groups"]) * slot
  for kernel in KERNELS:
    assert 2**18 < report["vmem"][kernel] <= said + operands, (kernel, said, report)
    assert said <= SPARE * VMEM_BYTES, (kernel, said, report)
    assert report["vmem"][kernel] <= SPARE * CORE[made["generation"]], (kernel, report)
    listed = pallas_tpu.smem_bytes(made["batch"] // devices, *blocks)
    assert listed <= report["smem"][kernel] <= SPARE * SMEM_BYTES, (kernel, listed, report)
    assert report["smem"][kernel] - listed < 2**14, "beside the list there is little"


@pytest.mark.parametrize("shapes", [FEW, pytest.param(MORE, marks=pytest.mark.long)],
                         ids=["few", "more"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_forward_and_backward(tmp_path, generation, shapes):
  cases = [case(generation, length, width, heads, **options)
           for length, width, heads, options in shapes[generation]]
  reports = compile_for_tpu(tmp_path, cases)
  assert len(reports) == len(cases)
  for report in reports:
    check(report)


# A process for each width: heads of 64 and 128 have one forward kernel, and the compiler would not
# say again what it takes.
@pytest.mark.long
@pytest.mark.timeout(3600)  # minutes each where nothing else runs
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("length", [8192, 32768])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_every_shape(tmp_path, generation, length, width):
  reports = compile_for_tpu(tmp_path, [case(generation, length, width, heads) for heads in HEADS])
  assert len(reports) == len(HEADS)
  for report in reports:
    check(report)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_float32(tmp_path, generation):
  for report in compile_for_tpu(
      tmp_path, [case(generation, 8192, width, (8, 2), dtype="float32") for width in (128, 256)]):
    check(report)


def test_each_device_of_a_mesh_has_its_own_rows_and_heads(tmp_path):
  shape = case("v5e", 8192, 128, (8, 2), batch=2, mesh=(1, 2, 2))
  report, = compile_for_tpu(tmp_path, [shape])
  check(report)
  # 1 row and 4 heads on 1 group; 2 + 3 + 4 products in the three kernels.
  assert report["flops"] == pytest.approx(9 * 2 * 8192**2 * 128 * 4, rel=0.01)
  with pytest.raises(AssertionError, match="Mosaic kernels cannot be automatically partitioned"):
    compile_for_tpu(tmp_path, [shape | dict(told=False)])


@pytest.mark.parametrize("generation", ["v5e", pytest.param("v6e", marks=pytest.mark.long)])
def test_full_blocks_do_not_pay_for_the_mask(tmp_path, generation):
  """Instruction bundles (cycles) of a full block, in the kernel and in one without partial blocks.

  The compiled kernel is cut at its branches. Full and partial blocks are its two largest regions;
  compiled for full blocks only, it has one.
  """
  shape = case(generation, 8192, 128, (8, 8))
  reports = compile_for_tpu(tmp_path, [shape, shape | dict(partial=False)])
  for kernel in KERNELS:
    regions, alone = (sorted(report["regions"][kernel])[::-1] for report in reports)
    assert alone[0] > 2 * alone[1], alone
    assert regions[1] > 2 * regions[2], regions
    # Whichever of the two is the full block: the partial one has the mask's instructions too.
    full = min(regions[:2], key=reports[0]["regions"][kernel].index)
    assert abs(full - alone[0]) < 0.03 * alone[0], (kernel, full, alone[0])


@pytest.mark.parametrize("generation", ["v5e", pytest.param("v5p", marks=pytest.mark.long),
                                        pytest.param("v6e", marks=pytest.mark.long)])
def test_splash_compiles(tmp_path, generation):
  shape = case(generation, 8192, 128, (8, 2), implementation="splash", soft_cap=30.0)
  report, = compile_for_tpu(tmp_path, [shape])
  assert set(report["vmem"]) == KERNELS
  assert max(report["vmem"].values()) < SPARE * VMEM_BYTES


@pytest.mark.long
def test_the_list_of_pairs_ends_where_declines_says(tmp_path):
  rows = case("v5e", 2**17, 64, (1, 1), batch=14)
  check(*compile_for_tpu(tmp_path, [rows]))
  with pytest.raises(AssertionError, match="Ran out of memory in memory space smem"):
    compile_for_tpu(tmp_path, [rows | dict(batch=16, told=False)])  # told, attention declines
  assert pallas_tpu.smem_bytes(16, 128, 128) > SPARE * SMEM_BYTES  # see test_pallas_tpu.py
  assert pallas_tpu.block_sizes(2**17, 2**17, 64, jnp.bfloat16) == (1024, 1024)
