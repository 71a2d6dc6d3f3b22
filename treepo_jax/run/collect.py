"""Prompts to scored trees: one rollout with its rewards, its figures and its answers.

Each host grows and grades the trees of its own prompts; then all know all of them.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from treepo_jax.model import mesh as mesh_lib
from treepo_jax.rollout import branching, grow
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.run import hosts, preemption
from treepo_jax.run.setup import Setup
from treepo_jax.tasks import rewards
from treepo_jax.tasks.data import Prompt


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Scored trees.

  Attributes:
    tree: on the host, in the prompts' order.
    prompts: B of them.
    reward: f32[B, N] at leaf rows, 0 elsewhere.
    correct: of each trajectory, by tree and in the order of its leaves.
    answers: what each trajectory gave as its answer, None without one; like `correct`.
    texts: what each trajectory wrote; like `correct`.
    metrics: the rollout's figures of a step.
    greedy: f32[B], reward of each prompt's greedy answer, where one was decoded.
  """

  tree: tree_lib.Tree
  prompts: list[Prompt]
  reward: np.ndarray
  correct: list[list[bool]]
  answers: list[list[str | None]]
  texts: list[list[str]]
  metrics: dict[str, float]
  greedy: np.ndarray | None = None


def collect(
  params: dict,
  key: jax.Array,
  prompts: Sequence[Prompt],
  *,
  setup: Setup,
  shape: grow.Settings,
  config,
  step: int = 0,
  room: int = 0,
) -> Rollout:
  """Grows a tree a prompt, grades every trajectory and counts what it cost.

  What policies by reward go by while trees grow waits for no algebra: an answer that only
  math-verify could call right is wrong to them.

  params: of hosts.local_copy. step: of training; the temperature of branching by log-prob may
  follow it. room: of grow, on all hosts. Raises Stopped, on every host, where one of them was told
  to stop.
  """
  longest, heat = shape.response_length, branching.heat(step, config)
  try:
    own = prompts[hosts.part(len(prompts))]
    room = -(-room // jax.process_count())
    part = _part(params, key, own, setup, shape, config, heat, room) if own else None
  except preemption.Stopped as stopped:
    part = stopped
  parts = [part for part in hosts.gather(part) if part is not None]
  for part in parts:
    if isinstance(part, preemption.Stopped):
      raise part

  tree = jax.tree.map(lambda *x: np.concatenate(x), *(part.tree for part in parts))
  owner, rows, tokens = _ends(tree)
  grades = rewards.join([part.grades for part in parts])
  reward = np.zeros(tree.parent.shape, np.float32)
  reward[owner, rows] = rewards.score(grades, tokens, longest=longest, config=config)

  def by_tree(values) -> list[list]:
    split = np.searchsorted(owner, np.arange(1, len(prompts)))
    return [list(values[a:b]) for a, b in zip([0, *split], [*split, len(owner)], strict=True)]

  correct = by_tree(grades.correct.tolist())
  cost = _cost([part.cost for part in parts])
  figures = cost | _figures(tree, owner, rows, correct, cost)
  figures |= {
    "reward/mean": float(reward[owner, rows].mean()),
    "reward/grader_errors": float(grades.errors),
    "rollout/allocation_temperature": heat,
    "time/rollout": max(part.rollout_seconds for part in parts),
    "time/reward": max(part.reward_seconds for part in parts),
  }
  answers = by_tree(grades.extracted)
  texts = by_tree([text for part in parts for text in part.texts])
  return Rollout(tree, list(prompts), reward, correct, answers, texts, figures)


@dataclasses.dataclass(frozen=True)
class _Part:
  """What one host grew: trees, then their trajectories' grades and texts; cost as grow tells it."""

  tree: tree_lib.Tree
  grades: rewards.Grades
  texts: list[str]
  cost: dict[str, float]
  rollout_seconds: float
  reward_seconds: float


def _part(
  params: dict,
  key: jax.Array,
  prompts: Sequence[Prompt],
  setup: Setup,
  shape: grow.Settings,
  config,
  heat: float,
  room: int,
) -> _Part:
  """Grows and grades this host's trees."""
  begun = time.perf_counter()

  def grade(texts: list[str], owners: Sequence[int], cheap: bool) -> rewards.Grades:
    asked = [prompts[b] for b in owners]
    golds, graders = [p.gold for p in asked], [p.grader for p in asked]
    questions = [p.text for p in asked]
    return rewards.grade(texts, golds, graders, questions, config=config, cheap=cheap)

  def judge(ended: Sequence[tuple[int, list[int]]]) -> np.ndarray:
    texts = [setup.text.decode(tokens) for _, tokens in ended]
    grades = grade(texts, [b for b, _ in ended], cheap=True)
    lengths = np.array([len(tokens) for _, tokens in ended])
    return rewards.score(grades, lengths, longest=shape.response_length, config=config)

  tree, cost = grow.grow(
    params,
    key,
    prompts,
    graph=setup.graph,
    table=setup.table,
    shape=shape,
    mesh=mesh_lib.local(setup.mesh),
    heat=heat,
    judge=judge,
    room=room,
    check=setup.stop.check,
  )
  grown = time.perf_counter()
  owner, rows, _ = _ends(tree)
  ended = list(zip(owner.tolist(), rows.tolist(), strict=True))
  texts = [setup.text.decode(tree_lib.response(tree, b, row)) for b, row in ended]
  grades = grade(texts, owner.tolist(), cheap=False)
  graded = time.perf_counter()
  return _Part(tree, grades, texts, cost, grown - begun, graded - grown)


def _ends(tree: tree_lib.Tree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns tree, row and number of tokens of every returned trajectory, tree by tree."""
  owner, slot = np.nonzero(tree.leaves != tree_lib.NO_ROW)
  rows = np.asarray(tree.leaves)[owner, slot]
  before = np.asarray(tree.depth)[owner, rows] - 1
  return owner, rows, before * tree.tokens.shape[2] + np.asarray(tree.length)[owner, rows]


def _cost(parts: list[dict[str, float]]) -> dict[str, float]:
  """Returns the cost of all hosts: counts add, figures by token are means over decoded tokens."""
  total = {name: sum(part[name] for part in parts) for name in parts[0]}
  decoded = max(total["rollout/tokens_decoded"], 1.0)
  total["rollout/row_occupancy"] = total["rollout/tokens_decoded"] / max(
    total["rollout/row_steps"], 1.0
  )
  for name in ("rollout/kv_bytes_read_per_token", "rollout/kv_bytes_flat_per_token"):
    read = sum(part[name] * part["rollout/tokens_decoded"] for part in parts)
    total[name] = read / decoded
  return total


def _figures(tree, owner, rows, correct, cost) -> dict[str, float]:
  """Returns the counts of the trees: tokens, fallbacks, why they ended, how prompts went."""
  depth = tree.depth[owner, rows]
  path = int(((depth - 1) * tree.tokens.shape[2] + tree.length[owner, rows]).sum())
  regrown = tree.source != tree_lib.NO_ROW
  stops = Counter(int(s) for s in tree.status[owner, rows])
  shares = [np.mean(c) for c in correct if c]
  return {
    "rollout/tokens_path": float(path),
    "rollout/decode_saving": 1 - cost["rollout/tokens_decoded"] / max(path, 1),
    "rollout/trajectories": float(len(rows)),
    "rollout/fallbacks": float(regrown.sum()),
    "rollout/fallback_prompt_ratio": float(regrown.any(1).mean()),
    "rollout/depth": float(depth.mean()),
    "rollout/pruned": float((tree.status == tree_lib.PRUNED).sum()),
    "rollout/dropped": float((tree.status == tree_lib.SHORT).sum()),
    "reward/solve_all": float(np.mean([s == 1 for s in shares])),
    "reward/solve_none": float(np.mean([s == 0 for s in shares])),
  } | {f"stop/{name}": stops[status] / len(rows) for status, name in tree_lib.STOP_NAMES.items()}
