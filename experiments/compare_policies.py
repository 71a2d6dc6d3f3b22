"""What the sampler's policies do to a batch of trees: allocation, fallback and pruning, over seeds.

python experiments/compare_policies.py --json=policies.json

The embedded policy on the embedded task, configs/branching.py's forced branching in shorter
segments, PROMPTS prompts a seed, the same for every policy. Nothing is trained. Columns, means over
seeds with their standard error:

right: trajectories that are right, in percent; independent answers have the policy's own accuracy,
  and what a policy moves it by is bias of the batch, not skill.
mixed: prompts with right and wrong answers, which training learns from.
split: of the nodes below which at least two trajectories end, those where rewards differ: where a
  tree's credit says more than the prompt's.
answers: distinct answers to a prompt.
tokens: decoded a trajectory.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from treepo_jax import config as config_lib
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.run import collect, setup
from treepo_jax.tasks import data

PROMPTS, SEEDS = 128, (0, 1, 2)
TREE = {"initial": 2, "segment": 8, "depth": 10}
POLICIES = {
  "independent answers": {"initial": 16, "fallback": "none"},
  "even, random fallback (the paper's default)": {},
  "more initial divergence, 2 to 8": {"initial_max": 8},
  "branches to unlikely segments, T = 2": {"allocation": "segment", "allocation_temperature": 2.0},
  "branches to unlikely segments, T = 0.1": {
    "allocation": "segment",
    "allocation_temperature": 0.1,
  },
  "branches to likely segments, T = 0.1": {
    "allocation": "segment",
    "allocation_temperature": 0.1,
    "favour": "high",
  },
  "fallback before the least likely token": {"fallback": "log_prob"},
  "fallback at unlikely blocks": {"fallback": "block", "fallback_block": 4},
  "fallback from the start": {"fallback": "start"},
  "fallback where rewards disagree": {"fallback": "disagree"},
  "pruned by log-prob": {"prune": "log_prob"},
  "pruned by entropy": {"prune": "entropy"},
  "pruned by reward": {"prune": "reward"},
}


def configure(changes: dict, seed: int, prompts: int):
  config = config_lib.default()
  config.seed = seed
  config.rollout.prompts = prompts
  config.rollout.update(TREE | changes)
  return config_lib.validate(config)


def splits(tree: tree_lib.Tree, reward: np.ndarray) -> tuple[int, int]:
  """Returns (nodes whose trajectories earn differently, nodes of two or more); prompts count."""
  differ = count = 0
  for b, leaves in enumerate(tree.leaves):
    below: dict[int, list[float]] = {}
    for leaf in leaves[leaves != tree_lib.NO_ROW].tolist():
      for row in [0, *tree_lib.path(tree, b, leaf)]:
        below.setdefault(row, []).append(float(reward[b, leaf]))
    several = [set(values) for values in below.values() if len(values) > 1]
    differ, count = differ + sum(len(s) > 1 for s in several), count + len(several)
  return differ, count


def measure(changes: dict, seed: int, prompts: int, policy: setup.Setup | None):
  """Returns (figures of a batch of trees, the policy)."""
  config = configure(changes, seed, prompts)
  policy = policy or setup.load(config)
  asked = data.take(data.source(config), policy.text, start=0, count=prompts, config=config)
  shape = setup.load(config).shape
  key = setup.key(config, 0, 0)
  made = collect.collect(
    policy.params, key, asked.prompts, setup=policy, shape=shape, config=config
  )
  differ, count = splits(made.tree, made.reward)
  right = [np.mean(c) for c in made.correct]
  return {
    "right": 100 * float(np.mean([r for c in made.correct for r in c])),
    "mixed": 100 * float(np.mean([0 < r < 1 for r in right])),
    "split": 100 * differ / count,
    "answers": float(np.mean([len(set(a)) for a in made.answers])),
    "tokens": made.metrics["rollout/tokens_decoded"] / made.metrics["rollout/trajectories"],
    "trajectories": made.metrics["rollout/trajectories"] / prompts,
  }, policy


def main() -> None:
  parser = argparse.ArgumentParser(description="What the sampler's policies do to trees.")
  parser.add_argument("--quick", action="store_true", help="one seed, fewer prompts")
  parser.add_argument("--json", type=Path, help="file for the figures")
  args = parser.parse_args()
  prompts, seeds = (32, SEEDS[:1]) if args.quick else (PROMPTS, SEEDS)
  rows, policy = [], None
  for name, changes in POLICIES.items():
    found = []
    for seed in seeds:
      figures, policy = measure(changes, seed, prompts, policy)
      found.append(figures)
    row = {"policy": name}
    for key in found[0]:
      values = [f[key] for f in found]
      row |= {
        key: float(np.mean(values)),
        f"{key}_error": float(np.std(values) / len(values) ** 0.5),
      }
    rows.append(row)
    shown = [f"{key} {row[key]:.1f} +- {row[f'{key}_error']:.1f}" for key in found[0]]
    print(f"{name}: {', '.join(shown)}", flush=True)
  if args.json:
    args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
  main()
