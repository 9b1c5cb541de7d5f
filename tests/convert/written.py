"""Files of other programs, written here: GGUF by the specification, tensors in memory."""

import struct

import numpy as np


class Tensors(dict):
  """Tensors by key in memory, as `table.Source` wants them."""

  @property
  def shapes(self):
    return {key: array.shape for key, array in self.items()}


def _string(text):
  return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value):
  if isinstance(value, str):
    return struct.pack("<I", 8) + _string(value)
  if isinstance(value, float):
    return struct.pack("<If", 6, value)
  if isinstance(value, list):
    inner = [_value(item) for item in value]
    return struct.pack("<I", 9) + inner[0][:4] + struct.pack("<Q", len(inner)) + b"".join(
      item[4:] for item in inner)
  return struct.pack("<II", 4, value)


def q8_0(array):
  """f32 to blocks of 32 (scale f16, 32 i8), and what they decode to."""
  blocks = array.reshape(-1, 32)
  scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
  codes = np.round(blocks / scale.astype(np.float32)).astype(np.int8)
  data = np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], 1)
  return data, (codes * scale.astype(np.float32)).reshape(array.shape)


def q4(array, offset):
  """f32 to blocks of 32 four-bit values: Q4_1 with its own minimum, Q4_0 without."""
  blocks = array.reshape(-1, 32)
  low = blocks.min(1, keepdims=True) if offset else -8 * np.abs(blocks).max(1, keepdims=True) / 7
  high = blocks.max(1, keepdims=True) if offset else low + 15 * np.abs(low) / 8
  scale = ((high - low) / 15).astype(np.float16)
  low = low.astype(np.float16) if offset else (-8 * scale.astype(np.float32))
  wide, least = scale.astype(np.float32), low.astype(np.float32)
  codes = np.clip(np.round((blocks - least) / wide), 0, 15).astype(np.uint8)
  packed = codes[:, :16] | (codes[:, 16:] << 4)
  head = [scale.view(np.uint8)] + ([low.view(np.uint8)] if offset else [])
  return np.concatenate([*head, packed], 1), (codes * wide + least).reshape(array.shape)


def gguf(path, fields, tensors):
  """Writes GGUF 3: metadata, and {name: (type number, shape, bytes)}."""
  head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
  head += b"".join(_string(name) + _value(value) for name, value in fields.items())
  body = b""
  for name, (kind, shape, data) in tensors.items():
    head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    head += struct.pack("<IQ", kind, len(body))
    body += data + b"\0" * (-len(data) % 32)
  path.write_bytes(head + b"\0" * (-len(head) % 32) + body)


def llama_gguf(path, params, config, **fields):
  """Writes the parameters of an `llm` (llama, tied) as llama.cpp does, matrices in f16."""
  heads = {"query": config.heads, "key": config.kv_heads}
  pairs = lambda w, n: w.reshape(n, 2, w.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(w.shape)
  tensors = {}

  def add(name, array, half=True):
    array = np.ascontiguousarray(array, np.float16 if half else np.float32)
    tensors[name] = (int(half), array.shape, array.tobytes())

  add("token_embd.weight", params["embed/embedding"])
  add("output_norm.weight", params["norm/scale"], half=False)
  for layer in range(config.depth):
    blk, at = f"blk.{layer}", lambda path, layer=layer: params[f"layers/{path}"][layer]
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
      kernel = at(f"attention/{name}/kernel")
      rows = kernel.reshape(kernel.shape[0], -1).T
      add(f"{blk}.attn_{short}.weight", pairs(rows, heads[name]) if name in heads else rows)
    out = at("attention/out/kernel")
    add(f"{blk}.attn_output.weight", out.reshape(-1, out.shape[-1]).T)
    for name in ("gate", "up", "down"):
      add(f"{blk}.ffn_{name}.weight", at(f"mlp/{name}/kernel").T)
    add(f"{blk}.attn_norm.weight", at("attention_norm/scale"), half=False)
    add(f"{blk}.ffn_norm.weight", at("mlp_norm/scale"), half=False)
  gguf(path, {
    "general.architecture": "llama", "llama.block_count": config.depth,
    "llama.embedding_length": config.width, "llama.feed_forward_length": config.mlp,
    "llama.attention.head_count": config.heads, "llama.attention.head_count_kv": config.kv_heads,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
    **fields,
  }, tensors)
