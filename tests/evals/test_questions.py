from vlm_jax.core.document import Document, Image, Text
from vlm_jax.evals.questions import cut, questions_of

IMAGE = Image(b"")


def fan_out(count, trunk=(IMAGE,)):
  turns = lambda k: (Text(f"q{k}", "user", branch=k), Text(f"a{k}", "assistant", True, k))
  return Document((*trunk, *(part for k in range(1, count + 1) for part in turns(k))), "s", "key")


def test_questions_of_every_form():
  got = questions_of(fan_out(2))
  assert [(q.key, q.document, q.text, q.answers) for q in got] == [
    ("key/1", "key", "q1", ("a1",)), ("key/2", "key", "q2", ("a2",))]
  assert len(questions_of(fan_out(1))) == len(questions_of(fan_out(1, trunk=()))) == 1
  talk = Document((IMAGE, Text("q", "user"), Text("a", "assistant", True), Text("r", "user"),
                   Text("b", "assistant", True)), "s", "talk")
  assert [(q.key, q.text, q.answers) for q in questions_of(talk)] == [("talk", "r", ("b",))]
  assert cut(talk, 1) == [talk]
  many = Document((IMAGE, Text("q", "user"), Text("a", "assistant", answers=("a", "b"))), "s", "k")
  assert questions_of(many)[0].answers == ("a", "b")


def test_cut_keeps_every_question_once_and_the_trunk_always():
  document = fan_out(11, trunk=(IMAGE, Text("be brief", "system")))
  assert cut(document, 11) == [document]
  for together, sizes in ((10, [6, 5]), (4, [4, 4, 3]), (1, [1] * 11)):
    pieces = cut(document, together)
    assert [len(questions_of(piece)) for piece in pieces] == sizes
    assert all(piece.parts[:2] == document.parts[:2] for piece in pieces)
    asked = [question for piece in pieces for question in questions_of(piece)]
    assert asked == questions_of(document)
