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
# # Your own data
#
# Pictures and conversations of your own, checked before anything is trained on them, then a short
# training and an answer. LLaVA's JSON is shown; the README lists the other formats.

# %%
import sys

SOURCE = "vlm-jax[quickstart]"  # @param {type:"string"}
# A package name, a wheel you uploaded, or "vlm-jax[quickstart] @ git+https://...". JAX is already
# there in Colab and is kept if it is new enough.
if "google.colab" in sys.modules:
  # %pip install --quiet "$SOURCE"
  pass

# %%
PATH = "my.json"  # @param {type:"string"}
IMAGES = "images"  # @param {type:"string"}
STEPS = 60  # @param {type:"integer"}
WORKDIR = "runs/mine"  # @param {type:"string"}

import os

import jax

from vlm_jax.data import toy

if not os.path.exists(PATH):
  toy.write(".")  # forty squares and their colours, to see it work
device = jax.devices()[0]
minutes = "1 on two cores" if device.platform == "cpu" else "unknown"
print(f"{device.device_kind} ({device.platform}), expected minutes: {minutes}")

# %% [markdown]
# ## What training would make of it
#
# Counts, the text that is learned (between « and »), and every record that would be dropped, with
# the reason. A token is a byte here: a tokenizer is trained in the next step.

# %%
from vlm_jax.configs import base
from vlm_jax.data import check, prepare

config = base.get_config()
config.data.sources.mine = base.source(
  name="llava_json", path=PATH, image_root=IMAGES, held_out=0.1)
config.data.sources.text = base.source(name="pydoc")  # text alone, so that it is not forgotten
print(check.check(config, "mine")[0])

# %% [markdown]
# ## Training
#
# The tokenizer learns from your texts and the manual. `base.py` has every field of the config with
# a line about it; a wrong name is answered with the nearest.

# %%
from vlm_jax.evals.run import in_loop
from vlm_jax.train.loop import train

config.data.root = f"{WORKDIR}-data"
prepare.prepare(config.data.root, ["pydoc"], config.llm.vocab_size, config=config)
config.data.rows, config.train.steps, config.train.log_every = 2, STEPS, 20
config.evals.mine = base.evaluation(kind="perplexity", source="mine", split="validation")
numbers = train(config.lock(), WORKDIR, evaluate=in_loop(config, WORKDIR))
print(f"perplexity per token of what was held out: {numbers['eval/mine/perplexity']:.2f}")

# %% [markdown]
# ## Ask it

# %%
from PIL import Image

import vlm_jax

bundle = vlm_jax.load(WORKDIR)
Image.new("RGB", (64, 64), "green").save("picture.png")
print(bundle.answer("what colour is it?", ["picture.png"]).text)
