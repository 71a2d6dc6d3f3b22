"""TreePO on MATH of levels 3 to 5, evaluated on the five sets of the paper's tables.

python -m treepo_jax.main --config=configs/math.py --workdir=runs/math \\
  --config.model.path=DIR --config.data.root=DATA

DIR is a Hugging Face directory of a model with a chat template, such as Qwen2.5-1.5B. DATA holds
simplerl_math_level3to5/train.jsonl (8,523 rows of hkust-nlp/simpleRL-reason's train.parquet; 2 have
no answer, 1 stands twice), math500/test.jsonl (500, of the same repository), aime24, amc23,
minerva_math and olympiadbench, each with a test.jsonl (30, 40, 272, 675, of QwenLM/Qwen2.5-Math,
evaluation/data). The paper's AMC has 83 problems. No training problem is one of MATH-500.

Eight training problems and two of OlympiadBench have more than 1,024 tokens of Qwen's and are left
out; data/overlong counts the former as they come up.
"""

from treepo_jax import config

EVALUATED = (
  "math500=math500/test.jsonl",
  "aime24=aime24/test.jsonl#aime",
  "amc23=amc23/test.jsonl#amc",
  "minerva=minerva_math/test.jsonl#minerva",
  "olympiadbench=olympiadbench/test.jsonl#olympiadbench",
)


def get_config():
  """Returns the defaults with MATH and answers of 2,048 tokens, for a model of 1B and more."""
  c = config.default()
  c.model.path = ""  # yours
  c.model.dtype = "bfloat16"
  c.model.unroll = False
  c.model.remat = "layer"
  c.data.path = "simplerl_math_level3to5/train.jsonl"
  c.data.eval_path = ",".join(EVALUATED)
  c.data.reader = "math"
  c.data.leakage = "drop"
  c.data.overlong = "drop"
  c.data.template = "treepo"
  c.rollout.prompts = 64
  c.rollout.depth = 8
  c.rollout.segment = 256
  c.rollout.page = 16
  c.rollout.prompt_length = 1024
  c.learn.row_length = 8192
  c.train.steps = 200
  c.train.learning_rate = 1e-6
  c.train.final_rate = 1.0
  c.train.warmup = 10
  c.train.weight_decay = 0.1
  c.eval.every = 20
  return c
