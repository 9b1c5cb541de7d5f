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
# # Train a small vision-language model and see that it looks
#
# A prefix-LM learns to answer questions about pictures (easy-VQA) while it reads the Python manual,
# in one loop, on packed rows. At the end you ask it yourself, and then ask again with the wrong
# picture: a model that looks must change its answer.

# %%
import sys

SOURCE = "vlm-jax[quickstart]"  # @param {type:"string"}
# A package name, a wheel you uploaded, or "vlm-jax[quickstart] @ git+https://...". JAX is already
# there in Colab and is kept if it is new enough.
if "google.colab" in sys.modules:
  # %pip install --quiet "$SOURCE"
  pass

# %%
RECIPE = "configs/quickstart.py"  # @param ["configs/quickstart.py", "configs/quickstart.py:debug"]
WORKDIR = "runs/notebook"  # @param {type:"string"}

import jax

MINUTES = {"cpu": "6 on two cores"}  # training and evaluation; other devices were not measured
device = jax.devices()[0]
print(f"{device.device_kind} ({device.platform}), expected minutes: "
      f"{MINUTES.get(device.platform, 'unknown')}")

# %% [markdown]
# ## The data
#
# Everything comes with pip packages: 4,000 training pictures with questions, drawings with
# their names, and the manual. What the model reads is packed: several documents share a row and
# see nothing of each other. The picture shows two rows, a colour for every kind of token, and who
# sees whom.

# %%
from vlm_jax.cli import config as recipes
from vlm_jax.data import inspect, pipeline, prepare

config = recipes.load(RECIPE)
prepare.prepare(config.data.root, ["easy_vqa", "openmoji", "pydoc"], config.llm.vocab_size)
loader = pipeline.make(config)
batch, info = next(loader)
loader.close()
print("\n".join(inspect.show(config, batch, examples=1)))
print("documents in one step:", info["documents"])
inspect.draw_rows(config, batch, rows=2)

# %% [markdown]
# ## Training
#
# The same function that `vlm-jax train` calls. Interrupt it and run the cell again: it continues
# from its last checkpoint, to the bit.

# %%
from vlm_jax.evals.run import in_loop
from vlm_jax.train.loop import train

numbers = train(config.lock(), WORKDIR, evaluate=in_loop(config, WORKDIR))
for name in ("accuracy", "none/accuracy", "shuffled/accuracy"):
  print(f"easy_vqa {name:18s} {numbers['eval/easy_vqa/' + name]:.4f}")

# %% [markdown]
# ## Ask it
#
# A test picture it has never seen, and the same question about another one.

# %%
import io

from PIL import Image

import vlm_jax

bundle = vlm_jax.load(WORKDIR)
documents = pipeline.documents(config, "easy_vqa", "test", "single")
for number in (0, len(documents) // 2):
  picture, question, truth = documents[number].parts
  Image.open(io.BytesIO(picture.data)).save("picture.png")
  said = bundle.answer(question.text, ["picture.png"])
  print(f"{question.text} -> {said.text} (should be {truth.text}), "
        f"log-probability {said.log_prob:.3f}")
Image.open("picture.png").resize((256, 256))
