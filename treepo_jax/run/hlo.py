"""What a compiled program does, read from its optimised HLO: collectives, copies, host traffic.

XLA's own cost analysis counts the body of a loop once; here a body counts as often as the loop is
known to run, once where that depends on data.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
HOST = ("infeed", "outfeed", "send", "recv")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s64": 8, "u64": 8, "f64": 8, "bf16": 2, "c64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[ )}\]])([a-z][a-z\-]*)\(")
_SHAPE = re.compile(r"\b(pred|bf16|c64|[sfu]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:?\{"?n"?:"?(\d+)')
_BELOW = re.compile(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT")
_NUMBER = re.compile(r"%([\w.\-]+) = \S+ constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    operation: "fusion", "all-gather", ...; without "-start", and those with "-done" are left out.
    bytes: of its result (of the largest part, where it is a tuple).
    shape: of that part.
    times: how often it runs in a call.
    text: as it stands.
  """

  name: str
  operation: str
  bytes: float
  shape: tuple[int, ...]
  times: int
  text: str


def instructions(text: str | None) -> Iterator[Instruction]:
  """Yields the instructions of an optimised HLO module outside fusions, with how often they run."""
  computations, entry = _computations(text or "")
  times: dict[str, int] = {}
  waiting = [(entry, 1)]
  while waiting:
    name, count = waiting.pop()
    times[name] = times.get(name, 0) + count
    for line in computations[name]:
      waiting += _calls(line, count, computations)
  for name, count in times.items():
    for line in computations[name]:
      found = _parse(line, count)
      if found:
        yield found


def collective_bytes(text: str | None) -> dict[str, float]:
  """Returns the bytes that a device receives or sends by each kind of collective in a call."""
  total: dict[str, float] = {name: 0.0 for name in COLLECTIVES}
  for x in instructions(text):
    if x.operation in total:
      total[x.operation] += x.bytes * x.times
  return total


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns each computation's lines, and the name of the one that is run."""
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif line.startswith("}"):
      lines = []
    elif _INSTRUCTION.match(line):
      lines.append(line)
  if not entry:
    raise ValueError("the text holds no ENTRY computation: it is no optimised HLO module")
  return computations, entry


def _calls(line: str, count: int, computations: dict[str, list[str]]) -> list[tuple[str, int]]:
  """Returns which computations an instruction runs and how often: loops, branches, calls."""
  operation = _operation(line)
  if operation == "while":
    called = dict(_CALLED.findall(line))
    return [(called["body"], count * _trips(line, computations[called["condition"]]))]
  if operation == "conditional":
    branches = _BRANCHES.search(line)
    names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
    # The branch that does most, as in a step that has work to do.
    longest = max(names, key=lambda name: len(computations[name]), default=None)
    return [(longest, count)] if longest else []
  if operation in ("call", "async-start"):
    return [(name, count) for kind, name in _CALLED.findall(line) if name in computations]
  return []


def _trips(line: str, condition: list[str]) -> int:
  """Returns how often a loop runs: as XLA notes, or up to the constant its counter is held to."""
  noted, below = _TRIPS.search(line), _BELOW.search("\n".join(condition))
  numbers = dict(_NUMBER.findall("\n".join(condition)))
  if noted:
    return int(noted[1])
  return int(numbers.get(below[1], 1)) if below else 1


def _operation(line: str) -> str:
  found = _INSTRUCTION.match(line)
  operation = _OPERATION.search(found[2]) if found else None
  return operation[1] if operation else ""


def _parse(line: str, times: int) -> Instruction | None:
  operation = _operation(line)
  if not operation or operation.endswith("-done"):
    return None
  found = _INSTRUCTION.match(line)
  assert found is not None
  result = found[2][: found[2].index(operation + "(")]
  shapes = [(kind, _sizes(sizes)) for kind, sizes in _SHAPE.findall(result)]
  sized = [(math.prod(sizes) * width(kind), sizes) for kind, sizes in shapes]
  size, shape = max(sized, default=(0.0, ()))
  return Instruction(found[1], operation.removesuffix("-start"), size, shape, times, line.strip())


def _sizes(text: str) -> tuple[int, ...]:
  return tuple(int(x) for x in text.split(",") if x)


def width(kind: str) -> float:
  """Returns the bytes of a number: of "f32", "bf16", "s8", ..."""
  return float(BYTES[kind]) if kind in BYTES else int(kind[1:]) / 8
