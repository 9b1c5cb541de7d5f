"""Reads a unigram model of sentencepiece (spiece.model) without its library.

The file is a message of protocol buffers; sentencepiece_model.proto of
github.com/google/sentencepiece numbers its fields. Only what a unigram needs is read.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vlm_jax.core.errors import DataError

MARK = "▁"  # what stands for a blank
UNIGRAM = 1
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of ModelProto
PIECE, SCORE = 1, 2  # of SentencePiece
KIND, BYTES, UNKNOWN = 3, 35, 40  # of TrainerSpec: model_type, byte_fallback, unk_id
CHARACTERS = 2  # of NormalizerSpec: precompiled_charsmap


def read(path: Path) -> tokenizers.Tokenizer:
  """The tokenizer of a file; a text goes in as sentencepiece takes one that begins with `MARK`.

  Raises:
    DataError: the file is damaged, or its model is no unigram.
  """
  try:
    model = list(_fields(path.read_bytes()))
    pieces = [dict(_fields(value)) for number, value in model if number == PIECES]
    trainer, normalizer = (dict(_fields(next(
      (value for field, value in model if field == number), b""))) for number in
      (TRAINER, NORMALIZER))
    vocabulary = [(piece[PIECE].decode(), struct.unpack("<f", piece.get(SCORE, bytes(4)))[0])
                  for piece in pieces]
  except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
    raise DataError(f"{path} cannot be read as a model of sentencepiece ({error}); download it "
                    "again") from error
  if trainer.get(KIND, UNIGRAM) != UNIGRAM or not vocabulary:
    raise DataError(f"{path} is no unigram model of sentencepiece; put the tokenizer.json of the "
                    "checkpoint beside it")
  inner = tokenizers.Tokenizer(models.Unigram(
    vocabulary, trainer.get(UNKNOWN, 0), bool(trainer.get(BYTES, 0))))
  steps = [normalizers.Precompiled(normalizer[CHARACTERS])] if normalizer.get(CHARACTERS) else []
  inner.normalizer = normalizers.Sequence([
    *steps, normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
    normalizers.Strip(left=False, right=True)])
  inner.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="never")
  inner.decoder = decoders.Metaspace(MARK)
  return inner


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """(number, value) of the fields of a message: numbers as int, everything else as its bytes."""
  at = 0
  while at < len(data):
    key, at = _number(data, at)
    kind = key & 7
    if kind == 0:
      value, at = _number(data, at)
    else:
      size = {1: 8, 5: 4}.get(kind)
      if kind == 2:
        size, at = _number(data, at)
      if size is None or at + size > len(data):
        raise ValueError(f"a field of kind {kind} at byte {at}")
      value, at = data[at : at + size], at + size
    yield key >> 3, value


def _number(data: bytes, at: int) -> tuple[int, int]:
  """A number of seven bits a byte, the lowest first, and where it ends."""
  value = shift = 0
  while True:
    value |= (data[at] & 127) << shift
    shift, at = shift + 7, at + 1
    if data[at - 1] < 128:
      return value, at
