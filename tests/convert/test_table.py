"""The key table and the safetensors files, without any model."""

import json

import ml_dtypes
import numpy as np
import pytest

from vlm_jax.convert import safetensors_io, table
from vlm_jax.core.errors import DataError, DiskError
from vlm_jax.core.tree import flatten, unflatten

KEYS = (
  ("embed", "tokens.weight", "copy"),
  ("patch/kernel", "conv.weight", "patch"),
  ("layers/query/kernel", "blocks.{layer}.q.weight", "in"),
  ("layers/query/bias", "blocks.{layer}.q.bias", "flat"),
  ("layers/out/kernel", "blocks.{layer}.o.weight", "out"),
  ("absent", "absent.weight", "copy"),
)
PARTS = (("llm/", "model.", KEYS),)
SHAPES = {
  "llm/embed": (7, 6), "llm/patch/kernel": (2 * 2 * 3, 6), "llm/layers/query/kernel": (3, 6, 2, 5),
  "llm/layers/query/bias": (3, 2, 5), "llm/layers/out/kernel": (3, 2, 5, 6),
}


class Tensors(dict):
  """Tensors by key in memory."""

  @property
  def shapes(self):
    return {key: array.shape for key, array in self.items()}


def params(seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {path: rng.standard_normal(shape).astype(dtype) for path, shape in SHAPES.items()}


def exported(flat):
  entries = table.entries(PARTS, SHAPES)
  tensors = table.export(unflatten(flat), entries)
  return entries, Tensors({key: tensor.get() for key, tensor in tensors.items()})


def test_export_has_the_layout_of_torch():
  flat = params()
  _, theirs = exported(flat)
  x = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
  np.testing.assert_allclose(
    x @ theirs["model.blocks.2.q.weight"].T,
    np.einsum("td,dhc->thc", x, flat["llm/layers/query/kernel"][2]).reshape(4, 10), rtol=1e-5)
  y = x[:, :5, None] * np.arange(2, dtype=np.float32)[None, None]
  y = y.swapaxes(1, 2)  # [T,H,C]
  np.testing.assert_allclose(
    y.reshape(4, 10) @ theirs["model.blocks.1.o.weight"].T,
    np.einsum("thc,hcd->td", y, flat["llm/layers/out/kernel"][1]), rtol=1e-5, atol=1e-6)
  # A convolution of one patch: rows, columns, channels in our order.
  patch = np.random.default_rng(2).standard_normal((2, 2, 3)).astype(np.float32)
  np.testing.assert_allclose(
    np.einsum("dchw,hwc->d", theirs["model.conv.weight"], patch),
    patch.reshape(-1) @ flat["llm/patch/kernel"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_export_import_is_the_identity_and_keeps_the_dtype(tmp_path, dtype):
  flat = params(dtype=dtype)
  entries = table.entries(PARTS, SHAPES)
  for number, shard_bytes in enumerate((10**9, 200)):
    directory = tmp_path / str(number)
    directory.mkdir()
    safetensors_io.write(directory, table.export(unflatten(flat), entries), shard_bytes)
    with safetensors_io.Reader(directory) as reader:
      back = flatten(table.load(reader, entries))
    assert set(back) == set(flat)
    for path, array in flat.items():
      assert back[path].dtype == array.dtype
      np.testing.assert_array_equal(back[path].view(np.uint8), array.view(np.uint8))
  index = json.loads((directory / safetensors_io.INDEX).read_text())
  assert len(set(index["weight_map"].values())) > 2
  assert index["metadata"]["total_size"] == sum(a.nbytes for a in flat.values())
  assert not list(directory.glob("*.tmp"))


def test_every_parameter_needs_one_row():
  with pytest.raises(ValueError, match="no row of KEYS describes llm/extra"):
    table.entries(PARTS, {**SHAPES, "llm/extra": (3,)})
  with pytest.raises(ValueError, match="two rows of KEYS describe llm/embed"):
    table.entries((("llm/", "model.", (*KEYS, ("embed", "again", "copy"))),), SHAPES)


def test_errors_name_the_keys():
  entries, theirs = exported(params())
  for change, sentence in (
    (lambda t: t.pop("model.blocks.1.q.bias"), r"1 keys are missing: model\.blocks\.1\.q\.bias;"),
    (lambda t: t.update({"model.more": np.zeros(3)}), r"1 keys are unexpected: model\.more;"),
    (lambda t: t.update({"model.conv.weight": np.zeros((6, 3, 2, 3))}),
     r"1 shapes are wrong: model\.conv\.weight is \(6, 3, 2, 3\), expected \(6, 3, 2, 2\);"),
    (lambda t: t.update({"model.blocks.2.q.bias": np.zeros(10, np.float16)}),
     r"model\.blocks\.2\.q\.bias is float16 but earlier layers are float32;"),
    (lambda t: t.update({"x.tokens.weight": t["model.tokens.weight"]}), "two spellings"),
  ):
    broken = Tensors(theirs)
    change(broken)
    with pytest.raises(DataError, match=sentence) as error:
      table.load(broken, entries, rename=table.renamer(((r"^x\.", "model."),)))
    assert "\n" not in str(error.value)
  many = Tensors()
  with pytest.raises(DataError, match="11 keys are missing: .* and 3 more;"):
    table.load(many, entries)


def test_damaged_files_are_one_sentence(tmp_path):
  with pytest.raises(DataError, match="holds neither"):
    safetensors_io.Reader(tmp_path)
  path = tmp_path / safetensors_io.SINGLE
  _, theirs = exported(params())
  safetensors_io.write(tmp_path, {k: safetensors_io.Tensor(a.nbytes, lambda a=a: a)
                                  for k, a in theirs.items()})
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(DataError, match="cannot be read as safetensors"):
    safetensors_io.Reader(tmp_path)
  (tmp_path / safetensors_io.INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')
  with pytest.raises(DataError, match="gone.safetensors: cannot be read"):
    safetensors_io.Reader(tmp_path)
  (tmp_path / safetensors_io.INDEX).write_text("{")
  with pytest.raises(DataError, match="cannot be read as JSON"):
    safetensors_io.Reader(tmp_path)
  with pytest.raises(DiskError, match="cannot be written"):
    safetensors_io.write(tmp_path / "absent", {})


def test_parts_of_one_tensor():
  keys = tuple((f"{name}/{leaf}", f"in_proj_{leaf}[{number}/3]", op)
               for number, name in enumerate(("query", "key", "value"))
               for leaf, op in (("kernel", "in"), ("bias", "flat")))
  shapes = {f"{name}/{leaf}": shape for name in ("query", "key", "value")
            for leaf, shape in (("kernel", (6, 2, 5)), ("bias", (2, 5)))}
  rng = np.random.default_rng(0)
  flat = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
  entries = table.entries([("", "", keys)], shapes)
  tensors = table.export(unflatten(flat), entries)
  theirs = Tensors({key: tensor.get() for key, tensor in tensors.items()})
  assert theirs.shapes == {"in_proj_kernel": (30, 6), "in_proj_bias": (30,)}
  assert all(tensors[key].nbytes == array.nbytes for key, array in theirs.items())
  np.testing.assert_array_equal(theirs["in_proj_kernel"][10:20],
                                flat["key/kernel"].reshape(6, 10).T)
  spelled = Tensors({"old." + key: array for key, array in theirs.items()})
  for source in (theirs, spelled):
    back = flatten(table.load(source, entries, table.renamer(((r"^old\.", ""),))))
    for path, array in flat.items():
      np.testing.assert_array_equal(back[path], array)
  with pytest.raises(DataError, match=r"in_proj_bias is \(31,\), which is not 3 equal parts"):
    table.load(Tensors(theirs | {"in_proj_bias": np.zeros(31)}), entries)
  del theirs["in_proj_bias"]
  with pytest.raises(DataError, match=r"3 keys are missing: in_proj_bias\[0/3\]"):
    table.load(theirs, entries)
