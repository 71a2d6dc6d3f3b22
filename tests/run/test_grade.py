"""--mode=grade: rows in, rows with verdicts out; mistakes named with file and line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from treepo_jax import config as config_lib
from treepo_jax.config import UserError
from treepo_jax.run import grade

ROOT = Path(__file__).parents[2]
ROWS = [
  {"gold": "1/2", "pred": r"so \boxed{0.5}", "expected": True, "id": 7},
  {"gold": "1/2", "pred": "0.5"},
  {"gold": "1/2", "pred": "The answer is $\\frac{1}{3}$"},
  {"gold": 3, "pred": 3.0},
  {"gold": "", "pred": r"\boxed{1}"},
  {"gold": '{"nums": [1, 2], "target": 3}', "pred": r"\boxed{1+2}", "grader": "countdown"},
  {"gold": "5", "pred": r"\boxed{5"},
]
VERDICTS = [
  (True, "0.5"),
  (True, "0.5"),
  (False, "The answer is $\\frac{1}{3}$"),
  (True, "3.0"),
  (False, "1"),
  (True, "1+2"),
  (False, None),
]


def write(path: Path, rows: list[dict]) -> Path:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
  return path


def read(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "treepo_jax.main", "--mode=grade", *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


def test_the_command(tmp_path):
  """Without config and workdir; every field of a row stays, one that was not graded says why."""
  source = write(tmp_path / "in.jsonl", ROWS)
  done = command(f"--input={source}", f"--output={tmp_path / 'deep' / 'out.jsonl'}")
  assert done.returncode == 0, done.stderr
  written = read(tmp_path / "deep" / "out.jsonl")
  assert [(row.pop("correct"), row.pop("extracted")) for row in written] == VERDICTS
  assert [row.pop("grader_error", None) for row in written] == [None] * 4 + ["gold", None, None]
  assert written == ROWS


def test_a_bare_answer_is_wrong_where_the_config_says_so(tmp_path):
  config = config_lib.default()
  config.reward.bare = False
  source = write(tmp_path / "in.jsonl", ROWS[:2])
  figures = grade.run(config_lib.validate(config), source, tmp_path / "out.jsonl")
  assert [row["correct"] for row in read(tmp_path / "out.jsonl")] == [True, False]
  assert (figures["rows"], figures["correct"], figures["errors"]) == (2, 1, 0)


@pytest.mark.parametrize(
  ("row", "words"),
  [
    ("{", "Expecting"),
    ("[1]", "object"),
    ('{"gold": "1"}', "'pred' is missing"),
    ('{"gold": null, "pred": "1"}', "'gold' must be a text"),
    ('{"gold": "1", "pred": true}', "'pred' must be a text"),
    ('{"gold": "1", "pred": "1", "grader": "maths"}', "maths"),
    ("[" * 10**5, "recursion"),
  ],
)
def test_a_bad_row_is_named_and_finished_work_is_left_alone(tmp_path, row, words):
  source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text(json.dumps(ROWS[0]) + "\n\n" + row + "\n")
  target.write_text("finished\n")
  with pytest.raises(UserError, match=words) as error:
    grade.run(config_lib.default(), source, target)
  assert str(error.value).startswith(f"{source}, line 3: ")
  assert target.read_text() == "finished\n"
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_mistakes_of_the_command(tmp_path):
  for arguments, words in (
    ((), "--input"),
    ((f"--input={tmp_path}/no.jsonl",), "--output"),
    ((f"--input={tmp_path}/no.jsonl", "--output=x"), "no.jsonl: no such file"),
  ):
    done = command(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
  empty = write(tmp_path / "empty.jsonl", [])
  with pytest.raises(UserError, match="no rows"):
    grade.run(config_lib.default(), empty, tmp_path / "out.jsonl")
