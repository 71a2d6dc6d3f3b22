"""One signal is remembered until the run looks for it, the second ends the program."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from treepo_jax.run import preemption

ROOT = Path(__file__).parents[2]
TOLD = """
import os, signal, sys
from treepo_jax.run import preemption
stop = preemption.Stop()
stop.listen()
stop.check()
first, *second = [getattr(signal, name) for name in sys.argv[1:]]
os.kill(os.getpid(), first)
try:
  stop.check()
except preemption.Stopped as stopped:
  assert stopped.number == first
else:
  raise AssertionError("the signal is lost")
for number in second:
  os.kill(os.getpid(), number)
print("at the end")
"""


@pytest.mark.parametrize("names", [["SIGTERM"], ["SIGINT"], ["SIGTERM", "SIGINT"], ["SIGINT"] * 2])
def test_the_first_signal_is_remembered_and_the_second_ends_at_once(names):
  done = subprocess.run(
    [sys.executable, "-c", TOLD, *names], cwd=ROOT, capture_output=True, text=True
  )
  assert "a second signal ends at once" in done.stderr
  if len(names) == 1:
    assert done.returncode == 0 and "at the end" in done.stdout, done.stderr
  else:
    assert done.returncode == -getattr(signal, names[1]) and "at the end" not in done.stdout


def test_no_signal_is_no_reason_to_stop():
  preemption.Stop().check()
