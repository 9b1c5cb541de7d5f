import numpy as np
import pytest

from vlm_jax.evals.metrics.retrieval import recall_at


def slowly(similarity, owners, k):
  """Sorts every row and column and looks."""
  images, texts = similarity.shape
  to_text = [any(owners[t] == i for t in np.argsort(-similarity[i])[:k]) for i in range(images)]
  to_image = [owners[t] in np.argsort(-similarity[:, t])[:k] for t in range(texts)]
  return float(np.mean(to_text)), float(np.mean(to_image))


def test_it_is_sorting_and_looking():
  rng = np.random.default_rng()
  owners = rng.permutation(np.concatenate([np.arange(30), rng.integers(0, 30, 90)]))
  similarity = rng.normal(size=(30, 120)) + 1.5 * (owners == np.arange(30)[:, None])
  got = recall_at(similarity, owners, (1, 3, 10))
  for k in (1, 3, 10):
    assert (got[f"image_to_text@{k}"], got[f"text_to_image@{k}"]) == slowly(similarity, owners, k)
  assert got["image_to_text@1"] < got["image_to_text@10"] > 0.5
  assert got["image_to_text@1"] != got["text_to_image@1"]
  # Another owner is another number.
  assert recall_at(similarity, np.roll(owners, 1), (3,)) != recall_at(similarity, owners, (3,))


def test_a_constant_recalls_nothing_and_the_truth_everything():
  owners = np.repeat(np.arange(4), 5)
  right = (owners == np.arange(4)[:, None]).astype(float)
  assert set(recall_at(np.zeros((4, 20)), owners, (1, 3)).values()) == {0.0}
  assert set(recall_at(right, owners).values()) == {1.0}


def test_wrong_inputs():
  with pytest.raises(ValueError, match="owners"):
    recall_at(np.zeros((2, 3)), np.array([0, 0, 0]))
  with pytest.raises(ValueError, match="owners"):
    recall_at(np.zeros((2, 3)), np.array([0, 1]))
  with pytest.raises(ValueError, match="not finite"):
    recall_at(np.full((1, 1), np.nan), np.array([0]))
