"""TreePO's rollout again, in plain Python: one prompt, dicts and lists, one wave at a time.

Nothing is shared with the package. What the model would say is a script: `write(row, depth, given)`
returns of the segment of a node, whose first `given` tokens are copied,
  length: tokens, the given ones included
  why: None, "eos" or "answer", which stand on its last token, or "repetition": the text loops
  loops: that the text loops where `why` already says something else; may be missing
  log_probs: a float a token; those of given tokens are not read
  boxed: whether a box has closed on the path so far, this segment included
  entropy: its mean.
What is drawn is handed in too: `draw(purpose, wave)` returns `width` uniform numbers in [0, 1) for
the purposes "branching", "order", "cut", "copies" and "place", `wave` being how many waves have
been planned before. `judge(leaf)` returns the reward of a leaf. The oracle draws nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

Tree = dict[str, Any]
Write = Callable[[int, int, int], dict[str, Any]]
Draw = Callable[[str, int], list[float]]
Judge = Callable[[int], float]
Place = tuple[int, int, int, int]  # source, parent, given, guide of a node to be regrown

# Why trajectories end, and how much sooner one than another is cut to grow again.
WEIGHTS = {"answer": 7, "eos": 5, "depth": 4, "length": 3, "repetition": 2}
LEAST_DISAGREEMENT = 1e-3  # so that nodes whose leaves agree may be drawn as well


@dataclasses.dataclass(frozen=True)
class Rules:
  """The keys of config.rollout that shape one tree, under their names and with their meaning."""

  segment: int
  width: int
  depth: int
  branching: int = 2
  branching_max: int = 0
  initial: int = 0
  initial_max: int = 0
  step_paths: int = 0  # rollout.step_tokens over prompts and segment
  response_tokens: int = 0
  min_width: int = 0
  allocation: str = "even"
  remainder: str = "spread"
  favour: str = "low"
  allocation_temperature: float = 1.0
  fallback: str = "random"
  fallback_from: str = "answered"
  fallback_window: int = 0
  fallback_windows: int = 0
  fallback_block: int = 128
  fallback_least: int = 0
  prune: str = "none"
  prune_share: float = 0.25
  prune_keep: int = 2
  response_length: int = 0
  stop_at: str = "box"
  min_length: int = 0
  repetition_first: bool = False

  @property
  def longest(self) -> int:
    return self.response_length or self.depth * self.segment

  @property
  def rows(self) -> int | None:
    """Rows of the tree; None: no bound, where each path that ends is one of `width` leaves."""
    loses = self.min_length > 0 or self.prune != "none"
    return 1 + 2 * self.width * self.depth if loses else None


# ------------------------------------------------------------------------------------------------
# Numbers.
# ------------------------------------------------------------------------------------------------


def integer(u: float, low: int, high: int) -> int:
  """Returns what the uniform number u says of low..high."""
  return low + math.floor(u * (high - low + 1))


def gumbel(u: float) -> float:
  return -math.log(-math.log(u)) if u > 0 else -math.inf


def mean(values: list[float]) -> float:
  return sum(values) / len(values)


def variance(values: list[float]) -> float:
  return mean([(x - mean(values)) ** 2 for x in values])


def softmax(scores: list[float]) -> list[float]:
  powers = [math.exp(s - max(scores)) for s in scores]
  return [p / sum(powers) for p in powers]


def pick(weights: list[float], u: float) -> int:
  """Returns the first index whose cumulative weight, as a share, exceeds u."""
  sums = list(itertools.accumulate(weights))
  return next((i for i, x in enumerate(sums) if x > u * sums[-1]), len(sums) - 1)


def largest_remainder(weights: list[float], total: int) -> list[int]:
  """Returns one for each and the rest by weight; what is over goes where most was cut off."""
  quotas = [w * (total - len(weights)) for w in weights]
  counts = [1 + math.floor(q) for q in quotas]
  order = sorted(range(len(quotas)), key=lambda i: math.floor(quotas[i]) - quotas[i])
  for i in order[: total - sum(counts)]:
    counts[i] += 1
  return counts


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


# ------------------------------------------------------------------------------------------------
# The tree: a list a field, indexed by row; row 0 is the prompt.
# ------------------------------------------------------------------------------------------------


def planted() -> Tree:
  return {
    "parent": [-1],
    "source": [-1],  # the leaf that was cut, 0: the prompt, -1: not by fallback
    "given": [0],  # first tokens that are copied
    "guide": [0],  # the row they are copied from, 0: none
    "depth": [0],
    "length": [0],
    "log_probs": [[]],
    "entropy": [0.0],
    "status": ["inner"],
    "leaves": [],
    "waves": [],  # rows decoded
    "fallbacks": 0,
  }


def create(tree: Tree, parent: int, source: int = -1, given: int = 0, guide: int = 0) -> int:
  new = {"parent": parent, "source": source, "given": given, "guide": guide}
  new |= {"depth": tree["depth"][parent] + 1, "length": 0, "log_probs": [], "entropy": 0.0}
  for name, value in (new | {"status": "open"}).items():
    tree[name].append(value)
  return len(tree["parent"]) - 1


def path(parent: list[int], row: int) -> list[int]:
  """Returns the rows from below the prompt to `row`."""
  return [*path(parent, parent[row]), row] if row > 0 else []


def response(tree: Tree, row: int) -> list[float]:
  """Returns the log-probs of all tokens from the prompt to the end of `row`."""
  return [x for r in path(tree["parent"], row) for x in tree["log_probs"][r]]


def below(tree: Tree, node: int) -> list[int]:
  """Returns the leaves that have finished below a node, in finishing order."""
  return [leaf for leaf in tree["leaves"] if node in [0, *path(tree["parent"], leaf)]]


# ------------------------------------------------------------------------------------------------
# A wave: what is decoded, and what becomes of it.
# ------------------------------------------------------------------------------------------------


def stopped(rules: Rules, said: dict[str, Any]) -> str | None:
  """Returns the stop on the last token of a segment, if any."""
  if rules.stop_at == "box":
    return said["why"] if said["why"] in ("eos", "answer") else None
  assert said["why"] != "answer", "decoding ends at a box only with stop_at = 'box'"
  eos = said["why"] == "eos"
  if said["boxed"] and (rules.stop_at == "segment" or eos):
    return "answer"
  return "eos" if eos else None


def classify(rules: Rules, said: dict[str, Any], tokens: int, depth: int) -> str:
  """Returns what becomes of a path of as many tokens as were decoded: the first that holds."""
  loops = said["why"] == "repetition" or said.get("loops", False)
  stop = stopped(rules, said) if tokens <= rules.longest else None  # else it is cut off
  if rules.repetition_first and loops:
    status = "repetition"
  elif stop:
    status = stop
  elif tokens >= rules.longest:
    status = "length"
  elif depth == rules.depth:
    status = "depth"
  else:
    status = "repetition" if loops else "inner"
  short = min(tokens, rules.longest) < rules.min_length
  return "short" if short and status != "inner" else status


def decode(rules: Rules, tree: Tree, row: int, write: Write) -> None:
  """Fills a row with its segment, cut to the longest answer."""
  depth, given = tree["depth"][row], tree["given"][row]
  said = write(row, depth, given)
  assert given < said["length"] == len(said["log_probs"]) <= rules.segment
  before = len(response(tree, tree["parent"][row]))
  log_probs = tree["log_probs"][tree["guide"][row]][:given] + said["log_probs"][given:]
  tree["log_probs"][row] = log_probs[: rules.longest - before]
  tree["length"][row] = len(tree["log_probs"][row])
  tree["entropy"][row] = said["entropy"]
  tree["status"][row] = classify(rules, said, before + said["length"], depth)
  assert tree["status"][row] != "inner" or said["length"] == rules.segment


def value(rules: Rules, tree: Tree, row: int, judge: Judge) -> float:
  """Returns how much an open path promises."""
  if rules.prune == "log_prob":
    return mean(response(tree, row))
  if rules.prune == "entropy":
    return -tree["entropy"][row]
  for node in [*path(tree["parent"], row)[-2::-1], 0]:  # the nearest first
    if leaves := below(tree, node):
      return mean([judge(leaf) for leaf in leaves])
  return 0.0


def pruned(rules: Rules, tree: Tree, active: list[int], judge: Judge) -> list[int]:
  """Returns the rows to be given up, the worst first."""
  if rules.prune == "none":
    return []
  most = len(active) - min(len(active), rules.prune_keep)
  worst = sorted(active, key=lambda row: (value(rules, tree, row, judge), -row))
  return worst[: min(math.floor(len(active) * rules.prune_share), most)]


# ------------------------------------------------------------------------------------------------
# Budgets: how many paths the next wave has, and who gets them.
# ------------------------------------------------------------------------------------------------


def continuations(left: int, wanted: int, active: int) -> int:
  """Returns what is wanted as far as there is room for it; no path stays without one."""
  return max(min(max(left, 0), wanted), active)


def budget(width: int, branching: int, finished: int, ended: int, active: int) -> int:
  """Returns the paths of the next wave: b for each one decoded, as far as the width allows."""
  return continuations(width - finished, branching * (ended + active), active)


def drawn_branching(rules: Rules, draw: Draw, purpose: str, wave: int, i: int = 0) -> int:
  if rules.branching_max > rules.branching:
    return integer(draw(purpose, wave)[i], rules.branching, rules.branching_max)
  return rules.branching


def divergence(rules: Rules, draw: Draw) -> int:
  """Returns the branches of the prompt itself."""
  most, least = rules.width, rules.initial or rules.width
  if rules.response_tokens:
    most = max(min(most, rules.response_tokens // rules.segment), 1)
  if rules.step_paths:
    return min(rules.step_paths, most)
  if rules.initial_max > least:
    return min(integer(draw("branching", 0)[0], least, rules.initial_max), most)
  return min(least, most)


def missing(rules: Rules, tree: Tree, count: int, tokens: int) -> int:
  """Returns the trajectories that may yet be: `count` of them are expected to take `tokens`."""
  finished, allowed = len(tree["leaves"]), rules.width
  if rules.response_tokens and tokens:
    rest = rules.response_tokens - sum(len(response(tree, leaf)) for leaf in tree["leaves"])
    allowed = min(max(rest * count // tokens, 0) + finished, rules.width)
    allowed = max(allowed, rules.min_width)
  left = max(allowed - finished, 0)
  if rules.rows:
    left = min(left, (rules.rows - len(tree["parent"])) // rules.depth)
  return left


def score(rules: Rules, log_probs: list[float]) -> float:
  if rules.allocation == "sum":
    return sum(log_probs)
  return mean(log_probs[-rules.segment :] if rules.allocation == "segment" else log_probs)


def allocate(rules: Rules, responses: list[list[float]], total: int) -> list[int]:
  """Deals `total` continuations to paths by the log-probs of their responses, or to all alike."""
  if rules.allocation == "even":
    return shares(total, len(responses), rules.remainder)
  sign = {"low": -1, "high": 1}[rules.favour]
  scores = [sign * score(rules, r) / rules.allocation_temperature for r in responses]
  return largest_remainder(softmax(scores), total)


def branch(rules: Rules, tree: Tree, draw: Draw, active: list[int], decoded: int) -> list[int]:
  """Creates the next wave below the active paths, out of the budget of all that were decoded."""
  responses = [response(tree, row) for row in active]
  tokens = sum(len(r) for r in responses) + rules.segment * len(active)
  left = missing(rules, tree, len(active), tokens)
  b = drawn_branching(rules, draw, "branching", len(tree["waves"]))
  total = continuations(left, rules.step_paths or b * decoded, len(active))
  counts = allocate(rules, responses, total)
  return [create(tree, row) for row, n in zip(active, counts, strict=True) for _ in range(n)]


# ------------------------------------------------------------------------------------------------
# Fallback: where nothing goes on, trajectories are cut and grow again.
# ------------------------------------------------------------------------------------------------


def sources(rules: Rules, stops: list[str], lengths: list[int], u: list[float]) -> list[int]:
  """Returns who may be cut, in order: places in the finishing order, which stops and lengths have.

  Weighted draws take one after the other without replacement (Plackett-Luce, by Gumbel noise).
  """
  which = rules.fallback_from
  may = {"answered": ("answer", "eos"), "boxed": ("answer",)}.get(which, tuple(WEIGHTS))
  least = max(rules.fallback_least, 1)
  places = [i for i, stop in enumerate(stops) if stop in may and lengths[i] >= least]
  keys = {
    "finished_first": lambda i: -(math.log(WEIGHTS[stops[i]]) + gumbel(u[i])),
    "longest": lambda i: -(math.log(lengths[i]) + gumbel(u[i])),
    "strict": lambda i: -WEIGHTS[stops[i]],
  }
  return sorted(places, key=keys.get(which, lambda i: u[i]))


def cut(rules: Rules, log_probs: list[float], u: float) -> int | None:
  """Returns how many tokens of a trajectory are kept; None: it is too short to be cut."""
  if rules.fallback == "start":
    return 0
  if rules.fallback == "log_prob":
    return log_probs.index(min(log_probs))
  if rules.fallback == "random":
    window = rules.fallback_window or rules.segment
    if rules.fallback_window > len(log_probs):
      return None
    windows = math.ceil(len(log_probs) / window)
    most = min(windows, rules.fallback_windows or windows)
    return (windows - integer(u, 1, most)) * window
  size = rules.fallback_block
  blocks = [log_probs[i : i + size] for i in range(0, len(log_probs), size)]
  sign = {"block": -1, "inverse_block": 1}[rules.fallback]
  return size * pick(softmax([sign * mean(block) for block in blocks]), u)


def aligned(rules: Rules, tree: Tree, leaf: int, kept: int) -> Place:
  """Returns where a leaf grows again after `kept` tokens: below whole segments, the rest given."""
  rows = [0, *path(tree["parent"], leaf)]
  whole, given = divmod(kept, rules.segment)
  return leaf, rows[whole], given, rows[whole + 1] if given else 0


def disagreeing(tree: Tree, u: list[float], judge: Judge) -> Iterator[Place]:
  """Yields the nodes drawn by how much the rewards below them vary, as often as is asked."""
  above = {row for leaf in tree["leaves"] for row in path(tree["parent"], leaf)}
  nodes = [0, *sorted(row for row in above if tree["status"][row] == "inner")]
  spread = [variance([judge(leaf) for leaf in below(tree, node)]) for node in nodes]
  weights = [x + LEAST_DISAGREEMENT for x in spread]
  for x in u:
    node = nodes[pick(weights, x)]
    yield below(tree, node)[0], node, 0, 0


def places(rules: Rules, tree: Tree, draw: Draw, judge: Judge) -> Iterator[Place]:
  """Yields where the tree may grow again, in order."""
  wave, leaves = len(tree["waves"]), tree["leaves"]
  prompt = (0, 0, 0, 0)
  if rules.fallback == "disagree" and leaves:
    yield from disagreeing(tree, draw("place", wave), judge)
    return
  responses = [response(tree, leaf) for leaf in leaves]
  stops, lengths = [tree["status"][leaf] for leaf in leaves], [len(r) for r in responses]
  order = sources(rules, stops, lengths, draw("order", wave))
  if not order:
    yield prompt
  for i in order[:1] if rules.fallback == "start" else order:
    kept = cut(rules, responses[i], draw("cut", wave)[i])
    yield prompt if kept is None else aligned(rules, tree, leaves[i], kept)


def regrow(rules: Rules, tree: Tree, draw: Draw, judge: Judge) -> list[int]:
  """Creates the next wave where trajectories are cut, as far as some are missing."""
  wave, queue = len(tree["waves"]), []
  finished = sum(len(response(tree, leaf)) for leaf in tree["leaves"])
  left = missing(rules, tree, len(tree["leaves"]), finished)
  for i, (source, parent, given, guide) in enumerate(places(rules, tree, draw, judge)):
    if len(queue) == left:
      break
    copies = rules.step_paths or drawn_branching(rules, draw, "copies", wave, i)
    for _ in range(min(copies, left - len(queue))):
      queue.append(create(tree, parent, source, given, guide))
  tree["fallbacks"] += len(queue)
  return queue


# ------------------------------------------------------------------------------------------------
# All of it.
# ------------------------------------------------------------------------------------------------


def unjudged(leaf: int) -> float:
  raise AssertionError(f"leaf {leaf} needs a reward: hand in judge")


def grow(write: Write, *, draw: Draw, judge: Judge = unjudged, **options) -> Iterator[Tree]:
  """Grows one tree and yields it after each wave is planned; the last one is the whole tree.

  Options are those of `Rules`. It is the same tree that is yielded again and again.
  """
  rules = Rules(**options)
  tree = planted()
  status = tree["status"]
  queue = [create(tree, 0) for _ in range(divergence(rules, draw))]
  while True:
    yield tree
    if not queue:
      return
    tree["waves"].append(queue)
    for row in queue:
      decode(rules, tree, row, write)
    tree["leaves"] += [row for row in queue if status[row] in WEIGHTS]
    for row in pruned(rules, tree, [row for row in queue if status[row] == "inner"], judge):
      status[row] = "pruned"
    active = [row for row in queue if status[row] == "inner"]
    if active:
      decoded = sum(status[row] != "short" for row in queue)
      queue = branch(rules, tree, draw, active, decoded)
    elif rules.fallback != "none" and len(tree["leaves"]) < rules.width:
      queue = regrow(rules, tree, draw, judge)
    else:
      queue = []
    assert rules.rows is None or len(tree["parent"]) <= rules.rows
