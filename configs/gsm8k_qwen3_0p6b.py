"""TreePO of Qwen3-0.6B on GSM8K, for one chip: v5e or v6e, as in Colab.

python -m treepo_jax.main --config=configs/gsm8k_qwen3_0p6b.py --mode=plan --topology=v5e:1x1 \\
  --workdir=runs/plan
python -m treepo_jax.main --config=configs/gsm8k_qwen3_0p6b.py --workdir=runs/gsm8k_0p6b \\
  --config.data.root=DATA

DATA is that of configs/gsm8k.py. Answers without a thought: a thought of Qwen3's is longer than
the 512 tokens. Not run: no TPU was at hand.
"""

import runpy
from pathlib import Path

BASE = runpy.run_path(str(Path(__file__).with_name("gsm8k.py")))


def get_config():
  """Returns configs/gsm8k.py with Qwen3-0.6B, sized for 16 GB."""
  c = BASE["get_config"]()
  c.model.path = "Qwen/Qwen3-0.6B"
  c.data.thinking = False
  c.rollout.prompts = 32
  c.rollout.rows = 64
  c.rollout.pages = 1024
  c.learn.row_length = 1024
  c.learn.micro_rows = 1
  return c
