"""Numbers that are said about visual tokens, computed: which are right, rounded or wrong.

"rounded" claims are what their value rounds to at the last digit that was said; "wrong" ones are
neither. Counts of words in tokens are those of LLaMA's tokenizer.
"""

import dataclasses
import math
from fractions import Fraction

import pytest

from vlm_jax.ops import costs
from vlm_jax.ops.costs import LLMS, causal, cross, full, kv_bytes
from vlm_jax.ops.visual_tokens import SYSTEMS, Footprint, fuyu, ovis2, patches

VICUNA = LLMS["vicuna-7b"]
KV = kv_bytes(4146, 32, 32, 128)  # the usual example: an image of 4096 tokens, 50 of text
KV_FEW = kv_bytes(350, 32, 32, 128)  # and said to be compressed


def slots(name, height=672, width=672):
  return SYSTEMS[name].image(height, width).slots


def flops(image, text=64):
  """Of a prompt when every token sees every token, as estimates on paper have it."""
  return costs.layer_flops(dataclasses.replace(image, mask="full"), VICUNA, text)


def speedup(image, text=64):
  return Fraction(flops(Footprint(576), text), flops(image, text))


@dataclasses.dataclass(frozen=True)
class Claim:
  """What is said, the number claimed, the exact one, the claim's last digit, the verdict."""

  says: str
  claimed: float
  exact: int | Fraction
  verdict: str
  digit: float = 1


OCR = {"tiny": 64, "small": 100, "base": 256, "large": 400}
WICO_PLUS = SYSTEMS["WiCo+"].image(336, 336)
CLAIMS = [
  Claim("336 pixels in patches of 14 are 576 tokens", 576, patches(336, 14), "right"),
  Claim("224 pixels in patches of 14 are 256 tokens", 256, patches(224, 14), "right"),
  Claim("336 pixels are 256 tokens of CLIP", 256, patches(336, 14), "wrong"),
  Claim("a high-resolution ViT makes 4096 tokens of 1024 pixels (patches of 16)", 4096,
        patches(1024, 16), "right"),
  Claim("the same with patches of 14", 4096, (1024 // 14) ** 2, "wrong"),
  Claim("'What is in this image?' and an image: 582", 582, 576 + 6, "right"),
  Claim("... with Vicuna's template", 582, 1 + 34 + 576 + 13, "wrong"),
  Claim("'... How many people are there?' and an image: 587", 587, 576 + 13, "wrong"),
  Claim("587 of 4096 are 14.3%", 14.3, Fraction(100 * 587, 4096), "rounded", 0.1),
  Claim("... 589 are 14.4%", 14.4, Fraction(100 * 589, 4096), "rounded", 0.1),
  Claim("... 14.3% of the 2048 of LLaMA 1", 14.3, Fraction(100 * 587, 2048), "wrong", 0.1),
  Claim("two images, 8 and 3 tokens: 1163", 1163, 576 + 8 + 576 + 3, "right"),
  Claim("... 'Compare these two images' has 8", 1163, 576 + 5 + 576 + 3, "wrong"),
  Claim("30 frames: 17,280", 17280, 30 * 576, "right"),
  Claim("8 frames: 4,608", 4608, 8 * 576, "right"),
  Claim("a causal mask of 8 tokens has 36 ones", 36, causal(8), "right"),
  Claim("... with an image of 3 and one of 1 in both directions 39", 39,
        costs.image_blocks(8, [3, 1]), "right"),
  Claim("10 images of 4096: 40,960", 40960, 10 * patches(1024, 16), "right"),
  Claim("... and 500 of text: 41,460", 41460, 10 * patches(1024, 16) + 500, "right"),
  Claim("... which are more than 128k", True, 41460 > 128 * 1024, "wrong"),
  Claim("LLaVA-NeXT has 2,880 tokens at 672 x 672", 2880, slots("LLaVA-NeXT"), "wrong"),
  Claim("... before newlines", 2880, slots("LLaVA-NeXT") - 48, "right"),
  Claim("50 tokens of text: 2,500 pairs", 2500, full(50), "right"),
  Claim("... that a causal model computes", 2500, causal(50), "wrong"),
  Claim("4096 and 50: 17,189,316 pairs", 17189316, full(4146), "right"),
  Claim("... 6,876 times those of the text", 6876, Fraction(full(4146), full(50)), "rounded"),
  Claim("41,000 tokens: 1.68 G pairs", 1.68e9, full(41000), "rounded", 1e7),
  Claim("12 layers of them: 206 M", 206e6, 12 * full(4146), "rounded", 1e6),
  Claim("256 and 50 are 350", 350, 256 + 50, "wrong"),
  Claim("350 tokens: 122 K pairs", 122e3, full(350), "rounded", 1e3),
  Claim("... 1.5 M in 12 layers", 1.5e6, 12 * full(350), "rounded", 1e5),
  Claim("137 times fewer pairs", 137, Fraction(full(4146), full(350)), "wrong"),
  Claim("... with 256 and 50", 137, Fraction(full(4146), full(306)), "wrong"),
  Claim("... hence 137 times faster", 137,
        Fraction(flops(Footprint(4096), 50), flops(Footprint(300), 50)), "wrong"),
  Claim("2.1 GB of keys and values for 4146 tokens", 2.1e9, KV, "wrong", 1e8),
  Claim("180 MB for 350", 180e6, KV_FEW, "rounded", 1e7),
  Claim("12 times less", 12, Fraction(KV, KV_FEW), "rounded"),
  Claim("16.1 GB with 14 GB of weights", 16.1e9, 14 * 10**9 + KV, "wrong", 1e8),
  Claim("14.18 GB with 14 GB of weights", 14.18e9, 14 * 10**9 + KV_FEW, "rounded", 1e7),
  Claim("8 sequences fit into 40 GB", 8, costs.largest_batch(40 * 10**9, 14 * 10**9, KV), "wrong"),
  Claim("96 short ones do", 96, costs.largest_batch(40 * 10**9, 14 * 10**9, KV_FEW), "wrong"),
  Claim("cross-attention of 100 to 4096 has 40 times fewer pairs", 40,
        Fraction(full(4196), cross(100, 4096)), "rounded", 10),
  Claim("... with causal masks and the text's own pairs", 40,
        Fraction(causal(4196), cross(100, 4096) + causal(100)), "wrong", 10),
  Claim("4096 to 32 is 128 times", 128, Fraction(4096, 32), "right"),
  Claim("... which is what BLIP-2 does", 128, Fraction(patches(224, 14) + 1, slots("BLIP-2")),
        "wrong"),
  Claim("4096 to 576 is 7 times", 7, Fraction(4096, 576), "rounded"),
  Claim("... which is what LLaVA's MLP does", 7, Fraction(slots("LLaVA-1.5"), 576), "wrong"),
  Claim("... which is what DeepSeek-VL does", 7, Fraction(4096, slots("DeepSeek-VL")), "rounded"),
  Claim("4096 to 256 is 16 times", 16, Fraction(4096, 256), "right"),
  Claim("... DeepSeek-OCR's, newlines counted", 16, Fraction(4096, slots("DeepSeek-OCR base")),
        "wrong"),
  Claim("of 8k, 4096 leave 4,000", 4000, 8192 - 4096, "rounded", 1000),
  Claim("of 8k, 256 leave 7,800", 7800, 8192 - 256, "wrong", 100),
  Claim("64 latents of 3 images: 192", 192, 3 * SYSTEMS["Flamingo"].image(9, 9).memory.rows,
        "right"),
  Claim("... for 576 tokens: 9 times fewer", 9, Fraction(576, 64), "right"),
  Claim("... for 256: 4 times", 4, Fraction(256, 64), "right"),
  Claim("222 of 2048 are 10.8%", 10.8, Fraction(100 * 222, 2048), "rounded", 0.1),
  Claim("... of Flamingo's context", 10.8, Fraction(100 * (30 + 3 * slots("Flamingo")), 2048),
        "wrong", 0.1),
  Claim("a resampler's scores are 64 x 256", 64 * 256, cross(64, 256 + 64), "wrong"),
  Claim("32 and 12 of 2048 are 2.1%", 2.1, Fraction(100 * (slots("BLIP-2") + 12), 2048), "rounded",
        0.1),
  Claim("256 of 4096 are 6%", 6, Fraction(100 * 256, 4096), "rounded"),
  Claim("512 of 4096 are 12%", 12, Fraction(100 * 512, 4096), "rounded"),
  Claim("CM3: 256 codes", 256, slots("CM3"), "right"),
  Claim("WiCo: 144", 144, slots("WiCo"), "right"),
  Claim("WiCo+ doubles its tokens in late layers", 2 * 144, WICO_PLUS.later, "wrong"),
  Claim("fewer tokens: 3.13 times fewer FLOPs (WiCo, 64 of text)", 3.13,
        speedup(SYSTEMS["WiCo"].image(9, 9)), "rounded", 0.01),
  Claim("... 2.76 with WiCo+", 2.76, speedup(WICO_PLUS), "rounded", 0.01),
  Claim("... 2.47 when four layers have them all", 2.47,
        speedup(dataclasses.replace(WICO_PLUS, at=-4)), "rounded", 0.01),
  Claim("256 of 4096 drop 90 to 95%", True, 90 <= 100 * (1 - 256 / 4096) <= 95, "right"),
  Claim("576 of 4096 drop 90 to 95%", True, 90 <= 100 * (1 - 576 / 4096) <= 95, "wrong"),
  Claim("LLaVA-Mini: 0.17% of 576", 0.17, Fraction(100 * slots("LLaVA-Mini"), 576), "rounded",
        0.01),
  Claim("YOPO: windows of 5 x 5 leave 4.3% of the pairs of patches", 4.3, Fraction(100 * 25, 576),
        "rounded", 0.1),
  Claim("Victor: 1% of 576", 1, Fraction(100 * SYSTEMS["Victor"].image(9, 9).later, 576),
        "rounded"),
  Claim("Victor: 5.1 times fewer FLOPs", 5.1, speedup(SYSTEMS["Victor"].image(9, 9)), "rounded",
        0.1),
  Claim("Ovis: 64 to 400 tokens", True, 64 <= ovis2(448, 896) <= 400, "wrong"),
  *(Claim(f"DeepSeek-OCR {mode}: {said} tokens", said, slots(f"DeepSeek-OCR {mode}"), "wrong")
    for mode, said in OCR.items()),
  *(Claim(f"DeepSeek-OCR {mode}: {said} without newlines", said,
          slots(f"DeepSeek-OCR {mode}") - math.isqrt(said) - 1, "right")
    for mode, said in OCR.items()),
  Claim("a linear projector: 4,198,400 parameters", 4198400, (1024 + 1) * 4096, "right"),
  Claim("the MLP has twice as many", 2,
        Fraction((1024 + 1) * 4096 + (4096 + 1) * 4096, (1024 + 1) * 4096), "wrong"),
  Claim("Fuyu at 1080p: 2340", 2340, fuyu(1080, 1920), "right"),
  Claim("Chameleon: 1024 between begin and end", 1024 + 2, slots("Chameleon"), "right"),
  Claim("LLaVA-NeXT at 1080p: 1948", 1948, slots("LLaVA-NeXT", 1080, 1920), "right"),
]


def verdict(claim: Claim) -> str:
  if claim.claimed == claim.exact:
    return "right"
  nearest = round(Fraction(claim.exact) / Fraction(str(claim.digit)))
  said = round(Fraction(str(float(claim.claimed))) / Fraction(str(claim.digit)))
  return "rounded" if nearest == said else "wrong"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.says)
def test_claim(claim):
  assert verdict(claim) == claim.verdict, f"{claim.says}: {float(claim.exact)}"


@pytest.mark.parametrize("exact,computed", [
  (17189316, full(4146)), (206271792, 12 * full(4146)), (8596731, causal(4146)),
  (1275, causal(50)), (122500, full(350)), (1470000, 12 * full(350)), (1681000000, full(41000)),
  (2173698048, KV), (183500800, KV_FEW), (543424512, kv_bytes(4146, 32, 8, 128)),
  (17606416, full(4196)), (409600, cross(100, 4096)), (2928, slots("LLaVA-NeXT")),
  (20979712, 1025 * 4096 + 4097 * 4096),
  (11, costs.largest_batch(40 * 10**9, 14 * 10**9, KV)),
  (141, costs.largest_batch(40 * 10**9, 14 * 10**9, KV_FEW)),
  (33, 30 + 3 * slots("Flamingo")), (273, slots("DeepSeek-OCR base")),
  (301989888, kv_bytes(576, 32, 32, 128)), (524288, kv_bytes(1, 32, 32, 128))])
def test_exact_integers(exact, computed):
  assert exact == computed


def test_how_far_off_the_ratios_are():
  off = lambda claimed, exact: abs(claimed - exact) / exact
  pairs = Fraction(full(4146), full(350))
  assert round(float(pairs), 2) == 140.32
  assert round(float(Fraction(full(4146), full(306))), 2) == 183.58
  assert round(float(Fraction(KV, KV_FEW)), 3) == 11.846
  assert 0.01 < off(137, pairs) < 0.03
  asked = Fraction(full(4196), cross(100, 4096))
  assert 0.05 < off(40, asked) < 0.08
  assert round(float(asked), 2) == 42.98
  assert round(float(Fraction(full(4196), cross(100, 4096) + full(100))), 2) == 41.96
  assert round(float(Fraction(causal(4196), cross(100, 4096) + causal(100))), 2) == 21.24
  # Pairs fall 140 times, but the matrices see 12 times fewer tokens, and they are most of the work.
  assert 11.8 < flops(Footprint(4096), 50) / flops(Footprint(300), 50) < 14
