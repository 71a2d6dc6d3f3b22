"""TreePO of Qwen2.5-1.5B on GSM8K, for four chips: v5e 2x2.

python -m treepo_jax.main --config=configs/gsm8k_qwen2p5_1p5b.py --mode=plan --topology=v5e:2x2 \\
  --workdir=runs/plan
python -m treepo_jax.main --config=configs/gsm8k_qwen2p5_1p5b.py --workdir=runs/gsm8k_1p5b \\
  --config.data.root=DATA

DATA is that of configs/gsm8k.py. Not run: no TPU was at hand.
"""

import runpy
from pathlib import Path

BASE = runpy.run_path(str(Path(__file__).with_name("gsm8k.py")))


def get_config():
  """Returns configs/gsm8k.py with Qwen2.5-1.5B, its state split over all chips."""
  c = BASE["get_config"]()
  c.model.path = "Qwen/Qwen2.5-1.5B"
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.learn.micro_rows = 0
  c.rollout.rows = 128
  c.rollout.pages = 8192
  return c
