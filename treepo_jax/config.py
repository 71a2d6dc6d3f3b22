"""Every key of a run with its unit and source, and the check that names a wrong value's key."""

from pathlib import Path
from typing import Any

import ml_collections

EMBEDDED_POLICY = str(Path(__file__).parent / "embedded")


class UserError(ValueError):
  """Something the user can mend: the text names the key or file, what it is and what to do."""


def default() -> ml_collections.ConfigDict:
  """Returns every key at its default, locked: the embedded policy on the embedded task."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # every draw is folded from it

  c.model = ml_collections.ConfigDict()
  # Hugging Face directory: config.json, *.safetensors, tokenizer
  c.model.path = EMBEDDED_POLICY
  c.model.dtype = (
    "float32"  # "float32" | "bfloat16": of weights and activations; losses are float32
  )
  c.model.unroll = True  # decode with the layers unrolled (small models, CPU) or scanned (large)
  c.model.remat = False  # recompute layers in the backward pass: less memory, a third more time

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1  # devices that hold whole copies; -1: all that are left
  c.mesh.fsdp = 1  # devices that weights and optimizer state are split over
  c.mesh.tensor = 1  # devices that heads and hidden units are split over
  c.mesh.cpu_devices = 0  # without an accelerator: devices the CPU is taken as; 0: about one a core

  c.data = ml_collections.ConfigDict()
  c.data.path = ""  # a JSONL file of prompts; "": the embedded arithmetic task
  c.data.eval_path = ""  # held-out JSONL file; needed where data.path is given
  c.data.levels = (3, 4, 5)  # arithmetic: operations a problem
  c.data.overlong = "error"  # a prompt beyond rollout.prompt_length: "error" | "drop"
  c.data.template = "plain"  # "plain": the text and a newline | "chat": the chat template

  c.rollout = ml_collections.ConfigDict()
  c.rollout.prompts = 16  # prompts a step
  c.rollout.width = 16  # w: trajectories a prompt
  c.rollout.depth = 5  # d: segments a trajectory at most
  c.rollout.segment = 16  # l: tokens a segment, a multiple of rollout.page
  c.rollout.branching = 2  # b: branches a node; the budget of a prompt grows as b^depth up to w
  # Branches of the prompt itself. 0, as many as width: answers are independent, and the tree is
  # where they agree (merge); fewer: TreePO's forced branching and fallback make up the rest.
  c.rollout.initial = 0
  c.rollout.initial_max = 0  # > initial: drawn a prompt, uniform in initial..initial_max
  c.rollout.remainder = "spread"  # uneven budget: "spread" over the first nodes | all to the "last"
  c.rollout.fallback = "random"  # "random": cut a finished answer at a segment and regrow | "none"
  c.rollout.merge = True  # siblings that draw the same tokens are decoded and trained once
  c.rollout.response_length = 0  # tokens of an answer at most; 0: depth * segment
  c.rollout.prompt_length = 64  # tokens a prompt at most
  c.rollout.temperature = 1.0
  c.rollout.stop_at_box = True  # an answer ends where its \boxed{...} closes; False: at EOS
  c.rollout.repetition_window = 8  # tokens of a repeated window
  c.rollout.repetition_count = (
    4  # times it occurs in the last window * count tokens; 0: not checked
  )
  c.rollout.page = 8  # tokens a page of the KV cache
  c.rollout.rows = 256  # decode rows a device at most, a multiple of rollout.group
  c.rollout.group = 2  # rows that read their shared pages together
  c.rollout.pages = 0  # pages of the pool a device; 0: as many as all its prompts can need

  c.reward = ml_collections.ConfigDict()
  c.reward.correct = 1.0
  c.reward.wrong = -1.0

  c.advantage = ml_collections.ConfigDict()
  c.advantage.estimator = "treepo"  # "treepo" (Eq 5) | "grpo" (Eq 2)
  c.advantage.aggregate = "average"  # over sub-groups: "average" (Eq 5) | "group_size" (Eq 6)
  c.advantage.reject = False  # drop sub-groups whose rewards are all equal (Eq 7)
  c.advantage.repeat = False  # True: count a sub-group at each depth it spans, as published

  c.learn = ml_collections.ConfigDict()
  c.learn.packing = "tree"  # "tree": each token once | "path": each trajectory by itself
  c.learn.row_length = 512  # tokens a packed row
  c.learn.micro_rows = 4  # rows a micro-batch, a multiple of mesh data * fsdp
  c.learn.minibatches = 1  # optimizer steps a rollout batch; a tree stays whole
  c.learn.clip_low = 0.2  # DAPO
  c.learn.clip_high = 0.28  # DAPO clip-higher
  c.learn.clip_dual = 10.0  # dual clip of negative advantages

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

  c.eval = ml_collections.ConfigDict()
  c.eval.prompts = 1024  # held-out prompts
  c.eval.samples = 1  # answers a prompt
  c.eval.every = 5  # steps between evaluations while training; 0: only before and after
  c.eval.temperature = 1.0
  c.eval.sampling = "sequential"  # "sequential" | "tree" (the shape of rollout)
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
  _one_of(c, "model.dtype", ("float32", "bfloat16"))
  for axis in ("fsdp", "tensor"):
    _positive(c, f"mesh.{axis}")
  if c.mesh.data != -1:
    _positive(c, "mesh.data")
  _at_least(c, "mesh.cpu_devices", 0)
  _one_of(c, "data.overlong", ("error", "drop"))
  _one_of(c, "data.template", ("plain", "chat"))
  if bool(c.data.path) != bool(c.data.eval_path):
    raise UserError("config.data.path, config.data.eval_path: give both files or neither")
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
  _multiple(c, "rollout.segment", "rollout.page")
  _multiple(c, "rollout.rows", "rollout.group")
  _one_of(c, "rollout.remainder", ("spread", "last"))
  _one_of(c, "rollout.fallback", ("random", "none"))
  for key in ("rollout.initial", "rollout.initial_max"):
    _at_least(c, key, 0)
  r = c.rollout
  if r.initial > r.width:
    raise UserError(
      f"config.rollout.initial = {r.initial} is above config.rollout.width = {r.width}: "
      "a prompt cannot start with more branches than trajectories"
    )
  least = r.initial or r.width
  if r.initial_max and not least <= r.initial_max <= r.width:
    raise UserError(
      f"config.rollout.initial_max = {r.initial_max}: must be 0, no draw, or lie between "
      f"rollout.initial = {least} and rollout.width = {r.width}"
    )

  _one_of(c, "advantage.estimator", ("treepo", "grpo"))
  _one_of(c, "advantage.aggregate", ("average", "group_size"))
  _one_of(c, "learn.packing", ("tree", "path"))
  _positive(c, "learn.row_length", "learn.micro_rows", "learn.minibatches", "learn.clip_dual")
  _positive(c, "learn.clip_low", "learn.clip_high")
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

  _positive(c, "train.steps", "train.eps", "train.grad_clip", "train.sampling_rounds", "train.keep")
  _positive(c, "train.checkpoint_every", "train.trees_every")
  for key in ("train.learning_rate", "train.warmup", "train.weight_decay"):
    _at_least(c, key, 0)
  for key in ("train.b1", "train.b2"):
    if not 0 <= _value(c, key) < 1:
      raise UserError(f"config.{key} = {_value(c, key)}: must be in [0, 1)")
  if not 0 <= c.train.final_rate <= 1:
    raise UserError(f"config.train.final_rate = {c.train.final_rate}: must be in [0, 1]")
  _positive(c, "eval.prompts", "eval.samples", "eval.temperature")
  _at_least(c, "eval.every", 0)
  _one_of(c, "eval.sampling", ("sequential", "tree"))
  return ml_collections.FrozenConfigDict(c)
