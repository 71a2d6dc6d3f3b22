"""Trees as JSON, one a line, so that anyone can check a rollout with their own tools."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from treepo_jax.learn import advantages
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.run import metrics as metrics_lib


def records(
  tree: tree_lib.Tree,
  reward: np.ndarray,
  advantage: advantages.Advantage,
  prompts: Sequence,
  step: int,
  *,
  config,
) -> list[dict]:
  """Returns one record a tree: its prompt, its nodes, its leaves and where fallback cut.

  reward: f32[B, N] at leaf rows. Advantages stand on leaves; where the estimator gives segments
  their own, on every node: the mean over the trajectories through it. Log-probs under what was
  drawn from join those of the policy where the config makes them others.
  """
  advantage = jax.tree.map(np.asarray, advantage)
  mass = np.maximum(advantage.weight.sum(1), 1e-9)
  mean = lambda value: (advantage.weight * value).sum(1) / mass
  by_segment = config.advantage.estimator in advantages.BY_SEGMENT
  r = config.rollout
  sampled = r.temperature != 1 or r.top_k > 0 or r.top_p < 1 or r.min_p > 0
  raw, white = mean(advantage.raw), mean(advantage.white)
  return [
    _record(tree, b, reward[b], raw[b], white[b], prompt, step, by_segment, sampled)
    for b, prompt in enumerate(prompts)
  ]


def write(path: str | Path, trees: Sequence[dict]) -> None:
  """Writes one record a line; a reader sees the whole file or none."""
  with metrics_lib.replacing(path) as temporary:
    temporary.write_text("".join(json.dumps(tree) + "\n" for tree in trees), encoding="utf-8")


def _record(
  tree: tree_lib.Tree,
  b: int,
  reward,
  advantage,
  white,
  prompt,
  step: int,
  by_segment: bool,
  sampled: bool,
) -> dict:
  leaves = [int(row) for row in tree.leaves[b] if row != tree_lib.NO_ROW]
  ended = set(leaves)
  rounded = lambda values: [round(float(x), 7) for x in values]
  nodes = []
  for row in range(int(tree.size[b])):
    length, leaf = int(tree.length[b, row]), row in ended
    credited = leaf or (by_segment and row > 0)
    nodes.append(
      {
        "row": row,
        "parent": int(tree.parent[b, row]),
        "tokens": tree.tokens[b, row, :length].tolist(),
        "log_probs": rounded(tree.log_probs[b, row, :length]),
        "stop": tree_lib.STOP_NAMES[int(tree.status[b, row])] if leaf else None,
        "reward": float(reward[row]) if leaf else None,
        "advantage": float(advantage[row]) if credited else None,
        "advantage_white": float(white[row]) if credited else None,
        "weight": 1.0,
      }
    )
    if sampled:
      nodes[-1]["sampled_log_probs"] = rounded(tree.sampled_log_probs[b, row, :length])
  source = {str(r): int(s) for r, s in enumerate(tree.source[b]) if s != tree_lib.NO_ROW}
  return {
    "step": step,
    "prompt_id": str(prompt.id),
    "prompt_tokens": list(map(int, prompt.tokens)),
    "gold": prompt.gold,
    "nodes": nodes,
    "leaves": leaves,
    "fallback_of": source,
  }
