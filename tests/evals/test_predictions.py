"""Files of predictions: taken up after a kill, and compared only when they can be."""

import json

import numpy as np
import pytest

from vlm_jax.cli import main as cli
from vlm_jax.core.errors import DataError, DiskError
from vlm_jax.evals import predictions
from vlm_jax.evals.bootstrap import paired


def write(path, scores, **extra):
  path.write_text(predictions.lines(
    {"key": f"q{i}", "document": f"d{i // 4}", "score": float(score), **extra}
    for i, score in enumerate(scores)))
  return str(path)


def test_a_torn_last_line_is_cut_and_the_file_goes_on(tmp_path):
  path = tmp_path / "new" / "p.jsonl"
  out = predictions.Appender(path)
  out.append([{"key": "a", "prediction": "é"}, {"key": "b"}])
  out.close()
  whole = path.read_bytes()
  path.write_bytes(whole + b'{"key": "c", "pred')
  again = predictions.Appender(path)
  assert [row["key"] for row in again.rows] == ["a", "b"]
  assert path.read_bytes() != whole  # a file named by mistake is not touched before an append
  again.append([{"key": "c"}])
  again.close()
  assert [row["key"] for row in predictions.read(path)] == ["a", "b", "c"]
  path.write_text('{"key": "a"}\nnot json\n{"key": "b"}\n')
  with pytest.raises(DataError, match="line 2 is not JSON"):
    predictions.Appender(path)
  (tmp_path / "file").write_text("")
  with pytest.raises(DiskError, match="cannot be written"):
    predictions.Appender(tmp_path / "file" / "p.jsonl")


def test_a_text_may_hold_what_unicode_calls_a_line_break(tmp_path):
  rows = [{"key": "a", "prediction": "one\u2028two\x85three"}, {"key": "b"}]
  out = predictions.Appender(tmp_path / "p.jsonl")
  out.append(rows)
  out.close()
  again = predictions.Appender(tmp_path / "p.jsonl")
  again.close()
  assert again.rows == rows == predictions.read(tmp_path / "p.jsonl")


def test_a_difference_is_surer_when_it_is_paired():
  rng = np.random.default_rng(0)
  hard = rng.random(400)
  a, b = (rng.random(400) < hard).astype(float), np.zeros(400)
  b[:] = np.where(rng.random(400) < 0.1, 1, a)  # right wherever A is, and now and then more
  found = paired(a, b)
  assert found.low > 0 and found.p < 0.01
  assert found.difference == pytest.approx(b.mean() - a.mean())
  # Shuffled, nothing is paired any more and the interval is wide.
  loose = paired(a, rng.permutation(b))
  assert loose.high - loose.low > 1.5 * (found.high - found.low)
  assert paired(b, a).difference == -found.difference and paired(b, a).high < 0
  same = paired(a, a)
  assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_no_difference_is_found_as_often_as_chance_says():
  rng = np.random.default_rng(1)
  p = [paired(rng.normal(size=60), rng.normal(size=60), resamples=500).p for _ in range(200)]
  assert 0.01 < np.mean(np.array(p) < 0.05) < 0.12 and np.mean(p) == pytest.approx(0.5, abs=0.1)


def test_compare_from_the_command_line(tmp_path, capsys):
  scores = np.arange(40) % 3 == 0
  a, b = write(tmp_path / "a", scores), write(tmp_path / "b", scores | (np.arange(40) % 5 == 0))
  assert cli.main(["compare", a, b, "--json"]) == 0
  said = json.loads(capsys.readouterr().out)
  assert said["difference"] == pytest.approx(said["b"] - said["a"]) and said["difference"] > 0
  assert said["questions"] == 40 and said["documents"] == 10 and said["p"] < 0.05
  assert cli.main(["compare", a, b]) == 0
  assert f"B - A {said['difference']:+.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("change,code,sentence", [
  (lambda rows: rows[:-2], 2, "2 of 8 questions of A are not in B (q6, q7)"),
  (lambda rows: [*rows, {**rows[0], "key": "q9"}], 2, "1 of 9 questions of B are not in A (q9)"),
  (lambda rows: [*rows, rows[0]], 65, "B has 'q0' twice"),
  (lambda rows: [{"key": "q0", "exact": 1}], 65, "row 1 lacks 'key' or the finite number"),
  (lambda rows: [{"key": 1, "score": float("nan")}], 65, "the finite number 'score' (its"),
  (lambda rows: [{"key": 1, "score": 1}, {"key": 1, "score": 0}], 65, "B has '1' twice"),
  (lambda rows: [], 65, "B has no predictions"),
])
def test_what_cannot_be_compared(change, code, sentence, tmp_path, capsys):
  a, b = tmp_path / "A", tmp_path / "B"
  write(a, np.ones(8))
  b.write_text(predictions.lines(change(predictions.read(a))))
  assert cli.main(["compare", str(a), str(b)]) == code
  assert sentence in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_compare_needs_two_files(tmp_path, capsys):
  assert cli.main(["compare", "x.jsonl"]) == 2
  assert cli.main(["compare", "x.jsonl", "y.jsonl"]) == 65
  assert "x.jsonl cannot be read" in capsys.readouterr().err
