"""Readers: every published file row by row, known golds as constants, complaints that say why."""

import json

import pytest

from tests.tasks import shared
from treepo_jax.config import UserError
from treepo_jax.tasks import readers, sources
from treepo_jax.tasks.readers import Question

# file, reader, rows, distinct questions with a gold, {row from 0: its gold}; from the files
SETS = [
  ("gsm8k/train.jsonl", "gsm8k", 7473, 7473, {0: "72", 1: "10"}),
  ("gsm8k/test.jsonl", "gsm8k", 1319, 1319, {0: "18", 2: "70000"}),
  ("math500/test.jsonl", "math", 500, 500, {0: r"\left( 3, \frac{\pi}{2} \right)"}),
  ("simplerl_math_level3to5/train.jsonl", "math", 8523, 8520, {0: "118"}),
  ("aime24/test.jsonl", "aime", 30, 30, {0: "204", 7: "025"}),
  ("amc23/test.jsonl", "amc", 40, 40, {0: "27", 3: "3159", 15: "-1"}),
  ("minerva_math/test.jsonl", "minerva", 272, 272, {0: "1.6", 1: "4.5e33"}),
  ("olympiadbench/test.jsonl", "olympiadbench", 675, 675, {0: "2", 13: "69, 84", 15: "(2, 4)"}),
  ("svamp/test.jsonl", "svamp", 1000, 1000, {0: "145"}),
  ("countdown/train.jsonl", "countdown", 8000, 8000, {0: '{"nums": [44, 19, 35], "target": 98}'}),
  ("countdown/test.jsonl", "countdown", 2000, 2000, {0: '{"nums": [6, 81, 97, 52], "target": 74}'}),
]


def table(name: str, reader: str, root: str = "") -> sources.Table:
  (spec,) = sources.parse(f"{name}#{reader}", "config.data.path", "plain")
  return sources.table(spec, split="train", root=root)


@pytest.mark.parametrize(("name", "reader", "rows", "distinct", "golds"), SETS)
def test_published_file(name, reader, rows, distinct, golds):
  found = table(name, reader, str(shared.path("data")))
  assert found.rows == rows
  assert len(found.questions) == distinct
  assert {i: found.questions[i].gold for i in golds} == golds
  assert {q.grader for q in found.questions} == {"countdown" if reader == "countdown" else "math"}
  for question in found.questions:
    assert question.gold == question.gold.strip() != ""
    assert "####" not in question.gold
    assert name.startswith(("simplerl", "math")) or "$" not in question.gold


def test_empty_golds_are_said_and_left_out(caplog):
  """Two rows of SimpleRL have no answer; one more is an exact duplicate."""
  found = table("simplerl_math_level3to5/train.jsonl", "math", str(shared.path("data")))
  assert found.empty == 2
  assert "line 5055: an empty answer; 2 of 8523 rows" in caplog.text


def test_boxes_of_math500_are_its_answers():
  """Two readers of one file: the last box of every solution is the published answer."""
  path = shared.path("data", "math500", "test.jsonl")
  answers, boxed = table(str(path), "math"), table(str(path), "minerva")
  assert answers.questions == boxed.questions


def test_countdown_says_all_that_is_needed():
  question = readers.countdown({"nums": [44, 19, 35], "target": 98})
  for part in ("44, 19, 35", "exactly once", "equals 98", "\\boxed{}"):
    assert part in question.text
  assert json.loads(question.gold) == {"nums": [44, 19, 35], "target": 98}


@pytest.mark.parametrize(
  ("reader", "row", "question"),
  [
    ("gsm8k", {"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,234"}, ("q", "1,234")),
    ("math", {"problem": "p", "answer": "5", "solution": r"\boxed{6}"}, ("p", "5")),
    ("math", {"problem": "p", "solution": r"\boxed{1} or \boxed{\frac12}."}, ("p", r"\frac12")),
    ("minerva", {"problem": "p", "solution": r"$\boxed{x+$ $\$2}$"}, ("p", r"x+ \$2")),
    ("math", {"question": "p", "answer": 27.0}, ("p", "27")),
    ("amc", {"problem": "p", "question": "p ", "answer": 0.5}, ("p", "0.5")),
    ("plain", {"prompt": "p", "answer": 7}, ("p", "7")),
    ("plain", {"question": "p", "answer": "so #### 7"}, ("p", "7")),
    ("svamp", {"Body": "He has 3", "Question": "So?", "Answer": 3.0}, ("He has 3. So?", "3")),
    ("svamp", {"Body": "He has 3. ", "Question": "So?", "Answer": 3.0}, ("He has 3. So?", "3")),
  ],
)  # fmt: skip
def test_reader(reader, row, question):
  assert readers.READERS[reader](row) == Question(*question)


def test_olympiadbench():
  row = {"question": "q", "context": None, "is_multiple_answer": False, "answer_type": "Numerical"}
  read = lambda **changes: readers.olympiadbench(row | changes)
  assert read(final_answer=["$k=1$"]).gold == "k=1"
  assert read(final_answer=["1,000"]).gold == "1,000"
  assert read(final_answer=["27,108,135"], is_multiple_answer=True).gold == "27, 108, 135"
  assert read(final_answer=["$1$", "$2$"], is_multiple_answer=True).gold == "1, 2"
  assert read(final_answer=["2"], context="Let $x = 1$.").text == "Let $x = 1$.\nq"


def test_a_row_may_name_its_grader():
  row = {"question": "q", "answer": "3", "grader": "number"}
  assert readers.plain(row) == Question("q", "3", "number")


@pytest.mark.parametrize(
  ("reader", "row", "complaint"),
  [
    ("gsm8k", {"question": "q", "answer": "4"}, "no '####'"),
    ("gsm8k", {"problem": "q", "answer": "#### 4"}, "expected 'question'"),
    ("math", {"problem": "p", "solution": r"\boxed{1"}, r"no complete \\boxed"),
    ("math", {"answer": "1"}, "expected 'problem' or 'question'; got answer"),
    ("aime", {"problem": "p", "question": "q", "answer": "1"}, "'problem' and 'question' differ"),
    ("aime", {"problem": "p", "solution": r"\boxed{1}"}, "expected 'answer'"),
    ("amc", {"problem": "p", "answer": float("nan")}, "a text or a number, got nan"),
    ("amc", {"problem": "p", "answer": True}, "got bool"),
    ("minerva", {"problem": "p", "answer": "1"}, "expected 'solution'"),
    ("olympiadbench", {"question": "p", "final_answer": "1"}, "a list of texts"),
    ("svamp", {"Body": "b", "Question": "", "Answer": 1}, "'Question' must be a text"),
    ("countdown", {"nums": [1, 2.5], "target": 3}, "whole numbers"),
    ("countdown", {"nums": [], "target": 3}, "whole numbers"),
    ("countdown", {"target": 3}, "expected 'nums'"),
    ("plain", {"question": "q", "answer": "1", "grader": "maths"}, "allowed: math, countdown"),
  ],
)
def test_a_bad_row_is_refused(reader, row, complaint):
  with pytest.raises(ValueError, match=complaint) as error:
    readers.READERS[reader](row)
  assert not isinstance(error.value, readers.NoGold)


@pytest.mark.parametrize(
  ("reader", "row"),
  [
    ("gsm8k", {"question": "q", "answer": "so #### "}),
    ("math", {"problem": "p", "answer": " "}),
    ("minerva", {"problem": "p", "solution": r"\boxed{ }"}),
    ("plain", {"question": "q", "answer": ""}),
  ],
)
def test_an_empty_gold_is_no_mistake_of_the_file(reader, row):
  with pytest.raises(readers.NoGold):
    readers.READERS[reader](row)


def test_readers_of_the_user():
  assert readers.find("treepo_jax.tasks.readers:svamp", "config.data.reader") is readers.svamp
  for name, complaint in [
    ("gsm", "no reader 'gsm'; there are plain, gsm8k"),
    ("no_such_module:read", "cannot be imported"),
    ("treepo_jax.tasks.readers:no_such", "cannot be imported"),
    ("treepo_jax.tasks.readers:ASKED", "is a tuple, not a function"),
  ]:
    with pytest.raises(UserError, match=complaint):
      readers.find(name, "config.data.reader")
