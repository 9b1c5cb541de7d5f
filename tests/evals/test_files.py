"""Benchmarks' own files: what is asked of them, and how answers to them are scored."""

import base64
import json

import pytest

from vlm_jax.cli import main as cli
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.evals.kinds.choice import INSTRUCTION, letter_of
from vlm_jax.evals.references import join
from vlm_jax.evals.requests import read_requests

VQA_QUESTIONS = {"questions": [
  {"question_id": 7, "image_id": 42, "question": "how many?"},
  {"question_id": 8, "image_id": 42, "question": "why?"}]}
VQA_ANNOTATIONS = {"annotations": [
  {"question_id": 7, "image_id": 42, "answers": [
    {"answer": "2", "answer_id": i + 1} if i < 3 else {"answer": "three", "answer_id": i + 1}
    for i in range(10)]},
  {"question_id": 8, "image_id": 42, "answers": [{"answer": "yes", "answer_id": i}
                                                 for i in range(10)]}]}
COCO = {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "id": 5, "caption": "A dog runs."},
                        {"image_id": 2, "id": 6, "caption": "a cat"},
                        {"image_id": 1, "id": 9, "caption": "a dog"}]}
POPE = [{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 2, "image": "a.jpg", "text": "Is there a cat?", "label": "no"}]
PNG = base64.b64encode(b"picture").decode()
TABLE = ("index\tquestion\thint\tA\tB\tC\tanswer\timage\n"
         f"3\tWhich?\t\tred\tblue\tnan\tB\t{PNG}\n"
         f"1000003\tWhich?\t\tblue\tred\t\tA\t{PNG}\n"
         f"4\tWhere?\tLook up.\there\tthere\tnowhere\tC\t{PNG}\n")


def put(path, value):
  lines = isinstance(value, list) and path.suffix == ".jsonl"
  path.write_text(value if isinstance(value, str) else
                  "\n".join(map(json.dumps, value)) if lines else json.dumps(value))
  return path


def test_requests_of_every_form(tmp_path):
  own = read_requests(put(tmp_path / "own.jsonl", [
    {"id": 1, "prompt": "hi"}, {"id": "b", "prompt": "who?", "image": "x.png"},
    {"id": "c", "prompt": "", "image": ["x.png", "y.png"]}]))
  assert [(r.key, r.prompt, r.images) for r in own] == [
    ("1", "hi", ()), ("b", "who?", (tmp_path / "x.png",)),
    ("c", "", (tmp_path / "x.png", tmp_path / "y.png"))]
  pope = read_requests(put(tmp_path / "pope.jsonl", POPE), images="/pictures")
  assert pope[1].prompt == "Is there a cat?" and str(pope[1].images[0]) == "/pictures/a.jpg"
  questions = put(tmp_path / "vqa.json", VQA_QUESTIONS)
  first = read_requests(questions, images="/v")[0]
  assert str(first.images[0]) == "/v/COCO_val2014_000000000042.jpg"
  assert str(read_requests(questions, images="/v/{:03d}.png")[1].images[0]) == "/v/042.png"
  coco = read_requests(put(tmp_path / "coco.json", COCO), prompt="describe")
  assert [(r.key, r.prompt, r.images[0].name) for r in coco] == [
    ("1", "describe", "a.jpg"), ("2", "describe", "b.jpg")]
  table = read_requests(put(tmp_path / "mm.tsv", TABLE))
  assert [r.key for r in table] == ["3", "1000003", "4"] and table[0].pictures() == [b"picture"]
  assert table[0].prompt == f"Which?\nA. red\nB. blue\n{INSTRUCTION}"
  assert table[2].prompt.startswith("Look up.\nWhere?\nA. here\n")


def say(role, *content):
  return {"role": role, "content": content[0] if len(content) == 1 else [
    {"type": "text", "text": part} if isinstance(part, str) else
    {"type": "image_url", "image_url": {"url": part[0]}} for part in content]}


def test_conversations_ask_their_last_question(tmp_path):
  url = f"data:image/png;base64,{PNG}"
  chats = [
    [say("user", ["x.png"], "what?"), say("assistant", "a cat")],
    [say("user", "is", [url], "larger than", ["y.png"], "?")],
    [say("system", "Be brief."), say("user", "hi"), say("assistant", "hello"),
     say("user", "and", ["x.png"]), say("assistant", "a dog")],
  ]
  rows = [{"messages": chat} for chat in chats]
  first, second, third = read_requests(put(tmp_path / "chat.jsonl", rows), images="/p")
  assert (first.key, first.prompt, first.turns) == ("1", "<image>what?", ())
  assert [str(image) for image in first.images] == ["/p/x.png"]
  assert second.prompt == "is<image>larger than<image>?"
  assert (second.images[0], str(second.images[1])) == (b"picture", "/p/y.png")
  assert third.prompt == "and<image>" and len(third.images) == 1
  assert [getattr(part, "text", "") for part in third.turns] == [
    "Be brief.", "hi", "hello", "and", ""]
  # LLaVA's list asks the same.
  llava = [{"id": "l", "image": "x.png", "conversations": [
    {"from": "human", "value": "<image>\nwhat?"},
    {"from": "gpt", "value": "a cat"}]}]
  one, = read_requests(put(tmp_path / "llava.json", llava), images="/p")
  assert (one.prompt, one.images, one.key) == (first.prompt, first.images, "l")


@pytest.mark.parametrize("name,value,sentence", [
  ("a.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}], "record 1: wrong_record"),
  ("a.jsonl", [{"messages": [{"role": "tool", "content": "x"}]}], "record 1: unknown_role"),
  ("a.json", [{"image": "a.png", "conversations": [{"from": "human", "value": "<image><image>"}]}],
   "record 1: image_count"),
  ("a.jsonl", [{"messages": [say("user", ["http://x.org/a.png"], "x")]}], "remote_image"),
  ("a.jsonl", [{"messages": [{"role": "user", "content": [
    {"type": "video", "video": ["a.png"]}, {"type": "text", "text": "x"}]}]}], "it shows a video"),
  ("a.jsonl", [{"id": 1, "prompt": "x"}, {"id": 1, "prompt": "y"}], "has the id '1' twice"),
  ("a.jsonl", [{"prompt": "x"}], "line 1 must have an 'id'"),
  ("a.jsonl", [{"id": 1, "prompt": " "}], "line 1 asks nothing"),
  ("a.jsonl", "{", "line 1 is not JSON"), ("a.jsonl", "[]", "line 1 is not a JSON object"),
  ("a.jsonl", "", "asks nothing"), ("a.json", {"x": 1}, "neither a list, a VQA v2 question file"),
  ("a.json", "nothing", "neither"), ("a.json", [1], "an entry of the list is no object"),
  ("a.json", {"questions": [{"question_id": 1, "image_id": 2, "question": 5}]}, "1 has no text"),
  ("a.tsv", "index\tquestion\n1\tx\n", "line 2 must have"),
])
def test_files_that_ask_nothing_usable(name, value, sentence, tmp_path):
  with pytest.raises(DataError, match=sentence):
    read_requests(put(tmp_path / name, value))


def score(tmp_path, capsys, kind, predictions, references, *more):
  code = cli.main(["score", f"--kind={kind}", f"--predictions={predictions}",
                   f"--references={references}", "--json", *more])
  captured = capsys.readouterr()
  return json.loads(captured.out) if code == 0 else (code, captured.err)


def test_vqa_results_are_scored_officially(tmp_path, capsys):
  references = put(tmp_path / "annotations.json", VQA_ANNOTATIONS)
  results = put(tmp_path / "results.json", [{"question_id": 8, "answer": "yes"},
                                            {"question_id": 7, "answer": "Two."}])
  out = tmp_path / "scored.jsonl"
  numbers = score(tmp_path, capsys, "vqa", results, references, f"--out={out}")
  # Three of ten: 7 annotators see three others agree, 3 see two.
  assert numbers["accuracy"] == pytest.approx((1 + (7 * 1 + 3 * 2 / 3) / 10) / 2)
  assert numbers["questions"] == 2
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(row["key"], row["document"]) for row in rows] == [("7", "42"), ("8", "42")]
  assert cli.main(["compare", str(out), str(out)]) == 0


def test_captions_pope_and_tables(tmp_path, capsys):
  coco = put(tmp_path / "coco.json", COCO)
  said = put(tmp_path / "r.json", [{"image_id": 1, "caption": "a dog"},
                                   {"image_id": 2, "caption": "a cat!"}])
  numbers = score(tmp_path, capsys, "caption", said, coco)
  assert numbers["bleu_1"] == pytest.approx(1) and numbers["pictures"] == 2
  assert numbers["rouge_l"] == pytest.approx(1) and numbers["cider"] > 1
  pope = put(tmp_path / "pope.jsonl", POPE)
  said = put(tmp_path / "p.jsonl", [{"question_id": 1, "answer": "Yes, a dog."},
                                    {"question_id": 2, "answer": "yes"}])
  numbers = score(tmp_path, capsys, "pope", said, pope)
  assert (numbers["accuracy"], numbers["yes_ratio"], numbers["recall"]) == (0.5, 1.0, 1.0)
  table = put(tmp_path / "mm.tsv", TABLE)
  said = lambda a, b, c: put(tmp_path / "m.jsonl", [
    {"key": "3", "prediction": a}, {"key": "1000003", "prediction": b},
    {"key": "4", "prediction": c}])
  numbers = score(tmp_path, capsys, "choice", said("B", "(a) blue", "nowhere."), table)
  assert (numbers["accuracy"], numbers["circular"], numbers["questions"]) == (1, 1, 2)
  numbers = score(tmp_path, capsys, "choice", said("B", "B", "C."), table)
  assert numbers["accuracy"] == pytest.approx(2 / 3) and numbers["circular"] == 0.5
  lines = put(tmp_path / "d.jsonl", [{"id": "x", "answers": ["10"]}])
  said = put(tmp_path / "e.jsonl", [{"key": "x", "prediction": "10.4"}])
  assert score(tmp_path, capsys, "relaxed", said, lines)["accuracy"] == 1
  assert score(tmp_path, capsys, "anls", said, lines)["anls"] == 0


@pytest.mark.parametrize("answer,letter", [
  ("B", "B"), ("b", "B"), ("(b) blue", "B"), ("A. red", "A"), ("B: x", "B"), ("Blue", "B"),
  ("red.", "A"), ("A dog", ""), ("D", ""), ("", ""), ("the blue one", "")])
def test_letters_are_read_out_of_answers(answer, letter):
  assert letter_of(answer, {"A": "red", "B": "blue"}) == letter


def test_what_cannot_be_scored(tmp_path, capsys):
  pope = put(tmp_path / "pope.jsonl", POPE)
  one = put(tmp_path / "one.jsonl", [{"question_id": 1, "answer": "yes"}])
  code, err = score(tmp_path, capsys, "pope", one, pope)
  assert code == 2 and "1 of 2 questions of" in err and "(2)" in err
  code, err = score(tmp_path, capsys, "perplexity", one, pope)
  assert code == 2 and "needs the model" in err
  code, err = score(tmp_path, capsys, "pop", one, pope)
  assert code == 2 and "did you mean 'pope'" in err
  with pytest.raises(DataError, match="no reference file of a known form"):
    join(one, put(tmp_path / "x.json", {"y": 1}))
  with pytest.raises(DataError, match="twice"):
    join(put(tmp_path / "two.json", [{"image_id": 1, "caption": "a"}] * 2), pope)
  with pytest.raises(DataError, match="has '1' 2 times"):
    join(one, put(tmp_path / "again.jsonl", [POPE[0], POPE[0]]))
  code, err = score(tmp_path, capsys, "choice", one, put(tmp_path / "p1.jsonl", POPE[:1]))
  assert code == 2 and "choice needs the options of every question" in err
  code, err = score(tmp_path, capsys, "pope", one, tmp_path / "p1.jsonl", "--seed=-1")
  assert code == 2 and "the seed of the bootstrap is -1" in err
  with pytest.raises(DataError, match="prediction 1 must have"):
    join(put(tmp_path / "odd.json", [{"image_id": 1}]), pope)
  # A picture that could not be read is a wrong answer, not a question left out.
  failed = put(tmp_path / "f.jsonl", [{"key": "1", "error": "truncated"},
                                      {"key": "2", "prediction": "no"}])
  assert [row["prediction"] for row in join(failed, pope)] == ["", "no"]
  with pytest.raises(UsageError, match="is no pattern"):
    read_requests(put(tmp_path / "vqa.json", VQA_QUESTIONS), images="{nothing}.jpg")
