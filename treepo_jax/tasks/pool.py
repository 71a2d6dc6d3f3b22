"""Worker processes that call a function within limits of time and memory, and are replaced.

A call that does not end, exhausts memory or kills its process costs itself: its worker is replaced,
and what waited behind it is done by another. Workers are fresh interpreters (no fork of a process
that has threads), start at the first call, load no jax, and end with their parent.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any, Literal

from treepo_jax.config import UserError
from treepo_jax.tasks import worker as worker_lib

START = 120.0  # seconds that a worker may take until it is ready
GRACE = 1.0  # seconds after its limit at which a worker that has not ended itself is killed
CHUNK = 16  # calls sent to a worker at once, at most
TRIES = 2  # times a call is begun whose worker ends otherwise than by its own limit
CODE = """
import sys
sys.path[:] = {path}
from treepo_jax.tasks import worker
worker.main(*{arguments})
"""

Status = Literal["value", "error", "timeout", "crash"]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a call.

  Attributes:
    status: "value" | "error": it raised | "timeout" | "crash": its process ended, twice.
    value: what it returned; of an error its text.
  """

  status: Status
  value: Any = None


@dataclasses.dataclass
class _Worker:
  """A process, its pipes, and the calls it has: places in the list of calls, the first begun."""

  process: subprocess.Popen
  calls: connection.Connection
  replies: connection.Connection
  ready: bool
  deadline: float  # of time.monotonic, when it is killed
  pending: deque[int]


class Pool:
  """Workers for one function; see the module. Not for use by several threads at once.

  Args:
    function: "module:function", imported in the workers. Its arguments and values are pickled.
    workers: processes.
    seconds: limit of a call, wall clock.
    memory: bytes of address space a worker may have.
  """

  def __init__(self, function: str, *, workers: int, seconds: float, memory: int):
    self.function, self.count, self.seconds, self.memory = function, workers, seconds, memory
    self._workers: list[_Worker] = []

  def run(self, calls: Sequence[tuple], *, weights: Sequence[int] | None = None) -> list[Outcome]:
    """Returns what became of each call, in order.

    weights: how many times `seconds` a call may take; 1 each where None. Raises UserError where
    workers cannot load the function.
    """
    outcomes: list[Outcome | None] = [None] * len(calls)
    waiting, tries = deque(range(len(calls))), [0] * len(calls)
    weigh = [1] * len(calls) if weights is None else list(weights)
    size = max(1, min(CHUNK, len(calls) // (4 * self.count)))
    while waiting or any(w.pending for w in self._workers):
      self._grow(min(self.count, len(waiting) + sum(bool(w.pending) for w in self._workers)))
      for worker in self._workers:
        if waiting and worker.ready and not worker.pending:
          chunk = [waiting.popleft() for _ in range(min(size, len(waiting)))]
          self._send(worker, chunk, calls, weigh)
      self._wait()
      for worker in list(self._workers):
        self._receive(worker, outcomes, weigh)
        ended = worker.process.poll() is not None
        if ended or time.monotonic() > worker.deadline:
          self._receive(worker, outcomes, weigh)  # what it sent before it ended
          self._bury(worker, outcomes, waiting, tries, late=not ended)
    return [outcome for outcome in outcomes if outcome is not None]

  def warm_up(self) -> None:
    """Returns once every worker is ready, so that a first batch is not charged with their start."""
    self._grow(self.count)
    while not all(worker.ready for worker in self._workers):
      self._wait()
      for worker in list(self._workers):
        self._receive(worker, [], [])
        if worker.process.poll() is not None or time.monotonic() > worker.deadline:
          self._bury(worker, [], deque(), [], late=False)

  def pids(self) -> list[int]:
    """Returns the process ids of the workers there are."""
    return [worker.process.pid for worker in self._workers]

  def close(self) -> None:
    """Ends the workers; the pool starts others when it is used again."""
    while self._workers:
      self._remove(self._workers[0])

  def _grow(self, count: int) -> None:
    while len(self._workers) < count:
      self._workers.append(_start(self.function, self.memory))

  def _send(self, worker: _Worker, chunk: list[int], calls: Sequence[tuple], weigh) -> None:
    worker.pending.extend(chunk)
    worker.deadline = time.monotonic() + self.seconds * weigh[chunk[0]] + GRACE
    try:
      worker.calls.send([(calls[i], self.seconds * weigh[i]) for i in chunk])
    except BrokenPipeError:  # it has ended: run() sees that and gives its calls to another
      _wait_for_end(worker)

  def _wait(self) -> None:
    """Waits until a worker has something to say, ends, or is out of time."""
    busy = [w for w in self._workers if w.pending or not w.ready]
    left = min((w.deadline for w in busy), default=0.0) - time.monotonic()
    connection.wait([w.replies for w in busy], timeout=max(left, 0.0))

  def _receive(self, worker: _Worker, outcomes: list, weigh: list[int]) -> None:
    """Takes what a worker has sent."""
    try:
      while worker.replies.poll():
        kind, value = worker.replies.recv()
        if kind == worker_lib.FAILED:
          self.close()
          raise UserError(f"{self.function} cannot be loaded: {value}")
        if kind == worker_lib.READY:
          worker.ready, worker.deadline = True, float("inf")
          continue
        outcomes[worker.pending.popleft()] = Outcome(kind, value)
        worker.deadline = float("inf")
        if worker.pending:
          worker.deadline = time.monotonic() + self.seconds * weigh[worker.pending[0]] + GRACE
    except (EOFError, OSError):
      _wait_for_end(worker)

  def _bury(self, worker: _Worker, outcomes, waiting: deque, tries: list[int], late: bool) -> None:
    """Takes a worker out that has ended or is out of time, and says what that means for its calls.

    The call it was at is given up where its own limit ended it, and begun again where something
    else did; those behind it go to other workers.
    """
    self._remove(worker)
    by_limit = late or worker.process.returncode == -signal.SIGALRM
    if not worker.ready:
      raise UserError(
        f"{self.function} cannot be loaded: "
        + (f"it took over {START:.0f} seconds" if by_limit else _ending(worker.process.returncode))
      )
    if worker.pending:
      begun = worker.pending.popleft()
      tries[begun] += 1
      if by_limit:
        outcomes[begun] = Outcome("timeout", f"over {self.seconds:g} seconds an answer")
      elif tries[begun] == TRIES:
        outcomes[begun] = Outcome("crash", _ending(worker.process.returncode))
      else:
        waiting.appendleft(begun)
      waiting.extendleft(reversed(worker.pending))

  def _remove(self, worker: _Worker) -> None:
    self._workers.remove(worker)
    worker.process.kill()
    worker.process.wait()
    worker.calls.close()
    worker.replies.close()


def _wait_for_end(worker: _Worker) -> None:
  """Waits for a process that has closed its pipe, and has it killed where it lives on."""
  try:
    worker.process.wait(GRACE)
  except subprocess.TimeoutExpired:
    worker.deadline = 0.0


def _ending(returncode: int) -> str:
  how = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
  return f"its process ended with {how}"


def _start(function: str, memory: int) -> _Worker:
  """Starts a worker; it says itself when it is ready."""
  their_calls, calls = connection.Pipe(duplex=False)
  replies, their_replies = connection.Pipe(duplex=False)
  theirs = (their_calls.fileno(), their_replies.fileno())
  code = CODE.format(path=json.dumps(sys.path), arguments=(*theirs, function, memory, START))
  # A user's function that imports jax must not take the accelerator that the policy is on.
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
  process = subprocess.Popen(
    [sys.executable, "-c", code],
    stdin=subprocess.DEVNULL,
    stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
    pass_fds=theirs,
    env=environment,
    start_new_session=True,  # Ctrl-C is for the run, which ends its workers
  )
  their_calls.close()
  their_replies.close()
  deadline = time.monotonic() + START + GRACE
  return _Worker(process, calls, replies, ready=False, deadline=deadline, pending=deque())


def _has_descriptor(stream) -> bool:
  try:
    stream.fileno()
  except (AttributeError, OSError):  # a notebook's stream, or pytest's
    return False
  return True
