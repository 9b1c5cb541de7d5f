"""One question about some pictures, answered: what `vlm-jax generate` prints."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Document, Image, Text
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.typing import Params
from vlm_jax.data import images as image_files
from vlm_jax.data import pipeline, template
from vlm_jax.data.bad import REASONS, BadExample
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, slots, stack
from vlm_jax.generate.sampling import GREEDY, Sampling

BUCKET = 64  # prompts are padded to a multiple of this, so that few programs are compiled


def answer(
  config: ConfigDict,
  params: Params,
  prompt: str,
  images: Sequence[str | Path] = (),
  *,
  max_tokens: int = 32,
  sampling: Sampling = GREEDY,
) -> dict[str, Any]:
  """Answers a question.

  Args:
    config: of the run.
    params: the parameters.
    prompt: the question.
    images: files, shown before the question.
    max_tokens: the answer is cut there.
    sampling: how to choose tokens.

  Returns:
    {"text", "tokens": the ids of the answer, "log_prob": of the answer and its end, "stopped":
    whether the model ended it, "prompt_tokens": slots of the prompt, images included,
    "image_tokens": those of the images, "seconds": wall-clock time, compilation included}.

  Raises:
    UsageError: an empty prompt or max_tokens below 1.
    DataError: an image that is missing or cannot be read.
  """
  if not prompt.strip():
    raise UsageError("--prompt is empty; ask something")
  if max_tokens < 1:
    raise UsageError(f"--max-tokens is {max_tokens}; use 1 or more")
  start = time.perf_counter()
  tokenizer, decode_image = pipeline.load_tokenizer(config), pipeline.image_decoder(config)
  pictures = tuple(_read(path, decode_image) for path in images)
  module = find_fusion(config)
  encoded = template.encode_prompt(ask(config, prompt, pictures), tokenizer, decode_image)
  laid_out = layouts([encoded], config)
  prompts = stack(laid_out, config, rows=1, bucket=BUCKET)
  said = generate(config, params, prompts, max_tokens=max_tokens, stop=(tokenizer.eos,),
                  sampling=sampling)
  tokens = np.asarray(said.tokens)[0, 0, : int(said.lengths[0, 0])].tolist()
  return {
    "text": tokenizer.decode(tokens).strip(),
    "tokens": tokens,
    "log_prob": float(np.asarray(said.log_probs)[0, 0].sum()),
    "stopped": bool(said.stopped[0, 0]),
    "prompt_tokens": slots(laid_out[0]),
    "image_tokens": len(pictures) * len(module.rows(config)),
    "seconds": time.perf_counter() - start,
  }


def ask(config: ConfigDict, prompt: str, pictures: Sequence[Image], key: str = "prompt"
        ) -> Document:
  """The document of one question about some pictures, which the model is to answer.

  Args:
    config: of the run; a model that learned from fan-out documents is asked as it was taught, in a
      branch.
    prompt: the question; "" asks for what follows the pictures, a caption.
    pictures: shown before the question.
    key: names the document.
  """
  if not prompt:
    return Document((*pictures, Text("", "text")), "", key)
  module = find_fusion(config)
  branch = int(f"masks/{module.STREAM}/q_class" in module.fields(config))
  parts = (*pictures, Text(prompt, "user", branch=branch), Text("", "assistant", branch=branch))
  return Document(parts, "", key)


def _read(path: str | Path, decode_image: template.DecodeImage) -> Image:
  try:
    return Image(decode_image(Image(image_files.read(str(path)))))
  except BadExample as error:
    raise DataError(f"--image {path}: {REASONS[error.reason]}; choose another file") from error
