"""Rewards of trees to the advantages that the loss uses: an estimator, then its normalisation.

Axes: B trees, W trajectories of a tree, N rows of a tree.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from treepo_jax import struct
from treepo_jax.learn import estimators
from treepo_jax.rollout import tree as tree_lib

# Estimator by name, and the normalisation it was published with.
ESTIMATORS = {
  "treepo": (estimators.treepo, "token"),
  "segment": (estimators.segment, "token"),
  "spo": (estimators.spo, "none"),
  "treerl": (estimators.treerl, "none"),
  "treerpo": (estimators.treerpo, "none"),
  "tree_grpo": (estimators.tree_grpo, "none"),
  "vineppo": (estimators.vineppo, "token"),
  "grpo": (estimators.centred, "group"),
  "dr_grpo": (estimators.centred, "none"),
  "rloo": (estimators.rloo, "none"),
  "reinforce": (estimators.reward, "none"),
  "reinforce_pp": (estimators.reward, "token"),
  "reinforce_pp_baseline": (estimators.centred, "token"),
  "remax": (estimators.remax, "none"),
}
# Those that give the segments of a trajectory advantages of their own.
BY_SEGMENT = ("segment", "spo", "treerl", "treerpo", "vineppo")
SWITCHES = {"treepo": ("aggregate", "reject", "repeat", "root"), "segment": ("eta",)}


@struct.dataclass
class Advantage:
  """Advantages of each trajectory at each row on its path; 0 at every other row.

  Estimators that give a trajectory one advantage repeat it along the path.

  Attributes:
    raw: as the estimator gives it, in units of reward.
    white: normalised: what the loss uses.
    weight: of the trajectory in every mean, on its path; 0 off the path.
  """

  raw: Float[Any, "b w n"]
  white: Float[Any, "b w n"]
  weight: Float[Any, "b w n"]


@functools.partial(jax.jit, static_argnames="config")
def estimate(
  tree: tree_lib.Tree,
  reward: Float[Array, "b n"],
  baseline: Float[Array, "b"] | None = None,
  weight: Float[Array, "b w"] | None = None,
  *,
  config,
) -> Advantage:
  """Returns the advantages of every returned trajectory, by config.advantage.

  Args:
    tree: a batch of grown trees; those without a returned trajectory take no part.
    reward: of each trajectory at the row of its leaf; other rows are not read.
    baseline: reward of each prompt's greedy answer; needed by "remax" alone.
    weight: of each trajectory in every mean, where siblings are not independent draws; None: 1.
    config: frozen; hashable, for it is static.

  Raises:
    ValueError: for "remax" without a baseline.
  """
  settings = config.advantage
  estimator, normalise = ESTIMATORS[settings.estimator]
  if settings.estimator == "remax" and baseline is None:
    raise ValueError("advantage.estimator = 'remax' needs the rewards of greedy answers")
  b, w = tree.leaves.shape
  families = _families(
    tree,
    reward,
    jnp.zeros(b) if baseline is None else baseline,
    jnp.ones((b, w)) if weight is None else weight,
  )
  switches = SWITCHES[settings.estimator] if settings.estimator in SWITCHES else ()
  advantage_fn: estimators.AdvantageFn = functools.partial(
    estimator, **{name: settings[name] for name in switches}
  )
  on_path = families.member * (tree.parent != tree_lib.NO_PARENT)[:, None]
  raw = jax.vmap(advantage_fn)(families) * on_path
  weight = families.weight[..., None] * on_path
  if settings.normalise != "published":
    normalise = settings.normalise
  tokens = weight * tree.length[:, None]  # how often each entry stands among the batch's tokens
  if normalise == "group":
    white = raw / (jax.vmap(estimators.deviation)(families) + estimators.EPS)[:, None, None]
  elif normalise == "token":
    white = whiten(raw, tokens, families.weight[..., None])
  elif normalise == "leaf":
    length = (on_path * tree.length[:, None]).sum(-1, keepdims=True)
    white = whiten(raw, tokens / jnp.maximum(length, 1), None)
  else:
    white = raw
  return Advantage(raw=raw, white=white * (on_path > 0), weight=weight)


def statistics(tree: tree_lib.Tree, advantage: Advantage, *, config) -> dict[str, float]:
  """Returns mean and standard deviation of raw advantages over tokens, in all and by depth.

  Every token stands once for each trajectory through it. On the host, in numpy.

  Returns:
    advantage/mean, advantage/std, advantage/zero (share of tokens whose advantage is 0), and of
    the d-th segments advantage/mean_depth_<d>, advantage/std_depth_<d>.
  """
  weight = advantage.weight * np.asarray(tree.length)[:, None]
  depth, raw = np.asarray(tree.depth)[:, None], np.asarray(advantage.raw)
  masks = {f"_depth_{d}": depth == d for d in range(1, config.rollout.depth + 1)}

  def average(value, mask):
    here = weight * mask
    return float((here * value).sum() / max(here.sum(), 1e-9))  # a depth may have no tokens

  figures = {"advantage/zero": average(raw == 0, depth > 0)}
  for name, mask in {"": depth > 0, **masks}.items():
    mean = average(raw, mask)
    variance = average((raw - mean) ** 2, mask)
    figures |= {f"advantage/mean{name}": mean, f"advantage/std{name}": variance**0.5}
  return figures


def whiten(
  value: Float[Array, "*b"], weight: Float[Array, "*b"], each: Float[Array, "*#b"] | None
) -> Float[Array, "*b"]:
  """Returns (x - mean) / sqrt(var + 1e-8) over all entries, each standing `weight` times.

  REINFORCE++'s global normalisation: with a trajectory's tokens as its weight, mean and variance
  are those of the batch's response tokens. 0 where the weight is 0.

  Args:
    value: x.
    weight: of each entry.
    each: weight of one of the equal draws that an entry stands for (1, where a weight is a number
      of tokens): makes the variance unbiased. None: the population's.
  """
  total = weight.sum()
  safe = jnp.where(total > 0, total, 1)
  mean = (weight * value).sum() / safe
  lost = 0.0 if each is None else (weight * each).sum() / safe
  spread = (weight * (value - mean) ** 2).sum()
  variance = spread / jnp.where(total > lost, total - lost, 1)
  return jnp.where(weight > 0, (value - mean) * jax.lax.rsqrt(variance + 1e-8), 0)


@jax.vmap
def _families(
  tree: tree_lib.Tree,
  reward: Float[Array, "n"],
  baseline: Float[Array, ""],
  weight: Float[Array, "w"],
) -> estimators.Family:
  """Returns the tree as estimators see it."""
  here = tree.leaves != tree_lib.NO_ROW
  leaf = jnp.where(here, tree.leaves, 0)
  on_path = tree_lib.ancestors(tree.parent)[leaf] & here[:, None]
  return estimators.Family(
    reward=jnp.where(here, reward[leaf], 0),
    weight=jnp.where(here, weight, 0),
    member=on_path.astype(jnp.float32),
    parent=tree.parent,
    leaf=leaf,
    baseline=baseline,
  )
