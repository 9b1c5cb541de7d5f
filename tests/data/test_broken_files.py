"""A broken file is one sentence; a broken record is counted with its reason, and never more."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import written
from tests.data.test_formats import folder, llava, own, records, write_tar  # noqa: F401
from tests.data.test_pipeline import same, steps
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import draw, files, images, pipeline, turns
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import tfds
from vlm_jax.data.tar import TarFile

GOOD = {"image": "000000000000.jpg", "conversations": [
  {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]}


def reasons(config):
  """The reason of every record, "" for a good one."""
  drawer = draw.Draw(config, "mine")
  items = [drawer((0, index)) for index in range(len(drawer.records))]
  return ["" if isinstance(item, list) else item.reason for item in items]


BROKEN = {
  "llava_json": ['{"a": 1}', "[" + "9" * 5000 + "]", "[" * 99999, "[1, 2", "hello", "",
                 '[{"image": "x.jpg", "caption": "y"}]', "[]"],
  "messages": ["hello\nworld", '{"conversations": []}', "", '[{"messages": "hi"}]'],
  "mmc4": ["hello", '{"text": "x"}', '{"text_list": "x", "image_info": [{"image": 1}]}'],
  "coco": ["[]", "{", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}',
           '{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}'],
  "vqav2": ["[]", "{", '{"questions": [{"question": "x"}]}'],
  "webdataset": ["hello", "", "\0" * 1024], "parquet": ["hello", ""], "obelics": ["hello", ""],
  "array_record": ["hello", "x" * 70000],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_of_another_kind_is_one_sentence(name, own, folder):  # noqa: F811
  answers = folder / "answers.json"
  answers.write_text('{"annotations": []}')
  for index, text in enumerate(BROKEN[name]):
    path = folder / f"broken-{name}-{index}"
    path.write_text(text)
    with pytest.raises(DataError, match="broken-.*expected|broken-.*has no record") as caught:
      draw.Draw(own(name, path, annotations=str(answers)), "mine")
    assert "\n" not in str(caught.value) and DataError.code == 65
  with pytest.raises(DataError, match="nowhere.* does not exist; expected"):
    draw.Draw(own(name, folder / "nowhere*", annotations=str(answers)), "mine")
  with pytest.raises(UsageError, match="has no path"):
    draw.Draw(own(name, "", annotations=str(answers)), "mine")


def test_parquet_of_other_columns_is_one_sentence(own, folder):  # noqa: F811
  pq.write_table(pa.table({"picture": ["x"], "label": [1]}), folder / "other.parquet")
  for name in ("parquet", "obelics"):
    with pytest.raises(DataError, match="has the columns picture, label; expected parquet with"):
      draw.Draw(own(name, folder / "other.parquet"), "mine")


def test_compressed_lines_say_so(own, folder):  # noqa: F811
  (folder / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
  with pytest.raises(DataError, match="compressed .gzip."):
    draw.Draw(own("llava_json", folder / "x.jsonl.gz"), "mine")


def change(**fields):
  return GOOD | fields


def said(value):
  return [{"from": "human", "value": value}, {"from": "gpt", "value": "a cat"}]


def test_every_bad_record_has_its_reason(own, folder):  # noqa: F811
  os.symlink("/etc/hostname", folder / "images" / "out.jpg")
  (folder / "images" / "text.jpg").write_text("no image")
  (folder / "secret.jpg").write_bytes((folder / "images" / GOOD["image"]).read_bytes())
  cases = [
    (GOOD, ""),
    (change(image="../secret.jpg"), "outside_root"),
    (change(image=str(folder / "secret.jpg")), "outside_root"),
    (change(image="out.jpg"), "outside_root"),
    (change(image="../images/" + GOOD["image"]), ""),
    (change(image="http://example.org/x.jpg"), "remote_image"),
    (change(image="FILE:///etc/hostname"), "remote_image"),
    (change(image="none.jpg"), "missing_file"),
    (change(image="a\0b.jpg"), "missing_file"),
    (change(image="x" * 5000), "missing_file"),
    (change(image=""), "wrong_record"),
    (change(image=7), "wrong_record"),
    (change(image="text.jpg"), "not_an_image"),
    (change(image="data:image/png;base64,%%%"), "not_an_image"),
    (change(image="data:text/plain,hello"), "not_an_image"),
    (change(conversations=said("<image><image> two?")), "image_count"),
    (change(image=[GOOD["image"]] * 3, conversations=said("<image> one?")), "image_count"),
    (change(conversations=said("no mark?")), ""),
    ({"conversations": said("text alone?")}, ""),
    ({"conversations": said("<image> of what?")}, "image_count"),
    (change(conversations=[]), "wrong_record"),
    (change(conversations="hello"), "wrong_record"),
    (change(conversations=[{"from": "narrator", "value": "x"}]), "unknown_role"),
    (change(conversations=[{"from": "human"}]), "wrong_record"),
    (change(conversations=[*said("<image> x"), {"from": "gpt", "value": " "}]), "empty_text"),
    (change(conversations=said("<image> x")[:1]), "zero_loss"),
    (change(conversations=said("<image> " + "why? " * 500)), "does_not_fit"),
    ([1, 2], "wrong_record"),
    ({"id": 5}, "wrong_record"),
  ]
  path = written.jsonl(folder / "bad.jsonl", [record for record, _ in cases])
  with open(path, "ab") as file:
    file.write(b'{"image": "\xff\xfe"}\n{"cut": \n')
  config = own("llava_json", path)
  assert reasons(config) == [reason for _, reason in cases] + ["wrong_record"] * 2
  config.data.bad_limit, config.data.tokens = 1.0, 200
  for _, info, _ in steps(config, 3):
    assert info["bad"]["outside_root"]
  documents = pipeline.documents(config, "mine", "train")
  assert len(documents) == len(cases) + 2 and documents[0].parts
  with pytest.raises(BadExample, match="outside_root"):
    documents[1]
  assert documents.key(1) == "mine/train[1]"


@pytest.mark.parametrize("row, reason", [
  ({"content": [{"type": "audio", "audio": "x"}]}, "type 'audio'"),
  ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image_count"),
  ({"content": [{"type": "video", "video": "film.mp4"}]}, "a video is str, not a list of frames"),
  ({"content": [{"type": "video", "video": []}]}, "a video is empty, not a list of frames"),
  ({"content": [{"type": "video", "video": ["1.jpg", 2]}]}, "an image is int, not a name or bytes"),
  ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role"),
  ({"messages": [{"role": "user", "content": 3}]}, "a text is int"),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not a name or bytes"),
  ({"texts": ["one", "two"]}, "not a list of objects"),
  ({"captions": []}, "captions is not"),
])
def test_ways_of_writing_refuse(row, reason):
  with pytest.raises(BadExample, match=reason):
    turns.documents(row, tuple(turns.WAYS))


def member(name, kind=tarfile.REGTYPE, link="", data=b"x"):
  info = tarfile.TarInfo(name)
  info.type, info.linkname, info.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
  return info, data


@pytest.mark.parametrize("extra, message", [
  (member("../evil.jpg"), "'../evil.jpg' leads out of it"),
  (member("a/../../evil.jpg"), "leads out of it"),
  (member("/etc/evil.jpg"), "'/etc/evil.jpg' leads out of it"),
  (member("b.jpg", tarfile.SYMTYPE, "/etc/passwd"), "'b.jpg' is a link"),
  (member("b.jpg", tarfile.LNKTYPE, "a.jpg"), "'b.jpg' is a link"),
  (member("b.jpg", tarfile.CHRTYPE), "'b.jpg' is no file"),
])
def test_tars_that_reach_outside_are_refused(tmp_path, extra, message):
  with tarfile.open(tmp_path / "x.tar", "w") as file:
    for info, data in (member("a.txt"), extra):
      file.addfile(info, io.BytesIO(data) if info.size else None)
  with pytest.raises(DataError, match=message):
    TarFile(str(tmp_path / "x.tar"), "samples")
  assert [path.name for path in tmp_path.iterdir()] == ["x.tar"], "nothing is extracted or indexed"


def test_tars_are_indexed_once_and_again_when_they_change(tmp_path, monkeypatch):
  path = written.tar(tmp_path / "x.tar", [("a.txt", b"one"), ("b.txt", b"two")])
  assert TarFile(path, "samples")[1] == {"key": "b", "txt": b"two"}
  assert sorted(os.listdir(tmp_path)) == ["x.tar", "x.tar.index.npz"]
  with monkeypatch.context() as patch:
    patch.setattr(tarfile, "open", None)  # the saved index is enough
    assert TarFile(path, "samples")[0] == {"key": "a", "txt": b"one"}
  written.tar(tmp_path / "x.tar", [("c.txt", b"three"), ("c.json", b"{}"), ("d.txt", b"4")])
  assert TarFile(path, "samples")[0] == {"key": "c", "txt": b"three", "json": b"{}"}
  (tmp_path / "x.tar.index.npz").write_bytes(b"PK broken")
  assert len(TarFile(path, "samples")) == 2
  (tmp_path / "x.tar.index.npz").unlink()
  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "read-only")))
    assert len(TarFile(path, "samples")) == 2 and os.listdir(tmp_path) == ["x.tar"]


def test_a_tar_that_ends_early_is_one_sentence(tmp_path):
  path = written.tar(tmp_path / "x.tar", [("a.txt", b"one"), ("b.txt", b"2" * 5000)])
  data = (tmp_path / "x.tar").read_bytes()
  whole = len(TarFile(path, "samples"))
  header = data[:1024] + b"\1" * 512 + data[1536:]  # tarfile takes it for the end
  ends = (600, 1024, 1024 + 200, 1024 + 600, 1024 + 512 + 3000, 1024 + 512 + 5120)
  for broken in (header, *(data[:length] for length in ends)):
    (tmp_path / "x.tar").write_bytes(broken)
    with pytest.raises(DataError, match="x.tar"):
      TarFile(path, "samples")
  (tmp_path / "x.tar").write_bytes(data)
  assert whole == len(TarFile(path, "samples")) == 2


def test_a_sample_without_text_or_with_broken_json_is_bad(own, folder):  # noqa: F811
  picture = (folder / "images" / GOOD["image"]).read_bytes()
  path = written.tar(folder / "bad.tar", [
    ("0.jpg", picture), ("0.txt", b"a cat"), ("1.jpg", picture), ("2.jpg", picture),
    ("2.json", b"{"), ("3.json", json.dumps(GOOD).encode()), ("4.jpg", b"x"), ("4.txt", b"cat")])
  assert reasons(own("webdataset", path)) == [
    "", "wrong_record", "wrong_record", "image_count", "not_an_image"]


def test_splits(own, folder, records):  # noqa: F811
  path = llava(folder, records * 20)
  parts = {split: own("llava_json", path, held_out=0.25, split=split)
           for split in ("train", "validation")}
  keys = {}
  for split, config in parts.items():
    opened = draw.Records(config, "mine", split)
    keys[split] = {opened._reader._chosen[i] for i in range(len(opened))}
  assert not keys["train"] & keys["validation"] and len(keys["train"] | keys["validation"]) == 240
  assert 35 < len(keys["validation"]) < 85
  more = files.share(300, 0.25, "validation", "x")
  assert set(more[more < 240].tolist()) == {int(key) for key in keys["validation"]}
  with pytest.raises(UsageError, match="mine.held_out, or write {split}"):
    draw.Draw(own("llava_json", path, split="validation"), "mine")
  with pytest.raises(UsageError, match="did you mean 'train'"):
    draw.Draw(own("llava_json", path, split="trian"), "mine")
  with pytest.raises(UsageError, match="held_out is 2"):
    draw.Draw(own("llava_json", path, held_out=2.0), "mine")
  llava(folder, records[:5], "s_test.json")
  named = str(folder / "s_{split}.json")
  assert len(draw.Draw(own("llava_json", named, split="test"), "mine").records) == 5
  with pytest.raises(DataError, match="s_train.json does not exist"):
    draw.Draw(own("llava_json", named), "mine")
  with pytest.raises(UsageError, match="its splits are named in its path"):
    draw.Draw(own("llava_json", named, held_out=0.1), "mine")


def test_workers_restarts_and_controls(own, folder, records):  # noqa: F811
  config = own("webdataset", **write_tar(folder, records))
  alone = steps(config, 4)
  for (batch, _, state), (other, _, again) in zip(
      alone[2:], steps(config, 2, start=alone[2][2]), strict=True):
    assert same(batch, other) and state == again
  config.data.workers = 2
  for (batch, _, _), (other, _, _) in zip(alone, steps(config, 4), strict=True):
    assert same(batch, other)
  config.data.workers = 0
  config.data.sources.mine.images = "none"
  assert not steps(config, 1)[0][0]["media/images/segment_ids"].any()
  config.data.sources.mine.images = "shuffled"
  real = draw.Records(config, "mine", "train")
  shuffled = draw.Records(config, "mine", "train", policy="shuffled")
  of = lambda document: [part.data for part in document.parts if isinstance(part, turns.Image)]
  pairs = [(of(real[i][0]), of(shuffled[i][0])) for i in range(2, 12)]
  assert all(isinstance(data, bytes) for pair in pairs for some in pair for data in some)
  assert all(one != other for one, other in pairs)


def test_tfds_by_name_says_what_is_missing(tmp_path, monkeypatch):
  from tensorflow_datasets.core import constants

  monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
  for name in ("coco_captions", "c4/en"):
    with pytest.raises(DataError, match=f"tfds build {name} --file_format=array_record"):
      tfds.find(name)
  with pytest.raises(DataError, match="tfds build c4 .* --data_dir=/data/sets`"):
    tfds.find("/data/sets/c4")
  with pytest.raises(UsageError, match="did you mean coco_captions"):
    tfds.find("coco_caption")
  for version in ("1.0.0", "1.10.0", "1.9.0"):
    (tmp_path / "coco_captions" / version).mkdir(parents=True)
    (tmp_path / "coco_captions" / version / "dataset_info.json").write_text("{}")
  assert tfds.find("coco_captions").endswith("1.10.0")
  assert tfds.find(str(tmp_path / "coco_captions" / "1.9.0")).endswith("1.9.0")
  for name in ("en", "de"):
    (tmp_path / "c4" / name / "1.0.0").mkdir(parents=True)
    (tmp_path / "c4" / name / "1.0.0" / "dataset_info.json").write_text("{}")
  with pytest.raises(UsageError, match="several configurations: de, en"):
    tfds.find("c4")
  assert tfds.find("c4/en").endswith("en/1.0.0")
  with pytest.raises(DataError, match="coco_captions/1.10.0"):
    tfds.Examples(tfds.find("coco_captions"), "train")


def test_tfds_splits_and_features(own, folder):  # noqa: F811
  rows = [{"image": str(path), "caption": f"number {i}"}
          for i, path in enumerate(sorted((folder / "images").glob("0*.jpg")))]
  features = lambda f: f.FeaturesDict({"image": f.Image(), "caption": f.Text()})
  path = written.tfds(folder, "sliced", features, rows)
  assert len(draw.Draw(own("tfds", path, split="train[:75%]"), "mine").records) == 9
  with pytest.raises(UsageError, match="Unknown split 'test'"):
    draw.Draw(own("tfds", path, split="test"), "mine")
  with pytest.raises(UsageError, match="its splits are its own"):
    draw.Draw(own("tfds", path, held_out=0.1), "mine")
  path = written.tfds(folder, "labels", lambda f: f.FeaturesDict({"label": f.Scalar(np.int64)}),
                      [{"label": 1}])
  with pytest.raises(DataError, match="has the features label; expected"):
    draw.Draw(own("tfds", path), "mine")


def test_json_of_every_shape_is_found(tmp_path):
  """Offsets survive escapes, nesting, other scripts, byte order marks and line ends."""
  values = [{"a": '\\"]},{["'}, ["é", "日本\u2028"], "x", 3.5, None, {"b": [[{}], "]"]}]
  for name, text in {
    "list": json.dumps(values, indent=2, ensure_ascii=False),
    "tight": json.dumps(values, separators=(",", ":")),
    "lines": "\r\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n\n",
    "mark": "\ufeff" + json.dumps(values, ensure_ascii=False),
    "mark lines": "\ufeff" + "\n".join(map(json.dumps, values[::-1][:1] + values[1:])),
  }.items():
    (tmp_path / name).write_bytes(text.encode())
    file = files.JsonFile(str(tmp_path / name), "values")
    expected = values[::-1][:1] + values[1:] if name == "mark lines" else values
    assert [file[i] for i in range(len(file))] == expected, name


def test_images_are_only_read_when_somebody_sees_them(own, folder, records, monkeypatch):  # noqa: F811
  config = own("llava_json", llava(folder, records))
  read = []
  monkeypatch.setattr(images, "read", lambda path: read.append(path) or b"")
  assert len(pipeline.documents(config, "mine", "train", images="none")) == 12
  assert not read
  assert draw.Records(config, "mine", "train")[3] and len(read) == 1
