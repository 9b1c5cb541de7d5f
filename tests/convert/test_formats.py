"""The readers of .npz, GGUF and .pth files: values, layouts, and files that are not what they say.
"""

import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.convert import written
from vlm_jax.convert import gguf, gguf_llama, npz, pth, sources
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.ops import rope


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def state():
  """Views of shared storages, other dtypes, a scalar, an empty tensor."""
  base = torch.from_numpy(random(4, 6))
  return {"w": base, "t": base.t(), "part": base[1:3, ::2], "half": base.half(),
          "b16": base.bfloat16(), "count": torch.tensor(3), "none": torch.zeros(0, 2),
          "parameter": torch.nn.Parameter(torch.from_numpy(random(3, seed=1)))}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "wrapped"])
def test_pth_is_what_torch_saved(tmp_path, old, wrap):
  saved = {"state_dict": state(), "epoch": 3, "rates": [0.5, None, True]} if wrap else state()
  torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
  with pth.Reader(tmp_path / "a.pth") as reader:
    assert reader.shapes == {key: tuple(value.shape) for key, value in state().items()}
    for key, value in state().items():
      value = value.detach()
      expected = value.float().numpy() if key == "b16" else value.numpy()
      got = reader[key].astype(np.float32) if key == "b16" else reader[key]
      assert got.dtype == expected.dtype
      np.testing.assert_array_equal(got, expected)
  model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
  torch.save(model.state_dict(), tmp_path / "b.pth", _use_new_zipfile_serialization=not old)
  with pth.Reader(tmp_path / "b.pth") as reader:  # an OrderedDict with versions of its modules
    assert set(reader.shapes) == set(model.state_dict())


class Attack:
  def __init__(self, marker="unused"):
    self.marker = marker

  def __reduce__(self):
    return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_pth_runs_nothing(tmp_path, old):
  marker = tmp_path / "ran"
  for number, content in enumerate((
      {"w": Attack(marker)}, {"w": torch.nn.Linear(2, 2)}, {"w": torch.zeros(2), "x": {1, 2}})):
    path = tmp_path / f"{number}.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(DataError, match="asks to run|its pickle does") as error:
      pth.Reader(path)
    assert "\n" not in str(error.value)
  (tmp_path / "bare.pth").write_bytes(pickle.dumps(Attack(marker)))
  with pytest.raises(DataError, match="asks to run '(posix|nt).mkdir'"):
    pth.Reader(tmp_path / "bare.pth")
  assert not marker.exists()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_pth_cut_anywhere_is_one_sentence(tmp_path, old):
  path = tmp_path / "a.pth"
  torch.save({"w": torch.from_numpy(random(8, 8))}, path, _use_new_zipfile_serialization=not old)
  whole = path.read_bytes()
  for size in (0, 3, 40, len(whole) // 2, len(whole) - 4):
    path.write_bytes(whole[:size])
    with pytest.raises(DataError, match="cannot be read as a PyTorch file|is truncated"):
      pth.Reader(path)
  torch.save({"epoch": 3}, path)
  with pytest.raises(DataError, match="holds no dictionary of tensors"):
    pth.Reader(path)


def test_npz_names_and_dtypes(tmp_path):
  stack = random(3, 2, 4)
  np.savez(tmp_path / "a.npz", **{
    "params/img/Transformer/encoderblock/x/kernel": stack,
    "params/img/pos": random(1, 4, 2).astype(ml_dtypes.bfloat16),
    "opt/target/head": random(2)})
  with npz.Reader(tmp_path / "a.npz") as reader:
    assert reader.shapes == {
      **{f"img/Transformer/encoderblock_{layer}/x/kernel": (2, 4) for layer in range(3)},
      "img/pos": (1, 4, 2), "head": (2,)}
    np.testing.assert_array_equal(reader["img/Transformer/encoderblock_2/x/kernel"], stack[2])
    assert reader["img/pos"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(reader["img/pos"], random(1, 4, 2).astype(ml_dtypes.bfloat16))
  np.savez(tmp_path / "o.npz", a=np.array([Attack()], object))
  with pytest.raises(DataError, match="holds Python objects"):
    npz.Reader(tmp_path / "o.npz")
  whole = (tmp_path / "a.npz").read_bytes()
  (tmp_path / "a.npz").write_bytes(whole[:-30])
  with pytest.raises(DataError, match="cannot be read as .npz"):
    npz.Reader(tmp_path / "a.npz")


def test_gguf_kinds_and_damage(tmp_path):
  array, path = random(4, 64), tmp_path / "a.gguf"
  eight, four, zero = written.q8_0(array), written.q4(array, True), written.q4(array, False)
  b16 = array.astype(ml_dtypes.bfloat16)
  expected = {"f32": array, "f16": array.astype(np.float16), "b16": b16, "q8": eight[1],
              "q41": four[1], "q40": zero[1]}
  data = {"f32": (0, array), "f16": (1, array.astype(np.float16)), "b16": (30, b16.view(np.uint16)),
          "q8": (8, eight[0]), "q41": (3, four[0]), "q40": (2, zero[0])}
  tensors = {name: (kind, array.shape, raw.tobytes()) for name, (kind, raw) in data.items()}
  written.gguf(path, {"a.list": ["x", "yz"], "a.number": 7, "a.float": 0.5}, tensors)
  with gguf.Reader(path) as reader:
    assert reader.fields == {"a.list": ["x", "yz"], "a.number": 7, "a.float": 0.5}
    for name, value in expected.items():
      assert reader[name].dtype == value.dtype and reader.shapes[name] == array.shape
      np.testing.assert_array_equal(reader[name], value, err_msg=name)
      assert np.abs(reader[name].astype(np.float32) - array).max() < 0.25
  whole = path.read_bytes()
  for size, sentence in ((len(whole) - 40, "'q40' ends at byte .* it is truncated"),
                         (60, "ends in the middle"), (0, "cannot be read as GGUF")):
    path.write_bytes(whole[:size])
    with pytest.raises(DataError, match=sentence):
      gguf.Reader(path)
  written.gguf(path, {}, {"w": (12, (4, 256), b"")})
  with pytest.raises(DataError, match="'w' has type 12; known: F32"):
    gguf.Reader(path)


def test_gguf_heads_turn_pairs(tmp_path):
  """Scores of llama.cpp (pairs of neighbours, its rows) are ours (halves, our rows)."""
  heads, channels, width, slots = 3, 8, 5, 6
  query, key = random(heads * channels, width), random(heads * channels, width, seed=1)
  x = random(slots, width, seed=2)
  halves = rope.sequence(channels, 100.0)

  def scores(query, key, layout):
    turn = rope.rotation(np.arange(slots)[None], layout)
    q, k = (np.asarray(rope.rotate((x @ w.T).reshape(1, slots, heads, channels), turn))
            for w in (query, key))
    return np.einsum("bthc,bshc->hts", q, k)

  expected = scores(query, key, halves.interleaved())
  ours = scores(gguf_llama.halves(query, heads), gguf_llama.halves(key, heads), halves)
  error = lambda a: np.abs(a - expected).max() / np.abs(expected).max()
  assert error(ours) < 2e-6
  assert error(scores(query, key, halves)) > 0.01  # the twin: rows as they are in the file


def test_gguf_of_other_models_is_refused(tmp_path):
  path = tmp_path / "a.gguf"
  written.gguf(path, {"general.architecture": "gemma3"}, {})
  with pytest.raises(UsageError, match="architecture is 'gemma3'"), sources.open_source(path):
    pass
  written.gguf(path, {"general.architecture": "llama"}, {})
  with pytest.raises(DataError, match="metadata has no"), sources.open_source(path):
    pass


def test_unknown_paths_are_one_sentence(tmp_path):
  with pytest.raises(UsageError, match="does not exist"), sources.open_source(tmp_path / "gone"):
    pass
  (tmp_path / "a.onnx").touch()
  with pytest.raises(UsageError, match="or a file named .safetensors, .npz, .gguf"), (
      sources.open_source(tmp_path / "a.onnx")):
    pass
