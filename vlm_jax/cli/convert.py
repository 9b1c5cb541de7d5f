"""Converts a published checkpoint into a run directory, or a run into a published checkpoint.

  vlm-jax convert DIRECTORY --from=hf --out=RUN --config=configs/llava.py
  vlm-jax convert RUN --to=hf --out=DIRECTORY
  vlm-jax convert RUN --to=peft --out=DIRECTORY
  vlm-jax convert RUN --to=jax --out=DIRECTORY
  vlm-jax convert FILE.gguf --from=gguf --out=DIRECTORY

The first reads a LLaVA, LLaVA-NeXT, PaliGemma, BLIP-2, InstructBLIP, CLIP or SigLIP of Hugging
Face, or a CoCa of OpenCLIP: its config decides the model, the recipe everything else. RUN then
holds step 0; `vlm-jax train --workdir=RUN` trains it, `evaluate` and, where it speaks, `generate`
and `predict` use it. The second writes
weights, config, image processor and tokenizer, of a LLaVA the chat template too, as transformers
loads them, adapters merged; the third only the adapters, as PEFT loads them. The fourth
writes any strategy as programs that need JAX alone, with a README.md that says how they are run.
The last writes a Llama of llama.cpp as transformers loads it, with a tokenizer for
config.data.tokenizer beside it. To start a module alone from weights of another program, set
config.tower.init, config.connector.init or config.llm.init in a recipe.
"""

import argparse
from pathlib import Path

from vlm_jax import runs
from vlm_jax.cli import config as recipes
from vlm_jax.core.errors import UsageError, nearest

SUMMARY = "read or write checkpoints of other programs"
FROM, TO = ("hf", "gguf"), ("hf", "peft", "jax")
DTYPES = ("float32", "bfloat16")


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("source", metavar="SOURCE", help="checkpoint or run directory")
  parser.add_argument("--from", dest="origin", metavar="KIND", help="hf: SOURCE is a checkpoint, "
                      "--out a run; gguf: SOURCE is a file, --out a checkpoint")
  parser.add_argument("--to", metavar="KIND", help=f"{', '.join(TO)}: SOURCE is a run, --out a "
                      "directory of this kind")
  parser.add_argument("--out", required=True, help="new directory")
  parser.add_argument("--dtype", default="", help=f"{' or '.join(DTYPES)} (default: as it is)")
  parser.add_argument("--step", type=int, help="with --to: step of the checkpoint (the newest)")
  parser.add_argument("--shard-gb", type=float, default=5.0, help="with --to: largest file (5)")
  parser.add_argument("--images", type=int, default=1, help="with --to=jax: in a prompt (1)")
  parser.add_argument("--prompt-tokens", type=int, default=128,
                      help="with --to=jax: of the longest prompt, pictures not counted (128)")
  parser.add_argument("--new-tokens", type=int, default=64,
                      help="with --to=jax: of the longest answer (64)")
  parser.add_argument("--check", action="store_true",
                      help="read everything back and compare it; with --to=hf also the logits of "
                           "what speaks, if transformers is installed")
  recipes.argument(parser, required=False)


def run(args: argparse.Namespace) -> None:
  """Converts, and says what there is now."""
  if (args.origin is None) == (args.to is None):
    raise UsageError("give either --from (SOURCE is a checkpoint) or --to (SOURCE is a run)")
  for flag, value, known in (("--from", args.origin, FROM), ("--to", args.to, TO),
                             ("--dtype", args.dtype or None, DTYPES)):
    if value is not None and value not in known:
      raise UsageError(f"{flag} is '{value}'; {nearest(value, known)}")
  if args.origin and args.step is not None:
    raise UsageError("--from takes no --step: a checkpoint has one")
  if args.origin == "hf" and not args.config:
    raise UsageError("--from=hf needs --config, the recipe of everything but the model")
  if args.origin != "hf" and (args.config or args.overrides):
    raise UsageError("only --from=hf takes a --config")
  {"hf": import_run, "gguf": import_gguf, None: export_run}[args.origin](args)


def import_gguf(args: argparse.Namespace) -> None:
  """A GGUF file as a checkpoint of Hugging Face."""
  from vlm_jax.convert import gguf_llama, nodes, table
  from vlm_jax.core.writing import new_directory

  with new_directory(args.out) as directory:
    notes = gguf_llama.write(Path(args.source), directory,
                             table.dtype_of(args.dtype) if args.dtype else None)
    if args.check:
      nodes.read_node(directory, "llm")
  print(f"{args.out}: for config.llm.init, and vlm_tokenizer.json for config.data.tokenizer")
  told(notes)


def told(notes: list[str]) -> None:
  """Says which marks the model has yet to learn."""
  if notes:
    print(f"marks of turns and pictures that the model has yet to learn: {', '.join(notes)}")


def import_run(args: argparse.Namespace) -> None:
  """A published system of Hugging Face as step 0 of a run, never all of it in memory."""
  import numpy as np

  from vlm_jax.convert import safetensors_io, systems, table
  from vlm_jax.core.tree import unflatten
  from vlm_jax.core.writing import new_directory
  from vlm_jax.train import checkpoint_tools

  source, out = Path(args.source), Path(args.out).absolute()
  dtype = np.dtype(table.dtype_of(args.dtype)) if args.dtype else None
  recipe = recipes.read(args).copy_and_resolve_references()
  recipe.lora.rank = 0  # a run of its own begins from this one: config.llm.init, config.lora
  config = systems.read_config(source, recipe)
  with new_directory(out) as directory, systems.open_pieces(source, config, dtype) as params:
    safetensors_io.space(directory, sum(leaf.nbytes for leaf in params.values()))
    config.precision.param = systems.one_dtype(params)
    new = systems.adopt_tokenizer(source, config, directory)
    for field in ("tokenizer", "instruction_tokenizer"):
      path = Path(config.data[field])
      if path.parent == directory:
        config.data[field] = str(out / path.name)
    checkpoint_tools.write_run(directory, config.to_json(indent=2, sort_keys=True) + "\n", 0,
                               unflatten(params), {"imported": str(source.absolute())})
    if args.check:
      checkpoint_tools.open_sound(directory / checkpoint_tools.FOLDER, 0)
  size = sum(leaf.size for leaf in params.values())
  print(f"{out}: {size:,} parameters in {config.precision.param}, as step 0; e.g. vlm-jax train "
        f"--workdir={args.out}")
  told(new)


def export_run(args: argparse.Namespace) -> None:
  """A run as a published system of Hugging Face, or its adapters as PEFT's."""
  from vlm_jax.convert import adapters, hf_text, parity, systems, table
  from vlm_jax.core.fusion import find_fusion
  from vlm_jax.core.writing import new_directory
  from vlm_jax.data.pipeline import load_tokenizer

  config, params, step = runs.open_pieces(args.source, args.step)
  dtype = table.dtype_of(args.dtype) if args.dtype else None
  if args.to == "peft":
    with new_directory(args.out) as directory:
      adapters.write(directory, config, params)
    print(f"{args.out}: the adapters of checkpoint {step}; base: the same run without them")
    return
  merged = config.lora.rank > 0
  params, config = adapters.merge(params, config)
  tokenizer = load_tokenizer(config)
  if args.to == "jax":
    from vlm_jax.generate import program

    with new_directory(args.out) as directory:
      program.write(directory, config, params, tokenizer, args.images, args.prompt_tokens,
                    args.new_tokens, dtype)
    print(f"{args.out}: checkpoint {step}{', adapters merged' if merged else ''}; README.md says "
          "how to run it")
    return
  checked = ""
  with new_directory(args.out) as directory:
    systems.write(directory, config, params, tokenizer.image, int(args.shard_gb * 1e9), dtype)
    hf_text.write(directory, config, tokenizer)
    if args.check:
      checked = f"; {parity.reread(directory, config, params)} arrays read back as they were"
      if systems.config_name(config) != systems.CONFIG:
        checked += "; it is not of transformers, so no logits are compared"
      elif not find_fusion(config).STREAM:
        checked += "; it says nothing, so no logits are compared with those of transformers"
      elif parity.available():
        back = systems.read(directory, config)[1]
        error = parity.logits(directory, config, back, tokenizer.image)
        checked += f", logits within {error:.1e} of those of transformers"
  print(f"{args.out}: checkpoint {step}{', adapters merged' if merged else ''}{checked}")
