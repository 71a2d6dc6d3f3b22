"""The paper's run (arXiv 2508.17445): Qwen2.5-7B, trees of 16 answers in 14 segments of 512.

python -m treepo_jax.main --config=configs/math_qwen2p5_7b.py --mode=plan --topology=v5p:2x2x4 \\
  --workdir=runs/plan
python -m treepo_jax.main --config=configs/math_qwen2p5_7b.py --workdir=runs/7b \\
  --config.data.root=DATA

The first says whether it fits, without a TPU; also for v6e:4x4 and v5e:8x16. DATA is that of
configs/math.py, whose problems and evaluation sets these are; the paper trains on MATH and on
DeepScaler. As the paper: 1,024 + 7,168 tokens, b = 2, two first branches, random fallback, 512
problems a step in mini-batches of 32, at most two further sampling rounds, learning rate 1e-6,
reward +1 and -1, 512 tokens of soft overlong cost. Its result, not ours: Overall 56.88 by maj@16
(Table 1, Fixed Init Divergence). Not run: no TPU was at hand.
"""

from configs import math


def get_config():
  """Returns the data of configs/math.py with the paper's sizes."""
  c = math.get_config()
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
  return c
