"""How many branches each open path of a prompt grows; one tree, lifted with vmap by the caller.

Axes: N nodes, W width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treepo_jax.rollout import tree as tree_lib
from treepo_jax.rollout.tree import NO_PARENT, Tree


@dataclasses.dataclass(frozen=True)
class Policy:
  """Keys of config.rollout that say who grows and how much."""

  branching: int
  branching_max: int  # at least branching
  initial: int
  initial_max: int  # at least initial
  initial_draw: str
  step_paths: int  # paths of a prompt and wave; 0: by branching
  response_tokens: int
  min_width: int
  allocation: str
  remainder: str
  favour: str


def between(uniform: Float[Array, "*u"], least: int, most: int) -> Int[Array, "*u"]:
  """Returns integers in least..most from uniform numbers in [0, 1)."""
  return least + jnp.floor(uniform * (most - least + 1)).astype(jnp.int32)


def initial(
  uniform: Float[Array, ""], width: int, segment: int, *, policy: Policy
) -> Int[Array, ""]:
  """Returns the branches of the prompt itself.

  initial_max = initial is the paper's Fixed Init Divergence, 2..8 its More Init Divergence (section
  4); both are bounded by what the budget can ever return. (The published bounds leave out one of
  its four cases, so that a prompt may exceed its width.)
  """
  most = width
  if policy.response_tokens:
    most = min(most, max(policy.response_tokens // segment, 1))
  if policy.step_paths:
    return jnp.int32(min(policy.step_paths, most))
  return jnp.minimum(between(uniform, policy.initial, policy.initial_max), most)


def reachable(
  finished: Int[Array, ""],
  used: Int[Array, ""],
  active: Int[Array, ""],
  growing: Int[Array, ""],
  width: int,
  segment: int,
  *,
  policy: Policy,
) -> Int[Array, ""]:
  """Returns U, the trajectories that a prompt can end with: its width, or what its tokens allow.

  The tokens that are left pay for trajectories as long as those known: while paths are active their
  mean length and a segment, else the mean of the finished ones (TreePO's token budget; a prefix
  counts once for each trajectory).

  finished: W. used: response tokens of the finished. active, growing: paths that go on and their
  tokens, 0 where none.
  """
  if not policy.response_tokens:
    return jnp.int32(width)
  left = jnp.maximum(policy.response_tokens - used, 0)
  more = left * active // jnp.maximum(growing + segment * active, 1)
  again = jnp.where(used > 0, left * finished // jnp.maximum(used, 1), width)
  total = finished + jnp.where(active > 0, more, again)
  return jnp.clip(total, min(policy.min_width, width), width)


def budget(
  room: Int[Array, ""],
  wave: Int[Array, ""],
  active: Int[Array, ""],
  uniform: Float[Array, ""],
  *,
  policy: Policy,
) -> Int[Array, ""]:
  """Returns how many paths a prompt continues with: max(min(U - W, b * wave), n).

  The budget b * wave counts the paths that ended in this wave too, so theirs goes to the active
  ones (budget transfer, section 2.3); the room U - W bounds it and every active path goes on.

  room: U - W. wave: paths decoded in this wave. active: n of them.
  """
  if policy.step_paths:
    wanted = jnp.int32(policy.step_paths)
  else:
    wanted = between(uniform, policy.branching, policy.branching_max) * wave
  return jnp.maximum(jnp.minimum(jnp.maximum(room, 0), wanted), active)


def scores(tree: Tree, *, policy: Policy) -> Float[Array, "n"]:
  """Returns what paths are weighed by: sum or mean of the log-probs, or the segment's mean."""
  own = tree.log_probs.sum(-1)
  if policy.allocation == "segment":
    return own / jnp.maximum(tree.length, 1)
  total = tree_lib.along(tree, own)
  if policy.allocation == "sum":
    return total
  return total / jnp.maximum(tree_lib.along(tree, tree.length), 1)


def even(active: Bool[Array, "w"], total: Int[Array, ""], remainder: str) -> Int[Array, "w"]:
  """Returns the branches of each path: total shared evenly over the active ones, which come first.

  remainder: "spread" gives what is left over to the first paths, one each; "last" gives all of it
  to the last, as published.
  """
  count = active.sum()
  share, rest = jnp.divmod(total, jnp.maximum(count, 1))
  rank = jnp.arange(active.shape[0])
  if remainder == "last":
    extra = jnp.where(rank == count - 1, rest, 0)
  else:
    extra = rank < rest
  return jnp.where(active, share + extra, 0).astype(jnp.int32)


def weighted(
  active: Bool[Array, "w"],
  total: Int[Array, ""],
  score: Float[Array, "w"],
  heat: Float[Array, ""],
  favour: str,
) -> Int[Array, "w"]:
  """Returns the branches of each path: one, and of the rest what softmax(score / heat) gives it.

  Shares are made whole by largest remainder, the earlier of equals first. favour: "low" scores get
  more, as the paper's section 4.4, or "high".
  """
  sign = 1.0 if favour == "high" else -1.0
  share = jax.nn.softmax(jnp.where(active, sign * score / heat, -jnp.inf))
  rest = total - active.sum()
  quota = jnp.where(active, share * rest, 0)
  whole = jnp.floor(quota).astype(jnp.int32)
  order = jnp.argsort(jnp.where(active, whole - quota, jnp.inf), stable=True)
  rank = jnp.argsort(order, stable=True)
  extra = rank < rest - whole.sum()
  return jnp.where(active, 1 + whole + extra, 0).astype(jnp.int32)


def allocate(
  tree: Tree,
  rows: Int[Array, "w"],
  total: Int[Array, ""],
  heat: Float[Array, ""],
  *,
  policy: Policy,
) -> Int[Array, "w"]:
  """Returns the parent of each new node: every active row as often as its share; then NO_PARENT.

  rows: active rows in order, N where there is none.
  """
  width, active = rows.shape[0], rows < tree.parent.shape[0]
  if policy.allocation == "even":
    counts = even(active, total, policy.remainder)
  else:
    score = scores(tree, policy=policy).at[rows].get(mode="fill", fill_value=0.0)
    counts = weighted(active, total, score, heat, policy.favour)
  new = jnp.repeat(rows, counts, total_repeat_length=width)
  return jnp.where(jnp.arange(width) < counts.sum(), new, NO_PARENT).astype(jnp.int32)


def heat(step: int, config) -> float:
  """Returns the temperature of allocation at a step: half a sine from one bound to the other.

  The paper's 5.0 to 1.0 is "descending" (section 4.4).
  """
  r = config.rollout
  if r.allocation_schedule == "constant":
    return r.allocation_temperature
  turn = math.pi * min(step / max(config.train.steps, 1), 1.0) - math.pi / 2
  sign = 1 if r.allocation_schedule == "ascending" else -1
  half = (r.allocation_high - r.allocation_low) / 2
  return r.allocation_low + half * (1 + sign * math.sin(turn))
