"""Worker processes: limits, replacement, and that nothing behind a culprit is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treepo_jax.config import UserError
from treepo_jax.tasks import pool

ROOT = Path(__file__).parents[2]
HERE = "tests.tasks.test_pool"


def double(value):
  return 2 * value


def misbehave(kind, value=0):
  """What a call can do to its process; "ok" returns the value."""
  if kind == "hang":
    while True:
      time.sleep(0.01)
  elif kind == "hang inside C":
    return 9 ** (9**9)  # no signal handler of Python's would run
  elif kind == "memory":
    return len([bytearray(2**28) for _ in range(1000)])
  elif kind == "raise":
    raise RuntimeError("as told")
  elif kind == "die":
    os.kill(os.getpid(), signal.SIGKILL)
  elif kind == "ignore its timer":
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(1000)
  elif kind == "slow":
    time.sleep(value)
  return value


def process(_):
  return os.getpid()


@pytest.fixture
def make():
  made = []

  def of(function: str, workers: int = 2, seconds: float = 5.0):
    made.append(pool.Pool(f"{HERE}:{function}", workers=workers, seconds=seconds, memory=2**30))
    return made[-1]

  yield of
  for p in made:
    p.close()


def test_values_in_order(make):
  outcomes = make("double").run([(i,) for i in range(500)])
  assert outcomes == [pool.Outcome("value", 2 * i) for i in range(500)]


def test_nothing_to_do(make):
  p = make("double")
  assert p.run([]) == []
  assert p.pids() == []  # lazily started


def test_workers_are_kept(make):
  p = make("process")
  p.warm_up()
  first = p.pids()
  assert {o.value for o in p.run([(i,) for i in range(100)])} <= set(first)
  assert p.pids() == first


@pytest.mark.parametrize(
  ("kind", "status"),
  [
    ("hang", "timeout"),
    ("hang inside C", "timeout"),
    ("ignore its timer", "timeout"),
    ("memory", "error"),
    ("raise", "error"),
    ("die", "crash"),
  ],
)
def test_a_culprit_costs_itself(make, kind, status):
  """One in the middle of a chunk; its neighbours get their values, the next run too."""
  p = make("misbehave", seconds=2.0)
  p.warm_up()
  calls = [("ok", i) for i in range(20)] + [(kind,)] + [("ok", i) for i in range(20)]
  begun = time.monotonic()
  outcomes = p.run(calls)
  assert time.monotonic() - begun < 60  # 2 s, or 3 where it must be killed, and a loaded machine
  assert outcomes[20].status == status
  assert [o.value for o in outcomes[:20] + outcomes[21:]] == [*range(20), *range(20)]
  assert p.run([("ok", 7)]) == [pool.Outcome("value", 7)]
  assert len(p.pids()) <= 2


def test_every_worker_hit_at_once(make):
  p = make("misbehave", seconds=1.0)
  outcomes = p.run([("hang",)] * 4 + [("ok", i) for i in range(8)])
  assert [o.status for o in outcomes] == ["timeout"] * 4 + ["value"] * 8


def test_a_worker_killed_from_outside_is_replaced_and_its_calls_done(make):
  p = make("misbehave")
  p.warm_up()
  victim = p.pids()[0]
  killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {victim}"])
  outcomes = p.run([("slow", 0.1)] * 20)
  killer.wait()
  assert [o.value for o in outcomes] == [0.1] * 20
  os.kill(p.pids()[0], signal.SIGKILL)  # an idle one
  assert p.run([("ok", 1)] * 8) == [pool.Outcome("value", 1)] * 8
  assert victim not in p.pids()


def test_weights_are_multiples_of_the_limit(make):
  p = make("misbehave", seconds=1.0)
  calls = [("slow", 2.0), ("slow", 2.0)]
  assert [o.status for o in p.run(calls, weights=[8, 1])] == ["value", "timeout"]


@pytest.mark.parametrize(
  ("function", "words"),
  [
    ("no_such_module:f", "no_such_module"),
    (f"{HERE}:absent", "absent"),
    (f"{HERE}:HERE", "no function"),
  ],
)
def test_a_function_that_cannot_be_loaded_is_named(function, words):
  with pytest.raises(UserError, match=words):
    pool.Pool(function, workers=1, seconds=1.0, memory=2**30).run([(1,)])


def test_the_engine_is_loaded_without_jax(make):
  p = pool.Pool("treepo_jax.tasks.verify:equal", workers=1, seconds=60.0, memory=2 * 2**30)
  assert p.run([("1", "1", False, "strict", 0.0)])[0].value is True
  p.close()
  code = (
    "import sys, treepo_jax.tasks.verify, treepo_jax.tasks.pool; "
    "print('jax' in sys.modules, 'transformers' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_their_parent(busy):
  """Also one at work, and a parent that had no time to say goodbye."""
  code = f"""
import os, signal, threading
from treepo_jax.tasks import pool
p = pool.Pool("{HERE}:misbehave", workers=2, seconds=3.0, memory=2**30)
p.warm_up()
print(*p.pids(), flush=True)
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
p.run([("hang inside C",)] * 2) if {busy} else signal.pause()
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  pids = [int(pid) for pid in done.stdout.split()]
  assert len(pids) == 2 and done.returncode == -signal.SIGKILL, done.stderr
  for _ in range(300):
    if not any(map(_alive, pids)):
      return
    time.sleep(0.1)
  pytest.fail(f"{[pid for pid in pids if _alive(pid)]} live on")


def _alive(pid: int) -> bool:
  try:
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
  except FileNotFoundError:
    return False
  return state != "Z"
