r"""Countdown answers: exact, each number once, never evaluated as code."""

import itertools
import json
import operator
import random
from fractions import Fraction

import pytest

from tests.tasks import shared
from treepo_jax.tasks import expression

NUMS, TARGET = [3, 7, 25], 46


@pytest.mark.parametrize(
  ("answer", "right"),
  [
    ("25 + 7 * 3", True),
    ("7 * 3 + 25 = 46", True),
    (r"25 + 7 \times 3", True),
    (r"25+(7\cdot 3)", True),
    ("25 + 7 x 3", True),
    ("25 + 7×3", True),
    (r"$\left(7\right)*3+25$", True),
    (r"-(-25) + 7*3", True),
    (r"\frac{7}{\frac{1}{3}} + 25", False),  # 1 is not given
    (r"25 + \frac{7}{3}", False),
    ("25 + 7 * 3 = 47", False),
    ("25 + 7 * 3 + 3", False),  # 3 twice
    ("25 + 21", False),
    ("46", False),
    ("25 + 7 * 3)", False),
    ("(25 + 7 * 3", False),
    ("25 + 7 ** 3", False),
    ("25 // 7 + 3", False),
    ("2 5 + 7 * 3", False),
    ("25.0 + 7 * 3", False),
    ("25 + 7 * 3 / 0", False),
    ("", False),
    ("__import__('os')", False),
    ("(" * 10**6, False),
    ("(" * 200 + "1" + ")" * 100, False),
    ("-" * 300 + "25 + 7 * 3", False),
    ("9**9**9**9", False),
  ],
)
def test_answers(answer, right):
  assert expression.solves(answer, NUMS, Fraction(TARGET)) is right


def test_division_is_exact():
  assert expression.solves("(1/3) * 3 * 7 * 1", [1, 3, 3, 7, 1], Fraction(7))
  assert expression.solves(r"\frac{8}{3-\frac{8}{3}}", [8, 3, 8, 3], Fraction(24))
  assert not expression.solves("10 / 3 + 1", [10, 3, 1], Fraction(4))


@pytest.mark.parametrize(
  "gold", ["46", "[]", "{}", '{"nums": [], "target": 1}', '{"nums": [1.5], "target": 1}', "x", ""]
)
def test_a_gold_that_is_none_is_refused(gold):
  with pytest.raises(ValueError):
    expression.read_gold(gold)


def test_public_problems():
  """Solutions found by brute force solve their problem, and no other one of the same numbers."""
  path = shared.path("data", "countdown", "test.jsonl")
  rows = [json.loads(line) for line in path.read_text().splitlines()[:60]]
  solved = 0
  for row in rows:
    nums, target = expression.read_gold(json.dumps(row))
    found = _solve(nums, int(target))
    if found:
      solved += 1
      assert expression.solves(found, nums, target)
      assert not expression.solves(found, nums, target + 1)
      assert not expression.solves(found, [*nums, 1], target)
  assert solved > 50


def _solve(nums: list[int], target: int) -> str | None:
  """Returns an expression that hits the target, in an order of nums from left to right."""
  signs = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
  orders = list(itertools.permutations(nums))
  random.Random(0).shuffle(orders)
  for order in orders:
    for chosen in itertools.product(signs, repeat=len(nums) - 1):
      text, value = str(order[0]), Fraction(order[0])
      for sign, number in zip(chosen, order[1:], strict=True):
        text = f"({text} {sign} {number})"
        value = value / number if sign == "/" else signs[sign](value, number)
      if value == target:
        return text
  return None
