"""Every key of a run with its unit and source, and the check that names a wrong value's key."""

from pathlib import Path
from typing import Any

import ml_collections

EMBEDDED_POLICY = str(Path(__file__).parent / "embedded")


ESTIMATORS = (
  *("treepo", "segment", "spo", "treerl", "treerpo", "tree_grpo", "vineppo"),
  *("grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "remax"),
)
FALLBACKS = ("random", "log_prob", "block", "inverse_block", "start", "disagree", "none")
FALLBACK_SOURCES = ("answered", "boxed", "finished_first", "strict", "longest", "any")
GRADERS = ("math", "countdown", "number")  # names that questions carry: tasks/rewards.py
MOST_ANSWERS = 1000  # a prompt, in evaluation: subsets of more are too many for a float64
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
TEMPLATES = ("plain", "boxed", "chat", "treepo")  # tasks/text.py


class UserError(ValueError):
  """Something the user can mend: the text names the key or file, what it is and what to do."""


def default() -> ml_collections.ConfigDict:
  """Returns every key at its default, locked: the embedded policy on the embedded task."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # every draw is folded from it

  c.model = ml_collections.ConfigDict()
  # Hugging Face directory (config.json, *.safetensors, tokenizer), or a name on the hub such as
  # "Qwen/Qwen2.5-7B", which is fetched once; a directory that exists goes first
  c.model.path = EMBEDDED_POLICY
  c.model.revision = ""  # on the hub: branch, tag or commit; "": the main branch
  c.model.dtype = (
    "float32"  # "float32" | "bfloat16": of weights and activations; losses are float32
  )
  # "xla" | "pallas": kernels for TPUs, elsewhere interpreted and slow | "auto": "pallas" on a TPU
  # where heads are multiples of 64 and, to decode, rollout.page of 16 (heads of a multiple of 128)
  # or of 128 (other heads); else "xla"
  c.model.attention = "auto"
  c.model.unroll = True  # decode with the layers unrolled (small models, CPU) or scanned (large)
  # What the backward pass recomputes: "none" | "dots": all but matrix products | "layer": whole
  # layers, the least memory, a third more time
  c.model.remat = "none"

  c.lora = ml_collections.ConfigDict()
  c.lora.rank = 0  # of low-rank adapters, which are then trained alone; 0: every weight is trained
  c.lora.alpha = 32.0  # adapters are added times alpha / rank
  c.lora.targets = PROJECTIONS  # projections that have one

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1  # devices that hold whole copies; -1: all that are left
  c.mesh.fsdp = 1  # devices that weights and optimizer state are split over; -1: all that are left
  c.mesh.tensor = 1  # devices that heads and hidden units are split over
  c.mesh.cpu_devices = 0  # without an accelerator: devices the CPU is taken as; 0: about one a core

  c.data = ml_collections.ConfigDict()
  # What to train on, [NAME=]WHERE[#READER]: a JSONL or Parquet file, tfds:NAME@SPLIT,
  # module:function or "arithmetic", the embedded task (tasks/sources.py); several, parted by
  # commas, are mixed. "": "arithmetic"
  c.data.path = ""
  c.data.weights = ()  # share of each of several; (): as many as each has
  c.data.eval_path = ""  # held-out sets, named alike; several need a NAME each; needed with path
  c.data.root = ""  # folder that files are looked for below, and TFDS data sets in
  # What makes a question of a row where no #READER does: "plain" | "gsm8k" | "math" | "aime" |
  # "amc" | "minerva" | "olympiadbench" | "svamp" | "countdown" | module:function (tasks/readers.py)
  c.data.reader = "plain"
  # Training questions that are held out too: "report" | "drop" them from training | "error"
  c.data.leakage = "report"
  c.data.levels = (3, 4, 5)  # arithmetic: operations a problem
  c.data.overlong = "error"  # a prompt beyond rollout.prompt_length: "error" | "drop"
  # "plain": the text and a newline | "boxed": and the instruction to reason and to box the answer |
  # "chat": the chat template | "treepo": with that instruction as the system's turn
  c.data.template = "plain"
  # What chat templates are told as enable_thinking: False has Qwen3 answer without a thought
  c.data.thinking = True

  c.rollout = ml_collections.ConfigDict()
  c.rollout.prompts = 16  # prompts a step
  c.rollout.width = 16  # w: trajectories a prompt
  c.rollout.depth = 5  # d: segments a trajectory at most
  c.rollout.segment = 16  # l: tokens a segment, a multiple of rollout.page
  c.rollout.branching = 2  # b: branches a node; the budget of a prompt grows as b^depth up to w
  c.rollout.branching_max = 0  # > branching: b is drawn a prompt and wave, branching..branching_max
  # Branches of the prompt itself. 0, as many as width: answers are independent, and the tree is
  # where they agree (merge); fewer: TreePO's forced branching and fallback make up the rest.
  c.rollout.initial = 0
  c.rollout.initial_max = 0  # > initial: drawn, uniform in initial..initial_max
  c.rollout.initial_draw = "prompt"  # for each "prompt" | once for the "batch"
  c.rollout.step_tokens = 0  # tokens of a wave of all prompts, instead of b and initial; 0: by b
  # Response tokens of a prompt's trajectories, a shared one once for each; 0: width alone decides
  c.rollout.response_tokens = 0
  c.rollout.min_width = 0  # trajectories that response_tokens leaves at least
  # Who gets the budget: all paths alike, "even", or by log-prob, the "sum" or "mean" of the answer
  # or the mean of its last "segment" (section 4.4)
  c.rollout.allocation = "even"
  c.rollout.remainder = "spread"  # even: what is left to the first nodes, "spread" | to the "last"
  c.rollout.favour = "low"  # by log-prob: paths of "low" or "high" log-prob get more
  c.rollout.allocation_temperature = 1.0  # of the softmax over log-probs
  # "constant" | half a sine "ascending" from allocation_low to _high | "descending"
  c.rollout.allocation_schedule = "constant"
  c.rollout.allocation_low = 1.0
  c.rollout.allocation_high = 5.0
  # Where a finished answer is cut to grow again: "random" | before its least likely token,
  # "log_prob" | at a block of tokens, preferably unlikely ones, "block", or likely ones,
  # "inverse_block" | at the "start" | where answers "disagree" most in reward | "none": not at all
  c.rollout.fallback = "random"
  # Which answers: with a box or EOS, "answered" | "boxed" | all, "finished_first" by a weighted
  # draw, "strict" in order of why they ended, "longest" by a draw weighted with length | "any"
  c.rollout.fallback_from = "answered"
  c.rollout.fallback_window = 0  # random: tokens between places to cut at; 0: a segment
  c.rollout.fallback_windows = 0  # random: windows cut off at most; 0: any number
  c.rollout.fallback_block = 128  # tokens of a block
  c.rollout.fallback_least = 0  # tokens of an answer that may be cut
  # Paths given up although they could go on, of low value: "log_prob" (mean of the answer) |
  # "entropy" (mean of the segment, high is bad) | "reward" (of answers nearby) | "none"
  c.rollout.prune = "none"
  c.rollout.prune_share = 0.25  # of a wave's open paths at most; their budget goes to the others
  c.rollout.prune_keep = 2  # open paths that stay at least
  c.rollout.merge = True  # nodes that draw the tokens of another are not decoded or trained again
  c.rollout.response_length = 0  # tokens of an answer at most; 0: depth * segment
  c.rollout.prompt_length = 64  # tokens a prompt at most
  c.rollout.temperature = 1.0
  c.rollout.top_k = 0  # tokens that can be drawn; 0: all
  c.rollout.top_p = 1.0  # probability that those that can be drawn make up at least (nucleus)
  c.rollout.min_p = 0.0  # of the likeliest token's probability, what one that can be drawn has
  # An answer ends where its \boxed{...} closes, "box" | with the "segment" of it | at "eos"
  c.rollout.stop_at = "box"
  c.rollout.blind_eos = False  # published: EOS is missed as a segment's first token, or one of many
  c.rollout.min_length = 0  # tokens of an answer; shorter ones are dropped and grown again
  c.rollout.repetition_first = False  # a loop ends an answer before its box, EOS or length do
  c.rollout.repetition_window = 8  # tokens of a repeated window
  c.rollout.repetition_count = (
    4  # times it occurs in the last window * count tokens; 0: not checked
  )
  c.rollout.page = 8  # tokens a page of the KV cache
  # Tokens decoded before rows are filled anew, a multiple of rollout.page; 0: 32, or the segment
  c.rollout.stride = 0
  c.rollout.rows = 256  # decode rows a device at most, a multiple of rollout.group
  c.rollout.group = 2  # rows that read their shared pages together
  c.rollout.pages = 0  # pages of the pool a device; 0: as many as all its prompts can need

  c.reward = ml_collections.ConfigDict()
  c.reward.correct = 1.0
  c.reward.wrong = -1.0
  c.reward.format = 0.0  # added where an answer has a complete box, right or wrong
  # Rewards of your own, "module:function" of (texts, golds, prompts), lists, to a list of floats or
  # bools: README.md, Grading. "": right or wrong by the question's grader
  c.reward.fn = ""
  # What counts: the last complete "box" | with the boxes that only separators part from it, as a
  # list, "boxes" | without a box what math-verify finds in the text, "anywhere"
  c.reward.extract = "box"
  c.reward.policy = "strict"  # "strict": tasks/answers.py | "math_verify": its defaults and no more
  c.reward.tolerance = 0.0  # strict: relative difference of numbers that are equal
  c.reward.bare = True  # --mode=grade: a "pred" without \boxed is the answer itself; False: wrong
  c.reward.timeout = 5.0  # seconds an answer may take, wall clock; its process is then replaced
  c.reward.workers = 0  # processes that math-verify or reward.fn run in; 0: one a core, at most 16
  c.reward.memory = 2.0  # GiB of address space of such a process
  c.reward.overlong_buffer = 0  # tokens before the longest answer that cost; 0: length is free
  c.reward.overlong_factor = 1.0  # what the longest answer costs (DAPO's soft overlong punishment)

  c.advantage = ml_collections.ConfigDict()
  # Trees: "treepo" (Eq 5) | "segment" | "spo" | "treerl" | "treerpo" | "tree_grpo" | "vineppo".
  # Groups: "grpo" (Eq 2) | "dr_grpo" | "rloo" | "reinforce" | "reinforce_pp" |
  # "reinforce_pp_baseline" | "remax" (decodes a greedy answer a prompt more). learn/estimators.py
  c.advantage.estimator = "treepo"
  # "published": the estimator's own | "none" | "group": over the standard deviation of the prompt's
  # rewards | "token": whitened over the batch's tokens | "leaf": the same, trajectories weigh alike
  c.advantage.normalise = "published"
  c.advantage.aggregate = (
    "average"  # treepo, over sub-groups: "average" (Eq 5) | "group_size" (Eq 6)
  )
  c.advantage.reject = False  # treepo: drop sub-groups whose rewards are all equal (Eq 7)
  c.advantage.repeat = False  # treepo: count a sub-group at each depth it spans, as published
  c.advantage.root = True  # treepo: False leaves the prompt's own group out (section 4.2)
  c.advantage.eta = 0.0  # segment: a parent k segments from the end counts eta^k; 0: wholly

  c.learn = ml_collections.ConfigDict()
  c.learn.packing = "tree"  # "tree": each token once | "path": each trajectory by itself
  c.learn.row_length = 512  # tokens a packed row
  # Rows a micro-batch, a multiple of mesh data * fsdp; 0: one for each of these
  c.learn.micro_rows = 4
  c.learn.minibatches = 1  # optimizer steps a rollout batch; a tree stays whole
  c.learn.loss = "ppo"  # "ppo" (DAPO, GRPO, TreePO's Eq 1) | "gspo" | "cispo" | "reinforce"
  # Mean of the loss over "token": all tokens (DAPO) | "sequence": trajectories, of their token
  # means (GRPO) | "fixed": trajectories, of their sums over the longest length (Dr. GRPO)
  c.learn.aggregate = "token"
  # A token of several trajectories stands for "leaf": each of them (the paper) | "once": their mean
  # | "sum": all of them, with the sum of their advantages
  c.learn.shared = "leaf"
  c.learn.clip_low = 0.2  # DAPO
  c.learn.clip_high = 0.28  # DAPO clip-higher
  c.learn.clip_dual = 10.0  # dual clip of negative advantages; 0: none
  c.learn.entropy_weight = 0.0  # of the entropy bonus
  c.learn.kl = "none"  # KL to a reference policy: "none" | "k1" | "k2" | "k3"
  c.learn.kl_in = "loss"  # "loss": by token, in the loss | "reward": k1, taken off the reward
  c.learn.kl_weight = 0.001
  c.learn.kl_target = 0.0  # nats a token that kl_weight is steered to; 0: it stays
  c.learn.reference = "initial"  # "initial": the weights at the start | "average": of the policy's
  c.learn.average = 0.99  # part of the average that stays at an optimizer step
  # Truncated importance weight of the trainer's log-probs over the rollout's: "none" | "token" |
  # "sequence"; old log-probs are then the trainer's
  c.learn.correction = "none"
  c.learn.correction_cap = 2.0

  c.train = ml_collections.ConfigDict()
  c.train.steps = 50  # rollout batches
  c.train.learning_rate = 3e-4
  c.train.final_rate = 0.1  # share of it that is left at the last step, linearly; 1: constant
  c.train.warmup = 5  # optimizer steps of linear warm-up, from lr / warmup
  c.train.weight_decay = 0.0
  c.train.b1 = 0.9
  c.train.b2 = 0.999
  c.train.eps = 1e-8
  c.train.grad_clip = 1.0  # global norm
  c.train.dynamic_sampling = True  # train only on prompts with mixed rewards (DAPO)
  c.train.sampling_rounds = 1  # rollouts at most to fill a batch with such prompts
  c.train.checkpoint_every = 20  # steps; the last step is always saved
  c.train.keep = 2  # checkpoints kept
  c.train.trees_every = 10  # steps between written trees; step 0 and the last are always written

  c.plan = ml_collections.ConfigDict()  # what --mode=plan takes for granted
  c.plan.response = (
    0  # tokens of an answer on average; 0: 0.4 of the longest, as in the paper's run
  )
  c.plan.saving = 0.2  # of the tokens of all answers, those that others share
  c.plan.price = 0.0  # of a chip-hour, in your currency; 0: no cost is told

  c.eval = ml_collections.ConfigDict()
  c.eval.prompts = 1024  # held-out prompts of each set at most
  c.eval.samples = 1  # answers a prompt
  c.eval.every = 5  # steps between evaluations while training; 0: only before and after
  c.eval.temperature = 1.0  # 0: greedy; filters (rollout.top_k, top_p, min_p) are left out
  c.eval.sampling = "sequential"  # "sequential" | "tree" (the shape of rollout)
  c.eval.chunk = 512  # prompts answered and saved at a time: what a kill costs at most
  c.eval.bootstrap = 1000  # resamples a prompt of the paper's maj@k (section 4.1); 0: none
  # Budget curve: evaluated again with so many answers a prompt, one by one, and as trees of so many
  # branches of the prompt and of each node; () and (): no curve
  c.eval.widths = ()
  c.eval.branchings = ()  # of trees; those that a width does not exceed are left out there
  # Weights of a training run: its workdir (the newest) or a folder of its checkpoints/; "": those
  # of model.path
  c.eval.checkpoint = ""
  return c.lock()


def _positive(c, *keys: str) -> None:
  for key in keys:
    value = _value(c, key)
    if value <= 0:
      raise UserError(f"config.{key} = {value}: must be above 0")


def _one_of(c, key: str, allowed: tuple[str, ...]) -> None:
  value = _value(c, key)
  if value not in allowed:
    names = ", ".join(repr(a) for a in allowed)
    raise UserError(f"config.{key} = {value!r}: must be one of {names}")


def _at_least(c, key: str, least: int | float) -> None:
  if _value(c, key) < least:
    raise UserError(f"config.{key} = {_value(c, key)}: must be at least {least}")


def _multiple(c, key: str, of: str) -> None:
  value, base = _value(c, key), _value(c, of)
  if value % base:
    near = max(base, round(value / base) * base)
    raise UserError(
      f"config.{key} = {value} is not a multiple of config.{of} = {base}: "
      f"use for example {near}, or change config.{of}"
    )


def _value(c, key: str) -> Any:
  for part in key.split("."):
    c = c[part]
  return c


def validate(c: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
  """Returns the config frozen; raises UserError naming a wrong key and what is allowed."""
  if not c.model.path:
    raise UserError(
      "config.model.path is empty: give a Hugging Face directory with config.json, *.safetensors "
      "and tokenizer, --config.model.path=DIR"
    )
  _one_of(c, "model.dtype", ("float32", "bfloat16"))
  _one_of(c, "model.remat", ("none", "dots", "layer"))
  _one_of(c, "model.attention", ("auto", "xla", "pallas"))
  _positive(c, "mesh.tensor")
  for axis in ("data", "fsdp"):
    if c.mesh[axis] != -1:
      _positive(c, f"mesh.{axis}")
  if c.mesh.data == c.mesh.fsdp == -1:
    raise UserError("config.mesh.data = config.mesh.fsdp = -1: only one can be all that are left")
  _at_least(c, "mesh.cpu_devices", 0)
  _one_of(c, "data.overlong", ("error", "drop"))
  _one_of(c, "data.template", TEMPLATES)
  _one_of(c, "data.leakage", ("report", "drop", "error"))
  if c.data.path and not c.data.eval_path:
    raise UserError(
      f"config.data.path = {c.data.path!r} needs config.data.eval_path: name a held-out set too"
    )
  if not all(isinstance(w, int | float) and w > 0 for w in c.data.weights):
    raise UserError(f"config.data.weights = {c.data.weights}: must be numbers above 0")
  if not c.data.path and not (c.data.levels and set(c.data.levels) <= set(range(1, 9))):
    raise UserError(f"config.data.levels = {c.data.levels}: operation counts from 1 to 8")

  _positive(
    c,
    *(f"rollout.{k}" for k in ("prompts", "width", "depth", "segment", "branching")),
    *(f"rollout.{k}" for k in ("prompt_length", "temperature", "page", "rows", "group")),
    "rollout.repetition_window",
  )
  if c.rollout.repetition_count < 0 or c.rollout.repetition_count == 1:
    raise UserError(
      f"config.rollout.repetition_count = {c.rollout.repetition_count}: must be 0, not checked, or "
      "at least 2 (any window occurs once)"
    )
  _at_least(c, "rollout.pages", 0)
  _at_least(c, "rollout.response_length", 0)
  _at_least(c, "rollout.stride", 0)
  _multiple(c, "rollout.segment", "rollout.page")
  _multiple(c, "rollout.stride", "rollout.page")
  _multiple(c, "rollout.rows", "rollout.group")
  _check_policies(c)
  r = c.rollout
  _one_of(c, "advantage.estimator", ESTIMATORS)
  _one_of(c, "advantage.normalise", ("published", "none", "group", "token", "leaf"))
  _one_of(c, "advantage.aggregate", ("average", "group_size"))
  _at_least(c, "advantage.eta", 0)
  _check_learn(c)
  longest = r.prompt_length + r.depth * r.segment
  if c.learn.row_length < longest:
    raise UserError(
      f"config.learn.row_length = {c.learn.row_length} cannot hold one trajectory: it needs "
      f"rollout.prompt_length + rollout.depth * rollout.segment = {longest} tokens"
    )
  if c.learn.minibatches > r.prompts:
    raise UserError(
      f"config.learn.minibatches = {c.learn.minibatches} is above config.rollout.prompts = "
      f"{r.prompts}: each mini-batch needs a tree"
    )

  _one_of(c, "reward.extract", ("box", "boxes", "anywhere"))
  _one_of(c, "reward.policy", ("strict", "math_verify"))
  _positive(c, "reward.timeout", "reward.memory")
  for key in ("format", "tolerance", "workers"):
    _at_least(c, f"reward.{key}", 0)
  module, _, function = c.reward.fn.partition(":")
  if c.reward.fn and not (module and function):
    raise UserError(
      f"config.reward.fn = {c.reward.fn!r}: must be 'module:function', for example "
      "'my_rewards:reward', or '' for the question's grader"
    )
  _at_least(c, "reward.overlong_buffer", 0)
  _at_least(c, "reward.overlong_factor", 0)
  _at_least(c, "lora.rank", 0)
  _positive(c, "lora.alpha")
  if not c.lora.targets or not set(c.lora.targets) <= set(PROJECTIONS):
    raise UserError(
      f"config.lora.targets = {c.lora.targets}: one or more of {', '.join(PROJECTIONS)}"
    )
  _positive(c, "train.steps", "train.eps", "train.grad_clip", "train.sampling_rounds", "train.keep")
  _positive(c, "train.checkpoint_every", "train.trees_every")
  for key in ("train.learning_rate", "train.warmup", "train.weight_decay"):
    _at_least(c, key, 0)
  for key in ("train.b1", "train.b2"):
    if not 0 <= _value(c, key) < 1:
      raise UserError(f"config.{key} = {_value(c, key)}: must be in [0, 1)")
  if not 0 <= c.train.final_rate <= 1:
    raise UserError(f"config.train.final_rate = {c.train.final_rate}: must be in [0, 1]")
  for key in ("plan.response", "plan.saving", "plan.price"):
    _at_least(c, key, 0)
  if c.plan.saving >= 1:
    raise UserError(f"config.plan.saving = {c.plan.saving}: must be below 1")
  _check_eval(c)
  return ml_collections.FrozenConfigDict(c)


def _check_eval(c: ml_collections.ConfigDict) -> None:
  """Raises UserError for a wrong key of config.eval."""
  _positive(c, "eval.prompts", "eval.samples", "eval.chunk")
  for key in ("every", "temperature", "bootstrap"):
    _at_least(c, f"eval.{key}", 0)
  _one_of(c, "eval.sampling", ("sequential", "tree"))
  for key in ("widths", "branchings"):
    values = c.eval[key]
    if not all(isinstance(v, int) and v > 0 for v in values) or len(set(values)) < len(values):
      raise UserError(f"config.eval.{key} = {values}: different whole numbers above 0, or ()")
  most = max(c.eval.samples, *c.eval.widths, 0)
  if most > MOST_ANSWERS:
    key = "samples" if c.eval.samples == most else "widths"
    raise UserError(f"config.eval.{key}: {most} answers a prompt; at most {MOST_ANSWERS}")
  if c.eval.branchings and not c.eval.widths:
    raise UserError(
      f"config.eval.branchings = {c.eval.branchings} needs config.eval.widths, how many answers a "
      "prompt each of these trees has, for example (4, 8, 16)"
    )


def _check_policies(c: ml_collections.ConfigDict) -> None:
  """Raises UserError for a wrong key of config.rollout that says who grows, is cut or pruned."""
  r = c.rollout
  _one_of(c, "rollout.initial_draw", ("prompt", "batch"))
  _one_of(c, "rollout.allocation", ("even", "sum", "mean", "segment"))
  _one_of(c, "rollout.remainder", ("spread", "last"))
  _one_of(c, "rollout.favour", ("low", "high"))
  _one_of(c, "rollout.allocation_schedule", ("constant", "ascending", "descending"))
  _one_of(c, "rollout.fallback", FALLBACKS)
  _one_of(c, "rollout.fallback_from", FALLBACK_SOURCES)
  _one_of(c, "rollout.prune", ("none", "log_prob", "entropy", "reward"))
  _one_of(c, "rollout.stop_at", ("box", "segment", "eos"))
  _positive(c, "rollout.fallback_block", "rollout.prune_keep", "rollout.top_p")
  _positive(c, *(f"rollout.allocation_{k}" for k in ("temperature", "low", "high")))
  for key in ("initial", "initial_max", "branching_max", "step_tokens", "response_tokens"):
    _at_least(c, f"rollout.{key}", 0)
  for key in ("min_width", "min_length", "top_k", "min_p", "prune_share"):
    _at_least(c, f"rollout.{key}", 0)
  for key in ("fallback_window", "fallback_windows", "fallback_least"):
    _at_least(c, f"rollout.{key}", 0)
  for key in ("top_p", "min_p", "prune_share"):
    if r[key] > 1:
      raise UserError(f"config.rollout.{key} = {r[key]}: must be at most 1")
  if r.allocation_low > r.allocation_high:
    raise UserError(
      f"config.rollout.allocation_low = {r.allocation_low} is above config.rollout.allocation_high "
      f"= {r.allocation_high}: a descending schedule is allocation_schedule = 'descending'"
    )
  if r.fallback_windows and r.fallback != "random":
    raise UserError(
      f"config.rollout.fallback_windows = {r.fallback_windows} needs config.rollout.fallback = "
      f"'random', not {r.fallback!r}: only its cuts are counted in windows"
    )
  longest = r.response_length or r.depth * r.segment
  if r.min_length > longest:
    raise UserError(
      f"config.rollout.min_length = {r.min_length} is above the longest answer, {longest} tokens"
    )
  for key, most in (("initial", r.width), ("min_width", r.width)):
    if r[key] > most:
      raise UserError(
        f"config.rollout.{key} = {r[key]} is above config.rollout.width = {most}: "
        "a prompt has no more trajectories than that"
      )
  least = r.initial or r.width
  if r.initial_max and not least <= r.initial_max <= r.width:
    raise UserError(
      f"config.rollout.initial_max = {r.initial_max}: must be 0, no draw, or lie between "
      f"rollout.initial = {least} and rollout.width = {r.width}"
    )
  if r.branching_max and r.branching_max < r.branching:
    raise UserError(
      f"config.rollout.branching_max = {r.branching_max}: must be 0, no draw, or at least "
      f"rollout.branching = {r.branching}"
    )
  if 0 < r.step_tokens < r.prompts * r.segment:
    raise UserError(
      f"config.rollout.step_tokens = {r.step_tokens} is less than a segment for each prompt: "
      f"rollout.prompts * rollout.segment = {r.prompts * r.segment}"
    )


def _check_learn(c: ml_collections.ConfigDict) -> None:
  """Raises UserError for a wrong key of config.learn, and for a loss that trees cannot pack."""
  _one_of(c, "learn.packing", ("tree", "path"))
  _one_of(c, "learn.loss", ("ppo", "gspo", "cispo", "reinforce"))
  _one_of(c, "learn.aggregate", ("token", "sequence", "fixed"))
  _one_of(c, "learn.shared", ("leaf", "once", "sum"))
  _one_of(c, "learn.kl", ("none", "k1", "k2", "k3"))
  _one_of(c, "learn.kl_in", ("loss", "reward"))
  _one_of(c, "learn.reference", ("initial", "average"))
  _one_of(c, "learn.correction", ("none", "token", "sequence"))
  _positive(c, "learn.row_length", "learn.minibatches")
  _at_least(c, "learn.micro_rows", 0)
  _positive(c, "learn.clip_low", "learn.clip_high", "learn.correction_cap")
  for key in ("clip_dual", "entropy_weight", "kl_weight", "kl_target"):
    _at_least(c, f"learn.{key}", 0)
  if not 0 <= c.learn.average < 1:
    raise UserError(f"config.learn.average = {c.learn.average}: must be in [0, 1)")
  if c.learn.kl_in == "reward" and c.learn.kl not in ("none", "k1"):
    raise UserError(
      f"config.learn.kl = {c.learn.kl!r}: a reward can only lose 'k1', the log-ratio itself; set "
      "config.learn.kl to 'k1' or config.learn.kl_in to 'loss'"
    )
  whole = [
    f"config.learn.{key} = {value!r}"
    for key, value in (("loss", "gspo"), ("correction", "sequence"))
    if c.learn[key] == value
  ]
  if whole and c.learn.packing == "tree":
    raise UserError(
      f"{whole[0]} needs config.learn.packing = 'path': its ratio is of a whole trajectory, so a "
      "token shared by several has no single one"
    )
