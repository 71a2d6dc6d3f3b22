"""Where finished trajectories are cut and grown again; one tree, lifted with vmap by the caller.

A cut keeps whole segments as nodes; what it keeps of one more is given to the new node as its first
tokens. So every node lies on the grid of segments, and whatever is decoded stands on exactly the
tokens before it. (The published code decodes from the text before the last segment instead, which
splices two trajectories; its "misaligned" cuts shift all that follows.)

Axes: N nodes, W width, T tokens of the longest answer, K blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treepo_jax import struct
from treepo_jax.rollout import branching, pruning
from treepo_jax.rollout.tree import (
  ANSWER,
  DEPTH,
  EOS,
  INNER,
  LENGTH,
  NO_PARENT,
  NO_ROW,
  REPETITION,
  Tree,
)

RANK = {ANSWER: 7.0, EOS: 5.0, DEPTH: 4.0, LENGTH: 3.0, REPETITION: 2.0}  # published priorities
LEAST_SPREAD = 1e-3  # variance of rewards that a node without disagreement counts as


@dataclasses.dataclass(frozen=True)
class Policy:
  """Keys of config.rollout that say what is cut, and where."""

  place: str
  source: str
  window: int
  windows: int
  block: int
  least: int


@struct.dataclass
class Draws:
  """Uniform numbers in [0, 1) of one wave of a prompt, one a trajectory."""

  branching: Float[Array, "*b w"]
  order: Float[Array, "*b w"]
  cut: Float[Array, "*b w"]
  copies: Float[Array, "*b w"]
  place: Float[Array, "*b w"]


def draw(key: jax.Array, width: int) -> Draws:
  """Returns the numbers of one wave of a prompt."""
  names = [field.name for field in dataclasses.fields(Draws)]
  return Draws(**dict(zip(names, jax.random.uniform(key, (len(names), width)), strict=True)))


@struct.dataclass
class Cuts:
  """New nodes, one an entry.

  Attributes:
    parent: node that each is grown from, NO_PARENT where there is none.
    source: trajectory that was cut, 0 where the prompt is grown anew, NO_ROW elsewhere.
    guide: node whose first tokens are given to it; 0 where none.
    given: how many.
  """

  parent: Int[Array, "*b w"]
  source: Int[Array, "*b w"]
  guide: Int[Array, "*b w"]
  given: Int[Array, "*b w"]


def ancestor_at(
  tree: Tree, row: Int[Array, "w"], depth: Int[Array, "w"], most: int
) -> Int[Array, "w"]:
  """Returns each row's ancestor at a depth, at most `most` steps up; itself if less deep."""
  up = lambda _, row: jnp.where(tree.depth[row] > depth, tree.parent[row], row)
  return jax.lax.fori_loop(0, most, up, row)


def responses(tree: Tree, most: int) -> Float[Array, "w t"]:
  """Returns the log-probs of each leaf's whole answer, 0 beyond its end."""
  w, s = tree.leaves.shape[0], tree.tokens.shape[1]
  row = jnp.maximum(tree.leaves, 0)
  up = lambda row, _: (jnp.maximum(tree.parent[row], 0), row)
  rows = jax.lax.scan(up, row, length=most)[1].T  # deepest first, then row 0
  place = tree.depth[rows] - 1  # -1 of row 0 is dropped
  out = jnp.zeros((w, most + 1, s)).at[jnp.arange(w)[:, None], place].set(tree.log_probs[rows])
  return out[:, :most].reshape(w, most * s)


def regrow(
  tree: Tree,
  draws: Draws,
  reward: Float[Array, "w"],
  room: Int[Array, ""],
  *,
  most: int,
  policy: Policy,
  branch: branching.Policy,
) -> Cuts:
  """Returns the nodes that regrow cut trajectories, until `room` is filled (section 2.3).

  Depth-first fallback: trajectories that may be cut come in the order of policy.source, each is cut
  where policy.place says and grows up to b branches there. Without any the prompt itself is grown
  again, b branches.

  reward: of each leaf, read where policy.place is "disagree". most: segments of a trajectory at
  most.
  """
  s = tree.tokens.shape[1]
  leaf = jnp.maximum(tree.leaves, 0)
  length = (tree.depth[leaf] - 1) * s + tree.length[leaf]
  if policy.place == "disagree":
    kept, source = _disagreeing(tree, draws.place, reward, most)
    guide, given = jnp.zeros_like(kept), jnp.zeros_like(kept)
    count = jnp.where((tree.leaves != NO_ROW).any(), leaf.shape[0], 1)
  else:
    eligible = _eligible(tree, leaf, length, policy)
    order = jnp.argsort(_priority(tree, leaf, length, eligible, draws.order, policy), stable=True)
    cut = jnp.where(eligible, _cut(tree, length, draws.cut, most, policy), 0)
    anew = ~eligible | (bool(policy.window and policy.place == "random") & (length < policy.window))
    kept = jnp.where(anew, 0, ancestor_at(tree, leaf, cut // s, most))[order]
    given = jnp.where(anew, 0, cut % s)[order]
    guide = jnp.where(given > 0, ancestor_at(tree, leaf, cut // s + 1, most)[order], 0)
    source = jnp.where(anew, 0, leaf)[order]
    count = jnp.maximum(eligible.sum(), 1)  # nothing to cut: the prompt itself
    if policy.place == "start":
      count = jnp.minimum(count, 1)

  if branch.step_paths:
    copies = jnp.full(leaf.shape, branch.step_paths)
  else:
    copies = branching.between(draws.copies, branch.branching, branch.branching_max)
  upto = jnp.cumsum(jnp.where(jnp.arange(leaf.shape[0]) < count, copies, 0))
  slot = jnp.arange(leaf.shape[0])
  live = slot < jnp.minimum(room, upto[-1])
  of = jnp.minimum(jnp.searchsorted(upto, slot, side="right"), leaf.shape[0] - 1)
  pick = lambda x, none: jnp.where(live, x[of], none).astype(jnp.int32)
  return Cuts(
    parent=pick(kept, NO_PARENT), source=pick(source, NO_ROW), guide=pick(guide, 0),
    given=pick(given, 0),
  )  # fmt: skip


def _eligible(tree: Tree, leaf, length, policy: Policy) -> Bool[Array, "w"]:
  """Returns which trajectories may be cut."""
  status = tree.status[leaf]
  eligible = (tree.leaves != NO_ROW) & (length >= max(policy.least, 1))
  if policy.source == "answered":
    eligible &= (status == ANSWER) | (status == EOS)
  elif policy.source == "boxed":
    eligible &= status == ANSWER
  return eligible


def _priority(tree: Tree, leaf, length, eligible, uniform, policy: Policy) -> Float[Array, "w"]:
  """Returns what the trajectories are sorted by, infinite where not eligible."""
  rank = jnp.zeros(leaf.shape)
  for status, value in RANK.items():
    rank = jnp.where(tree.status[leaf] == status, value, rank)
  gumbel = -jnp.log(-jnp.log(uniform))
  if policy.source == "finished_first":
    priority = -(jnp.log(rank) + gumbel)
  elif policy.source == "longest":
    priority = -(jnp.log(length.astype(jnp.float32)) + gumbel)
  elif policy.source == "strict":
    priority = -rank
  else:
    priority = uniform
  return jnp.where(eligible, priority, jnp.inf)


def _cut(tree: Tree, length, uniform, most: int, policy: Policy) -> Int[Array, "w"]:
  """Returns how many tokens of each trajectory are kept."""
  s = tree.tokens.shape[1]
  if policy.place == "start":
    return jnp.zeros_like(length)
  if policy.place == "random":
    window = policy.window or s
    count = -(-length // window)
    back = jnp.minimum(count, policy.windows) if policy.windows else count
    return (count - 1 - jnp.floor(uniform * back).astype(jnp.int32)) * window
  log_probs = responses(tree, most)
  valid = jnp.arange(most * s)[None] < length[:, None]
  if policy.place == "log_prob":
    return jnp.argmin(jnp.where(valid, log_probs, jnp.inf), 1).astype(jnp.int32)
  blocks = -(-most * s // policy.block)
  pad = [(0, 0), (0, blocks * policy.block - most * s)]
  split = lambda x: jnp.pad(x, pad).reshape(-1, blocks, policy.block).sum(-1)
  size = split(valid.astype(jnp.float32))
  mean = split(jnp.where(valid, log_probs, 0)) / jnp.maximum(size, 1)
  sign = 1.0 if policy.place == "inverse_block" else -1.0
  share = jax.nn.softmax(jnp.where(size > 0, sign * mean, -jnp.inf), -1)
  block = (jnp.cumsum(share, -1) <= uniform[:, None]).sum(-1)
  return jnp.minimum(block, (size > 0).sum(-1) - 1) * policy.block


def _disagreeing(tree: Tree, uniform, reward, most: int) -> tuple[Int[Array, "w"], Int[Array, "w"]]:
  """Returns (nodes, sources): nodes drawn by the variance of the rewards below them.

  An answer there teaches most: where all below a node earn alike, one more tells little.
  """
  n, w = tree.parent.shape[0], reward.shape[0]
  count, total, squares = pruning.below(tree, reward, most)
  mean = total / jnp.maximum(count, 1)
  spread = jnp.maximum(squares / jnp.maximum(count, 1) - mean**2, 0) + LEAST_SPREAD
  open_to = (count > 0) & (tree.status == INNER)
  upto = jnp.cumsum(jnp.where(open_to, spread, 0))
  node = (upto[None] <= (uniform * upto[-1])[:, None]).sum(1)
  node = jnp.minimum(node, n - 1).astype(jnp.int32)

  def climb(row, _):
    return jnp.where(row > 0, tree.parent[jnp.minimum(row, n - 1)], NO_ROW), row

  there = tree.leaves != NO_ROW
  rows = jax.lax.scan(climb, jnp.where(there, tree.leaves, NO_ROW), length=most + 1)[1]
  first = jnp.full(n, w).at[jnp.where(rows < 0, n, rows)].min(jnp.arange(w)[None], mode="drop")
  source = tree.leaves[jnp.minimum(first[node], w - 1)]
  some = there.any()
  return jnp.where(some, node, 0), jnp.where(some, source, 0)
