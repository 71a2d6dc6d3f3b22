"""Problems: pure functions of (seed, split, index), correct solutions, disjoint splits."""

import random
import re

import pytest

from treepo_jax import config as config_lib
from treepo_jax.tasks import arithmetic, rewards

CONFIG = config_lib.default()
LEVELS = (3, 4, 5)


def problems(split: str, count: int, seed: int = 0) -> list[arithmetic.Problem]:
  return [arithmetic.problem(seed, i, split=split, levels=LEVELS) for i in range(count)]


def evaluate(expression: str) -> int:
  """Evaluates a bracketed expression by Python's own rules, division exact."""
  value = eval(
    expression, {"__builtins__": {}}
  )  # only digits, brackets and operators: checked here
  assert re.fullmatch(r"[0-9()+\-*/ ]+", expression)
  assert value == int(value)
  return int(value)


def test_same_arguments_same_problem():
  assert problems("train", 20) == problems("train", 20)
  assert problems("train", 20) != problems("train", 20, seed=1)


def test_known_problems():
  """The embedded policy was trained on these words: a change of the generator must be seen."""
  assert [p.question for p in problems("heldout", 4)] == [
    "Jon has 22 keys. He gets 3 times as many. He drops 4. He loses 2. How many keys now?",
    "(((30 + 5) + 8) + 2) + 16 = ?",
    "((((23 + 11) / 2) + 18) - 14) - 10 = ?",
    "Hugo has 28 shells. He keeps one part of 4. He loses 2. He gets 4 times as many. "
    "How many shells now?",
  ]


def test_levels_take_turns():
  assert [p.level for p in problems("train", 6)] == [3, 4, 5, 3, 4, 5]


def test_values_stay_in_range():
  for problem in problems("train", 500):
    assert all(1 <= value <= arithmetic.LARGEST for value in problem.values)
    assert problem.answer == str(problem.values[-1])


@pytest.mark.parametrize("style", arithmetic.STYLES)
def test_every_written_step_is_correct(style):
  rng = random.Random(0)
  for problem in problems("train", 300):
    text = arithmetic.solution(problem, style, rng)
    *steps, last = text.split("; ")
    for step in steps:
      left, right = step.split(" = ")
      assert evaluate(left) == int(right), text
    assert last == f"Answer: \\boxed{{{problem.answer}}}"
    assert rewards.grade([text], [problem.answer], ["number"], config=CONFIG).correct.all()
    written = {
      "careful": (problem.level, problem.level),
      "short": (1, problem.level - 1),
      "direct": (0, 0),
    }[style]
    assert written[0] <= len(steps) <= written[1]


def test_expressions_have_the_answer():
  asked = [p for p in problems("train", 300) if p.question.endswith(" = ?")]
  assert len(asked) > 100
  for problem in asked:
    assert evaluate(problem.question.removesuffix(" = ?")) == int(problem.answer)


def test_splits_are_disjoint():
  chains = {
    split: {(p.start, p.steps) for p in problems(split, 2000)} for split in arithmetic.SPLITS
  }
  assert not chains["train"] & chains["heldout"]
  for split, found in chains.items():
    assert all(arithmetic.split_of(*chain) == split for chain in found)
    assert len(found) > 1900  # next to no repeats: there are millions


def test_one_chain_in_sixteen_is_held_out():
  """Binomial: 4000 chains, mean 250, standard deviation 15.3; five deviations are 77."""
  rng = random.Random(1)
  held = sum(
    arithmetic.split_of(rng.randint(2, 30), [("+", rng.randint(2, 19)), ("*", i)]) == "heldout"
    for i in range(4000)
  )
  assert abs(held - 4000 / arithmetic.HELDOUT_SHARE) < 77


def test_unknown_style_is_named():
  with pytest.raises(ValueError, match="'brief'.*careful, short, direct"):
    arithmetic.solution(problems("train", 1)[0], "brief", random.Random(0))
