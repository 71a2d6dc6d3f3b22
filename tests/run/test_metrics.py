"""metrics.jsonl through kills and resumptions; what a run prints in a pipe and on a terminal."""

import io
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from treepo_jax.config import UserError
from treepo_jax.run import metrics as metrics_lib


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
  with metrics_lib.Writer(tmp_path / "new" / "run", 0) as writer:
    for step in range(3):
      writer.write(step, {"reward/mean": step / 3})
      assert metrics_lib.read(writer.path)[-1] == {"step": step, "reward/mean": step / 3}


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_every_digit_comes_back(tmp_path_factory, value):
  with metrics_lib.Writer(tmp_path_factory.mktemp("run"), 0) as writer:
    writer.write(0, {"x": value})
  assert metrics_lib.read(writer.path) == [{"step": 0, "x": value}]


def test_scalars_of_numpy_and_jax_are_numbers_and_nan_is_null(tmp_path):
  with metrics_lib.Writer(tmp_path, 0) as writer:
    writer.write(
      0,
      {
        "f32": jnp.float32(0.1),
        "i64": np.int64(7),
        "array": np.array(2.5),
        "nan": float("nan"),
        "inf": np.float32("inf"),
      },
    )
  line = writer.path.read_text()
  assert json.loads(line, parse_constant=pytest.fail) == {
    "step": 0,
    "f32": float(np.float32(0.1)),
    "i64": 7,
    "array": 2.5,
    "nan": None,
    "inf": None,
  }


@pytest.mark.parametrize("cut", [0, 1, 20])  # bytes of a line that the kill left
def test_a_run_that_goes_on_ends_with_the_file_of_one_that_never_stopped(tmp_path, cut):
  def write(folder, start, stop):
    with metrics_lib.Writer(folder, start) as writer:
      for step in range(start, stop):
        writer.write(step, {"x": step * 0.1})
    return writer.path

  whole = write(tmp_path / "whole", 0, 8).read_text()
  path = write(tmp_path / "killed", 0, 6)
  with path.open("a") as file:
    file.write('{"step": 6, "x": 0.6000000000000001}\n'[:cut])
  write(tmp_path / "killed", 4, 8)  # the checkpoint was older than the last lines
  assert path.read_text() == whole
  assert [p.name for p in path.parent.iterdir()] == [metrics_lib.NAME]


def test_a_last_line_without_its_newline_is_whole(tmp_path):
  (tmp_path / metrics_lib.NAME).write_text('{"step": 0}\n{"step": 1}')
  with metrics_lib.Writer(tmp_path, 2) as writer:
    writer.write(2, {})
  assert [r["step"] for r in metrics_lib.read(writer.path)] == [0, 1, 2]


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"step": null}', "7"])
def test_a_wrong_line_before_the_last_is_named(tmp_path, line):
  path = tmp_path / metrics_lib.NAME
  path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
  with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 .* take the line out"):
    metrics_lib.Writer(tmp_path, 3)
  assert len(path.read_text().splitlines()) == 3  # and nothing is lost


def test_a_workdir_that_is_a_file_is_named(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(UserError, match=r"cannot write .*run/metrics\.jsonl: .* --workdir"):
    metrics_lib.Writer(tmp_path / "run", 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_named(tmp_path):
  writer = metrics_lib.Writer(tmp_path, 0)
  writer.close()
  writer._file = open("/dev/full", "a")
  with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device"):
    writer.write(0, {"x": 1.0})
  with pytest.raises(UserError, match="No space left"):  # what is buffered fails once more
    writer.close()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / "summary.json"
  path.write_text("old")
  with pytest.raises(RuntimeError), metrics_lib.replacing(path) as temporary:
    temporary.write_text("half")
    raise RuntimeError("killed")
  assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
  with metrics_lib.replacing(path) as temporary:
    temporary.write_text("new")
    assert path.read_text() == "old"
  assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]


@pytest.fixture
def clock(monkeypatch):
  """A clock that only moves when it is told to."""

  class Clock:
    now = 100.0

    def sleep(self, seconds: float) -> None:
      self.now += seconds

  clock = Clock()
  monkeypatch.setattr(metrics_lib.time, "monotonic", lambda: clock.now)
  monkeypatch.delenv("FORCE_COLOR", raising=False)
  return clock


def test_a_pipe_gets_plain_lines(capsys, clock):
  with metrics_lib.Progress(total=64, start=60, label="train", enabled=True) as progress:
    progress.note("resumed at step 60 [bold]")
    for seconds, figures in (
      (90, {"reward/mean": jnp.float32(0.25), "eval/accuracy": 0.125}),
      (2, {"reward/mean": 0.5, "rollout/decode_saving": 0.4}),
      (3, {"reward/mean": 0.75}),
      (4, {"reward/mean": 1.0}),
    ):
      clock.sleep(seconds)
      progress.advance(figures)
  assert capsys.readouterr().out.splitlines() == [
    "resumed at step 60 [bold]",
    "train 61/64  0:01:30 elapsed  90.0 s/step  0:04:30 left  reward 0.250  accuracy 12.5%",
    # Without the first step, which compiled; the last accuracy seen stays.
    "train 62/64  0:01:32 elapsed  2.0 s/step  0:00:04 left"
    "  reward 0.500  accuracy 12.5%  saving 40.0%",
    "train 63/64  0:01:35 elapsed  2.5 s/step  0:00:02 left"
    "  reward 0.750  accuracy 12.5%  saving 40.0%",
    "train 64/64  0:01:39 elapsed  3.0 s/step  0:00:00 left"
    "  reward 1.000  accuracy 12.5%  saving 40.0%",
  ]


def test_long_runs_print_a_hundredth_of_their_lines_but_are_never_silent(capsys, clock):
  progress = metrics_lib.Progress(total=1000, start=0, label="train", enabled=True)
  for _ in range(1000):
    clock.sleep(0.01)
    progress.advance({})
  assert len(capsys.readouterr().out.splitlines()) == 102  # the first two, and every tenth
  progress = metrics_lib.Progress(total=1000, start=0, label="train", enabled=True)
  for _ in range(20):
    clock.sleep(15)
    progress.advance({})
  assert len(capsys.readouterr().out.splitlines()) == 20


def test_a_terminal_gets_a_bar(monkeypatch, clock):
  screen = io.StringIO()
  console = rich.console.Console(file=screen, force_terminal=True, width=90)
  monkeypatch.setattr(metrics_lib, "_console", lambda: console)
  with metrics_lib.Progress(total=4, start=1, label="train", enabled=True) as progress:
    for _ in range(3):
      clock.sleep(2)
      progress.advance({"reward/mean": 0.5})
  assert "4/4" in screen.getvalue()
  assert "2.0 s/step" in screen.getvalue() and "reward 0.500" in screen.getvalue()


def test_progress_can_be_silent(capsys, clock):
  with metrics_lib.Progress(total=2, start=0, label="train", enabled=False) as progress:
    progress.note("nothing")
    progress.advance({"reward/mean": 0.5})
  assert capsys.readouterr().out == ""


def test_a_table_reads_fine_in_a_pipe(capsys, monkeypatch):
  monkeypatch.delenv("FORCE_COLOR", raising=False)
  rows = [
    ("held-out accuracy before", "12.5 %", "512 prompts"),
    ("tokens decoded", "1,203,442", "of 2,100,332 path tokens [42.7 % saved]"),
  ]
  metrics_lib.table("60 steps in 0:04:10", rows)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].strip() == "60 steps in 0:04:10"
  for row in rows:  # each on one line, nothing taken for markup
    assert any(all(cell in line for cell in row) for line in lines)
  assert not any("\x1b" in line for line in lines)
