"""Rewards of trajectories to one advantage a trajectory: TreePO's, and GRPO's to compare with.

Axes: B trees, N rows of a tree, W trajectories of a tree.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from treepo_jax import struct
from treepo_jax.rollout import tree as tree_lib

# (reward[w], member[w, n], parent[n]) of one tree -> advantage[w]. `member` is 1 where row n is on
# the path of trajectory w, the prompt's row 0 and the leaf included; a trajectory that is not there
# has a row of zeros.
AdvantageFn = Callable[[Float[Array, "w"], Float[Array, "w n"], Int[Array, "n"]], Float[Array, "w"]]


@struct.dataclass
class Advantage:
  """Advantages at the rows of returned trajectories, 0 at every other row.

  Attributes:
    raw: as the estimator gives it, in units of reward.
    white: what the loss uses: whitened over the batch's response tokens, or for GRPO the raw one.
  """

  raw: Float[Array, "b n"]
  white: Float[Array, "b n"]


@functools.partial(jax.jit, static_argnames="config")
def estimate(tree: tree_lib.Tree, reward: Float[Array, "b n"], *, config) -> Advantage:
  """Returns the advantage of every returned trajectory, by config.advantage.

  Args:
    tree: a batch of grown trees; those without a returned trajectory take no part.
    reward: of each trajectory at the row of its leaf; other rows are not read.
    config: frozen; hashable, for it is static.
  """
  settings = config.advantage
  if settings.estimator == "grpo":
    raw, length = _trajectories(tree, reward, group)
    white = raw  # normalised prompt by prompt already
  else:
    advantage_fn = functools.partial(
      subgroups,
      aggregate=settings.aggregate,
      reject=settings.reject,
      repeat=settings.repeat,
    )
    raw, length = _trajectories(tree, reward, advantage_fn)
    white = whiten(raw, length)
  return Advantage(raw=_scatter(tree, raw), white=_scatter(tree, white))


def subgroups(
  reward: Float[Array, "w"],
  member: Float[Array, "w n"],
  parent: Int[Array, "n"],
  *,
  aggregate: str,
  reject: bool,
  repeat: bool,
) -> Float[Array, "w"]:
  """Compares each trajectory with those that share its first d segments, for every d (one tree).

      A_i = sum_d c_d (R_i - mean(R over G_d(i))) / sum_d c_d

  where G_d(i) are the trajectories through the ancestor of i at depth d (TreePO, Eq 5, before its
  normalisation; Eq 6 and 7 by the switches). The prompt's own group (d = 0) is always counted, with
  mean 0 if the trajectory is its only one; a sub-group of one is not.

  Args:
    reward: of each trajectory.
    member: see AdvantageFn.
    parent: row of the parent, NO_PARENT for row 0.
    aggregate: "average": c_d = 1 (Eq 5); "group_size": c_d = |G_d| (Eq 6).
    reject: leave out sub-groups below the prompt whose rewards are all equal (Eq 7).
    repeat: count a sub-group again at each depth that does not split it, as the published code
      does; False counts each distinct set of trajectories once.
  """
  size = member.sum(0)
  total = jnp.matmul(reward, member, precision=jax.lax.Precision.HIGHEST)
  mean = jnp.where(size > 1, total / jnp.maximum(size, 1), 0)
  counted = size > 1
  if reject:
    highest = jnp.where(member > 0, reward[:, None], -jnp.inf).max(0)
    lowest = jnp.where(member > 0, reward[:, None], jnp.inf).min(0)
    counted &= highest != lowest
  if not repeat:
    counted &= size != size[jnp.maximum(parent, 0)]
  counted |= parent == tree_lib.NO_PARENT  # rows not taken have no members
  weight = member * jnp.where(counted, size if aggregate == "group_size" else 1.0, 0)[None]
  terms = weight * (reward[:, None] - mean[None])
  return terms.sum(1) / jnp.maximum(weight.sum(1), 1)


def group(
  reward: Float[Array, "w"], member: Float[Array, "w n"], parent: Int[Array, "n"]
) -> Float[Array, "w"]:
  """Returns (R_i - mean(R)) / (std(R) + 1e-6) over the prompt's trajectories (one tree).

  GRPO (TreePO, Eq 2) with the unbiased standard deviation; a lone trajectory keeps its reward.
  """
  del parent
  here = member[:, 0]
  count = here.sum()
  mean = jnp.where(count > 1, (reward * here).sum() / jnp.maximum(count, 1), 0)
  variance = (here * (reward - mean) ** 2).sum() / jnp.maximum(count - 1, 1)
  std = jnp.where(count > 1, jnp.sqrt(variance), 1)
  return here * (reward - mean) / (std + 1e-6)


def whiten(value: Float[Array, "*b"], weight: Float[Array, "*b"]) -> Float[Array, "*b"]:
  """Returns (x - mean) / sqrt(var + 1e-8) over all entries, each standing `weight` times.

  REINFORCE++'s global normalisation: with a trajectory's length as its weight, mean and unbiased
  variance are those of the batch's response tokens. 0 where the weight is 0.
  """
  total = weight.sum()
  mean = (weight * value).sum() / jnp.maximum(total, 1)
  variance = (weight * (value - mean) ** 2).sum() / jnp.maximum(total - 1, 1)
  return jnp.where(weight > 0, (value - mean) * jax.lax.rsqrt(variance + 1e-8), 0)


@functools.partial(jax.vmap, in_axes=(0, 0, None))
def _trajectories(
  tree: tree_lib.Tree, reward: Float[Array, "n"], advantage_fn: AdvantageFn
) -> tuple[Float[Array, "w"], Float[Array, "w"]]:
  """Returns each trajectory's advantage and its length in tokens, 0 where there is none."""
  here = tree.leaves != tree_lib.NO_ROW
  row = jnp.where(here, tree.leaves, 0)
  on_path = tree_lib.ancestors(tree.parent)[row] & here[:, None]
  length = jnp.where(on_path, tree.length[None], 0).sum(1)
  member = on_path.astype(jnp.float32)
  advantage = advantage_fn(jnp.where(here, reward[row], 0), member, tree.parent)
  return advantage, length.astype(jnp.float32)


@jax.vmap
def _scatter(tree: tree_lib.Tree, value: Float[Array, "w"]) -> Float[Array, "n"]:
  """Writes a value a trajectory to the row of its leaf."""
  n = tree.parent.shape[0]
  row = jnp.where(tree.leaves == tree_lib.NO_ROW, n, tree.leaves)  # row n is dropped
  return jnp.zeros(n, value.dtype).at[row].set(value, mode="drop")
