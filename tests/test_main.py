"""Mistakes on the command line: each a message that names what is wrong, exit status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = "--config=configs/tiny.py"


def run(*arguments: str) -> str:
  done = subprocess.run(
    [sys.executable, "-m", "treepo_jax.main", *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2, done.stdout + done.stderr
  assert "Traceback" not in done.stderr
  return done.stderr


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ((TINY, "--config.rollout.dpth=3"), ("dpth", "depth")),
    ((TINY, "--config.rollout.segment=12"), ("rollout.segment = 12", "rollout.page = 8")),
    ((TINY, "--config.rollout.depth=deep"), ("config.rollout.depth", "deep")),
    ((TINY, "--config.rollout.prompt_length=8"), ("prompt", " tokens", "prompt_length = 8")),
    ((TINY, "--config.model.path=nowhere"), ("model.path", "nowhere")),
    (
      (TINY, "--config.model.path=someone/no-such-policy"),
      ("model.path", "someone/no-such-policy"),
    ),
    ((TINY, "--mode=tran"), ("mode", "train")),
    ((TINY, "--wrkdir=x"), ("wrkdir",)),
    ((TINY, "train"), ("train", "--")),
    (("--config=configs/tinny.py",), ("configs/tinny.py",)),
    ((), ("--config",)),
    ((TINY, "--mode=export"), ("--output",)),
  ],
)
def test_a_mistake_is_named(arguments, words, tmp_path):
  said = run(*arguments, f"--workdir={tmp_path / 'run'}")
  for word in words:
    assert word in said


def test_a_missing_workdir_is_named():
  assert "--workdir" in run(TINY)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  said = run(TINY, f"--workdir={tmp_path / 'file' / 'run'}")
  assert str(tmp_path / "file" / "run") in said
