"""GSPO (arXiv 2507.18071): the ratio of a whole answer, clipped close to 1.

python -m treepo_jax.main --config=configs/gspo.py --workdir=runs/gspo

A ratio of whole answers has no value at a token that several share, so answers are trained path by
path; they are still decoded as trees. Two CPU cores: about three minutes.
"""

from treepo_jax import config


def get_config():
  """Returns the defaults with GRPO's advantage and GSPO's loss, at the paper's clip."""
  c = config.default()
  c.advantage.estimator = "grpo"
  c.learn.loss = "gspo"
  c.learn.packing = "path"
  c.learn.aggregate = "sequence"
  c.learn.clip_low, c.learn.clip_high = 3e-4, 4e-4
  c.learn.clip_dual = 0.0
  return c
