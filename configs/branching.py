"""TreePO's forced branching: few branches of the prompt, doubled at segments, and fallback.

python -m treepo_jax.main --config=configs/branching.py --workdir=runs/branching

The tree of the paper (sections 2.2 and 2.3). Against configs/tiny.py it decodes another eighth less
and ends a little lower (experiments/README.md).
"""

from treepo_jax import config


def get_config():
  """Returns the defaults with 6 branches of the prompt, grown to 16 trajectories."""
  c = config.default()
  c.rollout.initial = 6
  return c
