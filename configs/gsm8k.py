"""TreePO on GSM8K's training problems, evaluated on its test problems.

python -m treepo_jax.main --config=configs/gsm8k.py --workdir=runs/gsm8k \\
  --config.model.path=DIR --config.data.root=DATA

DIR is a Hugging Face directory of a model with a chat template, such as Qwen2.5-0.5B. DATA holds
gsm8k/train.jsonl and gsm8k/test.jsonl, 7,473 and 1,319 rows, of github.com/openai/grade-school-math
(grade_school_math/data). Prompts have at most 240 tokens of Qwen's; none is dropped.

SVAMP beside it: --config.data.eval_path=gsm8k=gsm8k/test.jsonl,svamp=svamp/test.jsonl#svamp
"""

from treepo_jax import config


def get_config():
  """Returns the defaults with GSM8K and answers of 512 tokens, for a model of 0.5B and more."""
  c = config.default()
  c.model.path = ""  # yours
  c.model.dtype = "bfloat16"
  c.model.unroll = False
  c.model.remat = "layer"
  c.data.path = "gsm8k/train.jsonl"
  c.data.eval_path = "gsm8k=gsm8k/test.jsonl"
  c.data.reader = "gsm8k"
  c.data.leakage = "drop"
  c.data.template = "treepo"
  c.rollout.prompts = 64
  c.rollout.depth = 8
  c.rollout.segment = 64
  c.rollout.page = 16
  c.rollout.prompt_length = 256
  c.learn.row_length = 2048
  c.train.steps = 200
  c.train.learning_rate = 1e-6
  c.train.final_rate = 1.0
  c.train.warmup = 10
  c.train.weight_decay = 0.1
  c.eval.prompts = 1319
  c.eval.every = 20
  return c
