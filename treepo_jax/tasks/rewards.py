"""Strict reward: the last complete \\boxed{...} of an answer is compared with the gold answer.

Nothing outside a box counts, an answer without a complete box is wrong, and a gold answer that
cannot be read is an error that is counted, never a silent zero.
"""

import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Int

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


def groups(answers: Sequence[str | None], grader: str, *, config) -> list[int]:
  """Returns the class of each of a prompt's answers: the same answer, the same index; None: -1."""
  del grader, config
  keys = [None if answer is None else normalise(answer) for answer in answers]
  index = {key: i for i, key in enumerate(dict.fromkeys(k for k in keys if k is not None))}
  return [-1 if key is None else index[key] for key in keys]


def score(
  correct: Bool[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], *, longest: int, config
) -> Float[np.ndarray, " n"]:
  """Returns the reward of each answer: right or wrong, less what its length costs.

  reward.correct or reward.wrong (TreePO section 3.1: +1 and -1), and where reward.overlong_buffer
  is B > 0, the last B tokens before the longest answer cost reward.overlong_factor / B each (DAPO,
  arXiv 2503.14476, Eq 13).

  Args:
    correct: verdicts.
    tokens: of each answer.
    longest: tokens of the longest answer there can be.
    config: reward.
  """
  r = config.reward
  value = np.where(correct, r.correct, r.wrong)
  if r.overlong_buffer:
    over = np.maximum(tokens - (longest - r.overlong_buffer), 0)
    value = value - over / r.overlong_buffer * r.overlong_factor
  return value.astype(np.float32)


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
