"""GridQA: drawn the same every time, splits apart, and answers that only the picture has."""

import collections
import itertools

import numpy as np
import pytest

from vlm_jax import recipes
from vlm_jax.core.document import Image, Text
from vlm_jax.data import tokenizer
from vlm_jax.data.sources import gridqa

FEW = 400
FIRST = (1, 1, 1, 0, 0, 5, 2, 0, 0, 5, 3, 4, 2, 3, 7, 1)


@pytest.fixture(scope="module")
def splits():
  return {name: list(itertools.islice(items, FEW)) for name, items in gridqa.prepare().items()}


def read(image: Image) -> tuple[int, ...]:
  """The colours of the cells of a picture."""
  colours = [gridqa.PALETTE[name] for name in gridqa.COLOURS]
  middle = image.data[gridqa.CELL // 2 :: gridqa.CELL, gridqa.CELL // 2 :: gridqa.CELL]
  return tuple(colours.index(tuple(cell)) for cell in middle.reshape(-1, 3).tolist())


def test_records_are_functions_of_split_and_number(splits):
  again = gridqa.prepare()
  for name, records in splits.items():
    assert records == list(itertools.islice(again[name], FEW))
    assert [record["key"] for record in records] == [f"{name}/{i}" for i in range(FEW)]
    assert records[0] != splits["train"][0] or name == "train"
  # Written down: whatever changes it changes every number that was measured.
  assert splits["test"][0]["grid"] == FIRST


def test_no_grid_is_in_two_splits(splits):
  for name, records in splits.items():
    for record in records:
      assert gridqa.split_of(record["grid"]) == gridqa.split_of(record["near"]) == name
      changed = [a != b for a, b in zip(record["grid"], record["near"], strict=True)]
      assert sum(changed) == 1
  grids = [record["grid"] for records in splits.values() for record in records]
  assert len(set(grids)) == len(grids)
  counts = np.bincount(np.concatenate(grids))
  assert len(counts) == 8 and np.ptp(counts) < 0.1 * counts.mean()


def test_pictures_show_what_captions_and_answers_say(splits):
  record = splits["test"][3]
  grid = record["grid"]
  (picture, *turns), = gridqa.parts(record, "fan_out")
  assert picture.data.shape == (16, 16, 3) and read(picture) == grid
  assert [part.branch for part in turns] == [k for k in range(1, 17) for _ in range(2)]
  said = [gridqa.COLOURS[colour] for colour in grid]
  assert [part.text for part in turns[::2]] == list(gridqa.PLACES)
  assert [part.text for part in turns[1::2]] == said and all(part.loss for part in turns[1::2])
  alone = gridqa.parts(record, "single")
  assert [(one[1].text, one[2].text) for one in alone] == [*zip(gridqa.PLACES, said, strict=True)]
  (picture, text), = gridqa.parts(record, "caption")
  assert text.text.replace(",", "").split() == said and text.text.count(",") == 3
  for one, (shown, told) in zip((grid, record["near"]), gridqa.parts(record, "pair"), strict=True):
    assert read(shown) == one and told.text == gridqa.caption(one)


def test_the_right_caption_of_a_match_is_first_or_second(splits):
  places = []
  for record in splits["test"]:
    (picture, *captions), = gridqa.parts(record, "match")
    assert read(picture) == record["grid"] and [one.branch for one in captions] == [1, 2]
    right = [one.text == gridqa.caption(record["grid"]) for one in captions]
    assert right == [one.loss for one in captions] and sum(right) == 1
    places += [right.index(True)]
  assert 0.4 < np.mean(places) < 0.6


def test_only_the_last_grid_answers_the_last_question(splits):
  for record in splits["test"][:50]:
    parts, = gridqa.parts(record, "interleaved")
    assert len(parts) == 3 * gridqa.SHOWN
    shown = [read(part) for part in parts[::3]]
    assert {gridqa.split_of(grid) for grid in shown} == {"test"} and len(set(shown)) == 3
    for grid, asked, said in zip(shown, parts[1::3], parts[2::3], strict=True):
      assert said.text == gridqa.COLOURS[grid[gridqa.PLACES.index(asked.text)]]
    cell = gridqa.PLACES.index(parts[-2].text)
    assert shown[-1][cell] not in [grid[cell] for grid in shown[:-1]]


@pytest.mark.parametrize("form, count", [("binding", gridqa.BOUND), ("episode", 9)])
def test_a_name_holds_in_its_document_alone(splits, form, count):
  meant = collections.defaultdict(set)
  for record in splits["test"][:100]:
    parts, = gridqa.parts(record, form)
    pictures, names = parts[::2], [part.text for part in parts[1::2]]
    colours = [set(read(picture)) for picture in pictures]
    assert len(names) == count and all(len(one) == 1 for one in colours)
    bound = {}
    for colour, name in zip([one.pop() for one in colours], names, strict=True):
      assert bound.setdefault(colour, name) == name
      meant[name].add(colour)
    assert len(set(bound.values())) == len(bound)
    if form == "episode":
      assert len(set(names[:8])) == 8 and names[8] in names[:8]
  assert meant.keys() == set(gridqa.NAMES) and all(len(found) == 8 for found in meant.values())


def test_where_a_colour_was_before_is_said_by_its_picture_alone(splits):
  """The last name, where it came once before, did so behind any picture: places teach nothing."""
  seen = collections.Counter()
  for number in range(10_000):
    parts, = gridqa.parts(splits["train"][0] | {"key": f"train/{number}"}, "binding")
    names = [part.text for part in parts[1::2]]
    if names[:-1].count(names[-1]) == 1:
      seen[len(names) - 1 - names.index(names[-1])] += 1
  assert seen.keys() == set(range(1, gridqa.BOUND))
  assert max(seen.values()) < 0.2 * seen.total() and min(seen.values()) > 0.025 * seen.total()


def test_every_word_is_one_token_of_the_recipe(splits):
  texts = [text for record in splits["train"] for text in gridqa.texts(record)]
  config = recipes.load("configs/gridqa.py")
  words = tokenizer.train(texts, config.llm.vocab_size)
  inside = [f" {colour}" for colour in gridqa.COLOURS]
  for word in (*gridqa.PLACES, *gridqa.COLOURS, *gridqa.NAMES, *inside):
    assert len(words.encode(word)) == 1, word
  for form in gridqa.FORMS:
    for parts in gridqa.parts(splits["test"][0], form):
      said = {word.strip(",") for part in parts if isinstance(part, Text)
              for word in part.text.split()}
      assert said <= {*gridqa.PLACES, *gridqa.COLOURS, *gridqa.NAMES}
