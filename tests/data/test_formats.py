"""Every format gives the same batches for the same documents."""

import io
import json
import pickle

import numpy as np
import pytest

from tests.data import written
from tests.data.test_pipeline import same, steps
from vlm_jax.configs import base
from vlm_jax.data import draw, pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with twelve images, and (as `records`) twelve conversations about them."""
  path = tmp_path_factory.mktemp("own")
  written.pictures(path / "images", 12, seed=np.random.SeedSequence().entropy % 2**32)
  return path


@pytest.fixture(scope="module")
def records(folder):
  names = sorted(path.name for path in (folder / "images").iterdir())
  return written.conversations(names, seed=np.random.SeedSequence().entropy % 2**32)


@pytest.fixture
def own(config, folder):
  """A function from the fields of a source to a config with that source alone."""
  def make(name, path, **fields):
    made = config.copy_and_resolve_references()
    with made.unlocked():
      made.data.sources = type(made)()
      made.data.sources.mine = base.source(
        name=name, path=str(path), image_root=str(folder / "images"), augment=("flip",), **fields)
    made.data.tokens, made.data.images, made.data.rows = 320, 4, 2
    return made
  return make


def batches(config, count=3):
  made = [batch for batch, _, _ in steps(config, count)]
  assert any(batch["media/images/values"].any() for batch in made)
  assert len({batch["streams/text/tokens"].tobytes() for batch in made}) == count
  assert all(np.isfinite(values).all() for batch in made for values in batch.values())
  return made


def agree(one, other):
  """Whether two configs give the same steps, to the bit."""
  return all(same(a, b) for a, b in zip(batches(one), batches(other), strict=True))


def llava(folder, records, name="llava.json"):
  (folder / name).write_text(json.dumps(records, indent=1, ensure_ascii=False))
  return folder / name


def write_messages(folder, records):
  return {"path": written.jsonl(folder / "m.jsonl", map(written.as_messages, records))}


def write_urls(folder, records):
  rows = [written.as_messages(record, folder / "images") for record in records]
  return {"path": written.jsonl(folder / "u.jsonl", rows)}


def write_marks(folder, records):
  """Messages of plain strings with <image> in them and the names beside."""
  rows = [{"images": written.names_of(record), "messages": [
    {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
    for turn in record["conversations"]]} for record in records]
  return {"path": written.jsonl(folder / "marks.jsonl", rows)}


def write_lines(folder, records):
  return {"path": written.jsonl(folder / "llava.jsonl", records)}


def write_tar(folder, records):
  """Two shards; members of a sample not beside each other."""
  for shard, some in enumerate((records[:7], records[7:])):
    members = []
    for record in some:
      members.append((f"a/{record['id']}.json",
                      json.dumps({"conversations": record["conversations"]}).encode()))
    for record in some:
      names = written.names_of(record)
      for number, name in enumerate(names):
        extension = "JPG" if len(names) == 1 else f"{number + 9}.jpg"
        members.append((f"a/{record['id']}.{extension}",
                        (folder / "images" / name).read_bytes()))
    written.tar(folder / f"shard-{shard:03d}.tar", members)
  return {"path": str(folder / "shard-{000..001}.tar")}


def write_parquet(folder, records):
  return {"path": written.parquet(folder / "c.parquet", records, folder / "images",
                                  "conversations")}


def write_parquet_messages(folder, records):
  rows = []
  for record in records:
    messages = written.as_messages(record)["messages"]
    for message in messages:
      if isinstance(message["content"], str):
        message["content"] = [{"type": "text", "text": message["content"]}]
      message["content"] = [part if part["type"] == "text" else {"type": "image"}
                            for part in message["content"]]
    rows.append({"image": written.names_of(record), "messages": messages})
  return {"path": written.parquet(folder / "m.parquet", rows, folder / "images", "messages")}


def write_array_record(folder, records):
  rows = [written.with_bytes(record, folder / "images") for record in records]
  rows[0] = json.dumps(rows[0]).encode()  # the text alone, as JSON
  return {"path": written.array_record(folder / "c.array_record", rows)}


def write_tfds(folder, records):
  rows = []
  for record in records:
    row = written.with_bytes(record, folder / "images")
    rows.append(row | {"images": [io.BytesIO(data) for data in row["images"]]})
  features = lambda f: f.FeaturesDict({
    "images": f.Sequence(f.Image()),
    "conversations": f.Sequence({"from": f.Text(), "value": f.Text()})})
  return {"path": written.tfds(folder, "own_chat", features, rows)}


WRITERS = {
  "messages": ("messages", write_messages), "data urls": ("messages", write_urls),
  "marks": ("messages", write_marks), "llava lines": ("llava_json", write_lines),
  "webdataset": ("webdataset", write_tar), "parquet": ("parquet", write_parquet),
  "parquet messages": ("parquet", write_parquet_messages),
  "array_record": ("array_record", write_array_record), "tfds": ("tfds", write_tfds),
}


@pytest.mark.parametrize("case", WRITERS)
def test_conversations_are_the_same_in_every_format(case, own, folder, records):
  reference = own("llava_json", llava(folder, records))
  name, write = WRITERS[case]
  other = own(name, **write(folder, records))
  assert agree(reference, other)
  changed = json.loads(json.dumps(records))
  changed[5]["conversations"][1]["value"] += " not"
  twin = own("llava_json", llava(folder, changed, "twin.json"))
  assert not agree(twin, other)
  reader, _ = draw.open_records(other, "mine", draw.find_source(name), "train")
  copy = pickle.loads(pickle.dumps(reader))
  assert len(copy) == 12 and [copy[i]["key"] for i in range(12)] == [r["key"] for r in reader]


def captions(folder, records):
  """(image name, text) pairs."""
  return [(written.names_of(record)[0], record["conversations"][1]["value"])
          for record in records[2:]]


def write_coco(folder, records):
  pairs = captions(folder, records)
  value = {"images": [{"id": 100 - i, "file_name": name, "coco_url": "http://x"}
                      for i, (name, _) in enumerate(pairs)],
           "annotations": [{"id": i, "image_id": 100 - i, "caption": text}
                           for i, (_, text) in reversed(list(enumerate(pairs)))]}
  (folder / "coco.json").write_text(json.dumps(value))
  return {"path": str(folder / "coco.json")}


def write_caption_tar(folder, records):
  members = [(f"{i}.{kind}", data) for i, (name, text) in enumerate(captions(folder, records))
             for kind, data in (("jpg", (folder / "images" / name).read_bytes()),
                                ("txt", text.encode()), ("json", b'{"width": 10}'))]
  return {"path": written.tar(folder / "captions.tar", members)}


def write_caption_parquet(folder, records):
  rows = [{"image": name, "caption": text} for name, text in captions(folder, records)]
  return {"path": written.parquet(folder / "captions.parquet", rows, folder / "images", "caption")}


def write_mmc4(folder, records):
  rows = [{"text_list": [text], "image_info": [
    {"image_name": name, "raw_url": "http://x", "matched_text_index": 0}]}
    for name, text in captions(folder, records)]
  return {"path": written.jsonl(folder / "mmc4.jsonl", rows)}


def write_obelics(folder, records):
  import pyarrow as pa
  import pyarrow.parquet as pq

  pairs = captions(folder, records)
  path = folder / "obelics.parquet"
  pq.write_table(pa.table({"images": [[name, None] for name, _ in pairs],
                           "texts": [[None, text] for _, text in pairs],
                           "metadata": ["{}"] * len(pairs)}), path)
  return {"path": str(path)}


def write_caption_tfds(folder, records):
  rows = [{"image": str(folder / "images" / name), "captions": [{"text": text}]}
          for name, text in captions(folder, records)]
  features = lambda f: f.FeaturesDict({"image": f.Image(),
                                       "captions": f.Sequence({"text": f.Text()})})
  return {"path": written.tfds(folder, "own_captions", features, rows)}


CAPTIONS = {"coco": write_coco, "webdataset": write_caption_tar, "parquet": write_caption_parquet,
            "mmc4": write_mmc4, "obelics": write_obelics, "tfds": write_caption_tfds}


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_are_the_same_in_every_format(name, own, folder, records):
  pages = [{"content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}
           for image, text in captions(folder, records)]
  reference = own("messages", written.jsonl(folder / "pages.jsonl", pages))
  assert agree(reference, own(name, **CAPTIONS[name](folder, records)))
  pages[3], pages[4] = pages[4], pages[3]
  twin = own("messages", written.jsonl(folder / "twin.jsonl", pages))
  assert not agree(twin, own(name, **CAPTIONS[name](folder, records)))


def write_vqa(folder, pairs):
  asked = [{"image_id": image, "question_id": 10 * image + k, "question": question}
           for image, turns in pairs for k, (question, _) in enumerate(turns)]
  answers = [{"image_id": image, "question_id": 10 * image + k, "multiple_choice_answer": answer}
             for image, turns in reversed(pairs) for k, (_, answer) in enumerate(turns)]
  for name, field, rows in (("q", "questions", asked), ("a", "annotations", answers)):
    (folder / f"{name}.json").write_text(json.dumps({field: rows, "data_subtype": "val2017"}))
  return {"path": str(folder / "q.json"), "annotations": str(folder / "a.json")}


def test_vqa_is_the_conversation_and_the_branches(own, folder, records):
  pairs, rows = [], []
  for index, record in enumerate(records):
    said = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
    pairs.append((index, list(zip(said[::2], said[1::2], strict=True))))
    rows.append({"image": f"{index:012d}.jpg", "conversations": [
      {"from": ("human", "gpt")[k % 2], "value": "<image>\n" * (k == 0) + text}
      for k, text in enumerate(said)]})
  fields = write_vqa(folder, pairs)
  assert agree(own("llava_json", llava(folder, rows, "vqa.json")), own("vqav2", **fields))
  single = [{"image": f"{image:012d}.jpg", "conversations": [
    {"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    for image, turns in pairs for question, answer in turns]
  documents = pipeline.documents(own("vqav2", **fields), "mine", "train", "single")
  others = pipeline.documents(own("llava_json", llava(folder, single, "single.json")), "mine",
                              "train")
  assert [d.parts for d in documents] == [d.parts for d in others] and len(documents) > 12
  branches = pipeline.documents(own("vqav2", **fields), "mine", "train", "fan_out")[3]
  assert [part.branch for part in branches.parts[1:]] == [
    k for k in range(1, len(pairs[3][1]) + 1) for _ in range(2)]


def test_pages_with_images_between_texts(own, folder):
  """MMC4, OBELICS and content parts; the text behind an image goes on, learned to its one end."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  names = sorted(path.name for path in (folder / "images").iterdir())
  pages = [{"content": [{"type": "text", "text": f"one {i} two."},
                        {"type": "image", "path": names[i]},
                        {"type": "text", "text": "three. four."},
                        {"type": "image", "path": names[i + 1]},
                        {"type": "image", "path": names[i + 2]}, {"type": "text", "text": "five"}]}
           for i in range(9)]
  mmc4 = [{"text_list": [f"one {i}", "two.", "three.", "four.", "five"], "image_info": [
    {"image_name": names[i + k], "matched_text_index": index}
    for k, index in ((1, 4), (0, 2), (2, 4))]} for i in range(9)]
  path = folder / "pages.parquet"
  pq.write_table(pa.table({
    "texts": [[f"one {i} two.", None, "three. four.", None, None, "five"] for i in range(9)],
    "images": [[None, names[i], None, names[i + 1], names[i + 2], None] for i in range(9)]}), path)
  reference = own("messages", written.jsonl(folder / "long.jsonl", pages))
  assert agree(reference, own("mmc4", written.jsonl(folder / "long4.jsonl", mmc4)))
  assert agree(reference, own("obelics", path))
  drawer = draw.Draw(reference, "mine")
  layout, = drawer((0, 4))
  words = pipeline.load_tokenizer(reference)
  tokens = layout.arrays["streams/text/tokens"]
  assert (tokens == words.bos).sum() == (tokens == words.eos).sum() == 1
