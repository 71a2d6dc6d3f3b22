"""Questions by position, from files, TFDS data sets and functions, each by its name.

A name is `[NAME=]WHERE[#READER]`, several are parted by commas. NAME is what figures call the set,
READER is one of tasks/readers.py. WHERE is one of

  FILE.jsonl                a row a line (any file that is not one of the below)
  FILE.parquet, FOLDER      Parquet, one file or all of a folder
  tfds:NAME[/CONFIG][:VERSION][@SPLIT]   TensorFlow Datasets, without TensorFlow
  module:function           your own (seed, split, position) -> Question, without end
  arithmetic                the embedded task, without end

A set is read whole when the run starts, so that a bad row is found then and not hours later.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from treepo_jax.config import GRADERS, UserError
from treepo_jax.tasks import arithmetic, readers
from treepo_jax.tasks.readers import Question, Row

EMBEDDED = "arithmetic"
TFDS = "tfds:"
TFDS_SPLITS = {"train": "train", "heldout": "test"}  # where none is named
HELDOUT_SEED = 0  # held-out problems do not change with config.seed
NAME = re.compile(r"(?:([\w.-]+)=)?([^#]+)(?:#([\w.:]+))?")


@dataclasses.dataclass(frozen=True)
class Spec:
  """Name, place and reader of a set, and what the user gave them as, for messages."""

  name: str
  where: str
  reader: str
  key: str


@dataclasses.dataclass(frozen=True)
class Source:
  """Questions by position.

  Attributes:
    read: position -> question, for every position >= 0.
    size: number of distinct questions; None where there is no end of them, as of a mix.
  """

  read: Callable[[int], Question]
  size: int | None


@dataclasses.dataclass(frozen=True)
class Table:
  """What a file or TFDS data set holds.

  Attributes:
    questions: distinct ones with a gold, in order.
    rows: read in all.
    empty: rows left out because their answer is empty.
  """

  questions: tuple[Question, ...]
  rows: int
  empty: int


def parse(text: str, key: str, reader: str) -> list[Spec]:
  """Returns the sets that `text`, given as `key`, names; `reader` is of those that name none."""
  specs = []
  for part in text.split(","):
    match = NAME.fullmatch(part.strip())
    if not match:
      raise UserError(
        f"{key} = {text!r}: {part!r} is not of the form [NAME=]WHERE[#READER], several with commas"
      )
    specs.append(Spec(match[1] or "", match[2], match[3] or reader, key))
  return specs


def load(spec: Spec, *, split: str, config) -> Source:
  """Returns a set's questions in its own order; raises UserError naming what cannot be read."""
  seed = config.seed if split == "train" else HELDOUT_SEED
  if spec.where == EMBEDDED:
    levels = tuple(config.data.levels)
    ask = functools.partial(_arithmetic, seed, split, levels, spec.name)
    return Source(read=ask, size=None)
  if not spec.where.startswith(TFDS) and readers.FUNCTION.fullmatch(spec.where):
    made = readers.function(spec.where, spec.key)
    return Source(read=functools.partial(_generated, made, seed, split, spec), size=None)
  found = table(spec, split=split, root=config.data.root)
  return listed(found.questions)


def listed(questions: tuple[Question, ...]) -> Source:
  """Returns a source of given questions, again from the first after the last."""
  return Source(read=lambda position: questions[position % len(questions)], size=len(questions))


def shuffled(source: Source, *, seed: int, index: int = 0) -> Source:
  """Returns the questions of a source with an end in an order of its own each epoch.

  A pure function of (seed, index of the source in a mix, position).
  """
  if (size := source.size) is None:
    return source

  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, index]).permutation(size)

  def read(position: int) -> Question:
    epoch, i = divmod(position, size)
    return source.read(int(order(epoch)[i]))

  return Source(read=read, size=size)


def table(spec: Spec, *, split: str, root: str) -> Table:
  """Reads a file or TFDS data set whole.

  Equal rows count once. Rows without an answer are left out and said. Raises UserError naming the
  place of a row that cannot be used.
  """
  read = readers.find(spec.reader, spec.key)
  found: dict[str, tuple[str, Question]] = {}
  rows, empty = 0, []
  for place, row in _rows(spec, split, root):
    rows += 1
    try:
      question = dataclasses.replace(_question(read(row)), dataset=spec.name)
    except readers.NoGold:
      empty.append(place)
      continue
    except (ValueError, TypeError, LookupError) as error:  # a reader of the user may raise any
      reason = error if isinstance(error, ValueError) else repr(error)
      raise UserError(f"{place}: {reason} (reader {spec.reader!r})") from error
    first, known = found.setdefault(question.text, (place, question))
    if known.gold != question.gold:
      raise UserError(f"{place}: the question of {first} with another answer; remove one of them")
  if not found:
    raise UserError(f"{spec.where}: no rows" + (" with an answer" if empty else ""))
  if empty:
    logging.warning(
      "%s: an empty answer; %d of %d rows are left out for that", empty[0], len(empty), rows
    )
  return Table(tuple(question for _, question in found.values()), rows, len(empty))


def _rows(spec: Spec, split: str, root: str) -> Iterator[tuple[str, Row]]:
  """Yields each row with the words that name its place."""
  if spec.where.startswith(TFDS):
    return _tfds(spec, split, root)
  path = Path(root) / spec.where
  if not path.exists():
    raise UserError(
      f"{path}: no such file; {spec.key} names JSONL and Parquet files, {TFDS}NAME, "
      f"module:function or {EMBEDDED}, below config.data.root = {root!r}"
    )
  return _parquet(path) if path.is_dir() or path.suffix == ".parquet" else _jsonl(path)


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
  for line, text in enumerate(path.read_bytes().splitlines(), start=1):
    if not text.strip():
      continue
    place = f"{path}, line {line}"
    try:
      row = json.loads(text)
    except ValueError as error:
      raise UserError(f"{place}: {error}") from error
    if not isinstance(row, dict):
      raise UserError(f"{place}: expected an object, got {type(row).__name__}")
    yield place, row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
  import pyarrow
  from pyarrow import parquet  # slow to import, and not every run needs it

  try:
    found = parquet.read_table(path)
  except (pyarrow.ArrowException, OSError) as error:
    raise UserError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from error
  for i, row in enumerate(found.to_pylist(), start=1):
    yield f"{path}, row {i}", row


def _tfds(spec: Spec, split: str, root: str) -> Iterator[tuple[str, Row]]:
  name, _, part = spec.where.removeprefix(TFDS).partition("@")
  part = part or TFDS_SPLITS[split]
  import tensorflow_datasets as tfds  # slow to import, and not every run needs it

  try:
    data: Any = tfds.data_source(
      name, split=part, data_dir=root or None, builder_kwargs={"file_format": "array_record"}
    )
  except (ValueError, RuntimeError, OSError, tfds.download.DownloadError) as error:
    raise UserError(
      f"{spec.key}: {TFDS}{name}@{part} cannot be read from {root or 'the folder of TFDS'}: "
      f"{_first_line(error)}. Data sets are looked for in config.data.root; python -m "
      "treepo_jax.tasks.tfds_builder makes one of your own files"
    ) from error
  for i in range(len(data)):
    row = {key: _python(value) for key, value in data[i].items()}
    yield f"{TFDS}{name}@{part}, row {i + 1}", row


def _python(value: Any) -> Any:
  """Returns a TFDS value as JSON would have it: bytes as text, numpy numbers and arrays as ours."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, np.ndarray | np.generic):
    return _python(value.tolist())
  if isinstance(value, list):
    return [_python(v) for v in value]
  if isinstance(value, dict):
    return {key: _python(v) for key, v in value.items()}
  return value


def _arithmetic(seed: int, split: str, levels: tuple, name: str, position: int) -> Question:
  problem = arithmetic.problem(seed, position, split=split, levels=levels)
  return Question(problem.question, problem.answer, "number", name)


def _generated(made: Callable, seed: int, split: str, spec: Spec, position: int) -> Question:
  try:
    return dataclasses.replace(_question(made(seed, split, position)), dataset=spec.name)
  except ValueError as error:
    raise UserError(f"{spec.where}({seed}, {split!r}, {position}): {error}") from error


def _question(made: object) -> Question:
  """Returns what a function of the user made; raises ValueError where it is no question."""
  if not isinstance(made, Question):
    raise ValueError(f"{made!r} is not a Question of treepo_jax.tasks.readers")
  if not made.text or not made.gold or made.grader not in GRADERS:
    raise ValueError(f"{made!r} needs a text, a gold and a grader of {', '.join(GRADERS)}")
  return made


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
