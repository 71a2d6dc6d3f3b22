"""Recorded trees made ready to draw: what is known of each segment, and where it stands.

A tree lies on its side. Columns are depths; each end of a branch takes a row, in depth-first order,
and a segment stands in the middle of the rows below it. Lengths are pixels.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

ROW = 30.0  # height of a row: the style sheet's --row
_CHARACTER = 6.65  # width of a character on a card
_CARD = 24.0  # height of a card with one line of text
_LINE = 15.0  # height of each further line
_LINES = 5  # lines of text on a card at most
_INSET = 34.0  # width of a card that is not text
_ROOT = 92.0  # width of the prompt's card
_GAPS, _GAP = ((4, 46.0), (10, 36.0)), 30.0  # between columns, by columns at most; with more
_WIDEST = ((4, 250.0), (6, 190.0), (10, 160.0))  # of a card, by columns at most
_NARROWEST, _NARROW = 84.0, 128.0  # of a card at least; at most, with more columns than above

# What would act on a page instead of being read: shown as the picture of itself.
_UNSEEN = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"} | {127: "\u2421"}
_BROKEN = "\ufffd"  # what a decoder gives for bytes that do not end a character


@dataclasses.dataclass
class Node:
  """A segment: row 0 is the prompt, without tokens of its own."""

  row: int
  parent: int
  tokens: list[int]
  log_probs: list[float]
  stop: str | None  # why its trajectory ended, None where it goes on
  reward: float | None
  advantage: float | None
  white: float | None  # the advantage after whitening
  weight: float
  source: int | None  # row of the trajectory that was cut to grow this one
  depth: int = 0
  order: int | None = None  # place among the returned trajectories, of the first that ends here
  times: int = 0  # how many of them end here
  path_tokens: int = 0  # from the prompt to its end
  pieces: list[tuple[str, float]] = dataclasses.field(default_factory=list)  # text, log-prob
  children: list["Node"] = dataclasses.field(default_factory=list)
  leaves: list["Node"] = dataclasses.field(default_factory=list)  # returned, at or below it
  rows: int = 0  # rows it spans
  x: float = 0.0  # where its card begins
  y: float = 0.0  # its card's middle
  width: float = _ROOT
  height: float = _CARD
  lines: int = 1  # of text on its card
  letters: int = 0  # on a line

  @property
  def text(self) -> str:
    return "".join(piece for piece, _ in self.pieces)

  @property
  def log_prob(self) -> float | None:
    """Mean over its tokens, None for the prompt."""
    return statistics.fmean(self.log_probs) if self.log_probs else None

  @property
  def credit(self) -> float | None:
    """Mean advantage of the trajectories through it: whitened, as trained, where that is known.

    Where segments have advantages of their own, the segment's.
    """
    nodes = self.leaves if self.advantage is None else [self]
    values = [node.advantage if node.white is None else node.white for node in nodes]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


@dataclasses.dataclass
class Tree:
  """A prompt's tree: its nodes in depth-first order, the prompt first."""

  prompt_id: str
  question: str
  gold: str
  nodes: list[Node]

  @property
  def leaves(self) -> list[Node]:
    return self.nodes[0].leaves

  @property
  def rewards(self) -> list[float]:
    return [leaf.reward for leaf in self.leaves if leaf.reward is not None]

  @property
  def decoded(self) -> int:
    return sum(len(node.tokens) for node in self.nodes)

  @property
  def path_tokens(self) -> int:
    return sum(leaf.path_tokens for leaf in self.leaves)

  @property
  def fallbacks(self) -> int:
    return sum(node.source is not None for node in self.nodes)

  @property
  def width(self) -> float:
    return max(node.x + node.width for node in self.nodes)

  @property
  def height(self) -> float:
    return self.nodes[0].rows * ROW


def trees(records: Sequence[dict], decode: Decode) -> list[Tree]:
  """Returns the trees of the lines of a trees/step_*.jsonl; `decode` turns token ids into text."""

  @functools.lru_cache(maxsize=1 << 16)  # tokens come in few pairs
  def text(ids: tuple[int, ...]) -> str:
    whole = decode(list(ids)).encode("utf-8", errors="replace").decode("utf-8")
    return whole.translate(_UNSEEN)

  return [_tree(record, text) for record in records]


def _tree(record: dict, text: Callable[[tuple[int, ...]], str]) -> Tree:
  sources = {int(row): source for row, source in record["fallback_of"].items()}
  nodes = {}
  for raw in sorted(record["nodes"], key=lambda raw: raw["row"]):  # parents come first
    node = Node(
      row=raw["row"],
      parent=raw["parent"],
      tokens=raw["tokens"],
      log_probs=raw["log_probs"],
      stop=raw["stop"],
      reward=raw["reward"],
      advantage=raw["advantage"],
      white=raw["advantage_white"] if "advantage_white" in raw else None,
      weight=raw["weight"],
      source=sources[raw["row"]] if raw["row"] in sources else None,
    )
    before = record["prompt_tokens"]
    if node.row:
      parent = nodes[node.parent]
      parent.children.append(node)
      node.depth = parent.depth + 1
      node.path_tokens = parent.path_tokens + len(node.tokens)
      before = parent.tokens or before
    node.pieces = _pieces(before[-1:], node.tokens, node.log_probs, text)
    nodes[node.row] = node
  for order, row in enumerate(record["leaves"]):
    nodes[row].order = order if nodes[row].order is None else nodes[row].order
    nodes[row].times += 1
  ordered = _depth_first(nodes[0])
  _place(ordered)
  return Tree(
    prompt_id=str(record["prompt_id"]),
    question=text(tuple(record["prompt_tokens"])),
    gold=str(record["gold"]),
    nodes=ordered,
  )


def _pieces(
  before: list[int],
  tokens: list[int],
  log_probs: list[float],
  text: Callable[[tuple[int, ...]], str],
) -> list[tuple[str, float]]:
  """Returns the text that each token adds, with its log-prob.

  A token alone may decode otherwise than after another (leading spaces), so each is read behind the
  one before it; tokens that only together make a character are one piece, their log-probs added.
  """
  ids = [*before, *tokens]
  pieces, context, done, log_prob = [], 0, len(before), 0.0
  for end in range(done + 1, len(ids) + 1):
    log_prob += log_probs[end - 1 - len(before)]
    known, seen = text(tuple(ids[context:done])), text(tuple(ids[context:end]))
    if seen.endswith(_BROKEN) and end < len(ids) and end - done < 4:
      continue  # the character goes on
    added = seen[len(known) :] or "".join(f"\u27e8{token}\u27e9" for token in ids[done:end])
    pieces.append((added, log_prob))
    context, done, log_prob = done, end, 0.0
  return pieces


def _depth_first(root: Node) -> list[Node]:
  """Returns the nodes in drawing order, each with the leaves and rows that it spans."""
  ordered, stack = [], [root]
  while stack:
    node = stack.pop()
    ordered.append(node)
    stack.extend(reversed(node.children))
  for node in reversed(ordered):
    node.leaves = [node] * node.times + [leaf for child in node.children for leaf in child.leaves]
    node.rows = sum(child.rows for child in node.children) or 1
  return ordered


def _place(nodes: Sequence[Node]) -> None:
  """Sets the place and size of each card; `nodes` stand in drawing order."""
  columns = max(node.depth for node in nodes)
  widest = next((width for most, width in _WIDEST if columns <= most), _NARROW)
  gap = next((gap for most, gap in _GAPS if columns <= most), _GAP)
  longest = max(len(node.text) for node in nodes)
  width = min(widest, max(_NARROWEST, longest * _CHARACTER + _INSET))
  above = 0  # rows taken so far
  for node in nodes:
    if node.row:
      node.width = width
      node.x = _ROOT + gap + (width + gap) * (node.depth - 1)
    node.letters = int((node.width - _INSET) / _CHARACTER)
    node.y = (above + node.rows / 2) * ROW
    room = 1 + int((node.rows * ROW - _CARD - 6) // _LINE)
    wanted = math.ceil(len(" ".join(node.text.split())) / node.letters)
    node.lines = max(1, min(_LINES, room, wanted))
    node.height = _CARD + _LINE * (node.lines - 1)
    above += 0 if node.children else 1
