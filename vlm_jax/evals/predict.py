"""Answers a file of prompts into a file of predictions; whatever ends it, it goes on from there."""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Document, Encoded, Image, Text
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.typing import Params
from vlm_jax.data import pipeline, template
from vlm_jax.data.bad import BadExample
from vlm_jax.evals.asking import WINDOW
from vlm_jax.evals.predictions import Appender
from vlm_jax.evals.reading import BUCKET
from vlm_jax.evals.requests import Request
from vlm_jax.generate.answer import ask
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import by_length, layouts, stack

Report = Callable[[dict[str, Any]], None]


def predict(
  config: ConfigDict,
  params: Params,
  requests: Sequence[Request],
  out: str | Path,
  *,
  step: int = 0,
  batch: int = 32,
  max_tokens: int = 32,
  report: Report = lambda progress: None,
) -> dict[str, Any]:
  """Answers every request that `out` does not answer yet, greedily.

  Prompts of about equal length are generated together, and every batch is on the disk before the
  next one starts: Ctrl-C, a kill or a full disk cost at most one batch.

  Args:
    config: of the run.
    params: the parameters.
    requests: what is asked.
    out: JSON lines {"key", "question", "prediction", "log_prob", "stopped", "step"}, or {"key",
      "error", "step"} for a request whose picture cannot be read; in the order in which they were
      answered.
    step: of the checkpoint; a file of another step is refused.
    batch: prompts generated together.
    max_tokens: an answer is cut there.
    report: gets {"done", "total", "bad", "seconds", "per_second"} after every batch.

  Returns:
    The last such progress.

  Raises:
    UsageError: a number below 1, or `out` was written by another checkpoint.
    DataError: `out` is damaged, or no picture can be read.
    DiskError: `out` cannot be written.
  """
  for name, value in (("--batch", batch), ("--max-tokens", max_tokens)):
    if value < 1:
      raise UsageError(f"{name} is {value}; use 1 or more")
  start = time.perf_counter()
  file = Appender(out)
  try:
    if others := {row.get("step") for row in file.rows} - {step}:
      raise UsageError(f"{out} holds predictions of checkpoint {others.pop()}, not {step}; choose "
                       "another --out, or that checkpoint with --step")
    answered = {row.get("key"): "error" in row for row in file.rows}
    known = {request.key for request in requests}
    done = len(known & answered.keys())
    bad = sum(answered[key] for key in known & answered.keys())
    pending = iter([request for request in requests if request.key not in answered])
    progress = {"done": done, "total": len(requests), "bad": bad, "seconds": 0.0,
                "per_second": 0.0}
    earlier = done
    while window := list(itertools.islice(pending, WINDOW * batch)):
      for rows in _batches(config, params, window, batch, max_tokens):
        file.append({**row, "step": step} for row in rows)
        done, bad = done + len(rows), bad + sum("error" in row for row in rows)
        seconds = time.perf_counter() - start
        progress = {"done": done, "total": len(requests), "bad": bad,
                    "seconds": seconds, "per_second": (done - earlier) / seconds}
        report(progress)
  finally:
    file.close()
  if bad == len(requests):
    raise DataError(f"no picture of the {bad} requests can be read; {out} has the reasons")
  return progress


def converse(request: Request, pictures: Sequence[Image]) -> Document:
  """The document of a conversation whose last question the model is to answer."""
  supply = iter(pictures)
  parts = tuple(next(supply) if isinstance(part, Image) else part for part in request.turns)
  return Document((*parts, Text("", "assistant")), "", request.key)


def _batches(config: ConfigDict, params: Params, requests: list[Request], batch: int,
             max_tokens: int):
  """Yields the rows of every batch; those of unreadable requests first."""
  tokenizer, decode_image = pipeline.load_tokenizer(config), pipeline.image_decoder(config)
  encoded: list[Encoded] = []
  asked: list[Request] = []
  bad = []
  for request in requests:
    try:
      pictures = [Image(data) for data in request.pictures()]
      document = converse(request, pictures) if request.turns else ask(
        config, request.prompt, pictures, request.key)
      encoded.append(template.encode_prompt(document, tokenizer, decode_image))
      asked.append(request)
    except BadExample as error:
      bad.append({"key": request.key, "error": str(error)})
  if bad:
    yield bad
  laid_out = layouts(encoded, config)
  for chosen in by_length(laid_out, batch):
    prompts = stack([laid_out[i] for i in chosen], config, rows=batch, bucket=BUCKET)
    said = generate(config, params, prompts, max_tokens=max_tokens, stop=tokenizer.stops)
    tokens, lengths = np.asarray(said.tokens)[:, 0], np.asarray(said.lengths)[:, 0]
    log_probs, stopped = np.asarray(said.log_probs)[:, 0].sum(-1), np.asarray(said.stopped)[:, 0]
    yield [{
      "key": asked[index].key, "question": asked[index].prompt,
      "prediction": tokenizer.decode(tokens[row, : lengths[row]]).strip(),
      "log_prob": float(log_probs[row]), "stopped": bool(stopped[row]),
    } for row, index in enumerate(chosen)]
