"""The paper's run (arXiv 2508.17445): Qwen2.5-7B, trees of 16 answers in 14 segments of 512.

python -m treepo_jax.main --config=configs/math_qwen2p5_7b.py --mode=plan --topology=v5p:2x2x4 \
  --workdir=runs/plan
"""

from treepo_jax import config


def get_config():
  """Returns the defaults with the paper's sizes."""
  c = config.default()
  c.model.path = "Qwen/Qwen2.5-7B"
  c.model.dtype = "bfloat16"
  c.model.unroll = False
  c.model.remat = "layer"
  c.mesh.data = 1
  c.mesh.fsdp = 4
  c.mesh.tensor = 4
  c.rollout.prompts = 64
  c.rollout.width = 16
  c.rollout.depth = 14
  c.rollout.segment = 512
  c.rollout.prompt_length = 1024
  c.rollout.page = 128
  c.rollout.rows = 64
  c.rollout.pages = 4096
  c.rollout.initial = 2
  c.learn.row_length = 8192
  c.learn.micro_rows = 4
  c.train.learning_rate = 1e-6
  c.train.warmup = 10
  c.train.weight_decay = 0.1
  return c
