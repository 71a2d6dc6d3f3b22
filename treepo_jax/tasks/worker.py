"""A worker process of tasks/pool.py: calls one function on what its pipe brings, within limits.

Each call is limited by a timer of the kernel's, whose signal ends the process: Python need not run
for it, so a computation that never returns to the interpreter ends too, also when the parent is
gone. A worker that waits ends with its parent, when the pipe closes. Imports neither jax nor any
module of the package.
"""

import importlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

READY, FAILED, VALUE, ERROR = "ready", "failed", "value", "error"
LONGEST = 2000  # characters of an error's text


def main(reader: int, writer: int, name: str, memory: int, start: float) -> None:
  """Serves calls until the pipe closes.

  Sends (READY, None) once the function is loaded, or (FAILED, what is wrong with it); then, for
  each call of each list of (arguments, seconds) that comes, (VALUE, its value) or (ERROR, text).

  Args:
    reader, writer: descriptors of the pipes.
    name: "module:function".
    memory: bytes of address space that the process may have.
    start: seconds that loading the function may take.
  """
  calls, replies = Connection(reader, writable=False), Connection(writer, readable=False)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  try:
    try:
      function = _timed(start, load, name)
    except Exception:
      replies.send((FAILED, _last_line()))
      return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    replies.send((READY, None))
    while True:
      for arguments, seconds in calls.recv():
        _serve(replies, function, arguments, seconds)
  except (EOFError, BrokenPipeError):  # the parent has closed its ends, or is gone
    return


def load(name: str) -> Callable:
  """Returns the function that "module:function" names; raises what importing it raises."""
  module, _, attribute = name.partition(":")
  function = getattr(importlib.import_module(module), attribute)
  if not callable(function):
    raise TypeError(f"{name} is no function")
  return function


def _serve(replies: Connection, function: Callable, arguments: tuple, seconds: float) -> None:
  try:
    replies.send((VALUE, _timed(seconds, function, *arguments)))
  except MemoryError:  # what is left of the address space may be in pieces: begin anew
    replies.send((ERROR, "MemoryError"))
    os._exit(1)
  except (BrokenPipeError, EOFError):
    raise
  except Exception:
    replies.send((ERROR, _last_line()))


def _timed(seconds: float, function: Callable, *arguments):
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    return function(*arguments)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)


def _last_line() -> str:
  error = sys.exc_info()[1]
  return "".join(traceback.format_exception_only(error))[-LONGEST:].strip()
