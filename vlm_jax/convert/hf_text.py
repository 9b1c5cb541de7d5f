"""The files beside the weights of a Hugging Face checkpoint that turn a text into input_ids.

Our tokenizer becomes their tokenizer.json. Of a LLaVA our template (`data/template.py`) becomes
their chat template, and the processor repeats `<image>` once for every slot of a picture.
"""

import json
from pathlib import Path

import tokenizers
from ml_collections import ConfigDict

from vlm_jax.convert import safetensors_io
from vlm_jax.core.errors import DataError, UsageError, UserError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data import tokenizer as our
from vlm_jax.data.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
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


def write(directory: Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
  """Writes the tokenizer; of what speaks generation defaults, of a LLaVA chat and processor.

  Args:
    directory: exists.
    config: of the model.
    tokenizer: the run's.

  Raises:
    DiskError: a file cannot be written.
  """
  inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
  speaks = bool(find_fusion(config).STREAM)
  if not speaks:  # no chat template writes the ends of a caption there
    inner.post_processor = tokenizers.processors.TemplateProcessing(
      single=f"{our.BOS} $A {our.EOS}",
      special_tokens=[(our.BOS, tokenizer.bos), (our.EOS, tokenizer.eos)])
  inner.save(str(directory / TOKENIZER))
  pad, bos, eos, image, user, assistant = our.needed(config.data.template)
  extra = {"image_token": image, "user_token": user, "assistant_token": assistant}
  safetensors_io.write_json(directory / "tokenizer_config.json", {
    "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "bos_token": bos,
    "eos_token": eos, "model_max_length": config.data.tokens if speaks else config.llm.positions,
    "clean_up_tokenization_spaces": False,
    "extra_special_tokens": {name: token for name, token in extra.items()
                             if token not in (bos, eos) and token in our.SPECIALS},
  })
  if speaks:
    safetensors_io.write_json(directory / "generation_config.json", {
      "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad,
      "do_sample": False})
  if config.fusion.name not in PROCESSORS:
    return
  if config.data.template == "marks":
    (directory / "chat_template.jinja").write_text(CHAT)
  tower = config.tower
  safetensors_io.write_json(directory / "processor_config.json", {
    "processor_class": PROCESSORS[config.fusion.name], "image_token": our.IMAGE,
    "patch_size": tower.patch,
    "vision_feature_select_strategy": "default" if tower.class_token else "full",
    "num_additional_image_tokens": int(tower.class_token),
  })


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
