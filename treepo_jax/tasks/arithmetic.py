"""Multi-step arithmetic problems in words and symbols, with worked solutions in several styles.

A problem is a chain: a start value and `level` operations, applied from left to right, whose
intermediate values stay within 1..99. It is asked as a little story or as a bracketed expression.
The chain alone decides the split (one hash in 16 is held out), so no held-out chain is ever seen in
training, in whatever words. Everything is a pure function of (seed, split, index).

Styles of a solution, all of them correct text:
  careful: one written step an operation, `12 + 5 = 17; 17 * 2 = 34; Answer: \\boxed{34}`
  short:   some neighbouring operations done in one step, `(12 + 5) * 2 = 34; Answer: \\boxed{34}`
  direct:  nothing but the answer, `Answer: \\boxed{34}`
"""

import dataclasses
import hashlib
import random
from collections.abc import Sequence

LEVELS = (2, 3, 4, 5)  # operations in a chain
SPLITS = ("train", "heldout")
STYLES = ("careful", "short", "direct")
FORMS = ("words", "symbols")
LARGEST = 99  # of every intermediate value
LARGEST_START = 30
LARGEST_TERM = 19  # of a number that is added or taken away
FACTORS = (2, 3, 4)  # of multiplication and exact division
HELDOUT_SHARE = 16  # one chain in so many is held out

NAMES = (
  ("Ann", "She"), ("Ben", "He"), ("Cleo", "She"), ("Dan", "He"), ("Eva", "She"), ("Finn", "He"),
  ("Gia", "She"), ("Hugo", "He"), ("Ida", "She"), ("Jon", "He"), ("Kim", "She"), ("Leo", "He"),
)  # fmt: skip
OBJECTS = (
  "apples", "books", "cards", "coins", "cups", "eggs",
  "figs", "keys", "nuts", "pens", "shells", "stamps",
)  # fmt: skip
VERBS = {
  "+": ("finds {} more", "buys {} more", "gets {} more", "wins {} more"),
  "-": ("loses {}", "sells {}", "gives away {}", "drops {}"),
  "*": ("gets {} times as many",),
  "/": ("keeps one part of {}",),
}


@dataclasses.dataclass(frozen=True)
class Problem:
  """A chain of operations and the way it is asked."""

  start: int
  steps: tuple[tuple[str, int], ...]  # (operation, number)
  question: str

  @property
  def level(self) -> int:
    return len(self.steps)

  @property
  def values(self) -> tuple[int, ...]:
    """The value after each operation."""
    values, value = [], self.start
    for operation, number in self.steps:
      value = apply(operation, value, number)
      values.append(value)
    return tuple(values)

  @property
  def answer(self) -> str:
    return str(self.values[-1])


def problem(seed: int, index: int, *, split: str, levels: Sequence[int]) -> Problem:
  """Returns problem number `index` of a split: chains are drawn until one belongs to the split.

  Levels take turns by index, so that any run of indices holds them evenly.
  """
  rng = random.Random(f"arithmetic/{seed}/{split}/{index}")
  level = levels[index % len(levels)]
  while True:
    start, steps = _chain(rng, level)
    if split_of(start, steps) == split:
      break
  form = rng.choice(FORMS)
  question = _story(rng, start, steps) if form == "words" else f"{_expression(start, steps)} = ?"
  return Problem(start, steps, question)


def split_of(start: int, steps: Sequence[tuple[str, int]]) -> str:
  """Returns the split of a chain: held out iff blake2b of its text is 0 modulo HELDOUT_SHARE."""
  digest = hashlib.blake2b(_canonical(start, steps).encode(), digest_size=4).digest()
  return "heldout" if int.from_bytes(digest, "little") % HELDOUT_SHARE == 0 else "train"


def solution(problem: Problem, style: str, rng: random.Random) -> str:
  """Returns a worked solution that ends in the boxed answer.

  In the short style each written step takes one, two or three operations, as `rng` says, and at
  least one step takes more than one. Raises ValueError for a style that is not in STYLES and for
  the short style of a single operation.
  """
  if style == "careful":
    groups = [1] * problem.level
  elif style == "direct":
    groups = []
  elif style == "short":
    groups = _groups(rng, problem.level)
  else:
    raise ValueError(f"style is {style!r}; allowed: {', '.join(STYLES)}")
  values = (problem.start, *problem.values)
  text, done = "", 0
  for size in groups:
    taken = _expression(values[done], problem.steps[done : done + size])
    text += f"{taken} = {values[done + size]}; "
    done += size
  return f"{text}Answer: \\boxed{{{problem.answer}}}"


def apply(operation: str, value: int, number: int) -> int:
  """Returns `value operation number`; division is exact or raises ArithmeticError."""
  if operation == "+":
    return value + number
  if operation == "-":
    return value - number
  if operation == "*":
    return value * number
  if operation == "/":
    quotient, rest = divmod(value, number)
    if rest:
      raise ArithmeticError(f"{value} / {number} is not exact")
    return quotient
  raise ValueError(f"operation is {operation!r}; allowed: + - * /")


def _chain(rng: random.Random, level: int) -> tuple[int, tuple[tuple[str, int], ...]]:
  start = value = rng.randint(2, LARGEST_START)
  steps = []
  for _ in range(level):
    operation, number = _step(rng, value)
    value = apply(operation, value, number)
    steps.append((operation, number))
  return start, tuple(steps)


def _step(rng: random.Random, value: int) -> tuple[str, int]:
  """Draws an operation first, then a number that keeps the value whole and within 1..LARGEST."""
  numbers = {
    "+": range(2, min(LARGEST_TERM, LARGEST - value) + 1),
    "-": range(2, min(LARGEST_TERM, value - 1) + 1),
    "*": [f for f in FACTORS if value * f <= LARGEST],
    "/": [f for f in FACTORS if value % f == 0],
  }
  operation = rng.choice([op for op, allowed in numbers.items() if len(allowed)])
  return operation, rng.choice(numbers[operation])


def _groups(rng: random.Random, level: int) -> list[int]:
  """Splits `level` operations into steps of 1 to 3, not all of them 1."""
  if level < 2:
    raise ValueError("a single operation has no short solution")
  while True:
    groups = []
    while sum(groups) < level:
      groups.append(rng.randint(1, min(3, level - sum(groups))))
    if len(groups) < level:
      return groups


def _canonical(start: int, steps: Sequence[tuple[str, int]]) -> str:
  return " ".join([str(start), *(f"{op} {number}" for op, number in steps)])


def _expression(start: int, steps: Sequence[tuple[str, int]]) -> str:
  text = str(start)
  for i, (op, number) in enumerate(steps):
    text = f"({text} {op} {number})" if i + 1 < len(steps) else f"{text} {op} {number}"
  return text


def _story(rng: random.Random, start: int, steps: Sequence[tuple[str, int]]) -> str:
  name, pronoun = rng.choice(NAMES)
  things = rng.choice(OBJECTS)
  text = f"{name} has {start} {things}. "
  for op, number in steps:
    text += f"{pronoun} {rng.choice(VERBS[op]).format(number)}. "
  return f"{text}How many {things} now?"
