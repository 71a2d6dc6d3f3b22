"""What a run says of itself: metrics.jsonl, its progress while it works, its table at the end."""

import collections
import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.live
import rich.markup
import rich.progress
import rich.table
import rich.text

from treepo_jax.config import UserError

NAME = "metrics.jsonl"

# What progress shows of a step: metric, its short name, its format. The last value seen stays.
FIGURES = (
  ("reward/mean", "reward", "{:.3f}"),
  ("eval/accuracy", "accuracy", "{:.1%}"),
  ("rollout/decode_saving", "saving", "{:.1%}"),
)

_RECENT = 20  # steps that rate and ETA are taken over
_SILENCE = 10.0  # seconds without a line in a pipe, at most, while steps end
_PIPE_WIDTH = 100  # columns of what is written where there is no terminal


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
  """Yields a temporary path that takes the place of `path` when the block ends without an error.

  A reader, or a run that is killed, finds the old file or the new one, never half of one. Folders
  are made. Raises UserError naming `path` where the disk is full or the folder cannot be written.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.part")
  with naming(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield temporary
      temporary.replace(path)
    finally:
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """Turns what the system says of a file that is written into what the user can do about it."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f"cannot write {path}: {error.strerror or error}. Free space or mend its permissions and run "
      "the same command again, or give another --workdir"
    ) from error


class Writer:
  """Appends one JSON object a step to `workdir`/metrics.jsonl.

  A run that resumes at `start_step` first drops the lines of that step and later ones, and a last
  line that a kill has cut short, so that the file ends up as if nothing had happened. Numbers are
  written with every digit that a float64 has; JSON has no NaN or infinity, which become null.
  Without `enabled`, as on all hosts but one, nothing is touched.
  """

  def __init__(self, workdir: str | Path, start_step: int, enabled: bool = True):
    """Raises UserError where the file cannot be written, or an earlier line cannot be read."""
    self.path, self._file = Path(workdir) / NAME, None
    if not enabled:
      return
    with naming(self.path):
      kept = [r for r in read(self.path) if r["step"] < start_step] if self.path.exists() else []
      with replacing(self.path) as temporary:
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
      self._file = self.path.open("a", encoding="utf-8")

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends {"step": step, **metrics} and flushes; scalars of numpy and jax are taken too."""
    if self._file:
      with naming(self.path):
        self._file.write(_line({"step": step, **metrics}))
        self._file.flush()

  def close(self) -> None:
    if self._file:
      with naming(self.path):
        self._file.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def _line(record: Mapping[str, Any]) -> str:
  return json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
  """Returns a scalar of any library as Python's own, NaN and infinity as None."""
  if hasattr(value, "dtype"):
    value = np.asarray(value).item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: str | Path) -> list[dict]:
  """Returns the records of a metrics file in order, without a last line that was cut short.

  Raises FileNotFoundError where there is none, UserError naming the line where another one is not
  a JSON object with a "step".
  """
  lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
  records = []
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
      records.append(record | {"step": int(record["step"])})
    except (ValueError, TypeError, KeyError) as error:
      if number < len(lines):
        raise UserError(
          f"{path}, line {number} is not a JSON object with a step: take the line out, or move the "
          "file away"
        ) from error
  return records


class Progress:
  """Shows how far a loop is: a bar on a terminal, plain lines in a pipe, nothing if not `enabled`.

    with Progress(total=60, start=12, label="train", enabled=True) as progress:
      progress.note("resumed at step 12")
      for step in range(12, 60):
        ...
        progress.advance(metrics)

  Rate and ETA are taken over the last steps, without the first, which compiles.
  """

  def __init__(
    self,
    total: int,
    start: int,
    label: str,
    enabled: bool,
    figures: Sequence[tuple[str, str, str]] = FIGURES,
  ):
    """`start` of `total` steps are done already; `figures`: metric, short name, format of each."""
    self._total, self._done, self._label, self._figures = total, start, label, figures
    self._shown: dict[str, str] = {}
    self._begun = self._said = time.monotonic()
    self._ends = collections.deque([self._begun], maxlen=_RECENT + 1)
    self._every = max(1, total // 100)
    self._console = _console() if enabled else None
    self._bar = rich.progress.Progress(
      rich.progress.SpinnerColumn(),  # moves while the first step compiles
      rich.progress.TextColumn("[bold]{task.description}"),
      rich.progress.BarColumn(bar_width=None),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TextColumn("[dim]{task.fields[pace]}"),
      expand=True,
    )
    self._task = self._bar.add_task(label, total=total, completed=start, pace="")
    self._text = rich.text.Text(no_wrap=True, overflow="ellipsis")
    self._live = None
    if self._console and self._console.is_terminal:
      both = rich.console.Group(self._bar, self._text)
      self._live = rich.live.Live(both, console=self._console)

  def __enter__(self):
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *_):
    if self._live:
      self._live.stop()

  def note(self, text: str) -> None:
    """Says `text` on a line of its own, above any bar: what is compiled, resumed or saved."""
    if self._console:
      self._console.print(text, markup=False, highlight=False, soft_wrap=True)

  def advance(self, metrics: Mapping[str, Any]) -> None:
    """Counts one step as done and shows its figures, as far as `metrics` has them."""
    self._done += 1
    if len(self._ends) == 2 and self._ends[0] == self._begun:
      self._ends.popleft()  # the first step compiled: not a measure of the next
    self._ends.append(time.monotonic())
    for key, name, form in self._figures:
      if key in metrics:
        self._shown[name] = f"{name} {form.format(float(metrics[key]))}"
    figures = "  ".join(self._shown[name] for _, name, _ in self._figures if name in self._shown)
    if self._live:
      self._bar.update(self._task, completed=self._done, pace=self._pace())
      self._text.plain = f"  {figures}"
    elif self._console and self._due():
      self._said = self._ends[-1]
      count = f"{self._done:>{len(str(self._total))}}/{self._total}"
      elapsed = _clock(self._ends[-1] - self._begun)
      self.note(f"{self._label} {count}  {elapsed} elapsed  {self._pace()}  {figures}".rstrip())

  def _due(self) -> bool:
    early = len(self._ends) == 2  # the first step, and the second, whose ETA is the first to trust
    late = self._ends[-1] - self._said >= _SILENCE
    return early or late or self._done == self._total or self._done % self._every == 0

  def _pace(self) -> str:
    """Returns rate and time left: 2.5 s/step  0:04:10 left."""
    step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
    rate = f"{step:.1f} s/step" if step >= 1 else f"{1 / max(step, 1e-9):.1f} step/s"
    return f"{rate}  {_clock(step * (self._total - self._done))} left"


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _console() -> rich.console.Console:
  console = rich.console.Console()
  if not console.is_terminal:
    console.width = _PIPE_WIDTH
  return console


def table(title: str, rows: Sequence[Sequence[str]]) -> None:
  """Prints rows of equally many cells, at least one row: what it is, then its figures."""
  grid = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE, show_header=False)
  for column, _ in enumerate(rows[0]):
    grid.add_column(justify="left" if column == 0 else "right", overflow="fold")
  for row in rows:
    grid.add_row(*(rich.markup.escape(cell) for cell in row))
  _console().print(grid)
