"""LLaVA-1.5 as published (arXiv:2310.03744): CLIP ViT-L/14 at 336 pixels, two layers, Vicuna 1.5.

The features are those before CLIP's last layer, without its class token: 24 x 24 slots an image.
Two stages, each an epoch with AdamW without decay, cosine after a warm-up of 3% (the scripts v1_5
of github.com/haotian-liu/LLaVA):

             trains                     rate   rows   images
  pretrain   connector                  1e-3   256    CLIP's middle square
  finetune   connector, language model  2e-5   128    the whole on a square of CLIP's mean colour

A row holds one picture and its text, up to 2048 slots. Theirs predicts captions without the
question in the first stage, and its prompts are Vicuna's; here our marks open turns, unless
config.data.template is a chat template. The data are LLaVA's own files, put into the folder you
start from. Arguments, joined by commas:

  7b, 13b              the language model (default 7b)
  pretrain, finetune   the stage (default finetune)
  debug                50 steps of a tiny model on easy-VQA in seconds; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.convert.processor import mean_colour
from vlm_jax.llm import llama
from vlm_jax.towers import vit

LLAMAS, STAGES = ("7b", "13b"), ("finetune", "pretrain")
# Trained part, learning rate, rows, documents of the epoch, file, folder of its images, fit.
STAGE = {
  "pretrain": ("projector", 1e-3, 256, 558_128, "blip_laion_cc_sbu_558k.json", "images",
               "center_crop"),
  "finetune": ("finetune", 2e-5, 128, 665_298, "llava_v1_5_mix665k.json", "data", "pad"),
}


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of the list above."""
  member, stage, debug = base.choose(arg, LLAMAS, STAGES, ("", "debug"))
  config = base.get_config()
  config.fusion.name = "concat"
  config.fusion.image_attention = "causal"
  config.precision.compute = "bfloat16"

  clip = vit.FAMILIES["clip_vision_model"]
  config.tower.update(vit.size("L/14"))
  config.tower.image_size = 336
  config.tower.class_token = True
  config.tower.pre_norm = True
  config.tower.post_norm = False  # the features before the last layer never meet it
  config.tower.feature_layer = -2
  config.tower.patch_bias = False
  config.tower.activation = "quick_gelu"
  config.tower.norm_eps = 1e-5
  config.tower.mean, config.tower.std = clip.mean, clip.std
  config.tower.remat = "full"
  config.connector.name = "mlp"  # mlp2x_gelu
  config.llm.update(name="llama", **llama.size(f"2-{member}"))
  config.llm.remat = "full"

  part, rate, rows, documents, path, root, fit = STAGE[stage]
  config.fusion.stage = part
  config.data.rows = rows
  config.data.images = 1
  config.data.tokens = 2048
  config.data.decode.fit = fit
  config.data.decode.border = mean_colour(clip.mean)
  config.data.sources.llava = base.source(
    name="llava_json", path=path, image_root=root, held_out=0.001)

  config.optim.lr = rate
  config.optim.schedule = "cosine"
  config.optim.b2 = 0.999
  config.optim.weight_decay = 0.0
  config.train.steps = documents // rows
  config.optim.warmup = round(0.03 * config.train.steps)
  config.train.log_every = 10
  config.train.checkpoint_every = 500
  config.evals.llava = base.evaluation(kind="perplexity", source="llava", split="validation")
  return shrink(config) if debug else config


def shrink(config: ConfigDict) -> ConfigDict:
  """The recipe at the size of a test, on easy-VQA: the same parts, narrow and few."""
  config.precision.compute = "float32"
  config.tower.update(image_size=64, patch=16, width=48, depth=3, mlp=96, heads=3, remat="none")
  config.llm.update(vocab_size=1024, width=64, depth=2, mlp=128, heads=4, kv_heads=4, head_dim=16,
                    remat="none")
  config.data.update(rows=8, tokens=192, window=32)
  del config.data.sources.llava, config.evals.llava
  config.data.sources.easy_vqa = base.source(name="easy_vqa", form="single")
  config.data.sources.text = base.source(name="pydoc")  # from which the tokenizer learns enough
  config.evals.easy_vqa = base.evaluation(
    kind="vqa", source="easy_vqa", split="test", limit=8)
  config.optim.update(lr=2e-3, warmup=5)
  config.train.update(steps=50, log_every=5, checkpoint_every=50)
  return config
