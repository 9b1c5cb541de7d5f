"""Retrieval: every caption of a split is scored with every picture of it.

Strategies that embed pictures and texts (CLIP, SigLIP, CoCa) rank by the cosine, both ways. One
that also says how well a pair matches (BLIP-2's first stage) may rank the `rerank` best of them
again (arXiv:2301.12597: the best 128 by ITC, again by ITM), here by the sum of the cosine and the
logit of belonging together; "text_to_image_cosine" and "image_to_text_cosine" leave that out.

Others are asked for a likelihood. Log p(text | picture) ranks pictures for a text as it is. Texts
of one picture are ranked by how much it raises their probability above the mean over all pictures,

    log p(text | picture) - log mean over pictures of p(text | picture),

since a frequent text is probable behind any picture (arXiv:2306.01879, section 3, with alpha = 1);
"image_to_text_raw" leaves the mean out.

Its cost is a forward pass for every pair: a hundred pictures of five captions are 50,000. With the
source's form "fan_out", `together` captions share a row and its picture. Use `limit`.
"""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core import fusion
from vlm_jax.core.document import Document, Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.typing import Params
from vlm_jax.data import template
from vlm_jax.evals import embed, pairs
from vlm_jax.evals.likelihood import of_branches
from vlm_jax.evals.metrics.retrieval import nearest, recall_at, reranked, strangers
from vlm_jax.evals.reading import Split, check, mean_score, with_controls
from vlm_jax.ops import contrastive

MAIN, UNIT = "text_to_image@1", "captions"
ASKS = ("speakers", "embedders")
PAIRS = 1_000_000  # more likelihoods are refused: days on one device


@dataclasses.dataclass(frozen=True)
class Candidates:
  """What is ranked.

  Attributes:
    pictures: key and trunk of every picture: its pixels, and tokens before any caption.
    captions: (key of the document, text, parts) of every caption; parts of a branch are in one.
    owners: i[captions], the picture of each.
    source: of the documents.
  """

  pictures: list[tuple[str, tuple]]
  captions: list[tuple[str, str, tuple[Tokens, ...]]]
  owners: np.ndarray
  source: str


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str
        ) -> tuple[dict[str, Any], dict[str, list[dict]]]:
  """Ranks everything as `entry.images` says, then with each control.

  Args:
    config: of the run.
    params: the parameters.
    entry: one of `config.evals`; `limit` counts documents, `together` captions in a row.
    split: which split is read.

  Returns:
    The numbers {"text_to_image@K", "image_to_text@K", "image_to_text_raw@K" (of likelihoods), and
    of those ranked again "text_to_image_cosine@K", "image_to_text_cosine@K" and "matched" (pairs),
    for K in 1, 5, 10, "low", "high", "chance", "pictures", "captions", "pairs", "bad", "seconds",
    "controls"}: low and high are of text_to_image@1, chance is what a blind guess gets there. The
    predictions have {"key", "document", "question": the caption, "answers": [its picture],
    "prediction": the picture found, "rank": from 1, "score"}, and with its own picture "log_prob",
    or "cosine" of embeddings, or "match", the sum of cosine and logit.

  Raises:
    UsageError: a field of the entry that cannot be, no pictures to rank, or too many pairs.
    DataError: too many documents cannot be read, or there is no caption.
  """
  check(entry, "batch", "together")
  if "none" in (entry.images, *entry.controls):
    raise UsageError("config.evals: retrieval ranks pictures, so images and controls cannot be "
                     "'none'; set controls=('shuffled',)")

  module = fusion.find_fusion(config)
  embeds = fusion.embeds(module)
  if entry.rerank and not (embeds and hasattr(module.Model, "matching")):
    raise UsageError(f"config.evals: rerank is {entry.rerank}, but config.fusion.name "
                     f"'{config.fusion.name}' has no `matching` to rank again by; set it to 0")
  if entry.rerank < 0:
    raise UsageError(f"config.evals: rerank is {entry.rerank}; use 0 for none, or more")

  def measure(images: str) -> tuple[dict[str, Any], list[dict], int]:
    opened = Split(config, entry, split, images)
    found = read(opened, None if embeds else PAIRS)
    if embeds:
      numbers, rows = compared(config, params, found, entry)
    else:
      numbers, rows = summary(found, similarity(config, params, found, entry), config.seed)
    return numbers, rows, opened.bad

  return with_controls(entry, measure)


def read(opened: Split, most: int | None = None) -> Candidates:
  """The pictures and captions of a split.

  Args:
    opened: the split.
    most: pairs that may be scored, None: any number.

  Raises:
    UsageError: fewer than two pictures, a document without one, or too many pairs.
    DataError: too many documents cannot be read, or there is no caption.
  """
  pictures: dict[str, tuple] = {}
  captions, owners, source = [], [], ""
  encode = lambda document: template.encode(document, opened.tokenizer, opened.decode_image)
  for _, document, encoded in opened.examples(encode):
    trunk, texts = apart(encoded)
    if not any(isinstance(part, Pixels) for part in trunk):
      raise UsageError(f"document {document.key} has no picture; set the evaluation's form to one "
                       "that captions pictures")
    record, source = document.key.split("?")[0], document.source
    pictures.setdefault(record, trunk)
    for number, parts in texts.items():
      key = f"{document.key}/{number}" if number else document.key
      captions.append((key, said(document, number), parts))
      owners.append(list(pictures).index(record))
  if not captions:
    raise opened.nothing("caption")
  if len(pictures) < 2 or most is not None and len(pictures) * len(captions) > most:
    raise UsageError(f"config.evals: retrieval among {len(pictures):,} pictures and "
                     f"{len(captions):,} captions scores every pair; choose 2 pictures or more"
                     + (f" and at most {most:,} pairs" if most else "")
                     + " with limit, which counts documents")
  return Candidates(list(pictures.items()), captions, np.array(owners), source)


def apart(encoded: Encoded) -> tuple[tuple, dict[int, tuple[Tokens, ...]]]:
  """The trunk of a document and the tokens of its captions, by branch; a plain one's are all 0."""
  branches: dict[int, list[Tokens]] = {}
  for part in encoded.parts:
    if isinstance(part, Tokens) and (part.branch or not encoded.branched):
      branches.setdefault(part.branch, []).append(part)
  taken = {id(part) for parts in branches.values() for part in parts}
  trunk = tuple(part for part in encoded.parts if id(part) not in taken)
  return trunk, {number: tuple(parts) for number, parts in branches.items()}


def said(document: Document, branch: int) -> str:
  """The text that is predicted in a branch."""
  return " ".join(part.text for part in document.parts
                  if getattr(part, "loss", False) and part.branch == branch)


def similarity(config: ConfigDict, params: Params, found: Candidates, entry: ConfigDict
               ) -> np.ndarray:
  """log p(caption | picture), f64[pictures, captions]."""
  size = entry.together if found.captions[0][2][0].branch else 1
  out = np.zeros((len(found.pictures), len(found.captions)))
  for row, (key, trunk) in enumerate(found.pictures):
    documents = []
    for start in range(0, len(found.captions), size):
      parts = [dataclasses.replace(part, branch=number if part.branch else 0)
               for number, (_, _, own) in enumerate(found.captions[start : start + size], 1)
               for part in own]
      documents.append(Encoded((*trunk, *parts), found.source, key))
    scored = of_branches(config, params, documents, min(entry.batch, len(documents)))
    out[row] = np.concatenate([sums for sums, _ in scored])
  return out


def compared(config: ConfigDict, params: Params, found: Candidates, entry: ConfigDict
             ) -> tuple[dict[str, Any], list[dict]]:
  """Numbers and rows of embeddings, the best of them ranked again if the entry says so.

  Whatever stands before a caption is not read.
  """
  shown = [Encoded(tuple(part for part in trunk if isinstance(part, Pixels)), found.source, key)
           for key, trunk in found.pictures]
  told = [Encoded(tuple(dataclasses.replace(part, branch=0) for part in parts), found.source, key)
          for key, _, parts in found.captions]
  scores = cosines(config, params, shown, told, entry)
  numbers = recall_at(scores, found.owners)
  if not entry.rerank:
    more, rows = _summary(found, scores, config.seed, "cosine")
    return numbers | more, rows
  by_picture, by_text = (nearest(scores, entry.rerank, axis) for axis in (1, 0))
  chosen = by_picture | by_text
  matches = pairs.matches(config, params, shown, told, chosen, entry.batch)
  numbers = {name.replace("@", "_cosine@"): value for name, value in numbers.items()}
  for way, best in (("image_to_text", by_picture), ("text_to_image", by_text)):
    ranked = reranked(scores, matches, best)
    again = recall_at(ranked, found.owners)
    numbers |= {name: value for name, value in again.items() if name.startswith(way)}
  more, rows = _summary(found, ranked, config.seed, "match")
  return numbers | more | {"matched": int(chosen.sum())}, rows


def cosines(config: ConfigDict, params: Params, shown: list[Encoded], told: list[Encoded],
            entry: ConfigDict) -> np.ndarray:
  """f32[pictures, captions] of embeddings."""
  return np.asarray(contrastive.cosines(embed.images(config, params, shown, entry.batch),
                                        embed.texts(config, params, told, entry.batch)))


def summary(found: Candidates, scores: np.ndarray, seed: int) -> tuple[dict[str, Any], list[dict]]:
  """Numbers and rows of log p f64[pictures, captions]."""
  mean = np.logaddexp.reduce(scores, axis=0) - np.log(len(scores))
  raised, raw = recall_at(scores - mean, found.owners), recall_at(scores, found.owners)
  numbers = {name.replace("image_to_text", "image_to_text_raw"): value
             for name, value in raw.items()}
  numbers |= {name: value for name, value in raised.items() if name.startswith("image_to_text")}
  more, rows = _summary(found, scores, seed, "log_prob")
  return numbers | more, rows


def _summary(found: Candidates, scores: np.ndarray, seed: int, what: str
             ) -> tuple[dict[str, Any], list[dict]]:
  """The numbers that do not depend on what ranks texts, and rows; `what` the scores are."""
  names = [key for key, _ in found.pictures]
  _, before = strangers(scores, found.owners)
  rows = [{"key": key, "document": names[owner], "question": text, "answers": [names[owner]],
           "prediction": names[int(scores[:, column].argmax())], "rank": int(before[column]) + 1,
           what: float(scores[owner, column]), "score": float(before[column] == 0)}
          for column, ((key, text, _), owner) in enumerate(
            zip(found.captions, found.owners, strict=True))]
  _, low, high = mean_score(rows, seed)
  return {"low": low, "high": high, "chance": 1 / len(names), "pictures": len(names),
          "captions": len(rows), "pairs": scores.size}, rows
