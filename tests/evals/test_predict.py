"""Predictions of a tiny model: interrupted anywhere, the file ends up as if it had not been."""

import json

import pytest

import vlm_jax
from tests.data.broken_source import png
from vlm_jax.cli import main as cli
from vlm_jax.core.document import Document, Image, Text
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import pipeline, template
from vlm_jax.evals.predict import predict
from vlm_jax.evals.predictions import read
from vlm_jax.evals.requests import Request, read_requests
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, stack

BATCH, TOKENS = 3, 4


@pytest.fixture
def asked(tmp_path):
  rows = [{"id": f"r{i}", "prompt": ("why? " * (1 + i % 4)).strip(), "image": f"{i % 3}.png"}
          for i in range(7)]
  for i in range(3):
    (tmp_path / f"{i}.png").write_bytes(png(i, 16))
  (tmp_path / "2.png").write_bytes(png()[:400])  # damaged
  (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return read_requests(tmp_path / "asked.jsonl")


def run(setup, asked, out, **options):
  return predict(*setup, asked, out, step=5, batch=BATCH, max_tokens=TOKENS, **options)


def by_key(out):
  rows = read(out)
  assert len({row["key"] for row in rows}) == len(rows), "a request was answered twice"
  return {row["key"]: row.get("prediction", row.get("error")) for row in rows}


def test_whole_and_interrupted_are_the_same(setup, asked, tmp_path):
  whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
  said = []
  last = run(setup, asked, whole, report=said.append)
  want = by_key(whole)
  assert last["done"] == last["total"] == 7 == len(want) and last["bad"] == 2
  assert {key for key, text in want.items() if text.startswith("truncated")} == {"r2", "r5"}
  assert len(set(want.values())) > 2 and [p["done"] for p in said] == [2, 5, 7]

  def interrupt(progress):
    if progress["done"] >= 5:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(setup, asked, cut, report=interrupt)
  assert len(read(cut)) == 5  # the batch before the interruption is on the disk
  with open(cut, "ab") as file:
    file.write(b'{"key": "r6", "predic')
  assert run(setup, asked, cut)["done"] == 7 and by_key(cut) == want
  # Nothing is left to do, and nothing is done.
  before = cut.read_bytes()
  assert run(setup, asked, cut)["done"] == 7 and cut.read_bytes() == before
  with pytest.raises(UsageError, match="holds predictions of checkpoint 5, not 6"):
    predict(*setup, asked, cut, step=6, batch=BATCH, max_tokens=TOKENS)


def test_a_prediction_is_the_answer_to_one_question(setup, asked, tmp_path):
  run(setup, asked, tmp_path / "p.jsonl")
  rows = {row["key"]: row for row in read(tmp_path / "p.jsonl")}
  for key in ("r0", "r3"):
    request = next(request for request in asked if request.key == key)
    alone = vlm_jax.Bundle(*setup).answer(request.prompt, request.images, max_tokens=TOKENS)
    assert rows[key]["prediction"] == alone.text and rows[key]["question"] == request.prompt
    assert rows[key]["log_prob"] == pytest.approx(alone.log_prob, abs=1e-3)
  assert rows["r0"]["prediction"] != rows["r1"]["prediction"] or (
    rows["r0"]["log_prob"] != rows["r1"]["log_prob"])


def test_a_conversation_is_read_up_to_its_last_question(setup, asked, tmp_path):
  """One question is the prompt it is elsewhere, and earlier turns change the answer to it."""
  question = {"role": "user", "content": [{"type": "image", "image": "0.png"},
                                          {"type": "text", "text": "why?"}]}
  earlier = [question, {"role": "assistant", "content": "no"}, {"role": "user", "content": "why?"}]
  chats = [{"id": "one", "messages": [question]}, {"id": "more", "messages": earlier},
           {"id": "other", "messages": [question, {"role": "assistant", "content": "so it is"},
                                        earlier[2]]}]
  (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
  requests = read_requests(tmp_path / "chat.jsonl")
  run(setup, [*requests, asked[0]], tmp_path / "p.jsonl")
  rows = {row["key"]: row for row in read(tmp_path / "p.jsonl")}
  assert asked[0].prompt == "why?" and rows["one"]["prediction"] == rows["r0"]["prediction"]
  assert rows["one"]["log_prob"] == pytest.approx(rows["r0"]["log_prob"], abs=1e-3)
  assert rows["more"]["question"] == "why?" and len({row["log_prob"] for row in rows.values()}) > 2
  # By hand: the turns, earlier answers learned as in training (a mask may end there), a bare mark.
  config, params = setup
  turns = (Text("why?", "user"), Text("so it is", "assistant", loss=True), Text("why?", "user"))
  document = Document((Image(png(0, 16)), *turns, Text("", "assistant")), "", "other")
  encoded = template.encode_prompt(document, pipeline.load_tokenizer(config),
                                   pipeline.image_decoder(config))
  said = generate(config, params, stack(layouts([encoded], config), config, rows=1, bucket=64),
                  max_tokens=TOKENS, stop=(pipeline.load_tokenizer(config).eos,))
  assert rows["other"]["log_prob"] == pytest.approx(float(said.log_probs.sum()), abs=1e-3)
  assert rows["other"]["log_prob"] != pytest.approx(rows["more"]["log_prob"], abs=0.1)


def test_the_command_answers_conversations(setup, asked, tmp_path, capsys, monkeypatch):
  del asked  # its pictures are there
  monkeypatch.setattr(vlm_jax, "load", lambda *args, **options: vlm_jax.Bundle(*setup, 5))
  rows = [{"id": "l", "image": "0.png", "conversations": [
    {"from": "human", "value": "<image>\nwhy?"}, {"from": "gpt", "value": "no"}]}]
  (tmp_path / "llava.json").write_text(json.dumps(rows))
  (tmp_path / "chat.jsonl").write_text(json.dumps({"id": "m", "messages": [
    {"role": "user", "content": [{"type": "image", "image": "0.png"},
                                 {"type": "text", "text": "why?"}]}]}))
  for name in ("llava.json", "chat.jsonl"):
    assert cli.main(["predict", "--workdir=run", f"--data={tmp_path / name}", "--batch=1",
                     f"--out={tmp_path}/out.jsonl", f"--max-tokens={TOKENS}"]) == 0
  assert "2 predictions" not in capsys.readouterr().out  # one each, in one file
  first, second = read(tmp_path / "out.jsonl")
  assert (first["key"], second["key"]) == ("l", "m") and first["step"] == 5
  assert first["prediction"] == second["prediction"]
  (tmp_path / "bad.jsonl").write_text('{"messages": []}')
  assert cli.main(["predict", "--workdir=run", f"--data={tmp_path}/bad.jsonl",
                   f"--out={tmp_path}/bad.out"]) == 65
  assert "record 1: wrong_record: messages is empty" in capsys.readouterr().err


def test_what_cannot_be_predicted(setup, tmp_path):
  gone = [Request("a", "why?", (tmp_path / "gone.png",))]
  with pytest.raises(DataError, match="no picture of the 1 requests can be read"):
    run(setup, gone, tmp_path / "p.jsonl")
  assert "missing_file" in read(tmp_path / "p.jsonl")[0]["error"]
  with pytest.raises(UsageError, match="--batch is 0"):
    predict(*setup, gone, tmp_path / "q.jsonl", batch=0)
  assert not (tmp_path / "q.jsonl").exists()
