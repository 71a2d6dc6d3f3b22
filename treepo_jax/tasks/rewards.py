"""Strict reward: the last complete \\boxed{...} of an answer is compared with the gold answer.

Nothing outside a box counts, an answer without a complete box is wrong, and a gold answer that
cannot be read is an error that is counted, never a silent zero.
"""

import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float

from treepo_jax.tasks import text as text_lib

NUMBER = re.compile(r"[+-]?([0-9]{1,50}(\.[0-9]{0,50})?|\.[0-9]{1,50})(/[0-9]{1,50})?")
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}([^0-9]|$))")


@dataclasses.dataclass(frozen=True)
class Grades:
  """Verdicts on n answers.

  Attributes:
    correct: whether each answer's box equals its gold answer.
    extracted: what stood in each answer's last complete box; None where there is no box.
    errors: answers that could not be graded (an empty gold answer); they count as wrong.
  """

  correct: Bool[np.ndarray, " n"]
  extracted: list[str | None]
  errors: int


def grade(texts: Sequence[str], golds: Sequence[str]) -> Grades:
  """Grades answers by their last complete box; raises ValueError where the counts differ."""
  if len(texts) != len(golds):
    raise ValueError(f"{len(texts)} answers but {len(golds)} gold answers")
  extracted = [text_lib.last_box(text) for text in texts]
  keys = [normalise(gold) for gold in golds]
  correct = [
    box is not None and key != "" and normalise(box) == key
    for box, key in zip(extracted, keys, strict=True)
  ]
  return Grades(np.array(correct, bool), extracted, sum(key == "" for key in keys))


def score(
  texts: Sequence[str], golds: Sequence[str], *, correct: float = 1.0, wrong: float = -1.0
) -> Float[np.ndarray, " n"]:
  """Returns `correct` or `wrong` for each answer (TreePO section 3.1: +1 and -1)."""
  return np.where(grade(texts, golds).correct, correct, wrong).astype(np.float32)


def normalise(answer: str) -> Fraction | str:
  """Returns what equal answers share: a number as an exact fraction, other text without spaces.

  `7`, `07`, `+7`, `7.0`, `14/2`, `$7$` and `7.` are one number; `1,234` is 1234, `1,2` is text.
  """
  answer = answer.strip().strip("$").strip()
  answer = answer.removesuffix(".").replace("\\!", "").replace("\\,", "").replace("−", "-")
  number = THOUSANDS.sub("", answer).replace(" ", "")
  if NUMBER.fullmatch(number):
    top, _, bottom = number.partition("/")
    if not bottom or int(bottom):
      return Fraction(top) / int(bottom or 1)
  return "".join(answer.split())
