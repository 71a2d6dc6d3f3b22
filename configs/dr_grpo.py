"""Dr. GRPO (arXiv 2503.20783): rewards centred but not scaled, sums over a fixed length, no KL.

python -m treepo_jax.main --config=configs/dr_grpo.py --workdir=runs/dr_grpo

Two CPU cores: two to three minutes.
"""

from treepo_jax import config


def get_config():
  """Returns the defaults with Dr. GRPO's advantage and loss."""
  c = config.default()
  c.advantage.estimator = "dr_grpo"
  c.learn.aggregate = "fixed"
  c.learn.clip_low = c.learn.clip_high = 0.2
  c.learn.clip_dual = 0.0
  c.train.dynamic_sampling = False
  return c
