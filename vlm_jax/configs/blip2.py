"""BLIP-2 as published (arXiv:2301.12597): EVA-CLIP ViT-g, 32 queries, a frozen language model.

Two stages, both with AdamW, cosine after 2,000 steps of warm-up, decay 0.05:

            trains                                 steps    pairs a step     ends at
  align     Q-Former and heads (blip2_qformer)     250,000  1,680            0
  generate  Q-Former, projection (blip2, blip2_t5)  80,000  1,920 or 1,520   half the rate

The second starts from the first: `--config.connector.init=RUN`, or `--config.fusion.init=FILE.pth`
of LAVIS, which may be either stage's. In both the norm behind the tower trains, nothing else of it.
The paper's 129M pictures cannot be had: COCO's captions, in the folder you start from, stand for
them, and published weights of the tower and the language model are named by config.tower.init and
config.llm.init. Random crops and flips are the flips here. Arguments, joined by commas:

  opt-2.7b, opt-6.7b, flan-xl, flan-xxl   the language model (default opt-2.7b)
  generate, align                         the stage (default generate)
  debug      50 steps of a tiny model on easy-VQA in seconds; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.llm import opt, t5
from vlm_jax.towers import vit

MEMBERS = ("opt-2.7b", "opt-6.7b", "flan-xl", "flan-xxl")
STAGES = ("generate", "align")


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of the list above."""
  member, stage, debug = base.choose(arg, MEMBERS, STAGES, ("", "debug"))
  config = base.get_config()
  config.precision.compute = "bfloat16"
  config.fusion.stage = "bridge"

  clip = vit.FAMILIES["clip_vision_model"]
  config.tower.update(name="eva", image_size=224, class_token=True, read_class=True,
                      norm_eps=1e-6, mean=clip.mean, std=clip.std, remat="full",
                      **{**vit.size("g/14"), "depth": 39})
  config.connector.update(name="qformer", latents=32, slot_width=768, depth=12, heads=12,
                          hidden=3072, norm_eps=1e-12)
  if member.startswith("opt"):
    config.fusion.name = "blip2"
    config.llm.update(name="opt", **opt.size(member.removeprefix("opt-")))
  else:
    config.fusion.name = "blip2_t5"
    config.llm.update(name="t5", **t5.size(member))
  config.llm.remat = "full"

  # Rows of sixteen captions.
  config.data.rows, config.data.images = (120 if member.startswith("opt") else 95), 16
  config.data.tokens, config.data.decoder_tokens = 16 * 64, 16 * 34
  config.data.sources.coco = base.source(
    name="coco", path="captions_train2017.json", image_root="train2017", form="single",
    held_out=0.01, augment=("flip",))
  config.evals.captions = base.evaluation(
    kind="caption", source="coco", split="validation", limit=500, max_tokens=30)
  if stage == "align":
    align(config)

  config.optim.update(lr=1e-4, b2=0.98, weight_decay=0.05, warmup=2000,
                      end_lr=0.0 if stage == "align" else 0.5)
  config.train.steps = 250_000 if stage == "align" else 80_000
  config.train.checkpoint_every = 5000
  return shrink(config) if debug else config


def align(config: ConfigDict) -> None:
  """Makes it the first stage; of the language model's node only the words are read."""
  config.fusion.update(name="blip2_qformer", width=256, start=30522)
  config.fusion.objectives = ConfigDict(dict(itc=1.0, itm=1.0, itg=1.0))
  config.connector.vocab_size = 30523  # BERT's, and what opens a text that is said
  config.llm = base.get_config().llm
  config.llm.update(vocab_size=30523, positions=32)
  config.data.template = "caption"
  config.data.rows = 105
  config.evals.captions = base.evaluation(
    kind="retrieval", source="coco", split="validation", limit=1000, rerank=128,
    controls=("shuffled",))


def shrink(config: ConfigDict) -> ConfigDict:
  """The recipe at the size of a test, on easy-VQA: the same parts, narrow and few."""
  aligns = config.fusion.name == "blip2_qformer"
  config.precision.compute = "float32"
  config.tower.update(image_size=64, patch=16, width=48, depth=2, mlp=96, heads=3, remat="none")
  config.connector.update(latents=4, slot_width=48, depth=2, heads=3, hidden=96)
  config.llm.update(vocab_size=1024, width=64, depth=2, mlp=128, heads=4, kv_heads=4, head_dim=16,
                    remat="none")
  if aligns:
    config.connector.vocab_size = 1024
    config.fusion.update(width=32, start=3)
  config.data.update(rows=4, tokens=256, decoder_tokens=128, images=8)
  config.data.sources = ConfigDict()
  config.evals = ConfigDict()
  config.data.sources.easy_vqa = base.source(
    name="easy_vqa", form="caption" if aligns else "single")
  if not aligns:
    config.data.sources.text = base.source(name="pydoc")  # the tokenizer learns enough from it
    config.data.window = 64
    config.evals.easy_vqa = base.evaluation(
      kind="vqa", source="easy_vqa", split="test", limit=8)
  else:
    config.data.sources.names = base.source(name="openmoji", form="caption")
    config.evals.find = base.evaluation(
      kind="retrieval", source="names", form="caption", split="test", limit=16, batch=8,
      rerank=4, controls=("shuffled",))
  config.optim.update(lr=2e-3, warmup=5)
  config.train.update(steps=50, log_every=5, checkpoint_every=50)
  return config
