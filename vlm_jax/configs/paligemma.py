"""PaliGemma and PaliGemma 2 (arXiv:2407.07726, 2412.03555): a prefix-LM on SigLIP and a Gemma.

The strategy is `prefix_lm`: image and prompt see each other, the answer is causal and alone is
predicted. Beside it a PaliGemma is its modules: SigLIP So400m/14 behind its last norm, one linear
layer that starts at zero, a Gemma, which multiplies the embeddings of tokens (and of nothing else)
with sqrt(width); and the template "newline", in which a line break parts prompt and answer.

Nothing is ever frozen. The resolution says the stage (section 3.2):

  1   224, texts of 128 tokens, 1 billion examples; the tower's learning rate warms up slowly
  2   448 (50 million) and 896 (10 million examples), texts of 512 tokens
  3   "transfer": one task; here VQAv2's rate, decay, clipping and schedule in big_vision

Start a stage with what the one before left (stage 1: with SigLIP's and Gemma's weights). Batch,
rate and warm-up steps of the stages 1 and 2 are ours, not published ones, and so are the sources,
easy-VQA in the place of the web-scale mix. Arguments, joined by commas:

  224, 448, 896                   the resolution (default 224)
  1-2b, 2-2b, 2-9b, 2-27b         the Gemma (default 1-2b)
  transfer                        stage 3
  debug                           50 steps of a tiny model in seconds; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.llm import gemma
from vlm_jax.towers import vit

EXAMPLES = {"224": 1_000_000_000, "448": 50_000_000, "896": 10_000_000}
GEMMAS = ("1-2b", "2-2b", "2-9b", "2-27b")
VOCABULARY = 256_000 + 1024 + 128  # Gemma's, <loc0000> to <loc1023>, <seg000> to <seg127>
VQA = 443_757 + 214_354  # questions of VQAv2's training and validation splits


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of the list above."""
  side, member, transfer, debug = base.choose(
    arg, tuple(EXAMPLES), GEMMAS, ("", "transfer"), ("", "debug"))
  config = base.get_config()
  config.fusion.name = "prefix_lm"
  config.precision.compute = "bfloat16"

  config.tower.update(vit.size("So400m/14"))
  config.tower.image_size = int(side)
  config.tower.activation = "gelu_tanh"
  config.tower.remat = "full"
  config.connector.name = "linear"
  config.connector.initial = "zeros"
  config.llm.update(name="gemma", **gemma.size(member))
  config.llm.vocab_size = VOCABULARY
  config.llm.update(window=0, global_every=1)  # no local layers, as in big_vision
  config.llm.remat = "full"

  slots, text = (int(side) // 14) ** 2, 128 if side == "224" else 512
  config.data.rows = 256  # examples of a step: a picture a row
  config.data.images = 1
  config.data.tokens = slots + text
  config.data.window = text
  config.data.template = "newline"
  config.data.decode.kernel = "bilinear"
  config.data.sources.easy_vqa = base.source(name="easy_vqa", form="single", ratio=1)

  config.optim.schedule = "rsqrt"  # never ends: a stage can be prolonged
  config.optim.lr = 2e-5
  config.optim.warmup = 10_000
  config.optim.weight_decay = 0.0
  config.optim.b2 = 0.999
  config.train.steps = EXAMPLES[side] // config.data.rows
  config.train.log_every = 50
  config.train.checkpoint_every = 1000
  if side == "224":
    config.optim.warmups = (("tower", 100_000),)
  if transfer:
    config.optim.update(lr=1e-5, schedule="cosine", weight_decay=1e-6 if side == "224" else 0.0,
                        decay_pattern=".*", warmups=())
    config.train.steps = 10 * VQA // config.data.rows
    config.optim.warmup = config.train.steps // 20
  config.evals.easy_vqa = base.evaluation(kind="vqa", source="easy_vqa", split="test")
  return shrink(config) if debug else config


def shrink(config: ConfigDict) -> ConfigDict:
  """The recipe at the size of a test: the same parts, narrow and few."""
  config.precision.compute = "float32"
  config.tower.update(image_size=64, patch=16, width=48, depth=2, mlp=96, heads=3, remat="none")
  config.llm.update(vocab_size=1024, width=64, depth=2, mlp=128, heads=4, head_dim=16, kv_heads=1,
                    query_scalar=16.0 if config.llm.query_scalar else 0.0, remat="none")
  config.data.update(rows=8, tokens=64, window=32)
  config.data.sources.text = base.source(name="pydoc")  # from which the tokenizer learns enough
  config.optim.update(lr=2e-3, warmup=5)
  if config.optim.warmups:
    config.optim.warmups = (("tower", 20),)
  config.train.update(steps=50, log_every=5, checkpoint_every=50)
  for entry in config.evals.values():
    entry.limit = 8
  return config
