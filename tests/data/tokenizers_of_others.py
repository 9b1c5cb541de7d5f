"""Tokenizers as published checkpoints have them, small: learned here, saved by transformers."""

import io
import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

WORDS = ("a photo of the small red circle and blue square don't it's running what is in this "
         "picture? yes, no. USER: ASSISTANT: system user assistant question answer one two 12 345 "
         "The quick brown fox jumps over a lazy dog; sphinx of black quartz, judge my vow!").split()
TEXTS = [" ".join(WORDS[(3 * k + j) % len(WORDS)] for j in range(9)) for k in range(80)]


def learn(inner, size, specials, **options):
  """Byte pairs of the texts: (vocabulary, merges)."""
  trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(specials),
                                show_progress=False, **options)
  inner.train_from_iterator(TEXTS, trainer)
  model = json.loads(inner.to_str())["model"]
  return model["vocab"], [tuple(pair) for pair in model["merges"]]


def bytes_of(size, specials, **options):
  """A byte-level tokenizer, as GPT-2's, Llama 3's and Qwen's."""
  inner = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = tokenizers.decoders.ByteLevel()
  learn(inner, size, specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
  return inner


def words_of(size, specials, prefix=True):
  """A tokenizer of sentencepiece's kind, as Llama 1 and 2 (`prefix`) and Gemma have it."""
  inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
  steps = [normalizers.Prepend("▁")] if prefix else []
  inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
  inner.decoder = tokenizers.decoders.Sequence([
    tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
    tokenizers.decoders.Fuse(), *([tokenizers.decoders.Strip(" ", 1, 0)] if prefix else [])])
  # Bytes are tokens without being special.
  alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
  split = pre_tokenizers.Split("▁", "merged_with_next")
  inner.pre_tokenizer = split
  learn(inner, size, [*specials, *alphabet])
  content = json.loads(inner.to_str())
  content["added_tokens"] = [token for token in content["added_tokens"]
                             if not token["content"].startswith("<0x")]
  content["pre_tokenizer"] = None
  return tokenizers.Tokenizer.from_str(json.dumps(content))


def save(inner, folder, **settings):
  """tokenizer.json and tokenizer_config.json as transformers writes them."""
  transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **settings).save_pretrained(folder)
  return folder


def clip(folder, length):
  """CLIP's: lower case, pairs inside words, <|startoftext|> and <|endoftext|>."""
  inner = transformers.CLIPTokenizer()._tokenizer
  inner.model = models.BPE(end_of_word_suffix="</w>")
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  alphabet += [letter + "</w>" for letter in alphabet]
  vocab, merges = learn(inner, 640, (), initial_alphabet=alphabet, end_of_word_suffix="</w>")
  vocab = {**vocab, "<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
  transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length
                             ).save_pretrained(folder)
  return len(vocab)


def siglip(folder, length):
  """SigLIP's: a unigram of sentencepiece, lower case, no punctuation, closed and padded by </s>."""
  import sentencepiece

  file = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=90, model_type="unigram",
    pad_id=-1, bos_id=-1, eos_id=1, unk_id=0, hard_vocab_limit=False, minloglevel=2)
  folder.mkdir(exist_ok=True)
  (folder / "spiece.model").write_bytes(file.getvalue())
  tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=length)
  tokenizer.save_pretrained(folder)
  return tokenizer.vocab_size


def siglip2(folder, length):
  """SigLIP 2's: Gemma's, lower case, closed by <eos>, padded on the right by <pad>."""
  specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
  model = json.loads(words_of(480, specials, prefix=False).to_str())["model"]
  transformers.Siglip2Tokenizer(
    vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=False,
    add_eos_token=True, padding_side="right", model_max_length=length).save_pretrained(folder)
  return len(model["vocab"])
