"""What the nodes of a tree carry into the loss: sums over the trajectories through them.

A loss by tokens is linear in the advantage for each sign (losses.py), so that a token shared by
many trajectories needs no more than these sums.

Axes: B trees, N rows of a tree, W trajectories of a tree, M copies of nodes.
"""

import numpy as np

from treepo_jax.learn.advantages import Advantage
from treepo_jax.rollout import tree as tree_lib

# Columns: sums over trajectories of positive and negative advantages, of weights, of the weights of
# those with a positive and a negative advantage; their number; what those that end here add to the
# loss's denominator.
GAIN, COST, COUNT, POSITIVE, NEGATIVE, TIMES, DIVISOR = range(7)


def nodes(tree: tree_lib.Tree, advantage: Advantage, config) -> np.ndarray:
  """Returns what each node carries into the loss, [B, N, 7]: sums over the trajectories through it.

  A trajectory of T tokens and weight w counts w a token and adds to the denominator w T
  (learn.aggregate = "token": the mean over tokens), w / T a token and w ("sequence": over
  trajectories, of their token means), or w a token and w L ("fixed": L the longest answer there
  can be, Dr. GRPO). A token of several trajectories stands for each of them with its own advantage
  (learn.shared = "leaf", as the paper trains), for their mean ("once": all that is summed is
  divided by their number), or for all with the sum of their advantages ("sum").
  """
  credit = np.zeros((*tree.parent.shape, DIVISOR + 1))
  for w in range(tree.leaves.shape[1]):
    credit += _trajectories(tree, advantage, w, config)
  return _share(credit, config)


def copies(
  tree: tree_lib.Tree, advantage: Advantage, total: np.ndarray, place: tuple, config
) -> np.ndarray:
  """Returns what a trajectory's copy of a node carries, [M, 7]; all copies together, the node's.

  total: of `nodes`. place: tree, trajectory and node of each copy, [M].
  """
  owner, slot, node = place
  own = np.zeros((owner.size, DIVISOR + 1))
  for w in range(tree.leaves.shape[1]):
    here = slot == w
    own[here] = _trajectories(tree, advantage, w, config)[owner[here], node[here]]
  if config.learn.shared != "leaf":
    whole = total[owner, node]
    own[:, :TIMES] = whole[:, :TIMES] / np.maximum(whole[:, TIMES:DIVISOR], 1)
  return own


def _trajectories(tree: tree_lib.Tree, advantage: Advantage, w: int, config) -> np.ndarray:
  """Returns what trajectory w of each tree brings to the nodes on its path, [B, N, 7]."""
  every, leaf = np.arange(tree.leaves.shape[0]), tree.leaves[:, w]
  here = leaf != tree_lib.NO_ROW
  on_path = here[:, None] & (advantage.weight[:, w] > 0)
  tokens = (on_path * tree.length).sum(1)
  weight = advantage.weight[:, w].max(1)
  part = weight / np.maximum(tokens, 1) if config.learn.aggregate == "sequence" else weight
  part, value = on_path * part[:, None], advantage.white[:, w]
  own = part * value
  credit = np.zeros((*on_path.shape, DIVISOR + 1))
  credit[..., GAIN], credit[..., COST] = np.maximum(own, 0), np.minimum(own, 0)
  credit[..., COUNT], credit[..., TIMES] = part, on_path
  credit[..., POSITIVE], credit[..., NEGATIVE] = part * (value > 0), part * (value < 0)
  r = config.rollout
  longest = r.response_length or r.depth * r.segment
  length = {"token": tokens, "sequence": 1, "fixed": longest}[config.learn.aggregate]
  credit[every[here], leaf[here], DIVISOR] = (weight * length)[here]
  return credit


def _share(credit: np.ndarray, config) -> np.ndarray:
  """Applies learn.shared to the sums over the trajectories through a token."""
  if config.learn.shared == "leaf":
    return credit
  credit, times = credit.copy(), np.maximum(credit[..., TIMES], 1)
  if config.learn.shared == "once":
    credit[..., :TIMES] /= times[..., None]
    return credit
  total = credit[..., GAIN] + credit[..., COST]
  credit[..., GAIN], credit[..., COST] = np.maximum(total, 0), np.minimum(total, 0)
  credit[..., POSITIVE] = credit[..., COUNT] * (total > 0)
  credit[..., NEGATIVE] = credit[..., COUNT] * (total < 0)
  return credit
