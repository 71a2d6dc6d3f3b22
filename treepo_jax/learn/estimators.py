"""The published credits of trees and of groups: rewards of one prompt's trajectories to advantages.

Each estimator is a pure function of one tree, lifted over trees by advantages.estimate. What it
returns broadcasts against [W, N]: one advantage a trajectory, one a node, or one for each node of
each trajectory. Every mean carries the trajectories' weights, and none depends on the order of
trajectories or rows.

Axes: W trajectories of a tree, N rows of a tree. G(n) are the trajectories through node n, |n|
their summed weight, R_i the reward of trajectory i, V(n) the mean of R over G(n).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treepo_jax import struct
from treepo_jax.rollout import tree as tree_lib

EPS = 1e-6  # added to standard deviations, as GRPO does


@struct.dataclass
class Family:
  """One tree as credit sees it.

  Attributes:
    reward: of each trajectory.
    weight: of each trajectory in every mean, 0 where there is none; 1 for independent samples.
    member: 1 where a row is on the trajectory's path, the prompt's row 0 and the leaf included.
    parent: row of the parent, NO_PARENT for row 0 and for rows not taken.
    leaf: row at which the trajectory ends, 0 where there is none.
    baseline: reward of the prompt's greedy answer; only ReMax reads it.
  """

  reward: Float[Array, "w"]
  weight: Float[Array, "w"]
  member: Float[Array, "w n"]
  parent: Int[Array, "n"]
  leaf: Int[Array, "w"]
  baseline: Float[Array, ""]


Advantages = Float[Array, "#w #n"]
AdvantageFn = Callable[[Family], Advantages]


def treepo(
  family: Family, *, aggregate: str, reject: bool, repeat: bool, root: bool
) -> Float[Array, "w 1"]:
  """TreePO: compares a trajectory with those that share its first d segments, for every d.

      A_i = sum_d c_d (R_i - mean(R over G_d(i))) / sum_d c_d

  where G_d(i) are the trajectories through the ancestor of i at depth d (arXiv 2508.17445, Eq 5
  before its normalisation; Eq 6 and 7 by the switches). The prompt's own group (d = 0) is always
  counted, with mean 0 if the trajectory is its only one; a sub-group of one is not.

  Args:
    aggregate: "average": c_d = 1 (Eq 5); "group_size": c_d = |G_d| (Eq 6).
    reject: leave out sub-groups below the prompt whose rewards are all equal (Eq 7).
    repeat: count a sub-group again at each depth that does not split it, as the published code
      does; False counts each distinct set of trajectories once.
    root: False leaves the prompt's own group out (the paper's section 4.2); a trajectory that
      shares no segment then has advantage 0.
  """
  count, mass, mean = _count(family), _mass(family), _value(family)
  counted = count > 1
  if reject:
    highest = jnp.where(family.member > 0, family.reward[:, None], -jnp.inf).max(0)
    lowest = jnp.where(family.member > 0, family.reward[:, None], jnp.inf).min(0)
    counted &= highest != lowest
  if not repeat:
    counted &= count != count[jnp.maximum(family.parent, 0)]
  # Rows not taken have no parent either, but no members.
  top = family.parent == tree_lib.NO_PARENT
  counted = counted | top if root else counted & ~top
  mean = jnp.where(count > 1, mean, 0)
  share = jnp.where(counted, mass if aggregate == "group_size" else 1.0, 0)
  weight = family.member * share[None]
  terms = weight * (family.reward[:, None] - mean[None])
  total = weight.sum(1)
  return (terms.sum(1) / jnp.where(total > 0, total, 1))[:, None]


def centred(family: Family) -> Float[Array, "w 1"]:
  """GRPO, Dr. GRPO and REINFORCE++-baseline: A_i = R_i - mean(R) over the prompt.

  They differ in what follows: division by the prompt's standard deviation (arXiv 2402.03300,
  TreePO's Eq 2), nothing (arXiv 2503.20783), whitening over the batch (arXiv 2501.03262). A lone
  trajectory keeps its reward.
  """
  here = family.weight > 0
  mean = jnp.where(here.sum() > 1, _mean(family.reward[:, None], family.weight[:, None])[0], 0)
  return jnp.where(here, family.reward - mean, 0)[:, None]


def reward(family: Family) -> Float[Array, "w 1"]:
  """REINFORCE: A_i = R_i; REINFORCE++ (arXiv 2501.03262) whitens it over the batch."""
  return jnp.where(family.weight > 0, family.reward, 0)[:, None]


def rloo(family: Family) -> Float[Array, "w 1"]:
  """RLOO (arXiv 2402.14740): A_i = R_i - mean of the prompt's other trajectories.

  A lone trajectory keeps its reward.
  """
  weight = family.weight
  others = weight.sum() - weight
  mean = ((weight * family.reward).sum() - weight * family.reward) / jnp.where(
    others > 0, others, 1
  )
  return jnp.where(weight > 0, family.reward - jnp.where(others > 0, mean, 0), 0)[:, None]


def remax(family: Family) -> Float[Array, "w 1"]:
  """ReMax (arXiv 2310.10505): A_i = R_i - reward of the prompt's greedy answer."""
  return jnp.where(family.weight > 0, family.reward - family.baseline, 0)[:, None]


def tree_grpo(family: Family) -> Float[Array, "w 1"]:
  """Tree-GRPO (arXiv 2509.21240): A_i = GRPO within the tree + GRPO over the prompt's trees.

  Each branch of the prompt begins a tree of its own. A group whose rewards are all equal, or that
  has one trajectory only, adds nothing.
  """
  first = family.member * (family.parent == 0)[None]  # the branch of the prompt a trajectory is on
  alike = first @ first.T  # 1 where two trajectories are of one tree
  here = family.weight > 0
  return (_relative(family, alike) + _relative(family, here[:, None] & here[None]))[:, None]


def segment(family: Family, *, eta: float) -> Float[Array, "w n"]:
  """The published per-segment estimator (tree_segment_reinforce_plus_plus_baseline).

      M_i = sum_p |p| (R_i - V(p)) / sum_p |p|     over the nodes p of the path, root and leaf too
      U(leaf) = M, U(node) = plain mean of U over its children, U(root) = 0
      A(node) = U(node) - U(parent)

  Along a path they sum to M_i. With eta > 0 the parent's part is eta^k U(parent), k = 1 for the
  last segment of the trajectory, 2 for the one before it and so on.
  """
  mass = family.member * _mass(family)[None]
  terms = mass * (family.reward[:, None] - _value(family)[None])
  total = mass.sum(1)
  modified = terms.sum(1) / jnp.where(total > 0, total, 1)
  value = _backed_up(family, modified).at[0].set(0.0)
  before = value[jnp.maximum(family.parent, 0)]
  if not eta:
    return (value - before)[None]
  depth = jnp.cumsum(family.member, 1) - family.member  # ancestors of a node on the path
  left = family.member.sum(1, keepdims=True) - depth
  return value[None] - eta**left * before[None]


def spo(family: Family) -> Float[Array, "1 n"]:
  """The published SPO variant: sibling-standardised values, differenced along the path.

  V(leaf) = R, V(node) = plain mean over its children; a node with siblings becomes
  (V - mean) / std over them (population, 0 where the std is 0), an only child stays; V(root) = 0;
  A(node) = V(node) - V(parent).
  """
  value = _backed_up(family, family.reward)
  siblings, mean, std = _siblings(family, value)
  level = jnp.where(std > 0, (value - mean) / jnp.where(std > 0, std, 1), 0)
  value = jnp.where(siblings > 1, level, value).at[0].set(0.0)
  return (value - value[jnp.maximum(family.parent, 0)])[None]


def treerl(family: Family) -> Float[Array, "1 n"]:
  """TreeRL (arXiv 2506.11902, Eq 2 to 4): global plus local advantage, over sqrt of the leaves.

  A(n) = ((V(n) - V(root)) + (V(n) - V(parent))) / sqrt(|n|)
  """
  value, mass = _value(family), _mass(family)
  both = 2 * value - value[0] - value[jnp.maximum(family.parent, 0)]
  return (both * jax.lax.rsqrt(jnp.maximum(mass, EPS)))[None]


def treerpo(family: Family) -> Float[Array, "1 n"]:
  """TreeRPO (arXiv 2506.05183): GRPO among the children of each node.

  V(leaf) = R, V(node) = plain mean over its children; A(n) = (V(n) - mean) / (std + 1e-6) over the
  siblings of n, itself included (population std); an only child has 0.
  """
  value = _backed_up(family, family.reward)
  siblings, mean, std = _siblings(family, value)
  return jnp.where((siblings > 1) & (std > 0), (value - mean) / (std + EPS), 0)[None]


def vineppo(family: Family) -> Float[Array, "1 n"]:
  """Segment Monte Carlo, as VinePPO (arXiv 2410.01679, Eq 6): A(n) = V(n) - V(parent).

  V of an inner node is the mean reward of the trajectories that were sampled through it; along a
  path the advantages sum to R_i - V(root).
  """
  value = _value(family)
  return (value - value[jnp.maximum(family.parent, 0)])[None]


def deviation(family: Family) -> Float[Array, ""]:
  """Returns the standard deviation of the prompt's rewards, 1 for a lone one; unbiased."""
  weight = family.weight
  total, squares = weight.sum(), (weight**2).sum()
  mean = _mean(family.reward[:, None], weight[:, None])[0]
  spread = (weight * (family.reward - mean) ** 2).sum()
  free = total - squares / jnp.where(total > 0, total, 1)  # n - 1 for weights of one
  several = (weight > 0).sum() > 1
  return jnp.where(several, jnp.sqrt(spread / jnp.where(several, free, 1)), 1)


def _count(family: Family) -> Float[Array, "n"]:
  return (family.member * (family.weight > 0)[:, None]).sum(0)


def _mass(family: Family) -> Float[Array, "n"]:
  return (family.member * family.weight[:, None]).sum(0)


def _value(family: Family) -> Float[Array, "n"]:
  """Returns V(n), 0 where no trajectory passes."""
  return _mean(family.reward[:, None], family.member * family.weight[:, None])


def _mean(value: Float[Array, "w #n"], weight: Float[Array, "w n"]) -> Float[Array, "n"]:
  """Returns the weighted means of columns, 0 where nothing weighs.

  Taken from the largest value down: the mean of equal values is that value to the last bit, and
  what is divided by their standard deviation is 0, not a rounding error.
  """
  top = jnp.where(weight > 0, value, -jnp.inf).max(0)
  top = jnp.where(jnp.isfinite(top), top, 0)
  total = weight.sum(0)
  return top + (weight * (value - top[None])).sum(0) / jnp.where(total > 0, total, 1)


def _relative(family: Family, alike: Float[Array, "w w"] | Bool[Array, "w w"]):
  """Returns (R - mean) / (std + 1e-6) over the trajectories alike to each; 0 for a lone one."""
  group = alike * family.weight[None]
  size = jnp.maximum((alike > 0).sum(1), 1)
  total = group.sum(1)
  safe = jnp.where(total > 0, total, 1)
  mean = _mean(family.reward[:, None], group.T)
  spread = (group * (family.reward[None] - mean[:, None]) ** 2).sum(1)
  free = total - (group * family.weight[None]).sum(1) / safe
  std = jnp.sqrt(spread / jnp.where(size > 1, free, 1))
  return jnp.where(size > 1, (family.reward - mean) / (std + EPS), 0)


def _taken(family: Family) -> Bool[Array, "n"]:
  """Returns which rows below the prompt a trajectory passes."""
  return (_count(family) > 0) & (family.parent != tree_lib.NO_PARENT)


def _backed_up(family: Family, value: Float[Array, "w"]) -> Float[Array, "n"]:
  """Returns a value a node: at leaves that of their trajectories, else the mean over children."""
  n = family.parent.shape[0]
  ends = (family.leaf[:, None] == jnp.arange(n)[None]) * family.weight[:, None]
  at = _mean(value[:, None], ends)

  def up(_, nodes):
    children, mean = _over_children(family, nodes)
    return jnp.where(children > 0, mean, at)

  levels = jnp.where(family.weight > 0, family.member.sum(1), 0).max()
  return jax.lax.fori_loop(0, levels.astype(jnp.int32), up, at)


def _siblings(family: Family, value: Float[Array, "n"]):
  """Returns each node's number of siblings, itself included, their mean and population std."""
  parent = jnp.maximum(family.parent, 0)
  children, mean = _over_children(family, value)
  count, mean = jnp.where(_taken(family), children[parent], 0), mean[parent]
  _, variance = _over_children(family, (value - mean) ** 2)
  std = jnp.sqrt(variance[parent])
  # Equal values that were summed in another order differ in their last bits.
  return count, mean, jnp.where(std > EPS * jnp.maximum(jnp.abs(mean), 1), std, 0)


def _over_children(
  family: Family, value: Float[Array, "n"]
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
  """Returns each node's number of children and the plain mean of their values (see `_mean`)."""
  n = family.parent.shape[0]
  taken, parent = _taken(family), jnp.maximum(family.parent, 0)
  count = jnp.zeros(n).at[parent].add(taken)
  top = jnp.full(n, -jnp.inf).at[parent].max(jnp.where(taken, value, -jnp.inf))
  top = jnp.where(count > 0, top, 0)
  total = jnp.zeros(n).at[parent].add(jnp.where(taken, value - top[parent], 0))
  return count, top + total / jnp.maximum(count, 1)
