"""CISPO (MiniMax-M1, arXiv 2506.13585): the clipped ratio weighs every token, none is dropped.

python -m treepo_jax.main --config=configs/cispo.py --workdir=runs/cispo

Two CPU cores: two to three minutes.
"""

from treepo_jax import config


def get_config():
  """Returns the defaults with GRPO's advantage and CISPO's loss; only large ratios are clipped."""
  c = config.default()
  c.advantage.estimator = "grpo"
  c.learn.loss = "cispo"
  c.learn.clip_low = 1.0
  return c
