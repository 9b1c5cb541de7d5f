"""`init` of config nodes: every format gives the same module, and says when it does not."""

import numpy as np
import pytest
import torch
import transformers

from tests.convert import tiny_llava, written
from vlm_jax.convert import safetensors_io, systems, table
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.core.tree import unflatten
from vlm_jax.train import initial
from vlm_jax.train import state as states


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A LLaVA as safetensors, as .pth in the names of memory, and as a run; its parameters."""
  folder = tmp_path_factory.mktemp("init")
  config = tiny_llava.get_config()
  flat = tiny_llava.noise(config)
  systems.write(folder / "hf", config, unflatten(flat), image_token=5, shard_bytes=30_000)
  model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "hf")
  torch.save(model.state_dict(), folder / "model.pth")
  tiny_llava.write_run(folder / "run", config, flat)
  (folder / "one").mkdir()
  systems.write(folder / "one" / "x", config, unflatten(flat), image_token=5)
  _, leaves = states.initializer(find_fusion(config), config)
  return folder, config, flat, leaves


def read(made, change):
  folder, config, _, leaves = made
  config = config.copy_and_resolve_references()
  change(config, folder)
  return initial.read(config, leaves)


@pytest.mark.parametrize("name", ["hf", "model.pth", "run", "one/x/model.safetensors"])
@pytest.mark.parametrize("node", ["tower", "connector", "llm"])
def test_a_node_of_every_format(made, name, node):
  flat = made[2]
  found = read(made, lambda c, folder: c[node].update(init=str(folder / name)))
  assert set(found) == {path for path in flat if path.startswith(f"{node}/")}
  for path, array in found.items():
    np.testing.assert_array_equal(array, flat[path], err_msg=path)


def test_llama_of_gguf(made, tmp_path):
  _, config, flat, _ = made
  mine = {path.removeprefix("llm/"): a for path, a in flat.items() if path.startswith("llm/")}
  written.llama_gguf(tmp_path / "a.gguf", mine, config.llm)
  found = read(made, lambda c, _: c.llm.update(init=str(tmp_path / "a.gguf")))
  assert set(found) == {path for path in flat if path.startswith("llm/")}
  for path, array in found.items():
    assert array.dtype == np.float32
    expected = flat[path] if "norm" in path else flat[path].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(array, expected, err_msg=path)


NPZ = {  # theirs to the name of SiglipVisionModel, and how torch's array becomes theirs
  "embedding/kernel": ("embeddings.patch_embedding.weight", lambda a: a.transpose(2, 3, 1, 0)),
  "embedding/bias": ("embeddings.patch_embedding.bias", lambda a: a),
  "pos_embedding": ("embeddings.position_embedding.weight", lambda a: a[None]),
  "Transformer/encoder_norm/scale": ("post_layernorm.weight", lambda a: a),
  "Transformer/encoder_norm/bias": ("post_layernorm.bias", lambda a: a),
}
BLOCK = {"LayerNorm_0": "layer_norm1", "LayerNorm_1": "layer_norm2"}


def big_vision(model, heads, layers):
  """The arrays of a SiglipVisionModel under big_vision's names, layer by layer."""
  theirs = {key: value.numpy() for key, value in model.state_dict().items()}
  out = {key: change(theirs[name]) for key, (name, change) in NPZ.items()}
  for layer in range(layers):
    at, to = f"encoder.layers.{layer}", f"Transformer/encoderblock_{layer}"
    for key, name in BLOCK.items():
      out[f"{to}/{key}/scale"] = theirs[f"{at}.{name}.weight"]
      out[f"{to}/{key}/bias"] = theirs[f"{at}.{name}.bias"]
    for key, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
      weight, bias = (theirs[f"{at}.self_attn.{name}.{leaf}"] for leaf in ("weight", "bias"))
      attention = f"{to}/MultiHeadDotProductAttention_0"
      out[f"{attention}/{key}/kernel"] = weight.T.reshape(len(weight), heads, -1)
      out[f"{attention}/{key}/bias"] = bias.reshape(heads, -1)
    weight = theirs[f"{at}.self_attn.out_proj.weight"]
    out[f"{attention}/out/kernel"] = weight.T.reshape(heads, -1, len(weight))
    out[f"{attention}/out/bias"] = theirs[f"{at}.self_attn.out_proj.bias"]
    for key, name in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
      out[f"{to}/MlpBlock_0/{key}/kernel"] = theirs[f"{at}.mlp.{name}.weight"].T
      out[f"{to}/MlpBlock_0/{key}/bias"] = theirs[f"{at}.mlp.{name}.bias"]
  return out


@pytest.mark.parametrize("kind", ["layers", "scanned", "vision_transformer"])
def test_vit_of_npz(made, tmp_path, kind):
  """The same tower from SigLIP's safetensors and from the .npz that big_vision would have."""
  _, config, _, _ = made
  tower = config.tower
  torch.manual_seed(0)
  model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
    hidden_size=tower.width, intermediate_size=tower.mlp, num_hidden_layers=tower.depth,
    num_attention_heads=tower.heads, image_size=tower.image_size, patch_size=tower.patch,
    vision_use_head=False)).eval()
  model.save_pretrained(tmp_path / "siglip")
  arrays = big_vision(model, tower.heads, tower.depth)
  if kind == "scanned":
    blocks = {key.replace("encoderblock_0", "encoderblock") for key in arrays
              if "encoderblock_0" in key}
    stacked = {key: np.stack([arrays.pop(key.replace("encoderblock", f"encoderblock_{layer}"))
                              for layer in range(tower.depth)]) for key in blocks}
    arrays |= stacked
    arrays = {f"params/img/{key}": array for key, array in arrays.items()}
  elif kind == "vision_transformer":
    old = {"LayerNorm_1": "LayerNorm_2", "Attention_0": "Attention_1", "MlpBlock_0": "MlpBlock_3",
           "pos_embedding": "Transformer/posembed_input/pos_embedding"}
    for new, name in old.items():
      arrays = {key.replace(new, name): array for key, array in arrays.items()}
    arrays["head/kernel"] = np.zeros((tower.width, 7), np.float32)
  np.savez(tmp_path / "a.npz", **arrays)
  ours = read(made, lambda c, _: c.tower.update(init=str(tmp_path / "a.npz")))
  theirs = read(made, lambda c, _: c.tower.update(init=str(tmp_path / "siglip")))
  assert set(ours) == set(theirs)
  for path, array in theirs.items():
    np.testing.assert_array_equal(ours[path], array, err_msg=path)


def test_errors_name_field_tensor_expected_and_found(made, tmp_path):
  folder, config, flat, _ = made
  base = table.export(unflatten(flat), systems.entries(config))
  whole = {key: tensor.get() for key, tensor in base.items()}
  q = "language_model.model.layers.0.self_attn.q_proj.weight"
  embed = "language_model.model.embed_tokens.weight"
  cases = (
    ("llm", {q: whole[q][:5]}, (), r"layers\.0\.self_attn\.q_proj\.weight is \(5, 32\), expected "
     r"\(32, 32\)"),
    ("llm", {}, (q,), r"1 keys are missing: model\.layers\.0\.self_attn\.q_proj\.weight"),
    ("llm", {q.replace("q_proj", "q_norm"): whole[q]}, (), r"1 keys are unexpected: .*q_norm"),
    ("llm", {embed: np.pad(whole[embed], ((0, 8), (0, 0)))}, (),
     r"embed_tokens\.weight has 280 rows, expected 272; set config\.llm\.vocab_size=280"),
    ("llm", {"language_model.lm_head.weight": whole[embed] + 1}, (),
     r"lm_head\.weight differs from .*set config\.llm\.tie_embeddings=False"),
    ("tower", {}, [key for key in whole if key.startswith("vision")], "no key ends like one of"),
  )
  for number, (node, change, without, sentence) in enumerate(cases):
    directory = tmp_path / str(number)
    directory.mkdir()
    arrays = {key: array for key, array in (whole | change).items() if key not in without}
    safetensors_io.write(directory, {
      key: safetensors_io.Tensor(a.shape, a.dtype, lambda a=a: a) for key, a in arrays.items()})
    with pytest.raises(DataError, match=sentence) as error:
      read(made, lambda c, _, d=directory, n=node: c[n].update(init=str(d)))
    assert f"config.{node}.init={directory}" in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(DataError, match=r"lm_head\.weight is missing.*tie_embeddings=True"):
    read(made, lambda c, folder: c.llm.update(init=str(folder / "hf"), tie_embeddings=False))
  with pytest.raises(DataError, match=r"config\.llm\.init=.*llm/.* is .*expected"):
    other = config.copy_and_resolve_references()
    other.llm.mlp = 56
    tiny_llava.write_run(tmp_path / "run", other, tiny_llava.noise(other))
    read(made, lambda c, _: c.llm.update(init=str(tmp_path / "run")))
  with pytest.raises(UsageError, match="does not exist"):
    read(made, lambda c, folder: c.llm.update(init=str(folder / "gone")))
  with pytest.raises(UsageError, match="'encoder_decoder' .*has no table of keys"):
    read(made, lambda c, folder: c.llm.update(name="encoder_decoder", init=str(folder / "hf")))


def test_weights_take_the_places_of_the_draw(made):
  folder, config, flat, leaves = made
  config = config.copy_and_resolve_references()
  config.llm.init = str(folder / "hf")
  init, _ = states.initializer(find_fusion(config), config)
  mesh = make_mesh(config)
  shardings = states.param_shardings(leaves, mesh)
  drawn = unflatten({path: states.jax.device_put(np.zeros(leaf.shape, leaf.dtype), shardings[path])
                     for path, leaf in leaves.items()})
  placed = states.flatten(initial.place(drawn, initial.read(config, leaves)))
  for path, leaf in placed.items():
    expected = flat[path] if path.startswith("llm/") else np.zeros_like(flat[path])
    np.testing.assert_array_equal(leaf, expected, err_msg=path)
    assert leaf.sharding == shardings[path]
