"""Questions as documents, and their answers: all at once in batches, or one while it is said."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core import stopping
from vlm_jax.core.document import Document, Encoded, Pixels, Text, Visual
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion, speaking
from vlm_jax.core.layout import Layout
from vlm_jax.core.typing import Params
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.generate.decode import Generated, generate, stream
from vlm_jax.generate.dialogue import Dialogue
from vlm_jax.generate.prompts import by_length, layouts, open_ends, slots, stack
from vlm_jax.generate.sampling import GREEDY, Sampling

MARK = "<image>"  # in a prompt: the next picture stands here
BUCKET = 64  # prompts are padded to a multiple of this, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Answer:
  """What was said in one open turn.

  Attributes:
    text: the words.
    tokens: their ids.
    log_prob: of the answer and its end, at temperature 1.
    stopped: whether the model ended it; else `max_tokens` did.
    prompt_tokens: slots of the prompt, images included.
    image_tokens: those of the images.
  """

  text: str
  tokens: tuple[int, ...]
  log_prob: float
  stopped: bool
  prompt_tokens: int
  image_tokens: int


def answers(
  config: ConfigDict,
  params: Params,
  tokenizer: Tokenizer,
  prompts: Sequence[Encoded],
  *,
  rows: int,
  max_tokens: int,
  sampling: Sampling = GREEDY,
  turns: int = 1,
) -> Iterator[dict[int, list[Answer]]]:
  """Answers prompts, `rows` of about equal length at a time.

  Args:
    config: of the run.
    params: the parameters.
    tokenizer: of the run.
    prompts: encoded prompts.
    rows: of one compiled call.
    max_tokens: an answer is cut there.
    sampling: how to choose tokens; a prompt draws by its number, whatever it is batched with.
    turns: see `prompts.stack`.

  Yields:
    Of every batch the numbers of its prompts, and the answers to their open turns in order.

  Raises:
    UsageError: max_tokens below 1, or as `prompts.layouts`.
  """
  check_tokens(max_tokens)
  config = speaking(config)
  laid_out = layouts(prompts, config)
  for chosen in by_length(laid_out, rows):
    stopping.point()
    batch = stack([laid_out[i] for i in chosen], config, rows=rows, bucket=BUCKET, turns=turns)
    numbers = sampling.seed + np.pad(chosen, (0, rows - len(chosen)))
    said = jax.device_get(generate(config, params, batch, max_tokens=max_tokens,
                                   stop=tokenizer.stops, sampling=sampling, seeds=numbers))
    yield {index: [_answer(config, tokenizer, prompts[index], laid_out[index], said, row, turn)
                   for turn in range((batch.ends[row] >= 0).sum())]
           for row, index in enumerate(chosen)}


def say(
  config: ConfigDict,
  params: Params,
  tokenizer: Tokenizer,
  prompt: Encoded,
  write: Callable[[str], None],
  *,
  max_tokens: int,
  sampling: Sampling = GREEDY,
  dialogue: Dialogue | None = None,
) -> Answer:
  """Answers one prompt of one open turn, and hands the answer out while it is being said.

  Args:
    config, params, tokenizer, max_tokens, sampling: as in `answers`.
    prompt: the encoded prompt.
    write: gets the answer in pieces of whole characters.
    dialogue: has read the prompt as far as it was said before; None: nothing of it.

  Raises:
    UsageError: as in `answers`, several open turns, or as `Dialogue.stream`.
  """
  check_tokens(max_tokens)
  config = speaking(config)
  laid_out = layouts([prompt], config)[0]
  turns = len(open_ends(laid_out, find_fusion(config).STREAM))
  if turns > 1:
    raise UsageError(f"document {prompt.key} has {turns} open turns, which cannot be "
                     "written out at once; give one question, or leave `write` out")
  options = dict(max_tokens=max_tokens, stop=tokenizer.stops, sampling=sampling)
  if dialogue is None:
    pieces = stream(config, params, stack([laid_out], config, rows=1, bucket=BUCKET), **options)
  else:
    pieces = dialogue.stream(params, laid_out, bucket=BUCKET, **options)
  speaker = Speaker(tokenizer, write)
  for said in pieces:
    speaker.update(said.tokens[0, 0, : said.lengths[0, 0]].tolist())
  speaker.finish()
  return _answer(config, tokenizer, prompt, laid_out, said, 0, 0)


def check_tokens(max_tokens: int) -> None:
  """Raises a UsageError when no token may be said."""
  if max_tokens < 1:
    raise UsageError(f"--max-tokens is {max_tokens}; use 1 or more")


def _answer(config: ConfigDict, tokenizer: Tokenizer, prompt: Encoded, laid_out: Layout,
            said: Generated, row: int, turn: int) -> Answer:
  """One open turn of what was said."""
  module = find_fusion(config)
  tokens = said.tokens[row, turn, : said.lengths[row, turn]].tolist()
  images = [part for part in prompt.parts if isinstance(part, Pixels)]
  return Answer(tokenizer.decode(tokens).strip(), tuple(tokens),
                float(said.log_probs[row, turn].sum()), bool(said.stopped[row, turn]),
                slots(laid_out), sum(len(module.order(config, image)) for image in images))


def ask(config: ConfigDict, prompt: str, pictures: Sequence[Visual], key: str = "prompt"
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
  module = find_fusion(speaking(config))
  branch = int(f"masks/{module.STREAM}/q_class" in module.fields(config))
  return Document(interleave(prompt, pictures, branch), "", key)


def interleave(prompt: str, pictures: Sequence[Visual], branch: int) -> tuple[Text | Visual, ...]:
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
  parts: list[Text | Visual] = []
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
