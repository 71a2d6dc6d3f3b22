r"""Values of closed forms such as `\frac{3\sqrt{2}}{4} + 2\pi`: most wrong answers need no algebra.

A form is numbers, `\pi`, `\frac`, `\sqrt`, powers, products (also without a sign), sums and groups.
A value is a double, good enough to tell two forms apart and never used to call them equal. What
reads differently to different readers (`2\frac{1}{2}`, `1/2\pi`, `2^3!`) has no value here, nor has
a sum whose terms cancel.
"""

import math
import re

DEEPEST = 30  # groups within each other
APART = 1e-6  # relative difference of values that are surely not equal
CANCELLED = 1e-6  # what is left of the largest partial sum, at least

_TOKEN = re.compile(
  r" *(?:([0-9]{1,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})"
  r"|(\\frac|\\sqrt|\\pi|\\cdot|\\times|[-+*/^(){}\[\]]))"
)


class _NoValue(ValueError):
  """What stands there is no closed form, or none with a value."""


def value(tidied: str) -> float | None:
  """Returns the value of a tidied answer (tasks/answers.py), None where it is no closed form."""
  try:
    reader = _Reader(_tokens(tidied))
    found = reader.sum()
    reader.end()
  except (_NoValue, ZeroDivisionError, OverflowError):
    return None
  return found if math.isfinite(found) else None


def apart(left: float, right: float, tolerance: float) -> bool:
  """Returns whether two values surely differ, by more than a relative tolerance."""
  return abs(left - right) > max(APART, 2 * tolerance) * max(abs(left), abs(right))


def _tokens(text: str) -> list[str]:
  tokens, place, text = [], 0, text.rstrip()
  while place < len(text):
    match = _TOKEN.match(text, place)
    if match is None:
      raise _NoValue(text)
    tokens.append(match[1] or match[2])
    place = match.end()
  return tokens


class _Reader:
  def __init__(self, tokens: list[str]):
    self.tokens, self.place, self.depth = tokens, 0, 0

  def end(self) -> None:
    if self._next():
      raise _NoValue(self._next())

  def sum(self) -> float:
    self.depth += 1
    if self.depth > DEEPEST:
      raise _NoValue("too deep")
    total = self._signed()
    largest = abs(total)
    while self._next() in ("+", "-"):
      total = total + self._product() if self._take() == "+" else total - self._product()
      largest = max(largest, abs(total))
    if abs(total) < CANCELLED * largest:
      raise _NoValue("cancelled")
    self.depth -= 1
    return total

  def _next(self) -> str:
    return self.tokens[self.place] if self.place < len(self.tokens) else ""

  def _take(self, wanted: str = "") -> str:
    token = self._next()
    if wanted and token != wanted or not token:
      raise _NoValue(token)
    self.place += 1
    return token

  def _signed(self) -> float:
    if self._next() in ("+", "-"):
      return self._product() if self._take() == "+" else -self._product()
    return self._product()

  def _product(self) -> float:
    total = self._power()
    divided = False
    while (token := self._next()) not in ("", "+", "-", ")", "}", "]"):
      if token in ("*", r"\cdot", r"\times", "/"):
        self.place += 1
        divided = token == "/"
        total = total / self._power() if divided else total * self._power()
      elif divided or token[0] in "0123456789." or self._mixed():
        raise _NoValue("one reader takes it for another thing than the next")
      else:
        total *= self._power()
    return total

  def _mixed(self) -> bool:
    """Returns whether a fraction stands right after a number."""
    return self._next() == r"\frac" and self.tokens[self.place - 1][-1].isdigit()

  def _power(self) -> float:
    base = self._atom()
    if self._next() != "^":
      return base
    self.place += 1
    exponent = self._group("{", "}") if self._next() == "{" else self._digit()
    raised = base**exponent
    if isinstance(raised, complex) or self._next() == "^":
      raise _NoValue("complex")
    return raised

  def _digit(self) -> float:
    token = self._take()
    if len(token) != 1 or not token.isdigit():
      raise _NoValue(token)
    return float(token)

  def _atom(self) -> float:
    token = self._take()
    if token[0].isdigit() or token[0] == ".":
      return float(token)
    if token == r"\pi":
      return math.pi
    if token == r"\frac":
      return self._group("{", "}") / self._group("{", "}")
    if token == r"\sqrt":
      degree = self._group("[", "]") if self._next() == "[" else 2.0
      return self._root(self._group("{", "}"), degree)
    if token in ("(", "{"):
      self.place -= 1
      return self._group(token, {"(": ")", "{": "}"}[token])
    raise _NoValue(token)

  def _root(self, radicand: float, degree: float) -> float:
    if radicand < 0 or degree <= 0:
      raise _NoValue("complex")
    return radicand ** (1 / degree)

  def _group(self, opening: str, closing: str) -> float:
    self._take(opening)
    inner = self.sum()
    self._take(closing)
    return inner
