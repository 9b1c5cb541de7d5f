"""Recall at K of image-text retrieval, several captions a picture (as for COCO and Flickr30k)."""

from collections.abc import Sequence

import numpy as np


def recall_at(similarity: np.ndarray, owners: np.ndarray, ks: Sequence[int] = (1, 5, 10)
              ) -> dict[str, float]:
  """R@K in both directions.

  Args:
    similarity: f[images, texts].
    owners: i[texts], the image that each text describes.
    ks: how many of the best are looked at.

  Returns:
    "image_to_text@K": the share of images with one of their own texts among the K most similar;
    "text_to_image@K": the share of texts whose image is among the K most similar. A stranger that
    is exactly as similar counts as more similar, so a constant similarity recalls nothing.

  Raises:
    ValueError: shapes that do not fit, an image without a text, or a similarity that is not finite.
  """
  found = dict(zip(("image_to_text", "text_to_image"), strangers(similarity, owners), strict=True))
  return {f"{way}@{k}": float((before < k).mean()) for way, before in found.items() for k in ks}


def strangers(similarity: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """How many strangers are at least as similar as one's own: i[images] texts, i[texts] images.

  Args and errors as of `recall_at`.
  """
  similarity, owners = np.asarray(similarity), np.asarray(owners)
  images, texts = similarity.shape
  if owners.shape != (texts,) or set(np.unique(owners)) != set(range(images)):
    raise ValueError("recall_at: owners must name an image for each text, and each image once")
  if not np.isfinite(similarity).all():
    raise ValueError("recall_at: the similarity is not finite everywhere")
  own = owners == np.arange(images)[:, None]
  best = np.where(own, similarity, -np.inf).max(1, keepdims=True)
  mine = similarity[owners, np.arange(texts)]
  return ((similarity >= best) & ~own).sum(1), ((similarity >= mine) & ~own).sum(0)


def nearest(similarity: np.ndarray, count: int, axis: int) -> np.ndarray:
  """bool[images, texts], the `count` largest along an axis; of equal ones the first."""
  order = np.argsort(-similarity, axis=axis, kind="stable")
  return np.argsort(order, axis=axis, kind="stable") < count


def reranked(similarity: np.ndarray, matches: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """Chosen pairs by the sum of both scores; behind all of them the others, by the first alone.

  Args:
    similarity: f[images, texts].
    matches: f[images, texts], of chosen pairs.
    chosen: bool[images, texts], at least one.
  """
  sums = similarity + np.where(chosen, matches, 0)
  return np.where(chosen, sums, similarity - similarity.max() + sums[chosen].min() - 1)
