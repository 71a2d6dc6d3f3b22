"""Prompts in order, from the embedded task or a JSONL file, with a position that can be saved.

A source is read by position, a pure function of (config, split, position): a run that saves the
position after each batch continues with exactly the prompts that it would have seen.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from treepo_jax.config import UserError
from treepo_jax.tasks import arithmetic
from treepo_jax.tasks import text as text_lib

QUESTION_KEYS = ("prompt", "question", "problem")
HELDOUT_SEED = 0  # held-out problems do not change with config.seed
PATIENCE = 10_000  # questions in a row that may be unfit before an endless source is given up


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked and what counts as right."""

  text: str
  gold: str


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A question as the policy sees it.

  Attributes:
    id: u32 identity of the question: the same wherever and whenever it is asked.
    tokens: the prompt after the template, at most config.rollout.prompt_length.
    gold: the right answer, as `grader` reads it.
    dataset: name of the set that it is of, "" where the set has none.
  """

  id: int
  text: str
  tokens: list[int]
  gold: str
  grader: str = "math"
  dataset: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
  """Questions by position.

  Attributes:
    read: position -> question, for every position >= 0.
    size: number of distinct questions; None where there is no end of them.
  """

  read: Callable[[int], Question]
  size: int | None


@dataclasses.dataclass(frozen=True)
class Batch:
  """Prompts of a step, no question twice.

  Attributes:
    position: where the next batch begins.
    dropped: questions left out because their prompt is longer than config.rollout.prompt_length.
  """

  prompts: list[Prompt]
  position: int
  dropped: int


def source(config, *, split: str) -> Source:
  """Returns the questions of a split: "train" ordered by config.seed, "heldout" fixed.

  A JSONL file's training rows are shuffled anew each epoch. Raises UserError naming file and line.
  """
  if split not in arithmetic.SPLITS:
    raise ValueError(f"split is {split!r}; allowed: {', '.join(arithmetic.SPLITS)}")
  train = split == "train"
  if not config.data.path:
    levels, seed = tuple(config.data.levels), config.seed if train else HELDOUT_SEED
    return Source(read=functools.partial(_ask, seed, split, levels), size=None)
  questions = read_jsonl(config.data.path if train else config.data.eval_path)
  order = functools.lru_cache(maxsize=2)(
    functools.partial(_order, config.seed, len(questions), train)
  )

  def read(position: int) -> Question:
    epoch, i = divmod(position, len(questions))
    return questions[order(epoch)[i]]

  return Source(read=read, size=len(questions))


def take(source: Source, text: text_lib.Text, *, start: int, count: int, config) -> Batch:
  """Returns the next `count` prompts from position `start`, skipping what is in the batch already.

  Raises UserError where a prompt is too long and config.data.overlong is "error", or where the
  source has fewer than `count` fitting questions.
  """
  prompts: dict[int, Prompt] = {}
  position, dropped, unfit = start, 0, 0
  while len(prompts) < count:
    prompt = _prompt(source.read(position), text, config)
    position += 1
    fits = len(prompt.tokens) <= config.rollout.prompt_length
    dropped += not fits
    if fits and prompt.id not in prompts:
      prompts[prompt.id], unfit = prompt, 0
      continue
    unfit += 1
    if unfit > (2 * source.size if source.size else PATIENCE):
      raise UserError(
        f"{count} different prompts are needed, but only {len(prompts)} fit "
        f"config.rollout.prompt_length = {config.rollout.prompt_length}: raise it or ask for fewer "
        "prompts (config.rollout.prompts, config.eval.prompts)"
      )
  return Batch(list(prompts.values()), position, dropped)


def heldout(config, text: text_lib.Text) -> Batch:
  """Returns the fixed held-out prompts, config.eval.prompts of them or all that a file has."""
  questions = source(config, split="heldout")
  count = (
    config.eval.prompts if questions.size is None else min(config.eval.prompts, questions.size)
  )
  if questions.size is None or config.data.overlong == "error":
    return take(questions, text, start=0, count=count, config=config)
  prompts = [_prompt(questions.read(i), text, config) for i in range(questions.size)]
  fitting = [p for p in prompts if len(p.tokens) <= config.rollout.prompt_length]
  return Batch(fitting[:count], questions.size, len(prompts) - len(fitting))


def identity(question: str) -> int:
  """Returns the u32 identity of a question: blake2b of its text."""
  return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=4).digest(), "little")


def read_jsonl(path: str | Path) -> list[Question]:
  """Reads rows {"prompt" | "question" | "problem": text, "answer": text or number}.

  Equal rows count once. Of an answer with `####` (GSM8K) what follows the last one is the gold
  answer. Raises UserError naming the file and line of a row that cannot be used.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(
      f"{path}: no such file; config.data.path and config.data.eval_path name JSONL files"
    )
  questions: dict[str, tuple[int, Question]] = {}
  for line, row in enumerate(path.read_bytes().splitlines(), start=1):
    if not row.strip():
      continue
    try:
      question = _question(json.loads(row))
    except ValueError as error:
      raise UserError(f"{path}, line {line}: {error}") from error
    first, known = questions.setdefault(question.text, (line, question))
    if known.gold != question.gold:
      raise UserError(
        f"{path}, line {line}: the question of line {first} with another answer; remove one of them"
      )
  if not questions:
    raise UserError(f"{path}: no rows")
  return [question for _, question in questions.values()]


def _question(row) -> Question:
  """Returns a JSONL row's question; raises ValueError saying what is wrong with it."""
  if not isinstance(row, dict):
    raise ValueError(f"expected an object, got {type(row).__name__}")
  keys = [key for key in QUESTION_KEYS if key in row]
  if len(keys) != 1 or "answer" not in row:
    raise ValueError(
      f"expected 'answer' and one of {', '.join(QUESTION_KEYS)}; got {', '.join(row) or 'no keys'}"
    )
  text, answer = row[keys[0]], row["answer"]
  if not isinstance(text, str) or not text.strip():
    raise ValueError(f"{keys[0]!r} must be a text that is not empty")
  if isinstance(answer, bool) or not isinstance(answer, str | int | float):
    raise ValueError(f"'answer' must be a text or a number, got {type(answer).__name__}")
  gold = str(answer).rpartition("####")[2].strip()
  if not gold:
    raise ValueError("'answer' is empty")
  return Question(text=text, gold=gold)


def _ask(seed: int, split: str, levels: tuple[int, ...], position: int) -> Question:
  problem = arithmetic.problem(seed, position, split=split, levels=levels)
  return Question(text=problem.question, gold=problem.answer)


def _order(seed: int, size: int, shuffled: bool, epoch: int) -> np.ndarray:
  """Returns the order of a file's rows in an epoch."""
  return np.random.default_rng([seed, epoch]).permutation(size) if shuffled else np.arange(size)


def _prompt(question: Question, text: text_lib.Text, config) -> Prompt:
  """Returns the prompt of a question; raises UserError where config.data.overlong makes it one."""
  tokens = text.prompt(question.text, config.data.template)
  number, limit = identity(question.text), config.rollout.prompt_length
  if len(tokens) > limit and config.data.overlong == "error":
    raise UserError(
      f"prompt {number} ({question.text[:40]!r}...) has {len(tokens)} tokens, more than "
      f"config.rollout.prompt_length = {limit}: raise it, or set config.data.overlong = 'drop' to "
      "leave such prompts out"
    )
  return Prompt(id=number, text=question.text, tokens=tokens, gold=question.gold)
