"""A tree of segments for each prompt, as arrays.

Axes: B prompts, N nodes (row 0 is the prompt), S tokens of a segment, P tokens of a prompt,
W width.
Rows are taken in order, so a parent's row is less than its child's.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from treepo_jax import struct
from treepo_jax.decoding.segment import NO_ROW

NO_PARENT = -1

UNUSED, OPEN, ACTIVE, INNER = 0, 1, 2, 3  # OPEN waits to be decoded, ACTIVE to be branched
EOS, ANSWER, LENGTH, DEPTH, REPETITION = 4, 5, 6, 7, 8  # why a trajectory ended, from EOS on
SHORT, PRUNED = 9, 10  # ended too, but dropped: no trajectory
STOP_NAMES = {EOS: "eos", ANSWER: "answer", LENGTH: "length", DEPTH: "depth",
              REPETITION: "repetition"}  # fmt: skip


@struct.dataclass
class Tree:
  """Trees of a batch of prompts.

  Attributes:
    prompt: tokens of the prompt, left aligned, 0 beyond prompt_length.
    prompt_length: tokens of the prompt.
    prompt_id: identity of the prompt; every draw is folded from it.
    tokens: sampled tokens of a node, 0 beyond length.
    log_probs: log-prob of each token under the policy at temperature 1, 0 beyond length: what the
      update compares with.
    sampled_log_probs: the same under what was drawn from: the policy at the rollout's temperature,
      with its filters.
    length: tokens of the node; a node with children is always full.
    parent: row of the parent, NO_PARENT for row 0 and for rows not taken.
    depth: segments from the prompt; 0 for row 0.
    status: UNUSED, OPEN, ACTIVE, INNER, or from EOS on why the trajectory ended.
    source: for a node made by fallback the row of the trajectory that was cut, 0 where the prompt
      was grown anew; else NO_ROW.
    size: rows taken.
    leaves: rows of the returned trajectories in finishing order, NO_ROW where there is none yet.
  """

  prompt: Int[Array, "*b p"]
  prompt_length: Int[Array, "*b"]
  prompt_id: UInt32[Array, "*b"]
  tokens: Int[Array, "*b n s"]
  log_probs: Float[Array, "*b n s"]
  sampled_log_probs: Float[Array, "*b n s"]
  length: Int[Array, "*b n"]
  parent: Int[Array, "*b n"]
  depth: Int[Array, "*b n"]
  status: Int[Array, "*b n"]
  source: Int[Array, "*b n"]
  size: Int[Array, "*b"]
  leaves: Int[Array, "*b w"]


def capacity(width: int, depth: int, spare: bool = False) -> int:
  """Rows that always suffice: every node has a leaf of its own below it, on a path of `depth`.

  spare: there are paths that are dropped; as many rows are kept for them.
  """
  return 1 + width * depth * (2 if spare else 1)


def create(
  prompt: Int[Array, "b p"],
  prompt_length: Int[Array, "b"],
  prompt_id: UInt32[Array, "b"],
  *,
  width: int,
  depth: int,
  segment: int,
  spare: bool = False,
) -> Tree:
  """Returns trees that hold their prompts and nothing else; spare: see capacity."""
  b, n = prompt.shape[0], capacity(width, depth, spare)
  rows = jnp.zeros((b, n), jnp.int32)
  return Tree(
    prompt=prompt,
    prompt_length=prompt_length,
    prompt_id=prompt_id,
    tokens=jnp.zeros((b, n, segment), jnp.int32),
    log_probs=jnp.zeros((b, n, segment), jnp.float32),
    sampled_log_probs=jnp.zeros((b, n, segment), jnp.float32),
    length=rows,
    parent=jnp.full((b, n), NO_PARENT, jnp.int32),
    depth=rows,
    status=rows.at[:, 0].set(INNER),
    source=jnp.full((b, n), NO_ROW, jnp.int32),
    size=jnp.ones(b, jnp.int32),
    leaves=jnp.full((b, width), NO_ROW, jnp.int32),
  )


def ancestors(parent: Int[Array, "n"]) -> Bool[Array, "n n"]:
  """Returns reach[i, j]: row j is row i or an ancestor of it (rows not taken reach themselves)."""
  n = parent.shape[0]
  up = jnp.where(parent == NO_PARENT, jnp.arange(n), parent)
  reach = jnp.eye(n, dtype=bool) | (jnp.arange(n)[None] == up[:, None])
  for _ in range(max(n - 1, 1).bit_length() - 1):
    # Doubling: after k hops `reach` holds the 2^k nearest ancestors and `up` the 2^k-th.
    up = up[up]
    reach = reach | reach[up]
  return reach


def attach(
  tree: Tree,
  parent: Int[Array, "w"],
  source: Int[Array, "w"],
) -> Tree:
  """Adds an OPEN node under each parent that is not NO_PARENT (one tree; lift with vmap)."""
  n = tree.parent.shape[0]
  live = parent != NO_PARENT
  row = jnp.where(live, tree.size + jnp.cumsum(live) - 1, n)  # row n is dropped
  status = tree.status.at[jnp.where(live, parent, n)].set(INNER, mode="drop")
  return dataclasses.replace(
    tree,
    parent=tree.parent.at[row].set(parent, mode="drop"),
    depth=tree.depth.at[row].set(tree.depth[parent] + 1, mode="drop"),
    status=status.at[row].set(OPEN, mode="drop"),
    source=tree.source.at[row].set(source, mode="drop"),
    size=tree.size + live.sum(dtype=jnp.int32),
  )


def along(tree: Tree, value: Int[Array, "n"] | Float[Array, "n"]):
  """Returns the sum of a value over the nodes of each path, the prompt's left out (one tree)."""
  up = jnp.maximum(tree.parent, 0)
  total = value.at[0].set(0)
  for _ in range(max(tree.parent.shape[0] - 1, 1).bit_length()):
    total, up = total + total[up], up[up]  # the sum over the next 2^k nodes up, and the one after
  return total


def finished(tree: Tree) -> Int[Array, "*b"]:
  """Returns W, how many trajectories of each prompt have ended."""
  return (tree.leaves != NO_ROW).sum(-1, dtype=jnp.int32)


def merge(tree: Tree, twin: Int[Array, "n"]) -> Tree:
  """Returns the tree with every node that has a twin taken out, its twin in its place.

  What lay below it lies below its twin, and a trajectory that ended there is named by the twin's
  row: `leaves` names a row as often as trajectories ended there. Rows are numbered anew, in the
  same order. One tree; lift with vmap. twin: NO_ROW where there is none; it has no twin itself.
  """
  gone = twin != NO_ROW
  kept = jnp.argsort(gone, stable=True)  # rows that stay, those not taken, and then the others
  number = jnp.argsort(kept, stable=True).astype(jnp.int32)
  number = jnp.where(gone, number[jnp.maximum(twin, 0)], number)
  move = lambda row: jnp.where(row >= 0, number[jnp.maximum(row, 0)], row)

  def take(x, none):
    blank = gone.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(blank, none, x)[kept]

  return dataclasses.replace(
    tree,
    tokens=take(tree.tokens, 0),
    log_probs=take(tree.log_probs, 0),
    sampled_log_probs=take(tree.sampled_log_probs, 0),
    length=take(tree.length, 0),
    parent=take(move(tree.parent), NO_PARENT),
    depth=take(tree.depth, 0),
    status=take(tree.status, UNUSED),
    source=take(move(tree.source), NO_ROW),
    size=tree.size - gone.sum(dtype=jnp.int32),
    leaves=move(tree.leaves),
  )


def path(tree: Tree, b: int, row: int) -> list[int]:
  """Returns the rows of a trajectory of tree b, from the first segment to `row` (on the host)."""
  rows = []
  while row > 0:
    rows.append(int(row))
    row = int(tree.parent[b, row])
  return rows[::-1]


def response(tree: Tree, b: int, row: int) -> list[int]:
  """Returns the tokens of a trajectory of tree b: its ancestors', root first (on the host)."""
  return [t for r in path(tree, b, row) for t in tree.tokens[b, r, : tree.length[b, r]].tolist()]
