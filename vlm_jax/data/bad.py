"""Records that cannot be used are named, counted and replaced; too many of them stop the run."""

import dataclasses

from vlm_jax.core.errors import DataError

REASONS = {
  "truncated": "the image file ends early or its data is damaged",
  "not_an_image": "the bytes are not an image in a known format",
  "decompression_bomb": "the image has more pixels than the limit",
  "extreme_aspect": "one side of the image is many times longer than the other",
  "missing_file": "there is no such file",
  "empty_text": "a text has no characters besides white space",
  "unknown_role": "a text has a role that the template does not know",
  "zero_loss": "no token of the document would be predicted",
  "does_not_fit": "an image and its turn are longer than one row",
  "wrong_record": "the record is not what its format says",
  "image_count": "the text has more or fewer <image> than the record has images",
  "outside_root": "an image's name leads out of image_root",
  "remote_image": "images are never fetched from the network: download them, name the files",
}
AT_LEAST = 200  # records of a source read before its share of bad ones can stop the run
KEYS = 5  # example keys kept per reason


class BadExample(Exception):
  """A record that cannot be used. `reason` is one of `REASONS`."""

  def __init__(self, reason: str, detail: str = ""):
    if reason not in REASONS:
      raise ValueError(f"unknown reason '{reason}'; known: {', '.join(REASONS)}")
    super().__init__(f"{reason}: {detail or REASONS[reason]}")
    self.reason, self.detail = reason, detail or REASONS[reason]


@dataclasses.dataclass(frozen=True)
class Bad:
  """Stands in the stream of records where a bad one was."""

  reason: str
  key: str
  detail: str = ""


@dataclasses.dataclass
class Tally:
  """Counts of one source: records read, bad ones by reason, and the keys of the first few."""

  source: str
  limit: float
  seen: int = 0
  bad: dict[str, int] = dataclasses.field(default_factory=dict)
  keys: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def count(self, item: Bad | list) -> None:
    """Counts one record read.

    Raises:
      DataError: more than `limit` of at least `AT_LEAST` records are bad.
    """
    self.seen += 1
    if not isinstance(item, Bad):
      return
    self.bad[item.reason] = self.bad.get(item.reason, 0) + 1
    keys = self.keys.setdefault(item.reason, [])
    if len(keys) < KEYS:
      keys.append(item.key)
    total = sum(self.bad.values())
    if self.seen >= AT_LEAST and total > self.limit * self.seen:
      raise DataError(
        f"source '{self.source}': {total} of {self.seen} records are bad ({self.examples()}), more "
        f"than config.data.bad_limit={self.limit}; mend the data or raise the limit"
      )

  def examples(self) -> str:
    """The counts by reason with their example keys, for messages."""
    return "; ".join(
      f"{reason} {count}: {', '.join(self.keys.get(reason, ()))}"
      for reason, count in sorted(self.bad.items())
    )

  def merge(self, other: "Tally") -> None:
    """Adds the counts of another shard."""
    self.seen += other.seen
    for reason, count in other.bad.items():
      self.bad[reason] = self.bad.get(reason, 0) + count
