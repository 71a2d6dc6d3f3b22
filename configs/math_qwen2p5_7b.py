"""The paper's runs (arXiv 2508.17445): Qwen2.5-7B, trees of 16 answers in 14 segments of 512.

python -m treepo_jax.main --config=configs/math_qwen2p5_7b.py --mode=plan --topology=v5p:2x2x4 \\
  --workdir=runs/plan
python -m treepo_jax.main --config=configs/math_qwen2p5_7b.py --workdir=runs/7b \\
  --config.data.root=DATA
python -m treepo_jax.main --config=configs/math_qwen2p5_7b.py:more_init ...   # one of VARIANTS

The first says whether it fits, without a TPU; also for v6e:4x4 and v5e:8x16. DATA is that of
configs/math.py, whose problems and evaluation sets these are; the paper trains on MATH and on
DeepScaler. As the paper: 1,024 + 7,168 tokens, b = 2, two first branches, random fallback, 512
problems a step in mini-batches of 32, at most two further sampling rounds, learning rate 1e-6,
reward +1 and -1, 512 tokens of soft overlong cost. Its results, not ours (Overall by maj@16, Table
1): grpo 46.63, tree_grpo 54.61, treepo 56.88, more_init 58.21. Not run: no TPU was at hand.
"""

import runpy
from pathlib import Path

BASE = runpy.run_path(str(Path(__file__).with_name("math.py")))

PROBABILITY = {"rollout.allocation": "segment", "rollout.allocation_temperature": 2.0}
MORE_INIT = {"rollout.initial_max": 8}  # two to eight first branches, drawn for each prompt

# What each of the paper's runs changes.
VARIANTS = {
  "treepo": {},  # Fixed Init Divergence
  "more_init": MORE_INIT,
  "grpo": {
    "rollout.initial": 16,
    "rollout.branching": 1,
    "rollout.merge": False,
    "rollout.fallback": "none",
    "advantage.estimator": "grpo",
  },
  "tree_grpo": {"advantage.estimator": "grpo"},  # GRPO w/ TreePO Sampling
  "56x128": MORE_INIT | {"rollout.depth": 56, "rollout.segment": 128},  # Fig 7
  "28x256": MORE_INIT | {"rollout.depth": 28, "rollout.segment": 256},
  "7x1024": MORE_INIT | {"rollout.depth": 7, "rollout.segment": 1024},
  "low_prob": MORE_INIT | PROBABILITY,  # Fig 8: Low Prob Encourage
  "high_prob": MORE_INIT | PROBABILITY | {"rollout.favour": "high"},
  "naive_to_low": MORE_INIT
  | {
    "rollout.allocation": "segment",
    "rollout.allocation_schedule": "descending",
    "rollout.allocation_low": 1.0,
    "rollout.allocation_high": 5.0,
  },
}


def get_config(variant: str = "treepo"):
  """Returns the data of configs/math.py with the paper's sizes, and what the variant changes."""
  if variant not in VARIANTS:
    raise ValueError(f"{variant!r} is none of the runs: {', '.join(VARIANTS)}")
  c = BASE["get_config"]()
  c.model.path = "Qwen/Qwen2.5-7B"
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.mesh.tensor = 4
  c.rollout.prompts = 512
  c.rollout.width = 16
  c.rollout.depth = 14
  c.rollout.segment = 512
  c.rollout.initial = 2
  c.rollout.branching = 2
  c.rollout.page = 128
  c.rollout.stride = 128
  c.rollout.rows = 64
  c.rollout.pages = 2048
  c.reward.overlong_buffer = 512
  c.learn.row_length = 8192
  c.learn.micro_rows = 0
  c.learn.minibatches = 16
  c.train.sampling_rounds = 3
  c.train.steps = 300
  c.eval.samples = 16
  c.eval.temperature = 0.6
  c.update_from_flattened_dict(VARIANTS[variant])
  return c
