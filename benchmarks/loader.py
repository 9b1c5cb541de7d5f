"""Images and tokens a second of one host, against torch's DataLoader and webdataset.

The same JPEGs of 640 x 480 with captions (see photos.py) are stored as each side likes them best:
one ArrayRecord file, a folder, tar files. Every side reads them in a shuffled order, decodes with
Pillow, resizes to 224 x 224 with the same kernel, tokenises with the same tokenizer and hands out
batches of about 32 pictures; ours are packed, theirs padded to the longest of the batch.

  ours            the training pipeline, packed steps
  ours_unpacked   the same up to single documents, without the packer
  torch           DataLoader over the folder
  webdataset      WebLoader over the tar files
  ..._draft       with JPEGs decoded reduced, where `decode.draft=1` lets Pillow do so: all sides

The pixels of all pictures are compared first and must be equal. Every stream is endless and its
workers live through all rounds, so neither start-up nor the end of an epoch is in a time; what
workers had ready from before is read first and not timed.

    python benchmarks/loader.py [--photos=1000] [--images=500] [--workers=0,1,2] [--rounds=7]

makes 1000 files and reads 500 a round. Few files slow ours alone: its shuffle is made for many.

The last line is JSON; where a key is by workers, "0" is one process that does everything:
  images_per_s     by workers: every side
  tokens_per_s     by workers: useful slots (text and 49 an image) of every side
  plain_ratio      by workers: seconds of webdataset as it is used / seconds of ours_draft
  same_ratio       by workers: the same, webdataset with the reduced decoding too
  gain             draft (ours / ours_draft), pipeline (webdataset / ours, same decoder) and packing
                   (fill of a packed row / fill of a padded one), workers 0
  pack_share       share of ours_draft's time that the packer takes, workers 0
  fill             share of slots that are not padding, ours and theirs
  draft_off        mean and largest difference of the reduced pixels in grey levels
  chips            H100s that one core feeds while they train a LLaVA of 7e9 parameters: 704 slots a
                   picture, 6 FLOPs a parameter and slot, half of 989 TFLOP/s
  bytes            mean size of a file
  seconds, best, matmul, others, contended   by workers, see protocol.py
  machine
"""

import argparse
import io
import itertools
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import protocol
import torch
import webdataset
from ml_collections import ConfigDict
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # workers find benchmarks.photos by its name

from benchmarks import photos
from vlm_jax.configs import base
from vlm_jax.data import draw, pipeline, prepare, tokenizer

SIZE, BATCH, SHARDS, VOCABULARY = 224, 32, 4, 320
SLOTS = 49  # of an image: 14 x 14 patches, 2 x 2 to a slot
CHIP = 0.5 * 989e12 / (6 * 7e9 * 704)  # documents a second
Batch = tuple[np.ndarray, int, int]  # u8[n,SIZE,SIZE,3], useful slots, all slots


def recipe(root: str, workers: int, draft: int) -> ConfigDict:
  """Steps of about `BATCH` pictures."""
  config = base.get_config()
  config.tower.image_size, config.tower.patch = SIZE, 16
  config.connector.name = "space_to_depth"
  config.llm.vocab_size = VOCABULARY
  config.data.root, config.data.workers, config.data.prefetch = root, workers, 2 * (workers > 0)
  config.data.rows, config.data.tokens, config.data.images = 4, 768, 10
  config.data.decode.draft = draft
  config.data.sources.photos = base.source(name="benchmarks.photos")
  return config


def packed(config: ConfigDict) -> Iterator[Batch]:
  """The training pipeline."""
  for flat, _ in pipeline.make(config):
    images = flat["media/images/values"][flat["media/images/segment_ids"] > 0]
    slots = flat["streams/text/segment_ids"]
    yield images, int((slots > 0).sum()), slots.size


def unpacked(config: ConfigDict) -> Iterator[Batch]:
  """The same documents, one at a time."""
  for layouts in pipeline._iterate(config, "photos", 0, draw.Draw(config, "photos"), 0):
    for layout in layouts:
      yield layout.arrays["media/images/values"], layout.sizes["text"], layout.sizes["text"]


class Example:
  """JPEG bytes and caption to (u8[SIZE,SIZE,3], ids), as a user of either library writes it."""

  def __init__(self, root: str, draft: int):
    self.path, self.draft = os.path.join(root, "tokenizer.json"), draft
    self.tokenizer: tokenizer.Tokenizer | None = None

  def __call__(self, jpeg: bytes, text: str | bytes) -> tuple[np.ndarray, list[int]]:
    self.tokenizer = self.tokenizer or tokenizer.load(self.path)  # once a worker
    image = Image.open(io.BytesIO(jpeg))
    if self.draft:
      image.draft("RGB", (self.draft * SIZE, self.draft * SIZE))
    image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    text = text if isinstance(text, str) else text.decode()
    return np.array(image), [self.tokenizer.bos, *self.tokenizer.encode(text), self.tokenizer.eos]


def collate(examples: list) -> tuple[torch.Tensor, torch.Tensor]:
  """Images stacked, ids padded to the longest of the batch with -1."""
  images, ids = zip(*examples, strict=True)
  padded = np.full((len(ids), max(map(len, ids))), -1, np.int32)
  for row, one in zip(padded, ids, strict=True):
    row[: len(one)] = one
  return torch.from_numpy(np.stack(images)), torch.from_numpy(padded)


def counted(batches: Iterator) -> Iterator[Batch]:
  """Batches of torch or webdataset with their slots counted."""
  for images, ids in batches:
    count = len(images)
    yield (images.numpy(), count * SLOTS + int((ids >= 0).sum()),
           count * (SLOTS + ids.shape[1]))


class Folder(torch.utils.data.Dataset):
  """The pictures as files."""

  def __init__(self, root: str, example: Example):
    self.root, self.example = root, example

  def __getitem__(self, number: int) -> tuple[np.ndarray, list[int]]:
    path = os.path.join(self.root, f"{number:06}")
    with open(f"{path}.jpg", "rb") as image, open(f"{path}.txt") as text:
      return self.example(image.read(), text.read())


class Endless:
  """Batches of indices: epoch after epoch, each in a new order."""

  def __iter__(self) -> Iterator[list[int]]:
    rng = np.random.default_rng(0)
    numbers = itertools.chain.from_iterable(
      rng.permutation(photos.COUNT).tolist() for _ in itertools.count())
    while True:
      yield list(itertools.islice(numbers, BATCH))


def torch_loader(root: str, workers: int, draft: int) -> Iterator[Batch]:
  """DataLoader over the folder."""
  data = Folder(os.path.join(root, "folder"), Example(root, draft))
  return counted(iter(torch.utils.data.DataLoader(
    data, batch_sampler=Endless(), num_workers=workers, collate_fn=collate)))


def webdataset_loader(root: str, workers: int, draft: int) -> Iterator[Batch]:
  """WebLoader over the tar files, shuffled within a window."""
  example = Example(root, draft)
  files = [os.path.join(root, f"{shard}.tar") for shard in range(SHARDS)]
  data = webdataset.WebDataset(files, shardshuffle=SHARDS, empty_check=False, seed=0)
  data = data.repeat().shuffle(100).to_tuple("jpg", "txt").map(lambda pair: example(*pair))
  data = data.batched(BATCH, collation_fn=collate)
  return counted(iter(webdataset.WebLoader(data, batch_size=None, num_workers=workers)))


def store(root: str) -> float:
  """Writes all three forms; mean bytes of a file."""
  prepare.prepare(root, ["benchmarks.photos"], VOCABULARY, log=lambda line: None)
  os.makedirs(os.path.join(root, "folder"))
  tars = [tarfile.open(os.path.join(root, f"{shard}.tar"), "w") for shard in range(SHARDS)]
  size = 0
  for number in range(photos.COUNT):
    jpeg, text = photos.photo(number), photos.caption(number)
    size += len(jpeg)
    for kind, data in (("jpg", jpeg), ("txt", text.encode())):
      name = f"{number:06}.{kind}"
      Path(root, "folder", name).write_bytes(data)
      entry = tarfile.TarInfo(name)
      entry.size = len(data)
      tars[number % SHARDS].addfile(entry, io.BytesIO(data))
  for tar in tars:
    tar.close()
  return size / photos.COUNT


def streams(root: str, workers: int) -> dict[str, Iterator[Batch]]:
  """Every side's endless stream."""
  sides: dict[str, Iterator[Batch]] = {}
  for name, draft in (("", 0), ("_draft", 1)):
    config = recipe(root, workers, draft)
    sides[f"ours{name}"] = packed(config)
    if not workers:
      sides[f"ours_unpacked{name}"] = unpacked(config)
    sides[f"torch{name}"] = torch_loader(root, workers, draft)
    sides[f"webdataset{name}"] = webdataset_loader(root, workers, draft)
  return sides


def take(stream: Iterator[Batch], images: int) -> np.ndarray:
  """Reads so many images; [images, useful slots, all slots] really read."""
  total = np.zeros(3, np.int64)
  while total[0] < images:
    batch = next(stream)
    total += [len(batch[0]), *batch[1:]]
  return total


def compare(root: str) -> dict[str, float]:
  """Makes sure that every side hands out the same pixels of every picture.

  Returns:
    {"mean", "max"} of how far reduced pixels are from the others.

  Raises:
    AssertionError: a picture of one side is not among the others'.
  """
  seen = {}
  for name, stream in streams(root, 0).items():
    pictures: set[bytes] = set()
    read = 0
    while len(pictures) < photos.COUNT and read < 3 * photos.COUNT:
      batch = next(stream)[0]
      pictures |= {one.tobytes() for one in batch}
      read += len(batch)
    seen[name] = pictures
  for name, pictures in seen.items():
    ours = seen["ours_draft" if name.endswith("_draft") else "ours"]
    if len(pictures) != photos.COUNT or pictures != ours:
      raise AssertionError(f"'{name}' has other pixels than ours")
  whole, reduced = Example(root, 0), Example(root, 1)
  pairs = [(whole(jpeg, "")[0], reduced(jpeg, "")[0]) for jpeg in map(photos.photo, range(8))]
  off = np.abs(np.diff(np.asarray(pairs, np.int16), axis=1))
  return {"mean": float(off.mean()), "max": int(off.max())}


def measure(root: str, workers: int, images: int, rounds: int) -> dict:
  """Times every side: protocol.py's numbers with "images_per_s" and "tokens_per_s" of each."""
  sides, read = streams(root, workers), {}

  def step(name: str) -> Callable[[], None]:
    def run() -> None:
      read.setdefault(name, []).append(take(sides[name], images))
    return run

  ahead = (workers > 0) * (2 * BATCH * workers + 3 * BATCH)  # more than any side keeps ready
  timing = protocol.measure({name: step(name) for name in sides}, rounds,
                            ready=lambda name: take(sides[name], ahead))
  rates: dict[str, dict[str, float]] = {"images_per_s": {}, "tokens_per_s": {}, "fill": {}}
  for name, seconds in timing["seconds"].items():
    counts = np.array(read[name][1:], np.float64)  # the first call is not timed
    best = int(np.argmin(np.array(seconds) / counts[:, 0]))
    rates["images_per_s"][name] = counts[best, 0] / seconds[best]
    rates["tokens_per_s"][name] = counts[best, 1] / seconds[best]
    rates["fill"][name] = counts[:, 1].sum() / counts[:, 2].sum()
  return timing | rates


def main() -> None:
  """Runs the comparison."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--photos", type=int, default=photos.COUNT, help="pictures made")
  parser.add_argument("--images", type=int, default=500, help="pictures read in a round")
  parser.add_argument("--workers", default="0,1,2", help="numbers of worker processes")
  parser.add_argument("--rounds", type=int, default=protocol.ROUNDS)
  args = parser.parse_args()
  photos.COUNT = args.photos
  torch.set_num_threads(1)
  with tempfile.TemporaryDirectory() as root:
    size = store(root)
    off = compare(root)
    timing = {count: measure(root, int(count), args.images, args.rounds)
              for count in args.workers.split(",")}
  first = timing[args.workers.split(",")[0]]
  contended = {count: one["contended"] for count, one in timing.items()}
  ratio = lambda one, above, below: None if one["contended"] else (
    one["images_per_s"][above] / one["images_per_s"][below])
  by_workers = lambda value: {count: value(one) for count, one in timing.items()}
  result = {
    "images_per_s": by_workers(lambda one: one["images_per_s"]),
    "tokens_per_s": by_workers(lambda one: one["tokens_per_s"]),
    "plain_ratio": by_workers(lambda one: ratio(one, "ours_draft", "webdataset")),
    "same_ratio": by_workers(lambda one: ratio(one, "ours_draft", "webdataset_draft")),
    "gain": {"draft": ratio(first, "ours_draft", "ours"),
             "pipeline": ratio(first, "ours", "webdataset"),
             "packing": first["fill"]["ours"] / first["fill"]["torch"]},
    "pack_share": None if first["contended"] or "ours_unpacked" not in first["fill"] else (
      1 - first["images_per_s"]["ours_draft"] / first["images_per_s"]["ours_unpacked_draft"]),
    "fill": {"ours": first["fill"]["ours"], "theirs": first["fill"]["torch"]},
    "draft_off": off,
    "chips": first["images_per_s"]["ours_draft"] / CHIP,
    "bytes": size,
    **{key: by_workers(lambda one, key=key: one[key])
       for key in ("seconds", "best", "matmul", "others")},
    "contended": contended if any(contended.values()) else False,
  }
  protocol.report(
    ["workers", "side", "images/s", "useful slots/s", "fill"],
    [[count, name, one["images_per_s"][name], one["tokens_per_s"][name], one["fill"][name]]
     for count, one in timing.items() for name in one["best"]],
    result,
  )


if __name__ == "__main__":
  main()
