r"""From a row of a data set to a question: one reader a way in which golds are published.

A reader is any function row -> Question. It raises ValueError saying what is wrong with the row,
and NoGold where nothing is wrong but that the answer is empty.
"""

import dataclasses
import importlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

from treepo_jax.config import GRADERS, UserError
from treepo_jax.tasks.text import last_box

ASKED = ("prompt", "question", "problem")
FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


class NoGold(ValueError):
  """A row whose answer is empty: nothing can be graded by it, so it is counted and left out."""


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked and what counts as right.

  Attributes:
    gold: the right answer, as `grader` reads it.
    grader: which of config.GRADERS compares answers with it.
    dataset: name of the set that it is of, "" where the set has none.
  """

  text: str
  gold: str
  grader: str = "math"
  dataset: str = ""


Row = dict[str, Any]  # texts, numbers, booleans, None, and lists and objects of them
Reader = Callable[[Row], Question]


def find(name: str, key: str) -> Reader:
  """Returns a reader of READERS or the user's own `module:function`; `key` is where it is named."""
  if name in READERS:
    return READERS[name]
  if FUNCTION.fullmatch(name):
    return function(name, key)
  raise UserError(
    f"{key}: there is no reader {name!r}; there are {', '.join(READERS)}, and your own as "
    "module:function"
  )


def function(name: str, key: str) -> Callable:
  """Returns the function that `module:function` names; raises UserError naming the key."""
  match = FUNCTION.fullmatch(name)
  if not match:
    raise UserError(f"{key} = {name!r}: write module:function, such as my_tasks.sums:question")
  try:
    found = getattr(importlib.import_module(match[1]), match[2])
  except (ImportError, AttributeError) as error:
    raise UserError(
      f"{key} = {name!r} cannot be imported: {error}; modules are looked for in the working "
      "directory and in PYTHONPATH"
    ) from error
  if not callable(found):
    raise UserError(f"{key} = {name!r} is a {type(found).__name__}, not a function")
  return found


def plain(row: Row) -> Question:
  """Reads {"prompt" | "question" | "problem": text, "answer": text or number}.

  Of an answer with `####` (GSM8K) what follows the last one is the gold; "grader" may name one of
  config.GRADERS. A row that could be read in two ways is refused.
  """
  keys = [key for key in ASKED if key in row]
  if len(keys) != 1 or "answer" not in row:
    raise ValueError(
      f"expected 'answer' and one of {', '.join(ASKED)}; got {', '.join(row) or 'no keys'}"
    )
  grader = row["grader"] if "grader" in row else "math"
  if grader not in GRADERS:
    raise ValueError(f"'grader' is {grader!r}; allowed: {', '.join(GRADERS)}")
  gold = _value(row, "answer").rpartition("####")[2]
  return Question(_text(row, keys[0]), _gold(gold, "answer"), grader)


def gsm8k(row: Row) -> Question:
  """GSM8K (arXiv 2110.14168): the gold is what follows the last `####` of the worked answer."""
  _, mark, gold = _text(row, "answer").rpartition("####")
  if not mark:
    raise ValueError("'answer' has no '####' with the final answer after it")
  return Question(_text(row, "question"), _gold(gold, "answer"))


def competition(row: Row) -> Question:
  r"""MATH (arXiv 2103.03874) and its relatives: `answer`, or the last `\boxed{}` of `solution`."""
  return contest(row) if "answer" in row else minerva(row)


def contest(row: Row) -> Question:
  """AIME, AMC: the gold is `answer`, a text or a number; 27.0 is 27."""
  return Question(_problem(row), _gold(_value(row, "answer"), "answer"))


def minerva(row: Row) -> Question:
  r"""Minerva math (arXiv 2206.14858, appendix): the gold is the last `\boxed{}` of `solution`."""
  gold = last_box(_text(row, "solution"))
  if gold is None:
    raise ValueError(r"'solution' has no complete \boxed{...} with the final answer")
  return Question(_problem(row), _gold(_undelimited(gold), "solution"))


def olympiadbench(row: Row) -> Question:
  r"""OlympiadBench (arXiv 2402.14008), text-only open-ended problems: the gold is `final_answer`.

  A list of one or more texts, each with `$` of its own. Several answers, and the parts of a tuple,
  become one text with ", " between them, so that no comma can be one of thousands. The unit stands
  in a field of its own and is not asked for in the box: it is left out, as the tolerance `error`.
  """
  answers = _required(row, "final_answer")
  if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
    raise ValueError("'final_answer' must be a list of texts")
  gold = _undelimited(", ".join(answers))
  if _required(row, "is_multiple_answer") or _required(row, "answer_type") == "Tuple":
    gold = re.sub(r"\s*,\s*", ", ", gold)
  context, text = _required(row, "context"), _text(row, "question")
  return Question(f"{context}\n{text}" if context else text, _gold(gold, "final_answer"))


def svamp(row: Row) -> Question:
  """SVAMP (arXiv 2103.07191): Body, a full stop where it has none, Question; the gold is Answer."""
  body = _text(row, "Body").strip()
  body += "" if body[-1] in ".!?" else "."
  return Question(
    f"{body} {_text(row, 'Question').strip()}", _gold(_value(row, "Answer"), "Answer")
  )


def countdown(row: Row) -> Question:
  """Countdown (TinyZero's rows): the answer is an expression of all of `nums` worth `target`.

  The gold is JSON {"nums": [...], "target": n} for the grader "countdown".
  """
  nums, target = _required(row, "nums"), _required(row, "target")
  if not isinstance(nums, list) or not nums or not all(map(_whole, [*nums, target])):
    raise ValueError("'nums' must be a list of whole numbers, 'target' a whole number")
  text = (
    f"Use each of the numbers {', '.join(map(str, nums))} exactly once, with +, -, *, / "
    f"and parentheses, in an expression that equals {target}. Put the expression alone into "
    "\\boxed{}."
  )
  return Question(text, json.dumps({"nums": nums, "target": target}), "countdown")


READERS: dict[str, Reader] = {
  "plain": plain,
  "gsm8k": gsm8k,
  "math": competition,
  "aime": contest,
  "amc": contest,
  "minerva": minerva,
  "olympiadbench": olympiadbench,
  "svamp": svamp,
  "countdown": countdown,
}


def _required(row: Row, key: str) -> Any:
  if key not in row:
    raise ValueError(f"expected {key!r}; got {', '.join(row) or 'no keys'}")
  return row[key]


def _text(row: Row, key: str) -> str:
  value = _required(row, key)
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{key!r} must be a text that is not empty")
  return value


def _problem(row: Row) -> str:
  """Returns `problem` or `question`; where a row has both they must say the same."""
  texts = [_text(row, key) for key in ("problem", "question") if key in row]
  if not texts:
    raise ValueError(f"expected 'problem' or 'question'; got {', '.join(row) or 'no keys'}")
  if texts[0].strip() != texts[-1].strip():
    raise ValueError("'problem' and 'question' differ")
  return texts[0]


def _value(row: Row, key: str) -> str:
  """Returns a text or number as text: whole numbers without a point."""
  value = _required(row, key)
  if isinstance(value, float) and math.isfinite(value):
    return str(int(value)) if value.is_integer() else repr(value)
  if isinstance(value, bool) or not isinstance(value, str | int):
    shown = value if isinstance(value, float) else type(value).__name__
    raise ValueError(f"{key!r} must be a text or a number, got {shown}")
  return str(value)


def _gold(text: str, key: str) -> str:
  if not text.strip():
    raise NoGold(f"{key!r} is empty")
  return text.strip()


def _undelimited(text: str) -> str:
  """Returns a mathematical text without the `$` around it or its parts; an escaped one stays."""
  return re.sub(r"(?<!\\)\$", "", text)


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)
