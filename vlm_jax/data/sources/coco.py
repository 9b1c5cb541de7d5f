"""COCO captions (arXiv:1504.00325): one JSON of images and of annotations that caption them.

A record is an image with all its captions, so that none is learned and tested at once.

Forms:
  single   one document a caption
  fan_out  one document an image: every caption is a branch and is written as if alone
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.core.document import Image, Text
from vlm_jax.core.errors import DataError
from vlm_jax.data import files
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts, Record

FORMS = ("single", "fan_out")
EXPECTS = ('a JSON object of "images": [{"id", "file_name"}] and "annotations": [{"image_id", '
           '"caption"}]')


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """The images of `entry.path` that have captions, in the order of the file."""
  del split
  records = []
  for path in files.paths(entry.path, EXPECTS):
    value = files.json_object(path, ("images", "annotations"), EXPECTS)
    try:
      names = {image["id"]: image["file_name"] for image in value["images"]}
      captions: dict = {number: [] for number in names}
      for annotation in value["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    except (KeyError, TypeError) as error:
      raise DataError(f"{path}: {type(error).__name__} {error}; expected {EXPECTS}") from error
    records += [{"key": number, "image": names[number], "captions": captions[number]}
                for number in names if captions[number]]
  return records


def parts(record: Record, form: str) -> list[Parts]:
  """The documents of one image; see the module for the forms."""
  captions = record["captions"]
  if not all(isinstance(text, str) for text in (record["image"], *captions)):
    raise BadExample("wrong_record", "file_name or caption is not a text")
  image = Image(record["image"])
  if form == "fan_out":
    branches = (Text(text.strip(), loss=True, branch=k) for k, text in enumerate(captions, 1))
    return [(image, *branches)]
  return [(image, Text(text.strip(), loss=True)) for text in captions]
