"""TreePO's rollout again, in plain Python: one prompt, dicts and lists, one wave at a time.

Nothing is shared with the package. What the model would say is a script: `write(row, depth)`
returns (length, why) of the segment of a node; why is None, "eos", "answer" or "repetition", and
the first two stand on its last token. What is drawn is handed in too: the oracle draws nothing.
"""

from collections.abc import Callable, Iterator

Write = Callable[[int, int], tuple[int, str | None]]


def budget(width: int, branching: int, finished: int, ended: int, active: int) -> int:
  """Returns the paths of the next wave: b for each one decoded, as far as the width allows."""
  return max(min(width - finished, branching * (ended + active)), active)


def shares(total: int, active: int, remainder: str) -> list[int]:
  """Deals `total` continuations to `active` paths, in their order."""
  each, left = divmod(total, active)
  if remainder == "last":
    return [each] * (active - 1) + [each + left]
  return [each + (i < left) for i in range(active)]


def saving(width: int, branching: int, initial: int, depth: int) -> float:
  """Returns the share of decoding that a tree saves where no path ends early."""
  decoded = sum(min(initial * branching**d, width) for d in range(depth))
  return 1 - decoded / (width * depth)


def path(parent: list[int], row: int) -> list[int]:
  """Returns the rows from below the prompt to `row`."""
  return [*path(parent, parent[row]), row] if row > 0 else []


def grow(
  write: Write,
  *,
  width: int,
  branching: int,
  initial: int,
  depth: int,
  response_length: int,
  remainder: str,
  fallback: str,
  shuffle: Callable[[int, list[int]], list[int]],
  cut: Callable[[int, int, list[int]], int],
) -> Iterator[dict]:
  """Grows one tree and yields it after each wave is planned; the last one is the whole tree.

  Where trajectories are cut, `row` being the first new node, `shuffle(row, leaves)` orders those
  that may be, and `cut(row, leaf, path)` says how many segments of its path are kept.
  """
  tree = {
    "parent": [-1],
    "source": [-1],
    "depth": [0],
    "length": [0],
    "status": ["inner"],
    "leaves": [],
    "waves": [],  # rows decoded
    "fallbacks": 0,
  }
  parent, status, length = tree["parent"], tree["status"], tree["length"]

  def create(below: int, source: int = -1) -> int:
    new = {"parent": below, "source": source, "depth": tree["depth"][below] + 1}
    for name, value in (new | {"length": 0, "status": "open"}).items():
      tree[name].append(value)
    return len(parent) - 1

  def decode(row: int) -> None:
    length[row], why = write(row, tree["depth"][row])
    room = response_length - sum(length[r] for r in path(parent, parent[row]))
    if length[row] > room:  # its last token, and what stands on it, is cut off
      length[row], why = room, None
    if why in ("eos", "answer"):
      status[row] = why
    elif length[row] == room:
      status[row] = "length"
    elif tree["depth"][row] == depth:
      status[row] = "depth"
    else:
      status[row] = why or "inner"

  def regrow() -> list[int]:
    left, queue = width - len(tree["leaves"]), []
    candidates = [row for row in tree["leaves"] if status[row] in ("eos", "answer")]
    for leaf in shuffle(len(parent), candidates) if candidates else [0]:
      rows = path(parent, leaf)
      kept = [0, *rows][cut(len(parent) + len(queue), leaf, rows)] if leaf else 0
      queue += [(kept, leaf)] * min(branching, left - len(queue))
    tree["fallbacks"] += len(queue)
    return [create(*node) for node in queue]

  queue = [create(0) for _ in range(initial)]
  while True:
    yield tree
    if not queue:
      return
    tree["waves"].append(queue)
    for row in queue:
      decode(row)
    tree["leaves"] += [row for row in queue if status[row] != "inner"]
    active = [row for row in queue if status[row] == "inner"]
    if active:
      ended = len(queue) - len(active)
      total = budget(width, branching, len(tree["leaves"]), ended, len(active))
      counts = shares(total, len(active), remainder)
      queue = [create(row) for row, n in zip(active, counts, strict=True) for _ in range(n)]
    else:
      queue = regrow() if fallback != "none" and len(tree["leaves"]) < width else []
