"""The same documents in every format, for the tests of the sources that read a user's own files."""

import base64
import io
import json
import tarfile

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image as PIL

WORDS = "red green blue small large round cat dog tree house looks at the near behind".split()


def pictures(folder, count, seed):
  """Writes count images; their names."""
  rng = np.random.default_rng(seed)
  folder.mkdir()
  for index in range(count):
    size = rng.integers(40, 90, 2)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    PIL.fromarray(pixels).save(folder / f"{index:012d}.jpg", quality=90)
  return [f"{index:012d}.jpg" for index in range(count)]


def sentence(rng):
  return " ".join(rng.choice(WORDS, rng.integers(2, 9)))


def conversations(names, seed):
  """Twelve conversations in LLaVA's form; the first is text alone, the second has two images."""
  rng = np.random.default_rng(seed)
  made = []
  for index in range(12):
    images = [[], names[:2]][index] if index < 2 else [names[index]]
    turns = []
    for turn in range(rng.integers(1, 4)):
      question = sentence(rng) + "?"
      if turn == 0 and len(images) == 1:
        question = f"<image>\n{question}"
      if turn == 0 and len(images) == 2:
        question = f"{question} <image> or <image>\n{sentence(rng)}"
      turns += [{"from": "human", "value": question}, {"from": "gpt", "value": sentence(rng)}]
    made.append({"id": f"c{index}", "image": images[0] if len(images) == 1 else images,
                 "conversations": turns} if images else {"id": f"c{index}", "conversations": turns})
  return made


def as_messages(record, folder=None):
  """OpenAI's form: content parts, file names or (with a folder) data: URLs."""
  images = iter(record.get("image") if isinstance(record.get("image"), list)
                else [record["image"]] if "image" in record else [])
  url = lambda name: name if folder is None else (
    "data:image/jpeg;base64," + base64.b64encode((folder / name).read_bytes()).decode())
  messages = []
  for turn in record["conversations"]:
    first, *rest = turn["value"].split("<image>")
    content = [{"type": "text", "text": first}] if first else []
    for piece in rest:
      content.append({"type": "image_url", "image_url": {"url": url(next(images))}})
      content.append({"type": "text", "text": piece})
    role = {"human": "user", "gpt": "assistant"}[turn["from"]]
    plain = role == "assistant"
    messages.append({"role": role, "content": turn["value"] if plain else content})
  return {"messages": messages}


def jsonl(path, records):
  path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
  return str(path)


def tar(path, members):
  """members: (name, bytes)."""
  with tarfile.open(path, "w") as file:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  return str(path)


def names_of(record):
  images = record.get("image", [])
  return images if isinstance(images, list) else [images]


def parquet(path, rows, folder, field, struct=True, group=5):
  """Rows with images as struct<bytes, path>; small row groups."""
  images = [[{"bytes": (folder / name).read_bytes(), "path": name} for name in names_of(row)]
            for row in rows]
  table = pa.table({"images": images, field: [row[field] for row in rows]})
  pq.write_table(table, path, row_group_size=group)
  return str(path)


def array_record(path, objects):
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for one in objects:
    writer.write(msgpack.packb(one) if isinstance(one, dict) else one)
  writer.close()
  return str(path)


def with_bytes(row, folder):
  """The record with its images inside."""
  rest = {key: value for key, value in row.items() if key not in ("image", "id")}
  return rest | {"images": [(folder / name).read_bytes() for name in names_of(row)]}


def tfds(folder, title, features, examples):
  """Prepares a data set as array_record, in the order given; returns its folder."""
  import tensorflow_datasets

  class Own(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tensorflow_datasets.core.Version("1.0.0")
    name = title

    def _info(self):
      return tensorflow_datasets.core.DatasetInfo(
        builder=self, features=features(tensorflow_datasets.features),
        disable_shuffling=True)

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield from enumerate(examples)

  if not (folder / title).exists():
    Own(data_dir=str(folder), file_format="array_record").download_and_prepare()
  return str(folder / title)
