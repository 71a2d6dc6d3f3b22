"""The strict reward: last complete box, numbers by value, errors counted."""

import json

import numpy as np
import pytest

from tests.tasks import shared
from treepo_jax.tasks import rewards


@pytest.mark.parametrize(
  ("text", "gold", "correct"),
  [
    (r"12 + 5 = 17; Answer: \boxed{17}", "17", True),
    (r"Answer: \boxed{18}", "17", False),
    ("Answer: 17", "17", False),  # no box
    (r"Answer: \boxed{17", "17", False),  # not complete
    (r"\boxed{3} no, \boxed{17}", "17", True),  # the last one counts
    (r"\boxed{17} no, \boxed{3}", "17", False),
    (r"\boxed{17} no, \boxed{3", "17", True),  # the last complete one
    (r"\boxed{}", "17", False),
    (r"\boxed{17.0}", "17", True),
    (r"\boxed{017}", "17", True),
    (r"\boxed{ 17 }", "17", True),
    (r"\boxed{$17$}", "17", True),
    (r"\boxed{34/2}", "17", True),
    (r"\boxed{-17}", "17", False),
    (r"\boxed{1,234}", "1234", True),
    (r"\boxed{1,2}", "12", False),  # a pair, not twelve
    (r"\boxed{17/0}", "17", False),
    (r"\boxed{0.3333}", "1/3", False),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{ 2 }", True),  # other text: equal but for spaces
    (r"\boxed{" + "9" * 5000 + "}", "17", False),
  ],
)
def test_grades(text, gold, correct):
  assert rewards.grade([text], [gold]).correct.tolist() == [correct]


def test_scores_are_plus_and_minus_one():
  scores = rewards.score([r"\boxed{1}", r"\boxed{2}", ""], ["1", "1", "1"])
  assert scores.dtype == np.float32
  assert scores.tolist() == [1, -1, -1]
  assert rewards.score([r"\boxed{1}", ""], ["1", "1"], correct=2.0, wrong=0.0).tolist() == [2, 0]


def test_an_empty_gold_is_an_error_and_never_right():
  grades = rewards.grade([r"\boxed{}", r"\boxed{1}"], ["", "1"])
  assert grades.correct.tolist() == [False, True]
  assert grades.errors == 1
  assert grades.extracted == ["", "1"]


def test_counts_must_agree():
  with pytest.raises(ValueError, match="2 answers but 1 gold"):
    rewards.grade(["", ""], ["1"])


def test_public_cases():
  """No pair that is wrong as mathematics is called right; boxed equal integers are all right."""
  rows = [
    json.loads(line) for line in shared.path("data", "grader_cases.jsonl").read_text().splitlines()
  ]
  wrong = [row for row in rows if row["policy"] == "semantic" and not row["expected"]]
  boxed = [f"\\boxed{{{row['pred']}}}" for row in wrong]
  assert len(wrong) > 20
  assert not rewards.grade(boxed, [row["gold"] for row in wrong]).correct.any()
