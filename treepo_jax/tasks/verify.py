"""Whether two answers are equal as mathematics: math-verify, asked one pair at a time.

Runs in worker processes (tasks/pool.py): what it is asked may hang or exhaust memory, and nothing
here guards against that. Only they import it: sympy takes half a second to load.
"""

import functools
import logging
from typing import Any

import math_verify
import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig
from math_verify.parser import NormalizationConfig

from treepo_jax.tasks import answers

# tidy() has left units out already; math-verify takes the d of 2x + 3d for one.
NORMALISATION = NormalizationConfig(
  basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
)
BOX = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=NORMALISATION),)
SENTENCE = (LatexExtractionConfig(), ExprExtractionConfig())
DECIMALS = 12  # of decimal numbers inside a list, a vector or a matrix
FLOAT_ERROR = 1e-9  # relative, of an expression with decimal numbers in it
EXACT_ERROR = 1e-20  # relative, of one without, evaluated with DIGITS
DIGITS = 30
ROOTS = tuple(sympy.sqrt(n).evalf(DIGITS) for n in (2, 3, 5, 7, 11, 13))
POINTS = ((0, 1), (sympy.Rational(1, 3), -1), (-5, 1))  # (shift, sign): + + +, - + -, all negative

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off


def equal(gold: str, answer: str, bare: bool, policy: str, tolerance: float) -> bool:
  """Returns whether an answer is right.

  Args:
    gold: what is right; the side whose variable counts in `x = 5`.
    answer: what is judged.
    bare: the answer may be a sentence with the answer in it; what stood in a box may not.
    policy: "strict" (tasks/answers.py) or "math_verify", its defaults and nothing else.
    tolerance: relative difference of numbers that are equal.

  Raises what sympy raises for a pair that it cannot compare.
  """
  if policy == "math_verify":
    return math_verify.verify(_alone(gold), _alone(answer), timeout_seconds=None)
  golds, found = _parsed(gold, True), _parsed(answer, bare)
  verdict = _as_numbers(golds, found, tolerance)
  if verdict is not None:
    return verdict
  if _of_different_variables(golds, found):
    return False
  golds, found = _as_vectors(golds, found)
  return math_verify.verify(
    golds,
    found,
    float_rounding=DECIMALS,
    allow_set_relation_comp=True,
    timeout_seconds=None,
    raise_on_error=True,
  )


@functools.lru_cache(maxsize=4096)  # a gold answer meets all the answers to its question
def _parsed(text: str, sentence: bool) -> list[Any]:
  """Returns what a text may mean: sympy objects, and the text itself last."""
  if not (sentence and answers.is_prose(text)):
    box = rf"\boxed{{{answers.tidy(text)}}}"
    found = math_verify.parse(box, BOX, parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]
    if not sentence or any(not isinstance(f, str) for f in found):
      return found
  text = answers.without_percent(text)
  return math_verify.parse(text, SENTENCE, parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]


@functools.lru_cache(maxsize=4096)
def _alone(text: str) -> list[Any]:
  if not answers.is_prose(text):
    text = f"${text}$"
  return math_verify.parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _as_numbers(golds: list[Any], found: list[Any], tolerance: float) -> bool | None:
  """Returns whether two expressions are equal by their values, or None where they have none.

  Numbers are compared once, expressions with variables at POINTS: what differs at one differs, and
  what agrees at all to EXACT_ERROR is one function. That settles in a millisecond what simplifying
  a difference takes a hundred for.
  """
  if not golds or not found:
    return None
  gold, answer = golds[0], found[0]
  if not all(isinstance(e, sympy.Expr) for e in (gold, answer)):
    return None
  names = sorted(gold.free_symbols | answer.free_symbols, key=str)
  decimal = gold.has(sympy.Float) or answer.has(sympy.Float)
  error = max(tolerance, FLOAT_ERROR if decimal else EXACT_ERROR)
  agreed = False
  for shift, sign in POINTS if names else POINTS[:1]:
    point = {name: sign**k * (shift + ROOTS[k % len(ROOTS)]) for k, name in enumerate(names, 1)}
    point |= {name: sympy.I for name in names if name.name == "i"}
    left, right = (e.doit().evalf(DIGITS, subs=point) for e in (gold, answer))
    if not all(e.is_finite and e.is_number and not e.free_symbols for e in (left, right)):
      continue
    if abs(left - right) > error * abs(left):
      return False
    agreed = True
  return True if agreed else None


def _of_different_variables(golds: list[Any], found: list[Any]) -> bool:
  """Returns whether both sides are equations, of different variables: solving them takes long."""
  equations = [side[0] for side in (golds, found) if side and isinstance(side[0], sympy.Eq)]
  return len(equations) == 2 and equations[0].free_symbols != equations[1].free_symbols


def _as_vectors(golds: list[Any], found: list[Any]) -> tuple[list[Any], list[Any]]:
  """Returns both sides with a column or row as a tuple where the other side is a list or tuple."""

  def entries(side: list[Any], other: list[Any]) -> list[Any]:
    if not side or not other or isinstance(other[0], sympy.MatrixBase):
      return side
    first = side[0]
    if isinstance(first, sympy.MatrixBase) and 1 in first.shape:
      return [sympy.Tuple(*first.flat())]
    return side

  def ends(side: list[Any], other: list[Any]) -> list[Any]:
    vector = other and isinstance(other[0], sympy.MatrixBase) and 1 in other[0].shape
    if vector and side and isinstance(side[0], sympy.Interval):
      return [sympy.Tuple(side[0].start, side[0].end)]
    return side

  golds, found = ends(golds, found), ends(found, golds)
  return entries(golds, found), entries(found, golds)


# The parser builds its tables with the first answers it reads: those are no answer's time.
for _pair in ((r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"), ("(1,2)", "[1,x)"), ("x=1, y=2", r"\{1,2\}")):
  equal(*_pair, False, "strict", 0.0)
