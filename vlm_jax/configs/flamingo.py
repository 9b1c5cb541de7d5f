"""OpenFlamingo's recipe (arXiv:2308.01390, section 3) on a Llama: CLIP ViT-L/14 at 224 pixels.

64 latents an image; a gated layer before every fourth layer, the first before the fourth, of the
shapes of OpenFlamingo-9B; images and language model stay as they are. Each step sums the losses of
web pages (Multimodal C4) and of captions, the latter counting a fifth, as Flamingo sums over its
data sets (arXiv:2204.14198, section 3.2); text before the first image of a page is not learned.
Theirs ends every chunk of a page with a mark of its own. With a tokenizer whose last two tokens are
<|endofchunk|> and <image>, config.data.template="open_flamingo" writes it, new_tokens=2 of
config.fusion makes room for both, and say_new=True there lets it be said.
AdamW at a constant rate, whose decay is of the gated layers alone. The data are your own files, put
into the folder you start from. Arguments, joined by commas:

  7b, 13b   the language model (default 7b)
  debug     50 steps of a tiny model on easy-VQA in seconds; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.llm import llama
from vlm_jax.towers import vit

LLAMAS = ("7b", "13b")


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of the list above."""
  member, debug = base.choose(arg, LLAMAS, ("", "debug"))
  config = base.get_config()
  config.fusion.name = "flamingo"
  config.fusion.image_attention = "last"
  config.fusion.stage = "bridge"
  config.fusion.predict_unseen = False
  config.precision.compute = "bfloat16"

  clip = vit.FAMILIES["clip_vision_model"]
  config.tower.update(vit.size("L/14"))
  config.tower.image_size = 224
  config.tower.class_token = True
  config.tower.pre_norm = True
  config.tower.patch_bias = False
  config.tower.activation = "quick_gelu"
  config.tower.norm_eps = 1e-5
  config.tower.mean, config.tower.std = clip.mean, clip.std
  config.tower.remat = "full"
  config.connector.update(name="perceiver", width=config.tower.width, latents=64, depth=6, heads=8,
                          head_dim=64, activation="gelu")
  config.bridge.update(every=4, first=3, heads=8, head_dim=64, activation="gelu")
  config.llm.update(name="llama", **llama.size(f"1-{member}"))
  config.llm.remat = "full"

  config.data.update(rows=64, tokens=1024, images=24)
  config.data.decode.fit = "center_crop"
  config.data.sources.pages = base.source(
    name="mmc4", path="mmc4/*.jsonl", image_root="mmc4", form="document", held_out=0.001)
  config.data.sources.captions = base.source(
    name="webdataset", path="laion/*.tar", ratio=2, weight=0.2)

  config.optim.update(lr=1e-4, schedule="constant", warmup=1875, b2=0.999, weight_decay=0.1,
                      decay_pattern="bridge/.*kernel")
  config.train.update(steps=125_000, log_every=10, checkpoint_every=1000)
  config.evals.pages = base.evaluation(kind="perplexity", source="pages", split="validation")
  return shrink(config) if debug else config


def shrink(config: ConfigDict) -> ConfigDict:
  """The recipe at the size of a test, on easy-VQA: the same parts, narrow and few."""
  config.precision.compute = "float32"
  config.tower.update(image_size=64, patch=16, width=48, depth=2, mlp=96, heads=3, remat="none")
  config.connector.update(width=48, latents=4, depth=1, heads=2, head_dim=16)
  config.bridge.update(every=2, first=1, heads=2, head_dim=16)
  config.llm.update(vocab_size=1024, width=64, depth=2, mlp=128, heads=4, kv_heads=4, head_dim=16,
                    remat="none")
  config.fusion.stage = "all"  # nothing in it knows anything yet
  config.data.update(rows=8, tokens=128, images=8, window=32)
  del config.data.sources.pages, config.data.sources.captions, config.evals.pages
  config.data.sources.easy_vqa = base.source(name="easy_vqa", form="single")
  config.data.sources.text = base.source(name="pydoc")  # from which the tokenizer learns enough
  config.evals.easy_vqa = base.evaluation(
    kind="vqa", source="easy_vqa", split="test", limit=8)
  config.optim.update(lr=2e-3, warmup=5)
  config.train.update(steps=50, log_every=5, checkpoint_every=50)
  return config
