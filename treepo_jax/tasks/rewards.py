"""Reward: answers are taken out of texts, compared with gold answers, and made numbers.

tasks/answers.py states the strict policy. Each question names its grader: "math", "number" or
"countdown". What numbers and text decide is decided here; the rest math-verify decides in worker
processes (tasks/pool.py), where an answer that hangs or bursts costs itself. An answer that could
not be graded counts as wrong, and is counted as an error by its name.
"""

import atexit
import dataclasses
import functools
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from treepo_jax.config import GRADERS, UserError
from treepo_jax.tasks import answers as answers_lib
from treepo_jax.tasks import expression, pool
from treepo_jax.tasks import text as text_lib

ENGINE = "treepo_jax.tasks.verify:equal"
WORKERS = 16  # processes at most where config.reward.workers leaves the number open
CHUNK = 16  # answers that a user's function gets at once
GOLD = "gold"  # status of an answer whose gold answer cannot be read

normalise = answers_lib.normalise


@dataclasses.dataclass(frozen=True)
class Grades:
  """Verdicts on n answers.

  Attributes:
    correct: whether each answer is right.
    extracted: what stood in each answer's last complete box; None where there is no box.
    status: of each answer "graded", or why it could not be: "gold" (an empty gold answer, or one
      that its grader cannot read), "timeout", "crash" (its worker ended twice), "error" (the
      engine or the user's function raised). An answer that could not be graded counts as wrong.
    value: rewards that the user's function gave, instead of those for right and wrong; else None.
  """

  correct: Bool[np.ndarray, " n"]
  extracted: list[str | None]
  status: list[str]
  value: Float[np.ndarray, " n"] | None = None

  @property
  def errors(self) -> int:
    """Answers that could not be graded."""
    return sum(status != "graded" for status in self.status)


def grade(
  texts: Sequence[str],
  golds: Sequence[str],
  graders: Sequence[str],
  prompts: Sequence[str] | None = None,
  *,
  config,
  bare: bool = False,
  cheap: bool = False,
) -> Grades:
  """Grades answers.

  Args:
    texts: what was written, without the prompt.
    golds: what is right; for "countdown" JSON (tasks/expression.py).
    graders: name of each answer's grader.
    prompts: questions, for a user's function (config.reward.fn); "" where None.
    config: reward.
    bare: a text without any `\\boxed` is the answer itself, or a sentence that ends with it.
    cheap: answers that only algebra could decide count as wrong, and no process is asked; a user's
      function is.

  Raises ValueError where the counts differ or a grader is unknown, UserError where the user's
  function cannot be loaded, returns something else than it must, or fails on all of CHUNK answers
  or more.
  """
  prompts = [""] * len(texts) if prompts is None else prompts
  if not len(texts) == len(golds) == len(graders) == len(prompts):
    raise ValueError(
      f"{len(texts)} answers but {len(golds)} gold answers, {len(graders)} graders, "
      f"{len(prompts)} prompts"
    )
  if unknown := set(graders) - set(GRADERS):
    raise ValueError(f"grader {sorted(unknown)}: must be of {', '.join(GRADERS)}")
  found = [_extract(text, bare, config.reward.extract) for text in texts]
  extracted = [answer for answer, _ in found]
  if config.reward.fn:
    return _by_user(texts, golds, prompts, extracted, config)
  verdicts = _verdicts(list(zip(golds, found, graders, strict=True)), cheap, config)
  return Grades(
    correct=np.array([verdict is True for verdict in verdicts], bool),
    extracted=extracted,
    status=[v if isinstance(v, str) else "graded" for v in verdicts],
  )


def join(parts: Sequence[Grades]) -> Grades:
  """Returns the verdicts of all parts as one, in their order."""
  values = [part.value for part in parts if part.value is not None]
  return Grades(
    correct=np.concatenate([part.correct for part in parts]),
    extracted=[answer for part in parts for answer in part.extracted],
    status=[status for part in parts for status in part.status],
    value=np.concatenate(values) if values else None,
  )


def score(
  grades: Grades, tokens: Int[np.ndarray, " n"], *, longest: int, config
) -> Float[np.ndarray, " n"]:
  """Returns the reward of each answer: right or wrong, or the user's, and what else config adds.

  reward.correct or reward.wrong (TreePO section 3.1: +1 and -1) or the number that the user's
  function gave; reward.format more where there is a box; and where reward.overlong_buffer is B > 0,
  the last B tokens before the longest answer cost reward.overlong_factor / B each (DAPO, arXiv
  2503.14476, Eq 13).

  Args:
    grades: verdicts.
    tokens: of each answer.
    longest: tokens of the longest answer there can be.
    config: reward.
  """
  r = config.reward
  value = np.where(grades.correct, r.correct, r.wrong) if grades.value is None else grades.value
  value = value + r.format * np.array([box is not None for box in grades.extracted], float)
  if r.overlong_buffer:
    over = np.maximum(tokens - (longest - r.overlong_buffer), 0)
    value = value - over / r.overlong_buffer * r.overlong_factor
  return value.astype(np.float32)


def groups(answers: Sequence[str | None], grader: str, *, config) -> list[int]:
  """Returns the class of each answer to one question: equal answers share a number, None has -1.

  Classes are numbered by their first answer, which is what later ones are compared with: as if it
  were the gold answer, exactly first and then by math-verify. A pair that cannot be compared is
  taken as different. Countdown: expressions are equal where their text is.
  """
  classes = [-1] * len(answers)
  first: dict[object, int] = {}
  heads: list[str] = []
  for i, answer in enumerate(answers):
    if answer is not None:
      share = _share(answer, grader)
      if share not in first:
        first[share] = len(heads)
        heads.append(answer)
      classes[i] = first[share]
  if grader != "math":
    return classes
  merged, left = list(range(len(heads))), list(range(len(heads)))
  while len(left) > 1:
    head, *others = left
    same = _verdicts([(heads[head], (heads[i], False), grader) for i in others], False, config)
    for i, equal in zip(others, same, strict=True):
      merged[i] = merged[head] if equal is True else merged[i]
    left = [i for i, equal in zip(others, same, strict=True) if equal is not True]
  order = {c: n for n, c in enumerate(sorted(set(merged)))}
  return [-1 if c < 0 else order[merged[c]] for c in classes]


def warm_up(config) -> None:
  """Starts the processes that grading may need; raises UserError where they cannot be."""
  _pool(config.reward.fn or ENGINE, config).warm_up()


def close() -> None:
  """Ends the processes of grading; they start again when they are needed."""
  for _, made in _pools.values():
    made.close()
  _pools.clear()


_pools: dict[str, tuple[tuple, pool.Pool]] = {}  # the run's processes, by the function they call
atexit.register(close)


def _pool(function: str, config) -> pool.Pool:
  r = config.reward
  wanted = (r.workers or min(os.cpu_count() or 1, WORKERS), r.timeout, r.memory)
  made = _pools[function] if function in _pools else None
  if made is None or made[0] != wanted:
    if made is not None:
      made[1].close()
    workers, seconds, memory = wanted
    made = _pools[function] = (
      wanted,
      pool.Pool(function, workers=workers, seconds=seconds, memory=int(memory * 2**30)),
    )
  return made[1]


def _extract(text: str, bare: bool, extract: str) -> tuple[str | None, bool]:
  """Returns a text's answer, None where it has none, and whether that is a bare one."""
  text = answers_lib.before_end(text)
  box = answers_lib.neighbouring_boxes(text) if extract == "boxes" else text_lib.last_box(text)
  if box is None and text.strip() and (extract == "anywhere" or bare and "\\boxed" not in text):
    return text.strip(), True
  return box, False


def _verdicts(
  pairs: list[tuple[str, tuple[str | None, bool], str]], cheap: bool, config
) -> list[bool | str]:
  """Returns what becomes of each (gold answer, (answer, bare), grader); equal ones are one."""
  verdicts = {pair: _decide(*pair, config) for pair in dict.fromkeys(pairs)}
  asked = [pair for pair, verdict in verdicts.items() if verdict is None]
  if asked and not cheap:
    settings = (config.reward.policy, config.reward.tolerance)
    calls = [(_gold(gold), answer, bare, *settings) for gold, (answer, bare), _ in asked]
    for pair, outcome in zip(asked, _pool(ENGINE, config).run(calls), strict=True):
      verdicts[pair] = outcome.value is True if outcome.status == "value" else outcome.status
  return [v if isinstance(v := verdicts[pair], str) else v is True for pair in pairs]


@functools.lru_cache(maxsize=4096)
def _gold(gold: str) -> str:
  """Returns a gold answer without the boxes that it may stand in."""
  boxes = dict.fromkeys(answers_lib.boxes(gold))
  return ", ".join(boxes) if boxes else gold


def _decide(gold: str, found: tuple[str | None, bool], grader: str, config) -> bool | str | None:
  """Returns a verdict, GOLD where the gold answer cannot be read, or None: math-verify is asked."""
  answer, bare = found
  if grader == "countdown":
    try:
      numbers, target = _countdown(gold)
    except ValueError:
      return GOLD
    return answer is not None and expression.solves(answer, list(numbers), target)
  gold = _gold(gold)
  if not gold.strip():
    return GOLD
  if answer is None:
    return False
  if grader == "number":
    return normalise(answer) == normalise(gold)
  if config.reward.policy != "strict":
    return None
  verdict = answers_lib.decide(gold, answer, config.reward.tolerance)
  sentence = not verdict and (bare and answers_lib.is_prose(answer) or answers_lib.is_prose(gold))
  return None if sentence else verdict


@functools.lru_cache(maxsize=4096)
def _countdown(gold: str) -> tuple:
  numbers, target = expression.read_gold(gold)
  return tuple(numbers), target


def _by_user(texts, golds, prompts, extracted, config) -> Grades:
  """Grades by the user's function: in chunks, and those that fail again one by one."""
  rows = list(zip(texts, golds, prompts, strict=True))
  chunks = [range(i, min(i + CHUNK, len(rows))) for i in range(0, len(rows), CHUNK)]
  status, value = ["graded"] * len(rows), np.full(len(rows), config.reward.wrong, float)
  correct, reasons = np.zeros(len(rows), bool), []
  while chunks:
    calls = [tuple([rows[i][part] for i in chunk] for part in range(3)) for chunk in chunks]
    outcomes = _pool(config.reward.fn, config).run(calls, weights=[len(chunk) for chunk in chunks])
    again = []
    for chunk, outcome in zip(chunks, outcomes, strict=True):
      if outcome.status == "value":
        for i, given in zip(chunk, _rewards(outcome.value, len(chunk), config), strict=True):
          correct[i] = given > 0
          value[i] = _worth(given, config)
      elif len(chunk) > 1:
        again += [range(i, i + 1) for i in chunk]
      else:
        status[chunk[0]] = outcome.status
        reasons.append(outcome.value)
    chunks = again
  if len(rows) >= CHUNK and len(reasons) == len(rows):
    raise UserError(
      f"config.reward.fn = {config.reward.fn!r} failed on every answer of a batch: {reasons[0]}"
    )
  return Grades(correct, extracted, status, value)


def _rewards(given: object, count: int, config) -> list[bool | float]:
  """Returns what the user's function gave; raises UserError where that is not what it must be."""
  name = f"config.reward.fn = {config.reward.fn!r}"
  given = given.tolist() if isinstance(given, np.ndarray) else given
  if not isinstance(given, list | tuple) or len(given) != count:
    got = f"{len(given)} of them" if isinstance(given, list | tuple) else type(given).__name__
    raise UserError(f"{name} must return a list of one reward an answer, {count} here; got {got}")
  given = [g.item() if isinstance(g, np.generic) else g for g in given]
  for reward in given:
    if not isinstance(reward, bool | int | float) or not math.isfinite(reward):
      raise UserError(f"{name} returned {reward!r}: a reward is a bool or a finite number")
  return given


def _worth(given: bool | float, config) -> float:
  if isinstance(given, bool):
    return config.reward.correct if given else config.reward.wrong
  return float(given)


def _share(answer: str, grader: str) -> object:
  """Returns what answers that are surely equal share."""
  if grader == "number":
    return normalise(answer)
  return answers_lib.share(answer) if grader == "math" else "".join(answer.split())
