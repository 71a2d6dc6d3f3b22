"""The strict reward: last complete box, numbers by value, errors counted."""

import json
from typing import Any

import numpy as np
import pytest

from tests.tasks import shared
from treepo_jax import config as config_lib
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


def score(right, tokens, longest, **reward):
  c: Any = config_lib.default()
  c.reward.update(reward)
  scores = rewards.score(np.array(right), np.array(tokens), longest=longest, config=c)
  assert scores.dtype == np.float32
  return scores.tolist()


def test_scores_are_plus_and_minus_one():
  assert score([True, False], [9, 9], 9) == [1, -1]
  assert score([True, False], [9, 9], 9, correct=2.0, wrong=0.0) == [2, 0]


def test_the_last_tokens_before_the_longest_answer_cost():
  """The published numbers: a buffer of 512 before 7168 tokens, factor 1."""
  tokens = [1, 6656, 6657, 6912, 7168]
  cost = [0, 0, -0.001953125, -0.5, -1]
  assert score([False] * 5, tokens, 7168, overlong_buffer=512) == [-1 + c for c in cost]
  assert score([True] * 5, tokens, 7168, overlong_buffer=512, overlong_factor=0.5) == [
    1 + c / 2 for c in cost
  ]


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


def test_equal_answers_share_a_class():
  answers = ["7", None, "07", r"\pi", "14/2", r"\pi ", "8", None]
  classes = rewards.groups(answers, "math", config=config_lib.default())
  assert classes == [0, -1, 0, 1, 0, 1, 2, -1]
