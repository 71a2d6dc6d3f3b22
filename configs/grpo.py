"""GRPO (arXiv 2402.03300) on trees of independent answers: group advantage, KL to the start.

python -m treepo_jax.main --config=configs/grpo.py --workdir=runs/grpo

Symmetric clip, the mean over answers of their token means, k3 in the loss. Two CPU cores: two to
three minutes.
"""

from treepo_jax import config


def get_config():
  """Returns the defaults with GRPO's advantage and loss."""
  c = config.default()
  c.advantage.estimator = "grpo"
  c.learn.aggregate = "sequence"
  c.learn.clip_low = c.learn.clip_high = 0.2
  c.learn.clip_dual = 0.0
  c.learn.kl = "k3"
  c.learn.kl_weight = 0.04
  c.train.dynamic_sampling = False
  return c
