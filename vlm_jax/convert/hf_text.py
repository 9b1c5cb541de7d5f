"""The files beside the weights of a Hugging Face checkpoint that turn a text into input_ids.

A run of a checkpoint with conventions of its own (a CLIP, a SigLIP, whatever has a chat template)
keeps its files in a folder `FOLDER`, and they are written again as they are. Any other tokenizer of
ours becomes their tokenizer.json. Of a LLaVA our template (`data/template.py`) becomes their chat
template, and the processor repeats `<image>` once for every slot of a picture.
"""

import json
import os
from pathlib import Path

import tokenizers
from ml_collections import ConfigDict

from vlm_jax.convert import processor, safetensors_io
from vlm_jax.core.errors import DataError, UsageError, UserError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import TOLD
from vlm_jax.core.writing import copy, new_directory
from vlm_jax.data import published
from vlm_jax.data import tokenizer as our
from vlm_jax.data.instruction import Reader
from vlm_jax.data.tokenizer import Tokenizer

TOKENIZER, FOLDER = "tokenizer.json", "tokenizer"
READER = "qformer_tokenizer"  # the folder of what a connector reads with, there and in a run
# A picture before the first word comes before the mark of its turn, as `generate` asks.
CHAT = (
  "{%- macro parts(content, mark) -%}{%- set said = namespace(yet=false) -%}"
  "{%- if content is string -%}{{ mark }}{{ content | trim }}{%- else -%}"
  "{%- for part in content -%}{%- if part['type'] == 'image' -%}<image>{%- else -%}"
  "{%- if not said.yet -%}{{ mark }}{%- set said.yet = true -%}{%- endif -%}"
  "{{ part['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
  "{%- for message in messages -%}"
  "{%- if message['role'] == 'assistant' -%}{{ parts(message['content'], '<assistant>') }}<eos>"
  "{%- elif message['role'] == 'system' -%}{{ parts(message['content'], '<bos>') }}"
  "{%- else -%}{{ parts(message['content'], '<user>') }}{%- endif -%}{%- endfor -%}"
  "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)
# Our marks, and under which names of tokenizer_config.json theirs are. Where one of theirs has
# two roles (CLIP pads with its end), it takes the first of these.
ROLES = {our.EOS: "eos_token", our.BOS: "bos_token", our.PAD: "pad_token", our.IMAGE: "image_token"}
# Of the strategies that hold conversations there.
PROCESSORS = {"concat": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
# The class of a tokenizer by the model_type of config.json, where its own files name none.
KINDS = {"clip": "CLIPTokenizer", "siglip": "SiglipTokenizer", "siglip2": "Siglip2Tokenizer"}


def convention(directory: Path, config: ConfigDict) -> str:
  """The `config.data.template` under which a checkpoint's tokenizer serves as it is, "": none.

  Args:
    directory: of the checkpoint.
    config: of its model.

  Raises:
    DataError: there is no tokenizer, or it is damaged.
  """
  asked = config.data.template
  if asked == "caption":
    return asked
  if config.fusion.name not in PROCESSORS:
    return ""
  if asked not in our.TEMPLATES:
    return asked
  found = published.read(directory)
  writes = found.chat and found.chat != CHAT and _image(directory, found)
  return our.CHECKPOINT if writes else ""


def keep(directory: Path, folder: Path) -> None:
  """Copies the tokenizer files of a checkpoint into a folder; config.json says what they do not.

  Raises:
    DataError: a file is damaged or cannot be read.
    DiskError: they cannot be written.
  """
  for path in published.paths(directory):
    copy(path, folder)
  theirs = safetensors_io.read_json(directory / "config.json")
  kind, found = theirs.get("model_type", ""), published.read(directory)
  more = {}
  # As the AutoTokenizer of transformers: for "siglip2" it never asks the files.
  if kind == "siglip2" or (not found.kind and kind in KINDS and (
      kind != "siglip" or (directory / published.PIECES).is_file())):
    more["tokenizer_class"] = KINDS[kind]
  if kind not in KINDS and not found.token("image_token") and (image := _image(directory, found)):
    more["image_token"] = image
  path = folder / published.CONFIG
  settings = safetensors_io.read_json(path) if path.is_file() else {}
  if any(settings.get(field) != value for field, value in more.items()):
    safetensors_io.write_json(path, settings | more)


def adopt_reader(directory: Path, config: ConfigDict, folder: Path) -> None:
  """Puts a checkpoint's second tokenizer, if its model has one, into a folder and uses it.

  Args:
    directory: of the checkpoint.
    config: of its model; `data.instruction_tokenizer` is changed.
    folder: of the run; what is there already stays.

  Raises:
    DataError: there is none, or it is damaged.
    DiskError: it cannot be written.
  """
  if TOLD not in find_fusion(config).fields(config):
    return
  path = folder / READER
  config.data.instruction_tokenizer = str(path)
  if not path.exists():
    published.read(directory / READER)
    with new_directory(path, "config.data.instruction_tokenizer") as made:
      for file in published.paths(directory / READER):
        copy(file, made)


def _image(directory: Path, found: published.Published) -> str | None:
  """The token of a picture: named by the tokenizer, ours, or numbered by config.json."""
  if token := found.token("image_token"):
    return token
  if found.inner.token_to_id(our.IMAGE) is not None:
    return our.IMAGE
  theirs = safetensors_io.read_json(directory / "config.json")
  number = theirs.get("image_token_index", theirs.get("image_token_id"))
  return None if number is None else found.inner.id_to_token(number)


def write(directory: Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
  """Writes the tokenizer; of what speaks generation defaults, of a LLaVA chat and processor.

  Args:
    directory: exists.
    config: of the model.
    tokenizer: the run's.

  Raises:
    DiskError: a file cannot be written.
  """
  speaks = bool(find_fusion(config).STREAM)
  if os.path.isdir(config.data.tokenizer):
    for path in published.paths(config.data.tokenizer):
      copy(path, directory)
    _drop_images(directory / processor.WHOLE)
  else:
    _write_ours(directory, config, tokenizer, speaks)
  if tokenizer.chat and config.data.template != our.CHECKPOINT:
    (directory / published.CHAT).write_text(tokenizer.chat.source, encoding="utf-8")
  if speaks:
    stops = tokenizer.stops
    safetensors_io.write_json(directory / "generation_config.json", {
      **({"bos_token_id": tokenizer.bos} if tokenizer.bos >= 0 else {}),
      "eos_token_id": stops[0] if len(stops) == 1 else list(stops),
      "pad_token_id": tokenizer.pad, "do_sample": False})
  if tokenizer.reader is not None:
    _write_reader(directory, config, tokenizer.reader)
  of = config.fusion.name
  if of not in PROCESSORS or (directory / "processor_config.json").exists():
    return
  tower = config.tower
  safetensors_io.write_json(directory / "processor_config.json", {
    "processor_class": PROCESSORS[of], "image_token": tokenizer.inner.id_to_token(tokenizer.image),
    "patch_size": tower.patch,
    "vision_feature_select_strategy": "default" if tower.class_token else "full",
    "num_additional_image_tokens": int(tower.class_token),
  })


def _write_reader(directory: Path, config: ConfigDict, reader: Reader) -> None:
  """Writes the tokenizer of what a connector reads, and which processor uses both."""
  folder, path = directory / READER, config.data.instruction_tokenizer
  folder.mkdir()
  if os.path.isdir(path):
    for file in published.paths(path):
      copy(file, folder)
  else:
    reader.inner.save(str(folder / TOKENIZER))
    safetensors_io.write_json(folder / "tokenizer_config.json", {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "model_max_length": config.data.instruction_tokens, "clean_up_tokenization_spaces": False})
  safetensors_io.write_json(directory / "processor_config.json", {
    "processor_class": "InstructBlipProcessor", "num_query_tokens": config.connector.latents})


def _drop_images(path: Path) -> None:
  """Leaves the image processor to its own file, for the run may make other pixels by now."""
  theirs = safetensors_io.read_json(path) if path.is_file() else {}
  if theirs.pop(processor.NODE, None):
    safetensors_io.write_json(path, theirs)


def _write_ours(directory: Path, config: ConfigDict, tokenizer: Tokenizer, speaks: bool) -> None:
  """Writes a tokenizer of ours, and our template as a chat template."""
  inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
  if not speaks:  # no chat template writes the ends of a caption there
    inner.post_processor = tokenizers.processors.TemplateProcessing(
      single=f"{our.BOS} $A {our.EOS}",
      special_tokens=[(our.BOS, tokenizer.bos), (our.EOS, tokenizer.eos)])
  inner.save(str(directory / TOKENIZER))
  template = config.data.template if config.data.template in our.TEMPLATES else "marks"
  pad, bos, eos, image, user, assistant = our.needed(template)
  extra = {"image_token": image, "user_token": user, "assistant_token": assistant}
  if tokenizer.reader is not None:
    del extra["image_token"]  # InstructBlipProcessor breaks on one that has a name
  safetensors_io.write_json(directory / "tokenizer_config.json", {
    "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "bos_token": bos,
    "eos_token": eos, "model_max_length": config.data.tokens if speaks else config.llm.positions,
    "clean_up_tokenization_spaces": False,
    "extra_special_tokens": {name: token for name, token in extra.items()
                             if token not in (bos, eos) and inner.token_to_id(token) is not None
                             and token in our.SPECIALS},
  })
  if config.data.template == "marks" and config.fusion.name in PROCESSORS:
    (directory / published.CHAT).write_text(CHAT)


def read(directory: Path, vocab_size: int, template: str = "marks"
         ) -> tuple[tokenizers.Tokenizer, list[str]]:
  """The tokenizer of a checkpoint with our marks, see `adopt`.

  Args:
    directory: of the checkpoint.
    vocab_size: rows of its embedding.
    template: whose marks it must have, `config.data.template`.

  Raises:
    DataError: there is no readable tokenizer.json.
    UsageError: there is no room for our marks.
  """
  path, told = directory / TOKENIZER, {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (directory / name).exists():
      told |= safetensors_io.read_json(directory / name)
  told |= told.get("extra_special_tokens") or {}
  try:
    return adopt(path.read_text(), told, vocab_size, template)
  except UserError:
    raise
  except Exception as error:  # the library raises bare Exception for every broken file
    raise DataError(f"{path} is not a usable tokenizer.json ({error}); put the one of the model "
                    "there") from error


def adopt(text: str, told: dict, vocab_size: int, template: str = "marks"
          ) -> tuple[tokenizers.Tokenizer, list[str]]:
  """A tokenizer with our marks among its special tokens.

  Theirs that mean the same take our names. Marks that they have no token for become new tokens in
  rows of the vocabulary that no token uses, or, without such rows, take those of their last
  special tokens.

  Args:
    text: of a tokenizer.json.
    told: the special tokens of tokenizer_config.json, by `ROLES`.
    vocab_size: rows of the embedding.
    template: whose marks it must have.

  Returns:
    The tokenizer, and a line for every mark that the model has yet to learn.

  Raises:
    UsageError: there are neither rows nor special tokens left.
  """
  content = json.loads(text)
  specials = [token["content"] for token in sorted(content["added_tokens"], key=_row)
              if token["special"]]
  names = {token: mark for token, mark in _names(told).items() if token in specials}
  have, notes = {names.get(token, token) for token in specials}, []
  marks = our.needed(template)
  missing = [mark for mark in our.SPECIALS if mark in marks and mark not in have]
  used = max([*content["model"]["vocab"].values(), *map(_row, content["added_tokens"])]) + 1
  spare = [token for token in specials if token not in names and token not in our.SPECIALS]
  for mark in missing:
    if used < vocab_size:
      content["added_tokens"].append({
        "id": used, "content": mark, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True})
      notes.append(f"{mark} is new")
      used += 1
    elif spare:
      notes.append(f"{mark} takes the place of {spare[-1]}")
      names[spare.pop()] = mark
    else:
      raise UsageError(f"the tokenizer has no room for the mark {mark}: all {vocab_size} rows of "
                       "the embedding are in use; give the checkpoint more rows first")
  for token in content["added_tokens"]:
    token["content"] = names.get(token["content"], token["content"])
  content["model"]["vocab"] = {names.get(token, token): row
                               for token, row in content["model"]["vocab"].items()}
  content["post_processor"] = None  # it would add the marks under their old names
  return tokenizers.Tokenizer.from_str(json.dumps(content)), notes


def _row(token: dict) -> int:
  return token["id"]


def _names(told: dict) -> dict[str, str]:
  """Their special tokens to our marks; two of ours may not be one of theirs."""
  names: dict[str, str] = {}
  for mark, field in ROLES.items():
    token = told.get(field, "<image>" if mark == our.IMAGE else None)
    token = token.get("content") if isinstance(token, dict) else token
    if token and token not in names:
      names[token] = mark
  return names
