"""Prompts to scored trees: one rollout with its rewards, its figures and its answers."""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from treepo_jax.rollout import branching, grow
from treepo_jax.rollout import tree as tree_lib
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

  step: of training; the temperature of branching by log-prob may follow it. room: of grow.
  """
  begun = time.perf_counter()
  longest, heat = shape.response_length, branching.heat(step, config)

  def grade(texts: list[str], owners: Sequence[int], cheap: bool) -> rewards.Grades:
    asked = [prompts[b] for b in owners]
    golds, graders = [p.gold for p in asked], [p.grader for p in asked]
    questions = [p.text for p in asked]
    return rewards.grade(texts, golds, graders, questions, config=config, cheap=cheap)

  def judge(ended: Sequence[tuple[int, list[int]]]) -> np.ndarray:
    texts = [setup.text.decode(tokens) for _, tokens in ended]
    grades = grade(texts, [b for b, _ in ended], cheap=True)
    lengths = np.array([len(tokens) for _, tokens in ended])
    return rewards.score(grades, lengths, longest=longest, config=config)

  tree, cost = grow.grow(
    params,
    key,
    prompts,
    graph=setup.graph,
    table=setup.table,
    shape=shape,
    mesh=setup.mesh,
    heat=heat,
    judge=judge,
    room=room,
  )
  grown = time.perf_counter()
  owner, slot = np.nonzero(tree.leaves != tree_lib.NO_ROW)
  rows = np.asarray(tree.leaves)[owner, slot]
  ended = list(zip(owner.tolist(), rows.tolist(), strict=True))
  texts = [setup.text.decode(tree_lib.response(tree, b, row)) for b, row in ended]
  grades = grade(texts, owner.tolist(), cheap=False)
  reward = np.zeros(tree.parent.shape, np.float32)
  before = np.asarray(tree.depth)[owner, rows] - 1
  tokens = before * tree.tokens.shape[2] + np.asarray(tree.length)[owner, rows]
  reward[owner, rows] = rewards.score(grades, tokens, longest=longest, config=config)
  graded = time.perf_counter()

  def by_tree(values) -> list[list]:
    split = np.searchsorted(owner, np.arange(1, len(prompts)))
    return [list(values[a:b]) for a, b in zip([0, *split], [*split, len(owner)], strict=True)]

  correct = by_tree([bool(c) for c in grades.correct])
  figures = cost | _figures(tree, owner, rows, correct, cost)
  figures |= {
    "reward/mean": float(reward[owner, rows].mean()),
    "reward/grader_errors": float(grades.errors),
    "rollout/allocation_temperature": heat,
    "time/rollout": grown - begun,
    "time/reward": graded - grown,
  }
  return Rollout(
    tree, list(prompts), reward, correct, by_tree(grades.extracted), by_tree(texts), figures
  )


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
