"""Which open paths are given up for their low value; one tree, lifted with vmap by the caller.

What a pruned path would have cost goes to those that stay, and it is not trained on. (The paper's
abstract promises pruning of low-value paths; the published code only stops loops, and trains on
them.)

Axes: N nodes, W width, D depth.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treepo_jax.rollout import tree as tree_lib
from treepo_jax.rollout.tree import NO_ROW, Tree


@dataclasses.dataclass(frozen=True)
class Policy:
  """Keys of config.rollout that say what is pruned."""

  value: str
  share: float
  keep: int


def below(
  tree: Tree, reward: Float[Array, "w"], most: int
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
  """Returns of every node the number, sum and sum of squares of the rewards of leaves below it.

  reward: of each leaf. most: segments of a trajectory at most.
  """
  n = tree.parent.shape[0]
  there = (tree.leaves != NO_ROW).astype(jnp.float32)
  values = jnp.stack([there, there * reward, there * reward**2], -1)

  def climb(row, _):
    up = jnp.where(row > 0, tree.parent[row], n)  # row n is dropped
    return jnp.where(row == n, n, up), row

  first = jnp.where(there > 0, tree.leaves, n)
  rows = jax.lax.scan(climb, first, length=most + 1)[1]
  total = jnp.zeros((n, 3)).at[rows].add(values, mode="drop")
  return total[:, 0], total[:, 1], total[:, 2]


def nearby(
  tree: Tree, rows: Int[Array, "w"], reward: Float[Array, "w"], most: int
) -> Float[Array, "w"]:
  """Returns the mean reward below the nearest ancestor of each row that has any; 0 without one."""
  count, total, _ = below(tree, reward, most)
  up = lambda _, row: jnp.where(count[row] > 0, row, jnp.maximum(tree.parent[row], 0))
  row = jax.lax.fori_loop(0, most, up, jnp.maximum(tree.parent[rows], 0))
  return total[row] / jnp.maximum(count[row], 1)


def pruned(
  tree: Tree,
  rows: Int[Array, "w"],
  entropy: Float[Array, "n"],
  reward: Float[Array, "w"],
  most: int,
  *,
  policy: Policy,
) -> Bool[Array, "w"]:
  """Returns which of the active rows are given up: those of the lowest value, later ones first.

  At most the share policy.share of them, and policy.keep stay.

  rows: active rows in order, N where there is none. entropy: mean over each node's segment.
  reward: of each leaf; read where policy.value is "reward".
  """
  n, width = tree.parent.shape[0], rows.shape[0]
  if policy.value == "none":
    return jnp.zeros(width, bool)
  active = rows < n
  at = jnp.minimum(rows, n - 1)
  if policy.value == "log_prob":
    length = tree_lib.along(tree, tree.length)
    value = (tree_lib.along(tree, tree.log_probs.sum(-1)) / jnp.maximum(length, 1))[at]
  elif policy.value == "entropy":
    value = -entropy[at]
  else:
    value = nearby(tree, at, reward, most)
  drop = [min(math.floor(k * policy.share), k - min(k, policy.keep)) for k in range(width + 1)]
  count = jnp.array(drop)[active.sum()]
  backwards = jnp.argsort(jnp.where(active, value, jnp.inf)[::-1], stable=True)
  return (jnp.argsort(backwards, stable=True) < count)[::-1]
