"""Nested dicts: flat and back, and the union of several."""

from vlm_jax.core.tree import flatten, unflatten, unite


def test_flat_and_back():
  tree = {"llm": {"norm": {"scale": 1}, "embed": 2}, "tower": 3}
  flat = flatten(tree)
  assert list(flat) == ["llm/embed", "llm/norm/scale", "tower"]
  assert unflatten(flat) == tree


def test_unite_keeps_every_host_and_changes_none():
  states = [{"count": 2, "shards": {"0": {"next": 3}}}, {"count": 2, "shards": {"1": {"next": 4}}}]
  assert unite(states) == {"count": 2, "shards": {"0": {"next": 3}, "1": {"next": 4}}}
  assert states[0]["shards"] == {"0": {"next": 3}}
