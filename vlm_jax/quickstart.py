"""The quickstart: prepares data, trains a model and its two controls, and says what they prove.

  mixed      pictures and text in every step; its accuracy is the result
  blind      the same steps without the pictures: how far the questions alone lead
  text_only  the text of the same steps alone: whether pictures cost the text anything

A blind model above `LEAK` has seen answers it should not see, and fails the run. Interrupted, the
same call continues: finished parts are kept in quickstart.json, the others resume from checkpoints.
"""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.configs import older
from vlm_jax.core.errors import DataError
from vlm_jax.core.writing import write_atomically
from vlm_jax.data import prepare
from vlm_jax.evals import run as evals
from vlm_jax.report import page
from vlm_jax.train import trackers
from vlm_jax.train.loop import train

PARTS = ("mixed", "blind", "text_only")
STATE = "quickstart.json"
# The best that an answerer who sees only the questions can reach on easy-VQA's test split is 0.678.
LEAK = 0.69


def run(configs: dict[str, ConfigDict], workdir: str | Path,
        log: Callable[[str], None] = print) -> dict[str, Any]:
  """Runs all parts.

  Args:
    configs: one config for each of `PARTS`; all read the same data.root.
    workdir: gets one run directory for each part.
    log: gets the progress, one line at a time.

  Returns:
    seconds (wall clock; of a resumed part since its last start), easy_vqa, easy_vqa_blind and
    easy_vqa_shuffled, openmoji and openmoji_blind (accuracies in [0, 1]), openmoji_interval and
    openmoji_blind_interval (their 95% intervals), openmoji_cider (of captions), text_ppl_mixed and
    text_ppl_text_only (perplexity per token), tokens_per_second (useful ones), token_fill and
    image_fill (shares of slots in use), workdir.

  Raises:
    DataError: the blind control answers better than the questions allow.
  """
  path = Path(workdir)
  began = time.perf_counter()
  mixed = configs["mixed"]
  sources = sorted({source.name for source in mixed.data.sources.values()})
  prepare.prepare(mixed.data.root, sources, mixed.llm.vocab_size, log=log)
  done = read(path)
  before = sum(part["seconds"] for part in done.values())
  for number, name in enumerate(PARTS, 1):
    if name in done:
      log(f"[{number}/{len(PARTS)}] {name}: finished earlier, in {path / name}")
      continue
    log(f"[{number}/{len(PARTS)}] {name}: {configs[name].train.steps} steps in {path / name}")
    start = time.perf_counter()
    row = train(configs[name], path / name, evaluate=evals.in_loop(configs[name], path / name),
                fill=older.fill)
    done[name] = {"row": row, "seconds": time.perf_counter() - start}
    write_atomically(path / STATE, json.dumps(done, indent=2))
  rows = {name: done[name]["row"] for name in PARTS}
  timing = trackers.read(path / "mixed" / "timing.jsonl")
  mean = lambda name: float(np.mean([row[name] for row in timing if name in row]))
  result = {
    "seconds": round(before + time.perf_counter() - began, 1),
    "easy_vqa": rows["mixed"]["eval/easy_vqa/accuracy"],
    "easy_vqa_blind": rows["blind"]["eval/easy_vqa/accuracy"],
    "easy_vqa_shuffled": rows["mixed"]["eval/easy_vqa/shuffled/accuracy"],
    "openmoji": rows["mixed"]["eval/openmoji/accuracy"],
    "openmoji_interval": interval(rows["mixed"]),
    "openmoji_blind": rows["blind"]["eval/openmoji/accuracy"],
    "openmoji_blind_interval": interval(rows["blind"]),
    "openmoji_cider": rows["mixed"]["eval/openmoji_captions/cider"],
    "text_ppl_mixed": rows["mixed"]["eval/text/perplexity"],
    "text_ppl_text_only": rows["text_only"]["eval/text/perplexity"],
    "tokens_per_second": round(mean("tokens/text/second"), 1),
    "token_fill": round(mean("fill/tokens/text"), 4),
    "image_fill": round(mean("fill/images/images"), 4),
    "workdir": str(path),
  }
  log(f"report: {page.write(path / 'mixed', outside=mixed.outside)}")
  check(result)
  return result


def interval(row: dict[str, Any]) -> list[float]:
  """The 95% interval of the choices among OpenMoji drawings."""
  return [row["eval/openmoji/low"], row["eval/openmoji/high"]]


def check(result: dict[str, Any]) -> None:
  """Raises DataError when the blind control proves a leak."""
  blind = result["easy_vqa_blind"]
  if blind > LEAK:
    raise DataError(f"the blind control reached {blind:.3f} on easy-VQA, above {LEAK}, which no "
                    "answerer without the picture can: answers leak into the questions, so the "
                    f"result {result['easy_vqa']:.3f} proves nothing; see {result['workdir']}")


def read(path: Path) -> dict[str, dict]:
  """The finished parts of a quickstart: name to its last metrics and its seconds."""
  file = path / STATE
  return json.loads(file.read_text()) if file.exists() else {}


def choose_workdir(parent: Path, name: str) -> Path:
  """The first of parent/name-1, -2, ... that is not finished: new, or to be continued."""
  for number in itertools.count(1):
    path = parent / f"{name}-{number}"
    if set(read(path)) != set(PARTS):
      return path
  raise AssertionError("count never ends")
