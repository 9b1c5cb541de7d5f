"""SigLIP and PaliGemma as big_vision writes them to .npz, against the same weights in safetensors.

The writers here are the reverse of what the converters of transformers read, on tiny random models:
layers one by one, or stacked by a scan; below "params/" or not.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import torch
import transformers

from tests.convert import test_paligemma_parity, test_systems
from vlm_jax.configs import base
from vlm_jax.convert import sources, systems
from vlm_jax.core.errors import DataError
from vlm_jax.core.tree import flatten
from vlm_jax.train import initial


def block(weights, heads):
  """A layer of transformers' encoders as big_vision's."""
  linear = lambda name: (weights[f"{name}.weight"].T, weights[f"{name}.bias"])
  out = {}
  for number, name in enumerate(("layer_norm1", "layer_norm2")):
    out |= {f"LayerNorm_{number}/scale": weights[f"{name}.weight"],
            f"LayerNorm_{number}/bias": weights[f"{name}.bias"]}
  for number, name in enumerate(("mlp.fc1", "mlp.fc2")):
    out |= dict(zip((f"MlpBlock_0/Dense_{number}/kernel", f"MlpBlock_0/Dense_{number}/bias"),
                    linear(name), strict=True))
  for ours, name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
    kernel, bias = linear(f"self_attn.{name}_proj")
    width, path = len(kernel), f"MultiHeadDotProductAttention_0/{ours}"
    if ours == "out":
      out |= {f"{path}/kernel": kernel.reshape(heads, -1, width), f"{path}/bias": bias}
    else:
      out |= {f"{path}/kernel": kernel.reshape(width, heads, -1),
              f"{path}/bias": bias.reshape(heads, -1)}
  return out


def below(weights, prefix):
  return {key.removeprefix(prefix): value for key, value in weights.items()
          if key.startswith(prefix)}


def stack(out, prefix, layers, scanned):
  """The layers under one name, stacked, or each under its own."""
  if scanned:
    return out | {f"{prefix}/{key}": np.stack([one[key] for one in layers]) for key in layers[0]}
  return out | {f"{prefix}_{number}/{key}": value for number, one in enumerate(layers)
                for key, value in one.items()}


def encoder(weights, prefix, heads, scanned):
  count = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layers."))
  layers = [block(below(weights, f"encoder.layers.{n}."), heads) for n in range(count)]
  return stack({}, f"{prefix}/encoderblock", layers, scanned)


def vision(weights, heads, scanned):
  out = encoder(weights, "img/Transformer", heads, scanned)
  return out | {
    "img/embedding/kernel": weights["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
    "img/embedding/bias": weights["embeddings.patch_embedding.bias"],
    "img/pos_embedding": weights["embeddings.position_embedding.weight"][None],
    "img/Transformer/encoder_norm/scale": weights["post_layernorm.weight"],
    "img/Transformer/encoder_norm/bias": weights["post_layernorm.bias"]}


def siglip(weights, config, scanned):
  text = below(weights, "text_model.")
  out = vision(below(weights, "vision_model."), config.tower.heads, scanned)
  pool = below(weights, "vision_model.head.")
  kernels = np.split(pool["attention.in_proj_weight"], 3)
  biases = np.split(pool["attention.in_proj_bias"], 3)
  names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
  one = {f"{name}.weight": kernel for name, kernel in zip(names, kernels, strict=True)}
  one |= {f"{name}.bias": bias for name, bias in zip(names, biases, strict=True)}
  one |= {f"self_attn.out_proj.{leaf}": pool[f"attention.out_proj.{leaf}"]
          for leaf in ("weight", "bias")}
  one |= {f"{norm}.{leaf}": pool[f"layernorm.{leaf}"] for norm in ("layer_norm1", "layer_norm2")
          for leaf in ("weight", "bias")}
  one |= {key: value for key, value in pool.items() if key.startswith("mlp.")}
  head = block(one, config.tower.heads)
  out |= {f"img/MAPHead_0/{key}": value for key, value in head.items() if "LayerNorm_1" not in key}
  out["img/MAPHead_0/probe"] = pool["probe"]
  out |= encoder(text, "txt/Encoder_0", config.llm.heads, scanned)
  return out | {
    "txt/Embed_0/embedding": text["embeddings.token_embedding.weight"],
    "txt/pos_embedding": text["embeddings.position_embedding.weight"][None],
    "txt/Encoder_0/encoder_norm/scale": text["final_layer_norm.weight"],
    "txt/Encoder_0/encoder_norm/bias": text["final_layer_norm.bias"],
    "txt/head/kernel": text["head.weight"].T, "txt/head/bias": text["head.bias"],
    "t": weights["logit_scale"], "b": weights["logit_bias"]}


def paligemma(weights, config, scanned):
  weights = {key.removeprefix("model."): value for key, value in weights.items()}
  out = vision(below(weights, "vision_tower."), config.tower.heads, scanned)
  text, layers = below(weights, "language_model."), []
  heads, groups, width = config.llm.heads, config.llm.kv_heads, config.llm.width
  for number in range(config.llm.depth):
    one = below(text, f"layers.{number}.")
    by_head = lambda name, count, one=one: one[f"self_attn.{name}_proj.weight"].reshape(
      count, -1, width).transpose(0, 2, 1)
    second = "pre_feedforward_layernorm.weight" in one  # Gemma 2 has norms behind its parts, too
    layers.append({
      "attn/q_einsum/w": by_head("q", heads),
      "attn/kv_einsum/w": np.stack([by_head("k", groups), by_head("v", groups)]),
      "attn/attn_vec_einsum/w": one["self_attn.o_proj.weight"].T.reshape(heads, -1, width),
      "mlp/gating_einsum": np.stack([one["mlp.gate_proj.weight"].T, one["mlp.up_proj.weight"].T]),
      "mlp/linear": one["mlp.down_proj.weight"].T,
      "pre_attention_norm/scale": one["input_layernorm.weight"],
      **({"post_attention_norm/scale": one["post_attention_layernorm.weight"],
          "pre_ffw_norm/scale": one["pre_feedforward_layernorm.weight"],
          "post_ffw_norm/scale": one["post_feedforward_layernorm.weight"]} if second else
         {"pre_ffw_norm/scale": one["post_attention_layernorm.weight"]})})
  out = stack(out, "llm/layers", layers, scanned)
  return out | {
    "img/head/kernel": weights["multi_modal_projector.linear.weight"].T,
    "img/head/bias": weights["multi_modal_projector.linear.bias"],
    "llm/embedder/input_embedding": text["embed_tokens.weight"],
    "llm/final_norm/scale": text["norm.weight"]}


SYSTEMS = {"siglip": (siglip, ("tower", "llm")),
           "paligemma": (paligemma, ("tower", "connector", "llm")),
           "paligemma2": (paligemma, ("tower", "connector", "llm"))}


def their_model(system):
  """A tiny random model; of the second PaliGemma with norms that differ."""
  if system != "paligemma2":
    return test_systems.their_model(system)
  torch.manual_seed(0)
  model = transformers.PaliGemmaForConditionalGeneration._from_config(
    test_paligemma_parity.their_config(1))
  with torch.no_grad():
    for weight in model.parameters():
      weight.normal_()
  return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """System to config, our parameters of the safetensors, and their weights by key."""
  found = {}
  for system in SYSTEMS:
    model = their_model(system)
    folder = tmp_path_factory.mktemp(system)
    model.save_pretrained(folder)
    recipe = base.get_config()
    recipe.data.sources.only = base.source(name="only")
    config, params = systems.read(folder, recipe)
    assert config.llm.post_norms == (system == "paligemma2")
    found[system] = config, flatten(params), {
      key: weight.detach().numpy() for key, weight in model.state_dict().items()}
  return found


def read(path, node, config, flat):
  shapes = {key.partition("/")[2]: leaf.shape for key, leaf in flat.items()
            if key.startswith(f"{node}/")}
  return sources.load_node(path, node, config, shapes, np.dtype("float32"))


@pytest.mark.parametrize("scanned", [False, True], ids=["one by one", "scanned"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_module_is_that_of_the_safetensors(system, scanned, made, tmp_path):
  write, nodes = SYSTEMS[system]
  config, flat, weights = made[system]
  arrays = write(weights, config, scanned)
  path = tmp_path / "a.npz"
  np.savez(path, **{("params/" if scanned else "") + key: value for key, value in arrays.items()})
  for node in nodes:
    found = read(path, node, config, flat)
    assert len(found) == sum(key.startswith(f"{node}/") for key in flat)
    for key, array in found.items():
      np.testing.assert_array_equal(array, flat[f"{node}/{key}"], err_msg=f"{node}/{key}")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_whole_model(system, made, tmp_path):
  """config.fusion.init; of a SigLIP with the projection of texts, the scale and the bias."""
  config, flat, weights = made[system]
  arrays = SYSTEMS[system][0](weights, config, True)
  np.savez(tmp_path / "a.npz", **arrays)
  config = config.copy_and_resolve_references()
  config.fusion.init = str(tmp_path / "a.npz")
  found = initial.read(config, flat)
  assert found.keys() == flat.keys()
  for path, array in found.items():
    np.testing.assert_array_equal(array, flat[path], err_msg=path)
  if system == "siglip":
    assert {"text_projection/kernel", "logit_scale", "logit_bias"} <= found.keys()
    np.savez(tmp_path / "a.npz", **{key: value for key, value in arrays.items() if key != "t"})
    with pytest.raises(DataError, match="config.fusion.init=.*keys are missing: t"):
      initial.read(config, flat)


def test_damage_is_named(made, tmp_path):
  """A kernel that is missing, and keys and values that are one array too short."""
  config, flat, weights = made["paligemma"]
  arrays = paligemma(weights, config, True)
  for change, sentence in (
    ({"llm/layers/mlp/linear": None}, "config.llm.init=.*keys are missing: layers_0/mlp/linear"),
    ({"llm/layers/attn/kv_einsum/w": arrays["llm/layers/attn/kv_einsum/w"][:, :1]},
     "kv_einsum/w is .* not 2 equal parts"),
    ({"llm/embedder/input_embedding": arrays["llm/embedder/input_embedding"][:-1]},
     "embedder/input_embedding has .* rows, expected")):
    changed = {key: value for key, value in {**arrays, **change}.items() if value is not None}
    np.savez(tmp_path / "b.npz", **changed)
    with pytest.raises(DataError, match=sentence):
      read(tmp_path / "b.npz", "llm", config, flat)
