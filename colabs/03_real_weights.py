# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Published weights
#
# A LLaVA as it lies on the Hugging Face Hub is read, asked, and taught by adapters. Then it is
# written twice: for transformers, which must say the same tokens, and for machines that have JAX
# and nothing else.

# %%
import sys

SOURCE = "vlm-jax"  # @param {type:"string"}
# A package name, a wheel you uploaded, or "vlm-jax @ git+https://...". JAX is already there in
# Colab and is kept if it is new enough.
if "google.colab" in sys.modules:
  # %pip install --quiet "$SOURCE"
  pass

# %%
CHECKPOINT = ""  # @param {type:"string"}
DTYPE = "float32"  # @param ["float32", "bfloat16"]
STEPS = 60  # @param {type:"integer"}
WORKDIR = "runs/tuned"  # @param {type:"string"}

import jax

device = jax.devices()[0]
minutes = "a few on two cores" if device.platform == "cpu" and not CHECKPOINT else "unknown"
print(f"{device.device_kind} ({device.platform}), expected minutes: {minutes}")

# %% [markdown]
# ## A checkpoint
#
# `CHECKPOINT` names the directory of a LLaVA that you downloaded, say `llava-1.5-7b-hf`. Its 7
# billion parameters are float32 while they train, 28 GB, however few adapters learn; to look at
# it, `DTYPE` may be bfloat16. Without a name, this cell writes the same files for a LLaVA so small
# that two cores will do. It is random: it has yet to learn to speak.

# %%
import os

import vlm_jax
from vlm_jax import recipes
from vlm_jax.bundle import of_recipe
from vlm_jax.convert import hf_text, systems
from vlm_jax.core.writing import new_directory
from vlm_jax.data import tokenizer, toy

random = not CHECKPOINT
if random:
  CHECKPOINT = "tiny-llava"
if random and not os.path.exists(CHECKPOINT):
  config = recipes.load("configs/llava_1_5.py:pretrain,debug")
  words = tokenizer.train(["what colour is it?", *toy.COLOURS], 280)
  words.save("words.json")
  config.data.tokenizer, config.llm.vocab_size = "words.json", words.vocab_size
  drawn = of_recipe(config)
  with new_directory(CHECKPOINT) as folder:
    systems.write(folder, drawn.config, drawn.params, words.image)
    hf_text.write(folder, drawn.config, words)
print(*sorted(os.listdir(CHECKPOINT)), sep="\n")

# %% [markdown]
# ## Look at it
#
# One call reads any of them: model, tokenizer, chat template, and how pictures become pixels. The
# picture of the attention shows where the model looked behind every word it said.

# %%
from PIL import Image

QUESTION, PICTURE = "what colour is it?", "picture.png"
Image.new("RGB", (96, 64), "green").save(PICTURE)
bundle = vlm_jax.load(CHECKPOINT, dtype=DTYPE)
for name in ("fusion", "tower", "connector", "llm"):
  fields = bundle.config[name]
  print(name, {field: fields[field] for field in ("name", "width", "depth") if field in fields})
print("parameters:", sum(leaf.size for leaf in jax.tree.leaves(bundle.params)))
alone, shown = (bundle.slots(bundle.question(QUESTION, some)) for some in ((), (PICTURE,)))
print(f"slots of the question: {alone}, of the picture: {shown - alone}")
before = bundle.answer(QUESTION, [PICTURE], max_tokens=8, attention_map="look.png")
print(f"{QUESTION} -> {before.text!r}")
Image.open("look.png")

# %% [markdown]
# ## Train
#
# Forty conversations about coloured squares, in LLaVA's JSON; `02_your_data` shows how to bring
# your own. `lora` trains adapters of the language model, and the connector; the checkpoint stays as
# it is. In float32 throughout, so that what comes out can be compared token by token.

# %%
from vlm_jax.evals.run import in_loop
from vlm_jax.train.loop import train

if not os.path.exists("my.json"):
  toy.write(".")
config = recipes.load(f"configs/finetune.py:init={CHECKPOINT},data=my.json,images=images,lora")
config.precision.compute = "float32"
config.data.rows, config.train.steps = 2, STEPS
if random:
  config.optim.lr = 5e-3  # it has further to go than what is published
numbers = train(config.lock(), WORKDIR, evaluate=in_loop(config, WORKDIR))
print(f"perplexity per token of what was held out: {numbers['eval/mine/perplexity']:.2f}")
tuned = vlm_jax.load(WORKDIR)
said = tuned.answer(QUESTION, [PICTURE], max_tokens=8)
print(f"{QUESTION} -> {said.text!r} (before: {before.text!r})")

# %% [markdown]
# ## Back to transformers
#
# `vlm-jax convert RUN --to=hf`, here called from Python: the adapters are merged, and `--check`
# reads every array again. Where transformers and PyTorch are installed they are asked, else we are,
# of these files alone.

# %%
import shutil

from vlm_jax.cli import main as cli
from vlm_jax.convert import parity

HF = f"{WORKDIR}-hf"
shutil.rmtree(HF, ignore_errors=True)
assert cli.main(["convert", WORKDIR, "--to=hf", f"--out={HF}", "--check"]) == 0
if parity.available():
  import transformers

  model = transformers.AutoModelForImageTextToText.from_pretrained(HF)
  processor = transformers.AutoProcessor.from_pretrained(HF)
  turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
  text = processor.apply_chat_template([turn], add_generation_prompt=True)
  inputs = processor(images=Image.open(PICTURE), text=text, return_tensors="pt")
  out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
  theirs = out[inputs["input_ids"].shape[1] :][: len(said.tokens)]  # without the end
else:
  theirs = list(vlm_jax.load(HF).answer(QUESTION, [PICTURE], max_tokens=8).tokens)
print("transformers" if parity.available() else "read again", "said", theirs)
print("the same tokens:", theirs == list(said.tokens))

# %% [markdown]
# ## JAX and nothing else
#
# `--to=jax` writes programs, parameters and a README.md with the lines that run them. Here they
# run in a process of their own, which imports nothing of this project; only picture and words are
# put in.

# %%
import re
import subprocess
from pathlib import Path

import numpy as np

JAX = Path(f"{WORKDIR}-jax")
shutil.rmtree(JAX, ignore_errors=True)
assert cli.main(["convert", WORKDIR, "--to=jax", f"--out={JAX}", "--new-tokens=8"]) == 0
lines = (JAX / "README.md").read_text().split("```python\n")[1].split("```")[0]
lines = lines.replace("+ [] +", f"+ {tuned.tokenizer.encode(QUESTION)} +")
lines = re.sub(r"np\.zeros\(.*\)(?=  # your picture)", 'np.load("pixels.npy")', lines)
np.save(JAX / "pixels.npy", np.stack(tuned.processor(PICTURE).squares)[None])
(JAX / "run.py").write_text(lines)
print(lines)
alone = os.environ | {"JAX_PLATFORMS": "cpu"}  # an accelerator is held by this process
done = subprocess.run([sys.executable, "run.py"], cwd=JAX, env=alone, capture_output=True,
                      text=True, check=True)
print("the programs said", done.stdout.strip())

# %% [markdown]
# ## Next: published pieces, on a laptop
#
# `configs/llava_smollm2.py` makes a LLaVA of EfficientNet-Lite0 and SmolLM2-135M, whose weights lie
# in two packages of the Python index, and needs two cores. In a terminal:
#
#     vlm-jax data prepare --config=configs/llava_smollm2.py
#     vlm-jax train --config=configs/llava_smollm2.py:connector --workdir=runs/connector
#     vlm-jax train --config=configs/llava_smollm2.py:lora --workdir=runs/lora \
#       --config.connector.init=runs/connector
#     vlm-jax chat --workdir=runs/lora --image=picture.png
