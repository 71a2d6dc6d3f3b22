"""TreePO of the embedded policy on the embedded arithmetic task: the default run.

python -m treepo_jax.main --config=configs/tiny.py --workdir=runs/tiny

Two CPU cores: one to two minutes. Held-out accuracy rises from 50 % to about 97 %, with 85 % fewer
tokens decoded and 77 % fewer trained than path by path (experiments/README.md, three seeds).
"""

from treepo_jax import config


def get_config():
  """Returns the defaults, which are this run."""
  return config.default()
