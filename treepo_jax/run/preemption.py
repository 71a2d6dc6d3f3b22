"""Signals that tell a run to stop: what is finished is saved, and the same command continues.

SIGTERM is how a preempted or drained machine tells its programs, some 30 seconds ahead; SIGINT is
Ctrl-C. A rollout can take longer than that, so it is given up between two segments and the state
from before it is saved: draws are folded from seed and step, so it is grown again as it was.
"""

import os
import signal


class Stopped(Exception):
  """A part that was given up because the run was told to stop; `number` is the signal's."""

  def __init__(self, number: int):
    super().__init__(number)
    self.number = number


class Stop:
  """Remembers a signal until the run looks for it."""

  def __init__(self):
    self.asked = 0

  def listen(self) -> None:
    """Takes SIGTERM and SIGINT; a second signal ends the program at once, unsaved."""
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._ask)

  def check(self) -> None:
    """Raises Stopped if a signal has come."""
    if self.asked:
      raise Stopped(self.asked)

  def _ask(self, number: int, _) -> None:
    for either in (signal.SIGTERM, signal.SIGINT):
      signal.signal(either, signal.SIG_DFL)
    self.asked = number
    # Not print: the signal may have come in the middle of one.
    os.write(2, b"stopping: what is finished is saved; a second signal ends at once, unsaved\n")
