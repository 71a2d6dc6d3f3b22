r"""Countdown: an arithmetic expression that uses given numbers once each and equals a target.

The gold answer is the JSON text {"nums": [3, 7, 25], "target": 46}. An answer is read by a parser
of its own, never evaluated as code: + - * / and parentheses, with `\times`, `\cdot`, `\div`,
`\frac{a}{b}`, `\left(`, `\right)`, `×`, `÷` and `x` between numbers for them, and `= 46` at its
end if that is the target. Values are exact fractions.
"""

import json
import re
from fractions import Fraction

LONGEST = 400  # characters of an expression
DEEPEST = 40  # parentheses and signs within each other

_TOKEN = re.compile(r" *(?:([0-9]{1,9})(?![0-9.,])|([-+*/(){}F]))")
_SPELLINGS = (
  (re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;!: ]|\$|\\[()]"), " "),
  (re.compile(r"\\[dt]?frac(?![a-z])"), "F"),
  (re.compile(r"\\(?:times|cdot)(?![a-z])|[×·∗]|(?<=[0-9)} ])[xX](?=[0-9({ ])"), "*"),
  (re.compile(r"\\div(?![a-z])|÷"), "/"),
  (re.compile(r"[−–]"), "-"),
  (re.compile(r"[\[]"), "("),
  (re.compile(r"[\]]"), ")"),
)


class _Unreadable(ValueError):
  """What stands there is no expression."""


def read_gold(gold: str) -> tuple[list[int], Fraction]:
  """Returns the numbers and the target; raises ValueError for a text that is not such JSON."""
  row = json.loads(gold)
  if not isinstance(row, dict) or not {"nums", "target"} <= set(row):
    raise ValueError("a Countdown gold answer is {'nums': [...], 'target': ...}")
  nums, target = row["nums"], row["target"]
  whole = [n for n in nums if isinstance(n, int) and not isinstance(n, bool)]
  if not nums or whole != list(nums) or not isinstance(target, int):
    raise ValueError("a Countdown gold answer has whole numbers 'nums' and a whole 'target'")
  return whole, Fraction(target)


def solves(answer: str, nums: list[int], target: Fraction) -> bool:
  """Returns whether an expression uses each number exactly once and equals the target exactly."""
  if len(answer) > LONGEST:
    return False
  for spelling, plain in _SPELLINGS:
    answer = spelling.sub(plain, answer)
  try:
    left, equals, right = answer.partition("=")
    reader = _Reader(_tokens(left))
    value = reader.whole()
    if equals and _Reader(_tokens(right)).whole() != target:
      return False
  except (_Unreadable, ZeroDivisionError):
    return False
  return value == target and sorted(reader.used) == sorted(nums)


def _tokens(text: str) -> list[str]:
  tokens, place = [], 0
  text = text.strip()
  while place < len(text):
    match = _TOKEN.match(text, place)
    if match is None:
      raise _Unreadable(text)
    tokens.append(match[1] or match[2])
    place = match.end()
  return tokens


class _Reader:
  """Reads sums of products of signed numbers, fractions and groups, and notes the numbers used."""

  def __init__(self, tokens: list[str]):
    self.tokens, self.place, self.depth = tokens, 0, 0
    self.used: list[int] = []

  def whole(self) -> Fraction:
    """Returns the value of all the tokens."""
    value = self._sum()
    if self.place < len(self.tokens):
      raise _Unreadable(self.tokens[self.place])
    return value

  def _next(self) -> str:
    return self.tokens[self.place] if self.place < len(self.tokens) else ""

  def _take(self) -> str:
    token = self._next()
    self.place += 1
    return token

  def _sum(self) -> Fraction:
    value = self._product()
    while self._next() in ("+", "-"):
      value = value + self._product() if self._take() == "+" else value - self._product()
    return value

  def _product(self) -> Fraction:
    value = self._atom()
    while self._next() in ("*", "/"):
      value = value * self._atom() if self._take() == "*" else value / self._atom()
    return value

  def _atom(self) -> Fraction:
    """Returns the value of a number, a signed atom, a fraction or a group."""
    self.depth += 1
    if self.depth > DEEPEST:
      raise _Unreadable("too deep")
    token = self._take()
    if token.isdigit():
      self.used.append(int(token))
      value = Fraction(int(token))
    elif token in ("+", "-"):
      value = self._atom() if token == "+" else -self._atom()
    elif token in ("(", "{"):
      value = self._group(token)
    elif token == "F":
      value = self._group(self._take()) / self._group(self._take())
    else:
      raise _Unreadable(token)
    self.depth -= 1
    return value

  def _group(self, opening: str) -> Fraction:
    """Returns the value up to the brace or parenthesis that closes the one just taken."""
    if opening not in ("(", "{"):
      raise _Unreadable(opening)
    value = self._sum()
    if self._take() != {"(": ")", "{": "}"}[opening]:
      raise _Unreadable("not closed")
    return value
