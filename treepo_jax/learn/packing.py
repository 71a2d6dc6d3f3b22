"""Trees and their advantages to packed rows for the update, in numpy on the host.

A row holds trees in depth-first order, so that what a token may see is an interval: token i sees
token j iff j <= i < end[j]. Each sampled token stands once and carries the sums over the
trajectories through it, which is all that a loss by tokens needs of them (see losses.policy):

    tree        row      p  a  b  c  d      p: prompt, trajectories a-b-c and a-d
    p - a - b - c   end  5  5  4  4  5
         `- d   previous 0  0  1  2  1      d follows a: what a's state predicts
              count      0  2  1  1  1

Axes: B trees, N rows of a tree, S tokens of a segment, W trajectories of a tree, P prompt tokens,
R packed rows, L tokens of a packed row, K pieces of rows (a tree, a part of one or a trajectory),
M nodes placed in pieces.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from treepo_jax import struct
from treepo_jax.config import UserError
from treepo_jax.learn import credit as credit_lib
from treepo_jax.learn.advantages import Advantage
from treepo_jax.rollout import tree as tree_lib


@struct.dataclass
class Batch:
  """Packed rows, in numpy from `pack` and on the devices in the update; 0 where there is nothing.

  Attributes:
    tokens: token ids.
    positions: position of the token on its path, the prompt's first token at 0.
    end: one past the last token of the row that sees this one; 0 for padding, which nobody sees.
    previous: column of the token whose hidden state predicts this one; 0 where count is 0.
    old_log_probs: log-prob under the policy that sampled the token; once rescored, under the
      trainer's before its first step.
    gain: sum of the positive advantages of the trajectories through the token, by their weights.
    cost: sum of their negative advantages, at most 0.
    count: sum of their weights, the number of trajectories where each weighs 1; 0 for prompts,
      padding and repeated context.
    positive: as count, of those with a positive advantage.
    negative: as count, of those with a negative advantage.
    node: index of the token's node, tree * N + row; 0 where count is 0.
    depth: segments from the prompt to the token's, 1 for the first; 0 where count is 0.
    divisor: what the row adds to the loss's denominator, by config.learn.aggregate.
    tokens_trained: sampled tokens of the row, repeated context included.
    tokens_path: sampled tokens that the same trajectories would hold one by one.
    rollout_log_probs: where old_log_probs are rescored, those of the policy that sampled.
    reference_log_probs: under the reference policy, where the loss asks for it.
  """

  tokens: Int[Any, "*k r l"]
  positions: Int[Any, "*k r l"]
  end: Int[Any, "*k r l"]
  previous: Int[Any, "*k r l"]
  old_log_probs: Float[Any, "*k r l"]
  gain: Float[Any, "*k r l"]
  cost: Float[Any, "*k r l"]
  count: Float[Any, "*k r l"]
  positive: Float[Any, "*k r l"]
  negative: Float[Any, "*k r l"]
  node: Int[Any, "*k r l"]
  depth: Int[Any, "*k r l"]
  divisor: Float[Any, "*k r"]
  tokens_trained: Int[Any, "*k r"]
  tokens_path: Int[Any, "*k r"]
  rollout_log_probs: Float[Any, "*k r l"] | None = None
  reference_log_probs: Float[Any, "*k r l"] | None = None


def abstract(rows: int, config) -> Batch:
  """Returns the shapes of a packed batch of so many rows."""
  per_row = ("divisor", "tokens_trained", "tokens_path")
  whole = (
    "tokens",
    "positions",
    "end",
    "previous",
    "node",
    "depth",
    "tokens_trained",
    "tokens_path",
  )

  def shape(name: str) -> jax.ShapeDtypeStruct:
    size = (rows,) if name in per_row else (rows, config.learn.row_length)
    return jax.ShapeDtypeStruct(size, np.int32 if name in whole else np.float32)

  names = [f.name for f in dataclasses.fields(Batch) if f.default is dataclasses.MISSING]
  return Batch(**{name: shape(name) for name in names})


class _Layout(NamedTuple):
  """Where every node stands in the depth-first order of its tree, the prompt left out."""

  parent: np.ndarray  # [B, N], 0 for row 0
  length: np.ndarray  # [B, N] tokens, 0 for nodes that no returned trajectory passes
  start: np.ndarray  # [B, N] tokens before the node in depth-first order
  stop: np.ndarray  # [B, N] one past the last token below the node
  offset: np.ndarray  # [B, N] tokens before the node on its path
  credit: np.ndarray  # [B, N, 7]: the columns of credit.py


class _Pieces(NamedTuple):
  """What is placed in a row as a whole: a tree, a run of its trajectories, or one trajectory."""

  tree: np.ndarray  # [K]
  length: np.ndarray  # [K] tokens, prompt included


class _Spans(NamedTuple):
  """The nodes that stand in the pieces, and each piece's prompt as node 0."""

  piece: np.ndarray  # [M]
  node: np.ndarray  # [M] row of the node in its tree
  at: np.ndarray  # [M] column of the first token, in the piece
  stop: np.ndarray  # [M] column one past the last token that sees the node
  previous: np.ndarray  # [M] column of the token that precedes the first on its path
  position: np.ndarray  # [M] tokens that precede the first on its path
  credit: np.ndarray  # [M, 7], 0 for prompts and repeated context


def pack(tree: tree_lib.Tree, advantage: Advantage, *, config) -> list[Batch]:
  """Returns the batches of one optimizer step each, at most config.learn.minibatches of them.

  Trees are dealt to the batches in turn and stay whole there; those without a returned trajectory
  take no turn, and no batch is empty. The number of rows is config.learn.micro_rows times a power
  of two, so that few shapes are compiled; empty rows come last.

  Args:
    tree: grown trees; nodes that no returned trajectory passes are left out.
    advantage: of the same trees, in their order.
    config: learn.packing "tree" places each token once; a tree longer than a row is cut into runs
      of trajectories that repeat their ancestors as context. "path" places every trajectory by
      itself, with its own copy of the prompt. learn.aggregate and learn.shared say what a
      trajectory's and a shared token's part in the loss is (see credit.nodes).

  Raises:
    UserError: if one trajectory with its prompt is longer than config.learn.row_length.
  """
  settings = config.learn
  tree, advantage = jax.tree.map(np.asarray, (tree, advantage))
  layout = _layout(tree, credit_lib.nodes(tree, advantage, config))
  _check(tree, layout, settings.row_length)
  if settings.packing == "path":
    pieces, nodes = _paths(tree, layout, advantage, config)
  else:
    pieces, nodes = _trees(tree, layout, settings.row_length)
  none = np.zeros_like(pieces.tree)
  prompts = _Spans(
    piece=np.arange(none.size),
    node=none,
    at=none,
    stop=pieces.length,
    previous=none,
    position=none,
    credit=np.zeros((none.size, credit_lib.DIVISOR + 1)),
  )
  spans = _Spans(*(np.concatenate(pair) for pair in zip(prompts, nodes, strict=True)))
  dealt = np.unique(pieces.tree, return_inverse=True)[1] % settings.minibatches
  return [_fill(tree, pieces, spans, dealt == m, config) for m in np.unique(dealt)]


def _layout(tree: tree_lib.Tree, credit: np.ndarray) -> _Layout:
  """Lays the nodes of all trees out in depth-first order, row by row over all trees at once."""
  b, n = tree.parent.shape
  every, taken = np.arange(b), int(tree.size.max(initial=1))
  parent = np.maximum(tree.parent, 0)
  length = np.where(credit[..., credit_lib.TIMES] > 0, tree.length, 0).astype(np.int64)
  below = length.copy()
  for i in range(taken - 1, 0, -1):
    below[every, parent[:, i]] += below[:, i]
  start, offset = np.zeros_like(length), np.zeros_like(length)
  free = length.copy()  # where a node's next child goes, counted from the node's start
  for i in range(1, taken):
    up = parent[:, i]
    start[:, i] = start[every, up] + free[every, up]
    free[every, up] += below[:, i]
    offset[:, i] = offset[every, up] + length[every, up]
  return _Layout(parent, length, start, start + below, offset, credit)


def _check(tree: tree_lib.Tree, layout: _Layout, row_length: int) -> None:
  """Raises UserError if a trajectory does not fit a row, ValueError if a prompt is empty."""
  prompt = np.where(layout.stop[:, 0] > 0, tree.prompt_length, 1)
  if (prompt == 0).any():
    raise ValueError("a prompt has no tokens: nothing would predict the first of its answers")
  path = np.where(layout.length > 0, layout.offset + layout.length, 0).max(1, initial=0)
  longest = int((prompt + path).max(initial=0))
  if longest > row_length:
    raise UserError(
      f"config.learn.row_length = {row_length} cannot hold a trajectory of {longest} tokens with "
      f"its prompt: set it to {longest} or more, or lower rollout.prompt_length, rollout.depth or "
      "rollout.segment"
    )


def _trees(tree: tree_lib.Tree, layout: _Layout, row_length: int) -> tuple[_Pieces, _Spans]:
  """Places each token once: whole trees, cut into runs of trajectories where they are too long."""
  run_tree, first, last, context, leaf = _runs(tree, layout, row_length)
  prompt = np.asarray(tree.prompt_length)

  # Each node belongs to the run that holds it in depth-first order.
  base = np.cumsum(layout.stop[:, 0]) - layout.stop[:, 0]
  owner, node = np.nonzero(layout.length)
  place = base[owner] + layout.start[owner, node]
  run = np.searchsorted(base[run_tree] + first, place, side="right") - 1
  credit = layout.credit[owner, node]

  # A run that begins inside a tree also holds the ancestors of its first trajectory.
  above_run, above = _climb(layout, run_tree, leaf)
  ahead = layout.start[run_tree[above_run], above] < first[above_run]
  run = np.concatenate([run, above_run[ahead]])
  node = np.concatenate([node, above[ahead]])
  credit = np.concatenate([credit, np.zeros((ahead.sum(), credit_lib.DIVISOR + 1))])

  owner = run_tree[run]
  start, position = layout.start[owner, node], prompt[owner] + layout.offset[owner, node]
  column = prompt[owner] + context[run] - first[run]  # of the start of the depth-first order
  # What precedes a node on its path stands in the run, or else at the end of its context.
  before = layout.parent[owner, node]  # full, or the prompt
  inside = (before > 0) & (layout.start[owner, before] >= first[run])
  before_stop = layout.start[owner, before] + layout.length[owner, before] + column
  spans = _Spans(
    piece=run,
    node=node,
    at=np.where(start < first[run], position, start + column),
    stop=np.minimum(layout.stop[owner, node], last[run]) + column,
    previous=np.where(inside, before_stop, position) - 1,
    position=position,
    credit=credit,
  )
  return _Pieces(tree=run_tree, length=prompt[run_tree] + context + last - first), spans


def _runs(tree: tree_lib.Tree, layout: _Layout, row_length: int) -> np.ndarray:
  """Cuts each tree's trajectories, in depth-first order, into runs that fit a row, greedily.

  Returns i64[5, K]: of each run its tree, the stretch first, last of depth-first order that it
  owns, the tokens of context it repeats, and the leaf of its first trajectory (0: no context).
  """
  runs = []
  for b in np.nonzero(layout.stop[:, 0])[0]:
    room, total = row_length - tree.prompt_length[b], layout.stop[b, 0]
    if total <= room:
      runs.append((b, 0, total, 0, 0))
      continue
    leaves = tree.leaves[b][tree.leaves[b] != tree_lib.NO_ROW]
    stops = layout.stop[b, leaves]
    first = done = context = opening = 0
    for i in np.argsort(stops, kind="stable"):
      if context + stops[i] - first > room:
        runs.append((b, first, done, context, opening))
        path = layout.offset[b, leaves[i]] + layout.length[b, leaves[i]]
        first, context, opening = done, path - (stops[i] - done), leaves[i]
      done = stops[i]
    runs.append((b, first, done, context, opening))
  return np.asarray(runs, np.int64).reshape(-1, 5).T


def _paths(
  tree: tree_lib.Tree, layout: _Layout, advantage: Advantage, config
) -> tuple[_Pieces, _Spans]:
  """Places every trajectory by itself, with its own copy of the prompt."""
  owner, slot = np.nonzero(advantage.weight.max(2) > 0)
  leaf = np.asarray(tree.leaves)[owner, slot]
  tokens = layout.offset[owner, leaf] + layout.length[owner, leaf]
  prompt = np.asarray(tree.prompt_length)[owner]
  piece, node = _climb(layout, owner, leaf)
  at = prompt[piece] + layout.offset[owner[piece], node]
  spans = _Spans(
    piece=piece,
    node=node,
    at=at,
    stop=(prompt + tokens)[piece],
    previous=at - 1,
    position=at,
    credit=credit_lib.copies(
      tree, advantage, layout.credit, (owner[piece], slot[piece], node), config
    ),
  )
  return _Pieces(tree=owner, length=prompt + tokens), spans


def _climb(layout: _Layout, owner: np.ndarray, leaf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns (index of the leaf, node) for the nodes with tokens from each leaf up to the prompt."""
  index, node = np.arange(leaf.size), leaf
  indices, nodes = [index[:0]], [node[:0]]
  while index.size:
    held = layout.length[owner[index], node] > 0
    indices.append(index[held])
    nodes.append(node[held])
    index, node = index[node > 0], layout.parent[owner[index], node][node > 0]
  return np.concatenate(indices), np.concatenate(nodes)


def _first_fit(length: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
  """Puts the longest piece first, each into the first row with room; returns rows and columns."""
  row, column = np.zeros_like(length), np.zeros_like(length)
  used = np.zeros_like(length)
  for k in np.argsort(-length, kind="stable"):
    row[k] = np.argmax(used + length[k] <= capacity)
    column[k] = used[row[k]]
    used[row[k]] += length[k]
  return row, column


def _fill(tree: tree_lib.Tree, pieces: _Pieces, spans: _Spans, chosen: np.ndarray, config) -> Batch:
  """Writes the chosen pieces into rows: what is known of spans is repeated over their tokens."""
  settings = config.learn
  row, column = np.zeros_like(pieces.length), np.zeros_like(pieces.length)
  row[chosen], column[chosen] = _first_fit(pieces.length[chosen], settings.row_length)
  spans = _Spans(*(x[chosen[spans.piece]] for x in spans))
  order = np.lexsort((spans.at, column[spans.piece], row[spans.piece]))
  spans = _Spans(*(x[order] for x in spans))
  owner, row, column = pieces.tree[spans.piece], row[spans.piece], column[spans.piece]
  prompt = spans.node == 0
  size = np.where(prompt, tree.prompt_length[owner], tree.length[owner, spans.node])

  micro_batches = -(-(row[-1] + 1) // settings.micro_rows)
  rows = settings.micro_rows * 2 ** int(micro_batches - 1).bit_length()
  filled = np.arange(settings.row_length)[None] < np.bincount(row, size, rows)[:, None]

  def write(dtype, flat):
    """Writes a value a token; the tokens of each row are one stretch from its first column on."""
    out = np.zeros(filled.shape, dtype)
    out[filled] = flat
    return out

  def repeat(value):
    return np.repeat(value, size)

  index = np.arange(size.sum()) - repeat(np.cumsum(size) - size)  # within the span
  credited = repeat(spans.credit[:, credit_lib.COUNT] > 0)
  previous = np.where(index == 0, repeat(spans.previous), repeat(spans.at - 1) + index)
  tokens, log_probs = _contents(tree, owner, spans.node, size)
  gain, cost, count, positive, negative = (
    write(np.float32, repeat(values)) for values in spans.credit[:, : credit_lib.TIMES].T
  )
  nodes = tree.parent.shape[1]
  whole = settings.aggregate != "token" or settings.shared == "leaf"
  added = spans.credit[:, credit_lib.DIVISOR] if whole else size * spans.credit[:, credit_lib.COUNT]
  return Batch(
    tokens=write(np.int32, tokens),
    positions=write(np.int32, repeat(spans.position) + index),
    end=write(np.int32, repeat(spans.stop + column)),
    previous=write(np.int32, credited * (previous + repeat(column))),
    old_log_probs=write(np.float32, np.where(credited, log_probs, 0)),
    gain=gain,
    cost=cost,
    count=count,
    positive=positive,
    negative=negative,
    node=write(np.int32, credited * repeat(owner * nodes + spans.node)),
    depth=write(np.int32, credited * repeat(tree.depth[owner, spans.node])),
    divisor=np.bincount(row, added, rows).astype(np.float32),
    tokens_trained=np.bincount(row, size * ~prompt, rows).astype(np.int32),
    tokens_path=np.bincount(row, size * spans.credit[:, credit_lib.TIMES], rows).astype(np.int32),
  )


def _contents(
  tree: tree_lib.Tree, owner: np.ndarray, node: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens and log-probs of spans one after the other; log-probs of prompts are 0."""
  prompt = node == 0
  sampled = np.repeat(~prompt, size)
  tokens, log_probs = np.zeros(sampled.size, np.int32), np.zeros(sampled.size, np.float32)
  inside = np.arange(tree.prompt.shape[1])[None] < size[prompt, None]
  tokens[~sampled] = tree.prompt[owner[prompt]][inside]
  owner, node, size = owner[~prompt], node[~prompt], size[~prompt]
  inside = np.arange(tree.tokens.shape[2])[None] < size[:, None]
  tokens[sampled] = tree.tokens[owner, node][inside]
  log_probs[sampled] = tree.log_probs[owner, node][inside]
  return tokens, log_probs
