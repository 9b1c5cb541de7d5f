"""GGUF files of Llama-like models under the names and in the layout of Hugging Face.

llama.cpp turns neighbouring channels of a head together, so the rows of its query and key matrices
are interleaved; here they are put back to halves, as every other checkpoint has them. Unnoticed,
this only doubles the perplexity.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from vlm_jax.convert import hf_text, safetensors_io
from vlm_jax.convert.gguf import Reader
from vlm_jax.core.errors import DataError, UsageError

NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
  "attn_norm.weight": "input_layernorm.weight",
  "attn_q.weight": "self_attn.q_proj.weight",
  "attn_k.weight": "self_attn.k_proj.weight",
  "attn_v.weight": "self_attn.v_proj.weight",
  "attn_output.weight": "self_attn.o_proj.weight",
  "ffn_norm.weight": "post_attention_layernorm.weight",
  "ffn_gate.weight": "mlp.gate_proj.weight",
  "ffn_up.weight": "mlp.up_proj.weight",
  "ffn_down.weight": "mlp.down_proj.weight",
}
HEADS = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
SPLITS = {  # how text is cut before the byte pairs are merged, by tokenizer.ggml.pre
  "smollm": [pre_tokenizers.Digits(individual_digits=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)],
  "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}
TOLD = {"bos_token": "tokenizer.ggml.bos_token_id", "eos_token": "tokenizer.ggml.eos_token_id",
        "unk_token": "tokenizer.ggml.unknown_token_id"}
CONTROL = 3  # token type of marks such as <|im_end|>


class Source:
  """The tensors of a GGUF file as a `LlamaForCausalLM` has them; see `table.Source`.

  Attributes:
    config: the config.json that describes them.
    shapes: key to shape.
    dtypes: key to dtype.
  """

  def __init__(self, reader: Reader):
    """Names every tensor.

    Raises:
      UsageError: it is no Llama, or its rotary embedding is scaled.
      DataError: it has a tensor that a Llama has not.
    """
    self._reader = reader
    self.config = read_config(reader)
    self._names: dict[str, str] = {}
    for key in reader.shapes:
      layer = re.fullmatch(r"blk\.(\d+)\.(.*)", key)
      name = NAMES.get(layer[2] if layer else key)
      if name is None:
        raise DataError(f"{reader.path}: '{key}' is no tensor of a Llama; this model is of another "
                        "family or a variant that is not known")
      self._names[f"model.layers.{layer[1]}.{name}" if layer else name] = key
    self.shapes = {name: reader.shapes[key] for name, key in self._names.items()}
    self.dtypes = {name: reader.dtypes[key] for name, key in self._names.items()}

  def __getitem__(self, key: str) -> np.ndarray:
    theirs = self._names[key]
    array = self._reader[theirs]
    field = HEADS.get(theirs.partition(".")[2].partition(".")[2])
    return halves(array, self.config[field]) if field else array


def write(path: Path, directory: Path, dtype: np.dtype | None = None) -> list[str]:
  """Writes a GGUF file as a `LlamaForCausalLM` of Hugging Face, tensor by tensor.

  Args:
    path: the file.
    directory: exists; gets weights, config.json, tokenizer.json as published, and
      vlm_tokenizer.json, the same with our marks (`hf_text.adopt`) for `config.data.tokenizer`.
    dtype: of the weights; None: as in the file, f32 for quantised ones.

  Returns:
    What `hf_text.adopt` says of marks.

  Raises:
    UsageError: as `Source`, or a tokenizer that is not known.
    DataError: the file is damaged.
    DiskError: it cannot be written.
  """
  with Reader(path) as reader:
    source, tokenizer, told = Source(reader), read_tokenizer(reader), _told(reader)
    safetensors_io.write(directory, {
      key: safetensors_io.Tensor(
        shape, dtype or source.dtypes[key],
        lambda key=key: source[key].astype(dtype or source.dtypes[key], copy=False))
      for key, shape in source.shapes.items()})
    tokenizer.save(str(directory / hf_text.TOKENIZER))
    ours, notes = our_tokenizer(reader)
    ours.save(str(directory / "vlm_tokenizer.json"))
    template = reader.fields.get("tokenizer.chat_template")
    safetensors_io.write_json(directory / "tokenizer_config.json", {
      "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **told,
      **({"chat_template": template} if template else {})})
    safetensors_io.write_json(directory / "config.json", source.config)
  return notes


def halves(array: np.ndarray, heads: int) -> np.ndarray:
  """Rows of heads from interleaved pairs to two halves, f[H*C,D]."""
  rows, width = array.shape
  return array.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def read_config(reader: Reader) -> dict[str, Any]:
  """Their config.json of a GGUF file's metadata.

  Raises:
    UsageError: the model is no Llama, or one whose rotary embedding is scaled.
    DataError: a field is missing.
  """
  fields, path = reader.fields, reader.path
  kind = fields.get("general.architecture")
  if kind != "llama":
    raise UsageError(f"{path}: general.architecture is '{kind}'; only 'llama' can be imported")
  scaling = fields.get("llama.rope.scaling.type", "none")
  if "rope_freqs.weight" in reader.shapes or scaling != "none":
    raise UsageError(f"{path}: its rotary embedding is scaled, which a GGUF file does not describe "
                     "fully; import the model's safetensors")
  try:
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "vocab_size": reader.shapes["token_embd.weight"][0],
      "hidden_size": width,
      "intermediate_size": fields["llama.feed_forward_length"],
      "num_hidden_layers": fields["llama.block_count"],
      "num_attention_heads": heads,
      "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
      "head_dim": fields.get("llama.attention.key_length", width // heads),
      "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
      "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
      "hidden_act": "silu",
      "max_position_embeddings": fields.get("llama.context_length", 2048),
      "tie_word_embeddings": "output.weight" not in reader.shapes,
    }
  except KeyError as error:
    raise DataError(f"{path}: its metadata has no {error}; download it again") from error


def read_tokenizer(reader: Reader) -> tokenizers.Tokenizer:
  """The tokenizer inside a GGUF file.

  Raises:
    UsageError: it is not byte-level BPE with a known way of cutting text.
  """
  fields = reader.fields
  split = fields.get("tokenizer.ggml.pre", "gpt-2")
  if fields.get("tokenizer.ggml.model") != "gpt2" or split not in SPLITS:
    raise UsageError(f"{reader.path}: its tokenizer is '{fields.get('tokenizer.ggml.model')}' with "
                     f"text cut as '{split}'; known are 'gpt2' with {', '.join(SPLITS)}: give the "
                     "model's tokenizer.json")
  tokens = fields["tokenizer.ggml.tokens"]
  merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
  inner = tokenizers.Tokenizer(models.BPE(
    vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
  inner.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
  inner.decoder = decoders.ByteLevel()
  kinds = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
  inner.add_special_tokens([AddedToken(token, special=True, normalized=False)
                            for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
  return inner


def our_tokenizer(reader: Reader, template: str = "marks"
                  ) -> tuple[tokenizers.Tokenizer, list[str]]:
  """The tokenizer inside a GGUF file with our marks, and what `hf_text.adopt` says of them.

  Raises:
    UsageError: as `read_tokenizer`, or no room for the marks of the template.
  """
  return hf_text.adopt(read_tokenizer(reader).to_str(), _told(reader),
                       reader.shapes["token_embd.weight"][0], template)


def _told(reader: Reader) -> dict[str, str]:
  """Their special tokens by role."""
  return {role: reader.fields["tokenizer.ggml.tokens"][reader.fields[field]]
          for role, field in TOLD.items() if field in reader.fields}
