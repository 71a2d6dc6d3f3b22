"""TreePO of the embedded policy on the embedded arithmetic task.

python -m treepo_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from treepo_jax import config


def get_config():
  """Returns the defaults, which are this run."""
  return config.default()
