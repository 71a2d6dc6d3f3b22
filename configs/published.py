"""TreePO as its published script runs, quirks included where they are choices and not defects.

python -m treepo_jax.main --config=configs/published.py --workdir=runs/published

The published code at f055523 with the values that take effect in its training script, at the size
of the embedded task. What it does otherwise than the paper says is a key here: what is left of an
even budget goes to the last path, EOS is not seen as a segment's first token, a group is counted at
each depth it spans. Not kept: text spliced at fallback, initial divergence and window that have no
effect, a cut that crashes, draws without a seed, a learning rate of 0 at the first step.
"""

from treepo_jax import config


def get_config():
  """Returns the defaults with the published choices."""
  c = config.default()
  c.rollout.initial = 2
  c.rollout.branching = 2
  c.rollout.remainder = "last"
  c.rollout.merge = False
  c.rollout.stop_at = "eos"
  c.rollout.blind_eos = True
  c.advantage.repeat = True
  return c
