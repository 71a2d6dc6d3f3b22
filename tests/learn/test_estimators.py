"""The plain-Python oracle against worked numbers, the estimators against the oracle."""

import functools
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import oracle, toy
from treepo_jax.learn import estimators
from treepo_jax.rollout import tree as tree_lib

SHARED = Path(os.environ.get("TREEPO_SHARED", Path(__file__).parents[3] / "shared"))
VECTORS = SHARED / "spec" / "vectors" / "treepo_vectors.json"

published = pytest.mark.skipif(not VECTORS.exists(), reason=f"published vectors not at {VECTORS}")

FIGURE_3 = ["q#a", "q#b", "q#c#1#1", "q#c#1#2", "q#c#2#1", "q#c#2#2", "q#c#2#3", "q#c#3"]
FIGURE_3_REWARDS = [-1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0]


def close(got, expected, atol=1e-6):
  """Compares rows of unequal lengths."""
  assert [len(row) for row in got] == [len(row) for row in expected]
  np.testing.assert_allclose(np.concatenate(got), np.concatenate(expected), atol=atol)


# ------------------------------------------------------------------------------------------------
# The oracle itself.
# ------------------------------------------------------------------------------------------------

# Figure 3 of the paper, segment by segment.
SEGMENTS = {
  "segment": (
    {},
    [[-0.666667], [1.111111], [-0.257807, -0.330428, 0.0], [-0.257807, -0.330428, 0.0],
     [-0.257807, 0.739288, 0.629630], [-0.257807, 0.739288, 0.629630],
     [-0.257807, 0.739288, -1.259259], [-0.257807, -0.408860]],
  ),
  "segment with eta": (
    {"eta": 0.5},
    [[-0.666667], [1.111111], [-0.257807, -0.523784, -0.294118], [-0.257807, -0.523784, -0.294118],
     [-0.257807, 0.545933, 0.870370], [-0.257807, 0.545933, 0.870370],
     [-0.257807, 0.545933, -1.018519], [-0.257807, -0.537763]],
  ),
  "spo": (
    {},
    [[-0.950255], [1.382189], [-0.431934, -0.275173, 0.707107], [-0.431934, -0.275173, 0.707107],
     [-0.431934, 1.846148, -0.707107], [-0.431934, 1.846148, -0.707107],
     [-0.431934, 1.846148, -2.828427], [-0.431934, -0.275173]],
  ),
  # V: prompt -1/4, c -1/3, c1 -1, c2 1/3; for c2: (1/3 + 1/4 + 1/3 + 1/3) / sqrt 3
  "treerl": (
    {},
    [[-1.5], [2.5], [-1 / 6 / 6**0.5, -17 / 12 / 2**0.5, -0.75],
     [-1 / 6 / 6**0.5, -17 / 12 / 2**0.5, -0.75], [-1 / 6 / 6**0.5, 1.25 / 3**0.5, 23 / 12],
     [-1 / 6 / 6**0.5, 1.25 / 3**0.5, 23 / 12], [-1 / 6 / 6**0.5, 1.25 / 3**0.5, -25 / 12],
     [-1 / 6 / 6**0.5, -17 / 12]],
  ),
  "vineppo": (
    {},
    [[-0.75], [1.25], [-1 / 12, -2 / 3, 0], [-1 / 12, -2 / 3, 0], [-1 / 12, 2 / 3, 2 / 3],
     [-1 / 12, 2 / 3, 2 / 3], [-1 / 12, 2 / 3, -4 / 3], [-1 / 12, -2 / 3]],
  ),
  # the values of spo before they are differenced, and an equal pair
  "treerpo": (
    {},
    [[-0.950254], [1.382187], [-0.431933, -0.707106, 0], [-0.431933, -0.707106, 0],
     [-0.431933, 1.414211, 0.707106], [-0.431933, 1.414211, 0.707106],
     [-0.431933, 1.414211, -1.414212], [-0.431933, -0.707106]],
  ),
}  # fmt: skip

# Figure 3, one number a trajectory.
TRAJECTORIES = {
  "centred": [-0.75, 1.25, -0.75, -0.75, 1.25, 1.25, -0.75, -0.75],
  "rloo": [-6 / 7, 10 / 7, -6 / 7, -6 / 7, 10 / 7, 10 / 7, -6 / 7, -6 / 7],
  "reward": FIGURE_3_REWARDS,
  # std of the prompt sqrt(15 / 14), of the six below c sqrt(16 / 15)
  "tree_grpo": [
    -0.724568, 1.207614, -1.370065, -1.370065, 2.498607, 2.498607, -1.370065, -1.370065,
  ],
}  # fmt: skip


@pytest.mark.parametrize("name", SEGMENTS)
def test_the_oracle_gives_figure_3_by_segments(name):
  switches, expected = SEGMENTS[name]
  estimate = getattr(oracle, name.split()[0])
  close(estimate(FIGURE_3, FIGURE_3_REWARDS, **switches), expected, 2e-6)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_the_oracle_gives_figure_3_by_trajectories(name):
  got = getattr(oracle, name)(FIGURE_3, FIGURE_3_REWARDS)
  close(got, oracle.repeated(FIGURE_3, TRAJECTORIES[name]), 2e-6)


def test_the_oracle_leaves_the_prompts_group_out():
  got = oracle.advantages(FIGURE_3, FIGURE_3_REWARDS, root=False)
  expected = [0, 0, -1 / 3, -1 / 3, 1, 1, -1, -2 / 3]  # c21: (4/3 + 2/3) / 2
  np.testing.assert_allclose(got, expected, atol=1e-9)


def test_the_oracle_counts_who_ended_in_one_leaf_as_a_group():
  keys, rewards = ["q#a", "q#a", "q#b"], [1.0, -1.0, 0.0]
  assert oracle.advantages(keys, rewards) == [1.0, -1.0, 0.0]
  assert oracle.vineppo(keys, rewards) == [[0.0], [0.0], [0.0]]
  # weight 3 stands for three: mean 2/5 of the prompt, 1/2 of the pair
  got = oracle.advantages(keys, rewards, [3.0, 1.0, 1.0], aggregate="group_size")
  np.testing.assert_allclose(got, [(5 * 0.6 + 4 * 0.5) / 9, (-5 * 1.4 - 4 * 1.5) / 9, -0.4])


@pytest.mark.parametrize("name", ["centred", "segment", "spo", "treerpo", "vineppo"])
def test_a_weight_of_two_in_the_oracle_is_a_trajectory_listed_twice(name):
  estimate = getattr(oracle, name)
  twice = estimate([*FIGURE_3, FIGURE_3[4]], [*FIGURE_3_REWARDS, 1.0])
  weighed = estimate(FIGURE_3, FIGURE_3_REWARDS, [1, 1, 1, 1, 2, 1, 1, 1])
  close(twice[:-1], weighed)


def test_the_oracle_normalises():
  keys, rewards = ["q#a", "q#b", "u#a"], [1.0, -2.0, 1.0]
  values, lengths = [[3.0, 1.0], [-1.0], [2.0]], [[1, 2], [1], [4]]
  # of the prompt: mean 0, 2 + 4 over 3 - 5 / 3, a lone trajectory's is 1
  np.testing.assert_allclose(
    oracle.deviations(keys, rewards, [2.0, 1.0, 1.0]), [4.5**0.5] * 2 + [1]
  )
  np.testing.assert_allclose(oracle.deviations(keys, rewards), [4.5**0.5] * 2 + [1])
  close(
    oracle.by_group(values, keys, rewards), [[2**0.5, 2**0.5 / 3], [-(2**0.5) / 3], [2.0]], 1e-5
  )
  # of the tokens 3 1 1 -1 2 2 2 2: mean 3/2, 14 - 18 + 8 * 9 / 4 - ... = 10 over 7
  close(
    oracle.by_token(values, lengths),
    [[x / (10 / 7) ** 0.5 for x in row] for row in [[1.5, -0.5], [-2.5], [0.5]]],
  )
  # of the trajectories' own means 5/3, -1, 2: mean 8/9
  variance = ((19 / 9) ** 2 / 3 + (1 / 9) ** 2 * 2 / 3 + (17 / 9) ** 2 + (10 / 9) ** 2) / 3
  close(
    oracle.by_leaf(values, lengths),
    [[x / variance**0.5 for x in row] for row in [[19 / 9, 1 / 9], [-17 / 9], [10 / 9]]],
  )


@pytest.mark.parametrize("over, expected", [("token", 2.5), ("sequence", 3), ("fixed", 10 / 6)])
def test_the_oracle_averages_over_tokens_trajectories_or_room(over, expected):
  assert oracle.average([[1, 2, 3], [4]], over, 3) == pytest.approx(expected)


def test_the_oracles_slopes_are_derivatives():
  t = {"new": [-1.0, -0.2, -3.0], "old": [-1.1, -1.2, -1.0], "advantage": [1.0, -0.5, 2.0]}
  moved = t | {"new": [x + 1e-6 for x in t["new"]]}
  for (loss, slope), (above, _) in zip(oracle.reinforce(t), oracle.reinforce(moved), strict=True):
    assert (above - loss) / 1e-6 == pytest.approx(slope)
  # r = exp(0.1), exp(1), exp(-2): within, above 1.28, below 0.8
  np.testing.assert_allclose([slope for _, slope in oracle.cispo(t)], [-math.exp(0.1), 0.64, -1.6])
  np.testing.assert_allclose([x for x, _ in oracle.cispo(t)], [math.exp(0.1), -0.128, 4.8])
  # the mean of new - old is -0.3, below 0.8: a credit's loss is not clipped there, a blame's is
  s = math.exp(-0.3)
  np.testing.assert_allclose(oracle.gspo(t), [-s, 0.5 * 0.8, -2 * s])


def test_the_oracles_penalties_and_importance_weights():
  t = {"new": [-1.0, -2.0], "reference": [-1.5, -2.0], "old": [-1.0, -1.0], "rollout": [-2.0, -1.5]}
  assert oracle.kl(t, "k1") == [0.5, 0.0]
  assert oracle.kl(t, "k2") == [0.125, 0.0]
  assert oracle.kl(t, "k3") == pytest.approx([math.exp(-0.5) - 0.5, 0])
  assert oracle.importance(t, "token", 2.0) == pytest.approx([2.0, math.exp(0.5)])
  assert oracle.importance(t, "sequence", 9.0) == pytest.approx([math.exp(1.5)] * 2)
  assert oracle.importance(t, "sequence", 2.0) == [2.0, 2.0]


def test_the_oracle_shares_tokens():
  ratio = {"new": [0.3, 0.4], "old": [0.0, 0.0]}  # both above 1.28
  each = [
    ratio | {"token": ["a", "b"], "advantage": [2.0, 2.0]},
    ratio | {"token": ["a", "c"], "advantage": [-1.0, -1.0]},
  ]
  r, far = math.exp(0.3), math.exp(0.4)
  alone = {"b": (-2 * 1.28, 1), "c": (far, 1)}
  assert oracle.shared(each, "leaf") == {"a": (pytest.approx(-2.56 + r), 2)} | alone
  assert oracle.shared(each, "once") == {"a": (pytest.approx((-2.56 + r) / 2), 1)} | alone
  assert oracle.shared(each, "sum") == {"a": (pytest.approx(-1.28), 2)} | alone


@published
def test_the_oracle_gives_the_published_vectors():
  vectors = json.loads(VECTORS.read_text())
  for vector in vectors["tree_advantage"]:
    keys, lengths = vector["paths"], [[n] for n in vector["lengths"]]
    for case in vector["cases"]:
      switches = {"aggregate": case["strategy"], "reject": case["reject_zero_std_subgroups"]}
      raw = oracle.advantages(keys, vector["rewards"], **switches)
      np.testing.assert_allclose(raw, case["raw_per_trajectory"], atol=1e-7)
      white = oracle.by_token([[x] for x in raw], lengths)
      close(white, [[x] for x in case["whitened_per_trajectory"]])
  for vector in vectors["segment_advantage"]:
    keys, rewards = vector["paths"], vector["rewards"]
    for eta in (-1.0, 0.5):
      close(oracle.segment(keys, rewards, eta=eta), vector[f"segment_adv_eta_{eta}"], 1e-7)
    close(oracle.spo(keys, rewards), vector["spo_sibling_norm_segment_adv"], 1e-7)
    sums = [sum(row) for row in oracle.segment(keys, rewards)]
    np.testing.assert_allclose(sums, vector["modified_leaf_reward"], atol=1e-7)
  for case in vectors["ppo_dual_clip"]:
    t = {"new": [math.log(case["ratio"])], "old": [0.0], "advantage": [case["adv"]]}
    assert oracle.ppo(t) == pytest.approx([case["loss"]])
  for length, penalty in vectors["overlong"]["cases"]:
    assert oracle.overlong(length) == penalty


# ------------------------------------------------------------------------------------------------
# The estimators against the oracle.
# ------------------------------------------------------------------------------------------------

FORESTS, SLOTS = 200, 32
KINDS = ["equal", "weighted", "uneven"]
PLAIN = {"aggregate": "average", "reject": False, "repeat": True, "root": True}
SWITCHES = [
  {"aggregate": a, "reject": j, "repeat": p, "root": r}
  for a in ("average", "group_size")
  for j in (False, True)
  for p in (True, False)
  for r in (True, False)
]
NAMES = ["centred", "reward", "rloo", "tree_grpo", "spo", "treerl", "treerpo", "vineppo"]
CASES = [
  *((name, {}) for name in NAMES),
  *(("segment", {"eta": eta}) for eta in (0.0, 0.5)),
  *(("treepo", switches) for switches in SWITCHES),
]
# Divided by a deviation, however small, float32 keeps fewer digits. Where the rewards of a group
# are equal it must keep none: what rounding leaves of them is 0.01 and more once divided.
DIVIDED = {"tree_grpo", "treerpo", "spo", "grpo"}


def grpo(family):
  return estimators.centred(family) / (estimators.deviation(family) + estimators.EPS)


@functools.cache
def lifted(name, switches):
  fn = functools.partial(grpo if name == "grpo" else getattr(estimators, name), **dict(switches))
  return jax.jit(jax.vmap(lambda fields: fn(estimators.Family(**fields))))


def estimate(name, family, switches=None, dtype: type = np.float64):
  """Returns the advantages [B, W, N] of stacked trees; each estimator is compiled once."""
  cast = {k: x.astype(dtype) if x.dtype.kind == "f" else x for k, x in family.items()}
  with jax.enable_x64(dtype == np.float64):
    got = np.asarray(lifted(name, tuple((switches or {}).items()))(cast))
  assert got.dtype == dtype
  got = got[:, None, None] if got.ndim == 1 else got
  return np.broadcast_to(got, family["member"].shape)


def family_of(parent, leaves, reward, weight):
  """Returns the fields of stacked families: of each tree its rows' parents and its leaves.

  All are doubles that float32 can hold.
  """
  leaf = np.zeros((len(parent), SLOTS), np.int32)
  member = np.zeros((len(parent), SLOTS, parent.shape[1]))
  here = np.zeros((len(parent), SLOTS))
  for b, rows in enumerate(leaves):
    leaf[b, : len(rows)], here[b, : len(rows)] = rows, 1
    for w, row in enumerate(rows):
      while row != tree_lib.NO_PARENT:
        member[b, w, row] = 1
        row = parent[b, row]
  return {
    "reward": (reward * here).astype(np.float32).astype(float),
    "weight": (weight * here).astype(np.float32).astype(float),
    "member": member,
    "parent": parent,
    "leaf": leaf,
    "baseline": np.linspace(-1, 1, len(parent)).astype(np.float32).astype(float),
  }


@functools.cache
def forests(kind):
  """Returns stacked trees, and of each forest its keys, rewards and weights.

  Rewards are mostly 1 or -1, in every second forest numbers whose means float32 rounds.
  "uneven" returns some leaves only, and of those some several times, each time with a reward of its
  own.
  """
  parents, leaves, rewards, weights = [], [], [], []
  for seed in range(FORESTS):
    tree, rng = toy.random_trees(seed), np.random.default_rng(seed)
    levels = [1.0, -1.0, -1.5, 0.25] if seed % 2 else [0.93, -0.31, 0.127, -1.713]
    for parent, rows in zip(np.asarray(tree.parent), np.asarray(tree.leaves), strict=True):
      rows = rows[rows != tree_lib.NO_ROW]
      if kind == "uneven":
        rows = rows[: rng.integers(1, len(rows) + 1)]
        rows = np.concatenate([rows, rng.choice(rows, rng.integers(1, 9))])
      parents.append(parent)
      leaves.append(rows.tolist())
      rewards.append(rng.choice(levels, SLOTS, p=[0.4, 0.4, 0.1, 0.1]))
      weights.append(np.ones(SLOTS) if kind == "equal" else rng.uniform(0.5, 2, SLOTS))
  family = family_of(np.stack(parents), leaves, np.stack(rewards), np.stack(weights))
  each, trees = [], len(parents) // FORESTS
  for start in range(0, len(parents), trees):
    keys, own, by = [], [], []
    for b in range(start, start + trees):
      keys += oracle.keys(f"p{b}", parents[b].tolist(), leaves[b])
      own += family["reward"][b, : len(leaves[b])].tolist()
      by += family["weight"][b, : len(leaves[b])].tolist()
    each.append((keys, own, by))
  return family, each


def on_paths(got, each):
  """Returns [B, W, N] at the rows of each trajectory, in the order of the keys and segments."""
  slots, values = {}, []
  for keys, _, _ in each:
    for key in keys:
      prompt, *rows = key.split("#")
      b = int(prompt[1:])
      slots[b] = slots.get(b, -1) + 1
      values += [got[b, slots[b], int(row)] for row in rows]
  return np.asarray(values, float)


def compare(name, switches, kind, of_forest):
  """Compares to the oracle's rows of every forest, in both precisions."""
  family, each = forests(kind)
  expected = np.concatenate([np.concatenate(of_forest(*forest)) for forest in each])
  rough = 2e-4 if name in DIVIDED else 1e-6
  for dtype, tolerance in ((np.float64, 1e-8), (np.float32, rough)):
    got = on_paths(estimate(name, family, switches, dtype), each)
    error = np.abs(got - expected) / np.maximum(np.abs(expected), 1)
    assert error.max() <= tolerance, f"{dtype.__name__}: {(error > tolerance).mean():.2%} differ"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, switches", CASES, ids=str)
def test_equals_the_oracle_on_random_forests(name, switches, kind):
  compare(name, switches, kind, functools.partial(getattr(oracle, name), **switches))


@pytest.mark.parametrize("kind", KINDS)
def test_remax_equals_the_oracle_on_random_forests(kind):
  family, _ = forests(kind)
  baselines = {f"p{b}": x for b, x in enumerate(family["baseline"].tolist())}
  compare("remax", {}, kind, functools.partial(oracle.remax, baselines=baselines))


@pytest.mark.parametrize("kind", KINDS)
def test_deviation_equals_the_oracle_on_random_forests(kind):
  compare("deviation", {}, kind, lambda k, r, w: oracle.repeated(k, oracle.deviations(k, r, w)))
  compare("grpo", {}, kind, lambda k, r, w: oracle.by_group(oracle.centred(k, r, w), k, r, w))


# ------------------------------------------------------------------------------------------------
# What holds of every tree.
# ------------------------------------------------------------------------------------------------

PER_TRAJECTORY = ["treepo", "centred", "reward", "rloo", "remax"]
PER_SEGMENT = ["segment", "treerl", "vineppo"]  # linear in rewards; the others divide
EVERY = [*PER_TRAJECTORY, *PER_SEGMENT, "tree_grpo", "spo", "treerpo"]
DEFAULT = {"treepo": PLAIN, "segment": {"eta": 0.0}}
OTHERWISE = {"aggregate": "group_size", "reject": True, "repeat": False, "root": False}


def cases(names):
  """Returns estimators with their switches, those that have any in two ways."""
  each = [(name, DEFAULT.get(name, {})) for name in names]
  return [*each, ("treepo", OTHERWISE), ("segment", {"eta": 0.5})]


def several(family):
  return (family["weight"] > 0).sum(1) > 1


def masked(got, family):
  """Returns the advantages on paths, 0 elsewhere and for the prompt's row."""
  got = got * family["member"]
  got[:, :, 0] = 0
  return got


@pytest.mark.parametrize("name, switches", cases(EVERY), ids=str)
def test_the_order_of_trajectories_does_not_matter(name, switches):
  family, _ = forests("uneven")
  order = np.random.default_rng(0).permutation(SLOTS)
  per = ("reward", "weight", "member", "leaf")
  moved = {k: x[:, order] if k in per else x for k, x in family.items()}
  got = masked(estimate(name, moved, switches), moved)
  expected = masked(estimate(name, family, switches), family)[:, order]
  np.testing.assert_allclose(got, expected, atol=1e-8)


@pytest.mark.parametrize("name, switches", cases(EVERY), ids=str)
def test_where_rows_lie_does_not_matter(name, switches):
  family, _ = forests("uneven")
  trees, n = family["parent"].shape
  rows = np.arange(n) + (np.arange(n) > 2) * 4  # rows 3 to 6 are not taken
  parent = np.full((trees, n + 4), tree_lib.NO_PARENT, np.int32)
  parent[:, rows] = np.where(family["parent"] < 0, tree_lib.NO_PARENT, rows[family["parent"]])
  member = np.zeros((trees, SLOTS, n + 4))
  member[:, :, rows] = family["member"]
  moved = family | {"parent": parent, "member": member, "leaf": rows[family["leaf"]]}
  got = masked(estimate(name, moved, switches), moved)[:, :, rows]
  expected = masked(estimate(name, family, switches), family)
  np.testing.assert_allclose(got, expected, atol=1e-8)


NOT_SHIFTED = [name for name in EVERY if name not in ("reward", "remax", "spo")]


@pytest.mark.parametrize("name, switches", cases(NOT_SHIFTED), ids=str)
def test_a_constant_added_to_a_prompts_rewards_does_not_matter(name, switches):
  family, _ = forests("uneven")
  shift = np.linspace(-2, 2, len(family["parent"]))[:, None]
  moved = family | {"reward": family["reward"] + shift * (family["weight"] > 0)}
  got, expected = (masked(estimate(name, f, switches), f) for f in (moved, family))
  of = several(family)
  np.testing.assert_allclose(got[of], expected[of], atol=1e-8)


# SPO is neither: an only child has its value, others have theirs divided by a deviation.
@pytest.mark.parametrize("name, switches", cases(n for n in EVERY if n != "spo"), ids=str)
def test_larger_rewards_give_larger_advantages_or_the_same(name, switches):
  family, _ = forests("uneven")
  moved = family | {"reward": family["reward"] * 3, "baseline": family["baseline"] * 3}
  got, expected = (masked(estimate(name, f, switches), f) for f in (moved, family))
  by, tolerance = (1, 1e-3) if name in DIVIDED else (3, 1e-8)  # the deviation is added 1e-6
  np.testing.assert_allclose(got, expected * by, atol=tolerance)


@pytest.mark.parametrize("name, switches", cases(EVERY), ids=str)
def test_only_weights_relative_to_each_other_matter(name, switches):
  family, _ = forests("uneven")
  moved = family | {"weight": family["weight"] * 4}
  got, expected = (masked(estimate(name, f, switches), f) for f in (moved, family))
  by = 0.5 if name == "treerl" else 1  # over sqrt of the leaves
  np.testing.assert_allclose(got, expected * by, atol=1e-8)


@pytest.mark.parametrize(
  "name, by",
  [
    ("treepo", 1),
    ("centred", 1),
    ("rloo", 5 / 4),
    ("vineppo", 1),
    ("treerl", 2),
    ("segment", 5 / 6),
  ],
)
def test_a_flat_tree_is_the_mean_baseline(name, by):
  rewards = np.pad([1, -1, 0.5, -1, -2.25], (0, SLOTS - 5))[None]
  family = family_of(
    np.array([[tree_lib.NO_PARENT, 0, 0, 0, 0, 0]], np.int32),
    [[1, 2, 3, 4, 5]],
    rewards,
    np.ones((1, SLOTS)),
  )
  expected = (rewards[0, :5] - rewards[0, :5].mean()) * by
  for aggregate in ("average", "group_size"):
    switches = PLAIN | {"aggregate": aggregate} if name == "treepo" else DEFAULT.get(name)
    got = masked(estimate(name, family, switches), family)[0, :5].sum(1)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("aggregate", ["average", "group_size"])
def test_advantages_of_a_balanced_tree_sum_to_zero(aggregate):
  rewards = np.random.default_rng(0).normal(size=(9, SLOTS))
  parent = np.array([tree_lib.NO_PARENT, *(i // 2 for i in range(14))], np.int32)
  family = family_of(
    np.broadcast_to(parent, (9, 15)), [list(range(7, 15))] * 9, rewards, np.ones((9, SLOTS))
  )
  got = estimate("treepo", family, PLAIN | {"aggregate": aggregate})[:, :8, 0]
  assert np.abs(got).max() > 0.1
  np.testing.assert_allclose(got.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_signs_follow_plain_rewards_and_rejection_never_weakens(switches):
  family, _ = forests("uneven")
  plain = family | {"reward": np.sign(family["reward"])}
  got = estimate("treepo", plain, switches)[:, :, 0]
  assert ((np.sign(got) == plain["reward"]) | (np.abs(got) < 1e-12)).all()
  rejecting = estimate("treepo", plain, switches | {"reject": True})[:, :, 0]
  assert (np.abs(rejecting) >= np.abs(got) - 1e-12).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name, switches", cases([*NOT_SHIFTED, "grpo"]), ids=str)
def test_equal_rewards_give_no_advantage(name, switches, dtype):
  family, _ = forests("uneven")
  equal = family | {"reward": np.float64(np.float32(0.9)) * (family["weight"] > 0)}
  got = masked(estimate(name, equal, switches, dtype), family)
  np.testing.assert_allclose(got[several(family)], 0, atol=2e-6)


def test_along_a_path_segments_sum_to_the_trajectorys_credit():
  family, _ = forests("weighted")
  reward, weight, member = family["reward"], family["weight"], family["member"]
  mass = np.einsum("bw,bwn->bn", weight, member)
  value = np.einsum("bw,bwn->bn", weight * reward, member) / np.maximum(mass, 1e-9)
  here = weight > 0
  sums = masked(estimate("vineppo", family), family).sum(2)
  np.testing.assert_allclose(sums, (reward - value[:, :1]) * here, atol=1e-12)
  sums = masked(estimate("segment", family, {"eta": 0.0}), family).sum(2)
  sizes = mass[:, None] * member
  terms = (sizes * (reward[..., None] - value[:, None])).sum(2)
  np.testing.assert_allclose(sums, terms / np.where(here, sizes.sum(2), 1), atol=1e-12)


def test_advantages_of_siblings_sum_to_zero():
  family, _ = forests("uneven")
  parent, here = family["parent"], family["member"].max(1) > 0
  mass = np.einsum("bw,bwn->bn", family["weight"], family["member"])
  for name, size in (("vineppo", mass), ("treerpo", here)):
    got = (masked(estimate(name, family), family)).sum(1) / np.maximum(family["member"].sum(1), 1)
    assert np.abs(got).max() > 0.1
    sums = np.zeros(parent.shape)
    for b, n in zip(*np.nonzero(parent >= 0), strict=True):
      sums[b, parent[b, n]] += got[b, n] * size[b, n]
    np.testing.assert_allclose(sums, 0, atol=1e-9)
