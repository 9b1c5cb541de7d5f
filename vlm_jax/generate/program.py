"""A model as programs that need JAX alone (`jax.export`), in a directory that says how to run them.

What speaks becomes `prefill`, which reads pictures and a prompt, and `step`, which reads one more
token; what embeds becomes `embed_image` and `embed_text`. They are lowered for CPU, TPU and CUDA,
by an attention that runs on all three. A program that speaks has one row and fixed numbers of
pictures, prompt tokens behind them and new tokens; a shorter prompt is padded behind its end. What
a template writes before the pictures is a constant of the program. The layout of a strategy is
numpy and stays here: the program holds that of the longest prompt and derives those of shorter ones
from it, which is compared with the strategy's own before anything is written.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.convert import safetensors_io
from vlm_jax.core import pieces
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Image, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import empty_cache, find_fusion
from vlm_jax.core.layout import TOLD, Field, streams_of
from vlm_jax.core.precision import precision
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.core.typing import Array, Params
from vlm_jax.data import images, template
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.generate import decode
from vlm_jax.generate.answer import ask
from vlm_jax.generate.prompts import Prompts, layouts, stack

PLATFORMS = ("cpu", "tpu", "cuda")
FIRST = 2**24  # numbers of a prompt's places, above all tokens
VALUES = "media/images/values"
WORDS = "what is this?"
PARAMS = "params.safetensors"
PIXELS = "pixels = np.zeros({shape}, np.uint8)  # your picture\n"
SPEAKS = """# '{fusion}' as programs of JAX

They need jax, flatbuffers, numpy and safetensors, and run on {platforms}. One row: {pictures}
picture(s), then a prompt of at most {prompt} tokens; at most {new} new ones. {head}{how}

The prompt "x" is {before} + the ids of "x" by tokenizer.json (no special tokens) + {after}.

```python
import jax, numpy as np
from jax import export
from safetensors import safe_open

program = lambda name: jax.jit(export.deserialize(bytearray(open(name, "rb").read())).call)
prefill, step = program("prefill.jax"), program("step.jax")
with safe_open("params.safetensors", "np") as file:
  params = {{name: jax.device_put(file.get_tensor(name)) for name in file.keys()}}
{load}prompt, said = {before} + [] + {after}, []  # the words in the middle
tokens = np.zeros((1, {prompt}), np.int32)
tokens[0, : len(prompt)] = prompt
logits, state = prefill(params, {pixels}tokens, np.array([len(prompt)], np.int32))
while len(said) < {new} and (token := int(logits.argmax())) not in {stops}:
  said.append(token)
  if len(said) < {new}:
    logits, state = step(params, np.array([token], np.int32), state)
print(said)
```
"""
EMBEDS = """# '{fusion}' as programs of JAX

They need jax, flatbuffers, numpy and safetensors, and run on {platforms}, n rows at a time. {how}

A text is [{bos}] + its ids by tokenizer.json + [{eos}], and zeros behind it, {length} in all.{said}

```python
import jax, numpy as np
from jax import export
from safetensors import safe_open

program = lambda name: jax.jit(export.deserialize(bytearray(open(name, "rb").read())).call)
with safe_open("params.safetensors", "np") as file:
  params = {{name: jax.device_put(file.get_tensor(name)) for name in file.keys()}}
pixels = np.zeros((2, {side}, {side}, 3), np.uint8)  # your pictures
tokens = np.zeros((3, {length}), np.int32)  # your texts
cosines = program("embed_image.jax")(params, pixels) @ program("embed_text.jax")(params, tokens).T
print(cosines{best})
```
"""


@dataclasses.dataclass(frozen=True)
class Form:
  """The arrays of the longest prompt, and what becomes of them when it is shorter.

  Attributes:
    prompts: one row.
    fields: of its arrays.
    places: stream to i32[T], which of the prompt's tokens a slot holds, -1: none of them.
    growing: the streams that are longer with every token.
    stream: the one that speaks.
    length: L, tokens of the longest prompt.
  """

  prompts: Prompts
  fields: dict[str, Field]
  places: dict[str, np.ndarray]
  growing: frozenset[str]
  stream: str
  length: int


def form(config: ConfigDict, encoded: Encoded, length: int) -> Form:
  """That of prompts that begin like `encoded`, with at most `length` tokens behind its pictures.

  Raises:
    UsageError: the strategy lays shorter prompts out in a way that cannot be derived.
  """
  module = find_fusion(config)
  numbered = _prompts(config, encoded, FIRST + np.arange(length, dtype=np.int32))
  places = {}
  for stream in streams_of(numbered.flat):
    tokens = numbered.flat[f"streams/{stream}/tokens"][0]
    places[stream] = np.where(tokens >= FIRST, tokens - FIRST, -1)
  growing = frozenset(stream for stream, held in places.items() if (held == 0).any())
  fields = {path: field for path, field in module.fields(config).items() if path in numbered.flat}
  made = Form(numbered, fields, places, growing, module.STREAM, length)
  check(config, encoded, made)
  return made


def check(config: ConfigDict, encoded: Encoded, made: Form) -> None:
  """Compares what `lay_out` makes of shorter prompts with what the strategy makes of them.

  Raises:
    UsageError: they differ.
  """
  rng, length = np.random.default_rng(0), made.length
  for count in sorted({2, 3, length // 2 + 1, length} & set(range(length + 1))):
    ids = rng.integers(0, config.llm.vocab_size, count).astype(np.int32)
    theirs, padded = _prompts(config, encoded, ids), np.zeros((1, length), np.int32)
    padded[0, :count] = ids
    flat, ends = lay_out(made, padded, np.array([count], np.int32), np)
    same = np.array_equal(ends, theirs.ends)
    for path, array in theirs.flat.items():
      wide = np.full_like(np.asarray(flat[path]), made.fields[path].pad)
      wide[:, : array.shape[1]] = array
      same &= np.array_equal(flat[path], wide)
    if not same:
      raise UsageError(f"config.fusion.name '{config.fusion.name}' lays prompts of {count} and "
                       f"{length} tokens out in ways that --to=jax cannot derive from each other")


def split(encoded: Encoded) -> tuple[tuple, tuple[Tokens, ...]]:
  """The parts up to the last picture, and the tokens behind it."""
  at = max((number for number, part in enumerate(encoded.parts, 1)
            if not isinstance(part, Tokens)), default=0)
  return encoded.parts[:at], encoded.parts[at:]


def _prompts(config: ConfigDict, encoded: Encoded, ids: np.ndarray) -> Prompts:
  """One row: `encoded` up to its last picture, then these tokens."""
  head, words = split(encoded)
  text = Tokens(ids, np.zeros(len(ids), bool), words[0].branch, words[0].turn)
  found = layouts([dataclasses.replace(encoded, parts=(*head, text))], config)
  prompts = stack(found, config, rows=1, bucket=1)
  unread = ("targets", "loss_weights")
  flat = {path: array for path, array in prompts.flat.items() if not set(unread) & set(
    path.split("/"))}
  return Prompts(flat, prompts.ends)


def lay_out(made: Form, tokens: Array, lengths: Array, xp: Any = jnp
            ) -> tuple[dict[str, Array], Array]:
  """The arrays of a prompt, padded behind its end.

  Args:
    made: of the longest prompt.
    tokens: i32[1,L].
    lengths: i32[1], tokens of this one.
    xp: jax.numpy, or numpy for arrays on the host.

  Returns:
    As in `Prompts`: path to array, and the ends.
  """
  less, flat = made.length - lengths[0], {}
  slots = {stream: len(held) for stream, held in made.places.items()}
  for path, values in made.prompts.flat.items():
    field, axis = made.fields[path], made.fields[path].axis
    if path == f"streams/{axis}/tokens":
      # A stream of fixed length holds the last tokens, whichever they are.
      held = made.places[axis]
      index = held if axis in made.growing else held - less
      values = xp.where(held >= 0, xp.take(tokens, xp.maximum(index, 0), axis=1), values)
    if field.shift in made.growing:
      values = xp.minimum(values, slots[field.shift] - less)
    if axis in made.growing:
      values = xp.where(xp.arange(slots[axis]) < slots[axis] - less, values, field.pad)
    flat[path] = values
  ends = made.prompts.ends
  return flat, (ends - less if made.stream in made.growing else ends)


def speaking(config: ConfigDict, made: Form, new_tokens: int) -> tuple[Callable, Callable]:
  """`prefill` and `step` of one row.

  prefill(params, pixels u8[1,N,S,S,3], tokens i32[1,L], lengths i32[1]) and step(params, token
  i32[1], state) return the logits f32[1,V] of the next token and the state, a tuple of arrays that
  `step` takes; without pictures there are no `pixels`. `params` is path to array.

  Args:
    config: of the model, frozen.
    made: of its prompts.
    new_tokens: how many tokens may be asked for.
  """
  module = find_fusion(config)
  model, structure = module.Model(config), []

  def prefill(params, *rest):
    flat, ends = lay_out(made, *rest[-2:])
    if len(rest) == 3:
      flat[VALUES] = rest[0]
    batch, ends = from_flat(jax.tree.map(jnp.asarray, flat)), jnp.asarray(ends)
    context = decode.make_context(module, config, batch, ends, new_tokens)
    columns = context.masks[module.STREAM].k_index.shape[1]
    cache = empty_cache(config, 1, columns, precision(config).compute)
    logits, cache = decode.prefill(model, unflatten(params), batch, ends, context, cache)
    leaves, tree = jax.tree.flatten((jnp.zeros((), jnp.int32), context, cache))
    structure.append(tree)
    return logits[:, 0], tuple(leaves)

  def step(params, token, state):
    number, context, cache = jax.tree.unflatten(structure[0], state)
    logits, cache = decode.extend(model, unflatten(params), token[:, None], number, context, cache)
    return logits[:, 0], tuple(jax.tree.leaves((number + 1, context, cache)))

  return prefill, step


def embedding(config: ConfigDict) -> tuple[Callable, Callable, str]:
  """`embed_image` and `embed_text` of any number of rows, and the path of the text's tokens.

  embed_image(params, pixels u8[n,S,S,3]) and embed_text(params, tokens i32[n,L]) return unit
  vectors f32[n,E], of a picture's K queries f32[n,K,E].
  """
  module = find_fusion(config)
  fields, model = module.fields(config), module.Model(config)
  path = next(path for path in fields if path.startswith("documents/") and path.endswith("/tokens"))

  def run(params, kind, given, values):
    flat = {name: jnp.full((values.shape[0], 1, *field.shape), field.pad, field.dtype)
            for name, field in fields.items() if name.startswith(kind)}
    flat[given] = values[:, None]
    flat |= {name: jnp.ones_like(array) for name, array in flat.items()
             if name.endswith("/segment_ids")}
    return model.apply({"params": unflatten(params)}, from_flat(flat))

  return (lambda params, pixels: run(params, "media", VALUES, pixels).image[:, 0],
          lambda params, tokens: run(params, "documents", path, tokens).text[:, 0], path)


def write(
  directory: Path,
  config: ConfigDict,
  params: Params,
  tokenizer: Tokenizer,
  pictures: int = 1,
  prompt_tokens: int = 128,
  new_tokens: int = 64,
  dtype: np.dtype | None = None,
) -> None:
  """Writes params.safetensors, config.json, tokenizer.json, the programs and a README.md.

  Args:
    directory: exists.
    config: of the model, without adapters.
    params: its parameters, arrays or `Pieces`.
    tokenizer: the run's.
    pictures: in a prompt, before its words.
    prompt_tokens: of the longest prompt behind its pictures, marks included.
    new_tokens: of the longest answer.
    dtype: of the parameters in the file; None: theirs.

  Raises:
    UsageError: a number below 1, or prompts that cannot be laid out by a program.
    DiskError: a file cannot be written.
  """
  if pictures < 0 or prompt_tokens < 8 or new_tokens < 1:
    raise UsageError(f"--images is {pictures}, --prompt-tokens {prompt_tokens} and --new-tokens "
                     f"{new_tokens}; use at least 0, 8 and 1")
  config = config.copy_and_resolve_references()
  # What runs everywhere; the blocks of `xla` want to know the number of rows.
  speaks = bool(find_fusion(config).STREAM)
  if TOLD in find_fusion(config).fields(config):
    raise UsageError(f"config.fusion.name '{config.fusion.name}' reads the prompt by a second "
                     "tokenizer, too, for which --to=jax has no place; use --to=hf")
  config.attention.implementation = "xla" if speaks else "dense"
  flat = {path: pieces.of(leaf) for path, leaf in flatten(params).items()}
  kind = {path: np.dtype(dtype or leaf.dtype) for path, leaf in flat.items()}
  given = {path: jax.ShapeDtypeStruct(leaf.shape, kind[path]) for path, leaf in flat.items()}
  if speaks:
    programs, page = _speaking_programs(config, given, tokenizer, pictures, prompt_tokens,
                                        new_tokens)
  else:
    programs, page = _embedding_programs(config, given, tokenizer)
  for name, program in programs.items():
    (directory / f"{name}.jax").write_bytes(program.serialize())
  safetensors_io.write_file(directory / PARAMS, {
    path: safetensors_io.Tensor(leaf.shape, kind[path], functools.partial(_cast, leaf, kind[path]))
    for path, leaf in flat.items()})
  (directory / "config.json").write_text(config.to_json(indent=2, sort_keys=True) + "\n")
  tokenizer.inner.save(str(directory / "tokenizer.json"))
  (directory / "README.md").write_text(page)


def _cast(leaf: pieces.Pieces, kind: np.dtype) -> np.ndarray:
  return leaf.whole().astype(kind, copy=False)


def _speaking_programs(config: ConfigDict, given: dict[str, Any], tokenizer: Tokenizer,
                       pictures: int, prompt_tokens: int, new_tokens: int
                       ) -> tuple[dict[str, export.Exported], str]:
  side, how = config.tower.image_size, images.decoding(config)
  blank = np.zeros((side, side, 3), np.uint8)
  encoded = template.encode_prompt(ask(config, WORDS, [Image(b"")] * pictures), tokenizer,
                                   lambda _: images.picture(blank, side, how))
  made = form(config, encoded, prompt_tokens)
  last = int(made.prompts.flat[f"streams/{made.stream}/positions"].max()) + new_tokens
  if config.llm.positions and last > config.llm.positions:
    raise UsageError(f"config.llm.positions is {config.llm.positions}, too few for {last}: ask for "
                     "fewer --prompt-tokens or --new-tokens")
  prefill, step = speaking(FrozenConfigDict(config), made, new_tokens)
  number = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
  squares = len(encoded.squares)
  pixels = (number(1, squares, side, side, 3, dtype=jnp.uint8),) if squares else ()
  arguments = (given, *pixels, number(1, prompt_tokens), number(1))
  _, state = jax.eval_shape(prefill, *arguments)
  programs = {"prefill": _lower(prefill, *arguments),
              "step": _lower(step, given, number(1), state)}
  before, tokens = split(encoded)
  head = "What stands before pictures is inside. " if any(
    isinstance(part, Tokens) for part in before) else ""
  ids = np.concatenate([part.ids for part in tokens]).tolist()
  words = tokenizer.encode(WORDS)
  start = next(start for start in range(len(ids)) if ids[start : start + len(words)] == words)
  rest, load = ("pixels, ", PIXELS.format(shape=[1, squares, side, side, 3])) if squares else (
    "", "")
  return programs, SPEAKS.format(
    fusion=config.fusion.name, pictures=pictures, prompt=prompt_tokens, new=new_tokens,
    before=ids[:start], after=ids[start + len(words) :], stops=tokenizer.stops, pixels=rest,
    load=load, head=head, how=_how(config) if squares else "", platforms=", ".join(PLATFORMS))


def _embedding_programs(config: ConfigDict, given: dict[str, Any], tokenizer: Tokenizer
                        ) -> tuple[dict[str, export.Exported], str]:
  embed_image, embed_text, path = embedding(FrozenConfigDict(config))
  (rows,) = export.symbolic_shape("n")
  side, (length,) = config.tower.image_size, find_fusion(config).fields(config)[path].shape
  pixels = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8)
  queries = jax.eval_shape(embed_image, given, pixels).shape[1:-1]
  programs = {
    "embed_image": _lower(embed_image, given, pixels),
    "embed_text": _lower(embed_text, given, jax.ShapeDtypeStruct((rows, length), jnp.int32)),
  }
  return programs, EMBEDS.format(
    fusion=config.fusion.name, length=length, side=side, bos=tokenizer.bos, eos=tokenizer.eos,
    said=" A picture has several vectors; the nearest to a text counts." if queries else "",
    best=".max(axis=1)" if queries else "", how=_how(config), platforms=", ".join(PLATFORMS))


def _lower(function: Callable, *arguments: Any) -> export.Exported:
  return export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)


def _how(config: ConfigDict) -> str:
  side, decode_fields = config.tower.image_size, dict(config.data.decode)
  tiles = "" if not decode_fields["grids"] else (
    "; behind it its tiles, for pictures whose best grid is that of a square one")
  return (f"A picture is u8[{side},{side},3], brought to its square by '{decode_fields['fit']}' "
          f"(`data.decode` of config.json){tiles}; scaling to mean and deviation is inside.")
