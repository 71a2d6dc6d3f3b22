"""TreePO on Countdown from a base model: reach a number with each of three or four others once.

python -m treepo_jax.main --config=configs/countdown.py --workdir=runs/countdown \\
  --config.model.path=DIR --config.data.root=DATA

DIR is a Hugging Face directory of a model with a chat template, such as Qwen2.5-1.5B. DATA holds
countdown/train.jsonl and countdown/test.jsonl of {"nums": [44, 19, 35], "target": 98}, such as the
8,000 and 2,000 rows of Jiayi-Pan/TinyZero, where five test problems are training problems with
their numbers in another order. Prompts have at most 78 tokens of Qwen's.
"""

from treepo_jax import config


def get_config():
  """Returns the defaults with Countdown and answers of 512 tokens, for a model of 0.5B and more."""
  c = config.default()
  c.model.path = ""  # yours
  c.model.dtype = "bfloat16"
  c.model.unroll = False
  c.model.remat = "layer"
  c.data.path = "countdown/train.jsonl"
  c.data.eval_path = "countdown=countdown/test.jsonl"
  c.data.reader = "countdown"
  c.data.leakage = "drop"
  c.data.template = "treepo"
  c.rollout.prompts = 64
  c.rollout.depth = 8
  c.rollout.segment = 64
  c.rollout.page = 16
  c.rollout.prompt_length = 96
  c.learn.row_length = 2048
  c.train.steps = 200
  c.train.learning_rate = 1e-6
  c.train.final_rate = 1.0
  c.train.warmup = 10
  c.train.weight_decay = 0.1
  c.eval.every = 20
  return c
