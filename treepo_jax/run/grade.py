"""Grades a file of answers with the run's own reward: --mode=grade."""

import json
import time
from pathlib import Path

from treepo_jax.config import GRADERS, UserError
from treepo_jax.run import metrics as metrics_lib
from treepo_jax.tasks import rewards

CHUNK = 2048  # rows graded at a time
FIGURES = (("correct", "correct", "{:.1%}"), ("errors", "errors", "{:.0f}"))


def run(config, source: Path, target: Path) -> dict:
  """Grades each row {"gold", "pred", "grader"?} of a JSONL file and writes it with its verdict.

  A row gains "correct" (bool) and "extracted" (what was judged, null where there is no answer);
  one that could not be graded also "grader_error", why, and counts as wrong. A "pred" without any
  `\\boxed` is the answer itself unless config.reward.bare is False. The output takes its place
  when all rows are graded. Returns {"rows", "correct", "errors", "seconds"}. Raises UserError
  naming file and line of a row that cannot be used; then nothing is written.
  """
  rows = _read(source)
  begun, right, errors = time.perf_counter(), 0, 0
  chunks = -(-len(rows) // CHUNK)
  with (
    metrics_lib.replacing(target) as temporary,
    temporary.open("w", encoding="utf-8") as out,
    metrics_lib.Progress(chunks, 0, "grade", enabled=chunks > 1, figures=FIGURES) as progress,
  ):
    for first in range(0, len(rows), CHUNK):
      chunk = rows[first : first + CHUNK]
      preds, golds = ([str(row[key]) for row in chunk] for key in ("pred", "gold"))
      graders = [_grader(row) for row in chunk]
      grades = rewards.grade(preds, golds, graders, config=config, bare=config.reward.bare)
      right, errors = right + int(grades.correct.sum()), errors + grades.errors
      for i, row in enumerate(chunk):
        verdict = {"correct": bool(grades.correct[i]), "extracted": grades.extracted[i]}
        if grades.status[i] != "graded":
          verdict["grader_error"] = grades.status[i]
        out.write(json.dumps(row | verdict, ensure_ascii=False) + "\n")
      done = first + len(chunk)
      progress.advance({"correct": right / done, "errors": errors})
  seconds = time.perf_counter() - begun
  shown = [
    ("rows", str(len(rows))),
    ("correct", f"{right} ({right / len(rows):.2%})"),
    ("could not be graded", str(errors)),
    ("seconds", f"{seconds:.1f}"),
    ("written", str(target)),
  ]
  metrics_lib.table("Grades", shown)
  return {"rows": len(rows), "correct": right, "errors": errors, "seconds": seconds}


def _read(source: Path) -> list[dict]:
  """Returns the rows of a file; raises UserError naming file and line of one that is none."""
  if not source.is_file():
    raise UserError(f"{source}: no such file; --input names a JSONL file of answers")
  rows = []
  for line, text in enumerate(source.read_bytes().splitlines(), start=1):
    if not text.strip():
      continue
    try:
      rows.append(_row(json.loads(text)))
    except (ValueError, RecursionError) as error:
      raise UserError(f"{source}, line {line}: {error}") from error
  if not rows:
    raise UserError(f"{source}: no rows")
  return rows


def _row(row) -> dict:
  """Returns a row that can be graded; raises ValueError saying what is wrong with it."""
  if not isinstance(row, dict):
    raise ValueError(f"expected an object, got {type(row).__name__}")
  for key in ("gold", "pred"):
    if key not in row:
      raise ValueError(f"{key!r} is missing; a row is {{'gold': ..., 'pred': ...}}")
    if isinstance(row[key], bool) or not isinstance(row[key], str | int | float):
      raise ValueError(f"{key!r} must be a text or a number, got {type(row[key]).__name__}")
  if _grader(row) not in GRADERS:
    raise ValueError(f"'grader' is {_grader(row)!r}; allowed: {', '.join(GRADERS)}")
  return row


def _grader(row: dict) -> str:
  return row["grader"] if "grader" in row else "math"
