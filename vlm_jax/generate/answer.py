"""One question about some pictures, answered: what `vlm-jax generate` prints."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image as PIL

from vlm_jax.core.document import Document, Image, Pixels, Text
from vlm_jax.core.errors import DataError, DiskError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.typing import Params
from vlm_jax.data import images as image_files
from vlm_jax.data import pipeline, template
from vlm_jax.data.bad import REASONS, BadExample
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.generate import maps
from vlm_jax.generate.decode import generate, stream
from vlm_jax.generate.prompts import layouts, slots, stack
from vlm_jax.generate.sampling import GREEDY, Sampling

MARK = "<image>"  # in a prompt: the next picture stands here
BUCKET = 64  # prompts are padded to a multiple of this, so that few programs are compiled


def answer(
  config: ConfigDict,
  params: Params,
  prompt: str,
  images: Sequence[str | Path] = (),
  *,
  max_tokens: int = 32,
  sampling: Sampling = GREEDY,
  write: Callable[[str], None] | None = None,
  attention_map: str | Path = "",
  attention_layers: Sequence[int] = (),
) -> dict[str, Any]:
  """Answers a question.

  Args:
    config: of the run.
    params: the parameters.
    prompt: the question; an `<image>` in it says where the next picture stands.
    images: files, shown in this order; before the question when it has no `<image>`.
    max_tokens: the answer is cut there.
    sampling: how to choose tokens.
    write: gets the answer in pieces of whole characters while it is being said; None: nobody does.
    attention_map: PNG file to draw the attention over the pictures of every word in, "" for none.
    attention_layers: the layers to average there, (): all; see `maps.word_maps`.

  Returns:
    {"text", "tokens": the ids of the answer, "log_prob": of the answer and its end, "stopped":
    whether the model ended it, "prompt_tokens": slots of the prompt, images included,
    "image_tokens": those of the images, "seconds": wall-clock time, compilation included}.

  Raises:
    UsageError: an empty prompt, max_tokens below 1, a number of `<image>` that is not the images',
      an `attention_map` that is no PNG, or as `maps.word_maps`.
    DataError: an image that is missing or cannot be read.
    DiskError: `attention_map` is in no directory or cannot be written.
  """
  if max_tokens < 1:
    raise UsageError(f"--max-tokens is {max_tokens}; use 1 or more")
  if attention_map:
    maps.check(config, len(images), attention_layers)
    _check_place(Path(attention_map))
  start = time.perf_counter()
  tokenizer, decode_image = pipeline.load_tokenizer(config), pipeline.image_decoder(config)
  pictures = tuple(_read(path, decode_image) for path in images)
  module = find_fusion(config)
  encoded = template.encode_prompt(ask(config, prompt, pictures), tokenizer, decode_image)
  laid_out = layouts([encoded], config)
  prompts = stack(laid_out, config, rows=1, bucket=BUCKET)
  options: dict[str, Any] = {"max_tokens": max_tokens, "stop": tokenizer.stops,
                             "sampling": sampling}
  if write is None:
    said = generate(config, params, prompts, **options)
  else:
    speaker = Speaker(tokenizer, write)
    for said in stream(config, params, prompts, **options):
      speaker.update(said.tokens[0, 0, : said.lengths[0, 0]].tolist())
    speaker.finish()
  tokens = np.asarray(said.tokens)[0, 0, : int(said.lengths[0, 0])].tolist()
  if attention_map:
    found = maps.word_maps(config, params, encoded, tokens, tokenizer, attention_layers)
    _save(maps.draw(found, encoded.images), attention_map)
  return {
    "text": tokenizer.decode(tokens).strip(),
    "tokens": tokens,
    "log_prob": float(np.asarray(said.log_probs)[0, 0].sum()),
    "stopped": bool(said.stopped[0, 0]),
    "prompt_tokens": slots(laid_out[0]),
    "image_tokens": sum(len(module.order(config, part)) for part in encoded.parts
                        if isinstance(part, Pixels)),
    "seconds": time.perf_counter() - start,
  }


def ask(config: ConfigDict, prompt: str, pictures: Sequence[Image], key: str = "prompt"
        ) -> Document:
  """The document of one question about some pictures, which the model is to answer.

  Args:
    config: of the run; a model that learned from fan-out documents is asked as it was taught, in a
      branch.
    prompt: the question; "" asks for what follows the pictures, a caption.
    pictures: shown before the question, or where it says `<image>`.
    key: names the document.

  Raises:
    UsageError: see `interleave`.
  """
  if not prompt:
    return Document((*pictures, Text("", "text")), "", key)
  module = find_fusion(config)
  branch = int(f"masks/{module.STREAM}/q_class" in module.fields(config))
  return Document(interleave(prompt, pictures, branch), "", key)


def interleave(prompt: str, pictures: Sequence[Image], branch: int) -> tuple[Text | Image, ...]:
  """The parts of a question with its pictures where `<image>` says, and the answer's empty part.

  Args:
    prompt: the question.
    pictures: in order.
    branch: of a question whose pictures come first; pictures are never in a branch, so a question
      with one in its middle is in the trunk.

  Raises:
    UsageError: the number of `<image>` is neither 0 nor that of the pictures, or there is no word.
  """
  pieces = [piece.strip() for piece in prompt.split(MARK)]
  if len(pieces) == 1:
    pieces = [""] * len(pictures) + pieces
  if len(pieces) != len(pictures) + 1:
    raise UsageError(f"--prompt has {len(pieces) - 1} {MARK} and there are {len(pictures)} --image;"
                     f" write one {MARK} for each, or none: then they stand before the question")
  if not any(pieces):
    raise UsageError("--prompt is empty; ask something")
  branch = 0 if any(pieces[:-1]) else branch
  parts: list[Text | Image] = []
  for piece, picture in zip(pieces, [*pictures, None], strict=True):
    if piece:
      continues = any(isinstance(part, Text) for part in parts)
      parts.append(Text(piece, "user", branch=branch, continues=continues))
    if picture is not None:
      parts.append(picture)
  return (*parts, Text("", "assistant", branch=branch))


class Speaker:
  """Hands out an answer that grows by tokens in pieces of whole characters.

  A token may be a part of a character: such a rest, and blanks that may be the last, wait.
  """

  def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]):
    self._tokenizer, self._write = tokenizer, write
    self._text = self._shown = ""

  def update(self, tokens: Sequence[int]) -> None:
    """Takes all tokens so far."""
    self._text = self._tokenizer.decode(tokens).strip()
    self._show(self._text.rstrip("\ufffd").rstrip())

  def finish(self) -> None:
    """Hands out what waited: the answer has ended."""
    self._show(self._text)

  def _show(self, text: str) -> None:
    if len(text) > len(self._shown):
      self._write(text[len(self._shown) :])
      self._shown = text


def _check_place(path: Path) -> None:
  if path.suffix.lower() != ".png":
    raise UsageError(f"--attention-map is {path}; give it a name that ends in .png")
  if not (folder := path.absolute().parent).is_dir():
    raise DiskError(f"--attention-map: there is no directory {folder}; make it or choose another")


def _save(picture: PIL.Image, path: str | Path) -> None:
  try:
    picture.save(path)
  except OSError as error:
    raise DiskError(f"--attention-map {path} cannot be written ({error.strerror}); free space or "
                    "choose another file") from error


def _read(path: str | Path, decode_image: template.DecodeImage) -> Image:
  try:
    image = Image(image_files.read(str(path)))
    decode_image(image)  # to name the file if it cannot be
    return image
  except BadExample as error:
    raise DataError(f"--image {path}: {REASONS[error.reason]}; choose another file") from error
