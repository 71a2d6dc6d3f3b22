r"""Prompts in order, from one source or a mix of several, with a position that can be saved.

Everything is a pure function of (config, split, position): a run that saves the position after each
batch continues with exactly the prompts that it would have seen, and several hosts that save the
same position each take their part of the same batch.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

from absl import logging

from treepo_jax.config import UserError
from treepo_jax.tasks import mixing, sources
from treepo_jax.tasks import text as text_lib
from treepo_jax.tasks.readers import Question
from treepo_jax.tasks.sources import Source

PATIENCE = 10_000  # questions in a row that may be unfit before an endless source is given up
SPACING = re.compile(r"\s|~|\\[,;:!> ]|\\q?quad(?![a-z])")  # of texts in lower case


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A question as the policy sees it.

  Attributes:
    id: u32 identity of the question: the same wherever and whenever it is asked, so questions of
      two sets with one text share it.
    tokens: the prompt after the template, at most config.rollout.prompt_length.
    gold: the right answer, as `grader`, one of config.GRADERS, reads it.
    dataset: name of the set that it is of, "" where the set has none.
  """

  id: int
  text: str
  tokens: list[int]
  gold: str
  grader: str = "math"
  dataset: str = ""


@dataclasses.dataclass(frozen=True)
class Batch:
  """Prompts of a step, no question twice within a set.

  Attributes:
    position: where the next batch begins.
    dropped: questions left out because their prompt is longer than config.rollout.prompt_length.
  """

  prompts: list[Prompt]
  position: int
  dropped: int


def source(config) -> Source:
  """Returns the training questions in an order of config.seed.

  Each set is shuffled anew each of its epochs; several are mixed by config.data.weights; questions
  that are held out too are treated as config.data.leakage says. Raises UserError naming file and
  line of a row that cannot be used.
  """
  if config.data.eval_path and not config.data.path:
    raise UserError(
      "config.data.path is empty, but config.data.eval_path is not: name what to train on, "
      f"{sources.EMBEDDED!r} for the embedded task"
    )
  specs = sources.parse(
    config.data.path or sources.EMBEDDED, "config.data.path", config.data.reader
  )
  parts = [sources.load(spec, split="train", config=config) for spec in specs]
  if any(part.size is not None for part in parts):
    parts = _checked(parts, _heldout_sets(config), config.data.leakage)
  parts = [sources.shuffled(part, seed=config.seed, index=i) for i, part in enumerate(parts)]
  if len(parts) == 1:
    return parts[0]
  return mixing.mix(parts, weights=config.data.weights, seed=config.seed)


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
  """Returns the fixed held-out prompts, set after set: the first config.eval.prompts of each."""
  batches = [_first(part, text, config) for part in _heldout_sets(config)]
  return Batch(
    prompts=[prompt for batch in batches for prompt in batch.prompts],
    position=sum(batch.position for batch in batches),
    dropped=sum(batch.dropped for batch in batches),
  )


def identity(question: str) -> int:
  """Returns the u32 identity of a question: blake2b of its text."""
  return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=4).digest(), "little")


def fingerprint(question: str) -> bytes:
  """Returns what questions share that differ in case, white space and LaTeX spacing alone."""
  return hashlib.blake2b(SPACING.sub("", question.lower()).encode(), digest_size=16).digest()


def _heldout_sets(config) -> list[Source]:
  """Returns the held-out sets; several need names that differ."""
  text = config.data.eval_path or sources.EMBEDDED
  specs = sources.parse(text, "config.data.eval_path", config.data.reader)
  names = [spec.name for spec in specs]
  if len(specs) > 1 and ("" in names or len(set(names)) < len(names)):
    raise UserError(
      f"config.data.eval_path = {text!r}: give each set a name of its own, such as "
      "math500=math500/test.jsonl,aime24=aime24/test.jsonl"
    )
  return [sources.load(spec, split="heldout", config=config) for spec in specs]


def _first(part: Source, text: text_lib.Text, config) -> Batch:
  """Returns the first config.eval.prompts prompts of a held-out set that fit, or all that do."""
  count = config.eval.prompts if part.size is None else min(config.eval.prompts, part.size)
  if part.size is None or config.data.overlong == "error":
    return take(part, text, start=0, count=count, config=config)
  prompts = [_prompt(part.read(i), text, config) for i in range(part.size)]
  fitting = [p for p in prompts if len(p.tokens) <= config.rollout.prompt_length]
  return Batch(fitting[:count], part.size, len(prompts) - len(fitting))


def _checked(parts: Sequence[Source], held: Sequence[Source], leakage: str) -> list[Source]:
  """Returns the training sets, where config.data.leakage is "drop" without what is held out too.

  Sets without end are not compared. Says how many questions are in both and shows the first.
  """
  known = {fingerprint(question.text): question for part in held for question in _all(part)}
  leaked = [
    [question for question in _all(part) if fingerprint(question.text) in known] for part in parts
  ]
  found = [question for questions in leaked for question in questions]
  if not found:
    return list(parts)
  total = sum(part.size for part in parts if part.size is not None)
  where = known[fingerprint(found[0].text)].dataset
  message = (
    f"{len(found)} of {total} training questions are held out too, the first"
    f"{' in ' + where if where else ''}: {found[0].text[:80]!r}"
  )
  if leakage == "error":
    raise UserError(
      f"{message}. Set config.data.leakage = 'drop' to train without them, or 'report' to keep them"
    )
  if leakage == "report":
    logging.warning("%s; config.data.leakage = 'drop' leaves them out of training", message)
    return list(parts)
  logging.warning("%s; they are left out of training", message)
  return [_without(part, questions) for part, questions in zip(parts, leaked, strict=True)]


def _all(part: Source) -> list[Question]:
  return [part.read(i) for i in range(part.size or 0)]


def _without(part: Source, questions: Sequence[Question]) -> Source:
  if not questions:
    return part
  gone = {question.text for question in questions}
  left = tuple(question for question in _all(part) if question.text not in gone)
  if not left:
    raise UserError("every training question is held out too: config.data.path needs other ones")
  return sources.listed(left)


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
  return Prompt(
    id=number,
    text=question.text,
    tokens=tokens,
    gold=question.gold,
    grader=question.grader,
    dataset=question.dataset,
  )
