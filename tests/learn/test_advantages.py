"""Advantages against worked numbers, the plain-Python oracle and the estimator's invariants."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests import oracle, toy
from treepo_jax import config as config_lib
from treepo_jax.learn import advantages
from treepo_jax.rollout import tree as tree_lib

SHARED = Path(os.environ.get("TREEPO_SHARED", Path(__file__).parents[3] / "shared"))
VECTORS = SHARED / "spec" / "vectors" / "treepo_vectors.json"

FIGURE_3 = ["q#a", "q#b", "q#c#1#1", "q#c#1#2", "q#c#2#1", "q#c#2#2", "q#c#2#3", "q#c#3"]
FIGURE_3_REWARDS = [-1, 1, -1, -1, 1, 1, -1, -1]

# name: trajectories, rewards, {(aggregate, reject, repeat): raw advantages}
WORKED = {
  "figure 3 of the paper": (
    FIGURE_3,
    FIGURE_3_REWARDS,
    {
      # c22: 1 - (-0.25) for the prompt, 1 - (-1/3) for c, 1 - 1/3 for c2; their mean is 1.08333
      ("average", False, True): [
        -0.75, 1.25, -0.4722222, -0.4722222, 1.0833333, 1.0833333, -0.9166667, -0.7083333,
      ],
      ("average", True, True): [
        -0.75, 1.25, -0.7083333, -0.7083333, 1.0833333, 1.0833333, -0.9166667, -0.7083333,
      ],
      # c22: (8 * 1.25 + 6 * 1.33333 + 3 * 0.66667) / 17
      ("group_size", False, True): [
        -0.75, 1.25, -0.625, -0.625, 1.1764706, 1.1764706, -0.8235294, -0.7142857,
      ],
      ("group_size", True, True): [
        -0.75, 1.25, -0.7142857, -0.7142857, 1.1764706, 1.1764706, -0.8235294, -0.7142857,
      ],
    },
  ),
  # The pair is a sub-group at depth 1 and, unsplit, again at depth 2: terms 4/3, 1, 1.
  "a sub-group that does not split": (
    ["u#a#b#1", "u#a#b#2", "u#c"],
    [1, -1, -1],
    {
      ("average", False, True): [1.1111111, -0.8888889, -0.6666667],
      ("average", False, False): [1.1666667, -0.8333333, -0.6666667],
      ("group_size", False, True): [8 / 7, -6 / 7, -2 / 3],
    },
  ),
  "binary to depth 3": (
    [f"u#{i // 4}#{i // 2}#{i}" for i in range(8)],
    [1, 1, 1, -1, -1, -1, -1, -1],
    {
      ("average", False, True): [
        0.5833333, 0.5833333, 0.9166667, -1.0833333, -0.25, -0.25, -0.25, -0.25,
      ]
    },
  ),
  "nothing shared": (
    ["u#1", "u#2", "u#3", "u#4"],
    [1, -1, -1, -1],
    {("average", False, True): [1.5, -0.5, -0.5, -0.5]},
  ),
  "a prompt with one trajectory": (
    ["u#1", "v#1", "v#2"],
    [-1, 1, -1],
    {("average", False, True): [-1, 1, -1]},
  ),
}  # fmt: skip

# Figure 3 by lengths of its trajectories: whitened advantages.
WHITENED = {
  (1, 1, 1, 1, 1, 1, 1, 1): [
    -0.806004, 1.309068, -0.512244, -0.512244, 1.132812, 1.132812, -0.982260, -0.761940,
  ],
  (3, 1, 2, 2, 4, 4, 2, 1): [
    -1.002762, 1.176394, -0.700102, -0.700102, 0.994798, 0.994798, -1.184359, -0.957363,
  ],
}  # fmt: skip

SWITCHES = [
  (a, j, p) for a in ("average", "group_size") for j in (False, True) for p in (True, False)
]


def settings(aggregate="average", reject=False, repeat=True, estimator="treepo"):
  c: Any = config_lib.default()
  c.advantage.estimator, c.advantage.aggregate = estimator, aggregate
  c.advantage.reject, c.advantage.repeat = reject, repeat
  return ml_collections.FrozenConfigDict(c)


def forest(trajectories, lengths=None):
  """Returns the trees of the keys, padded, and where each trajectory's leaf is, (tree, row)."""
  prompts = list(dict.fromkeys(key.split("#")[0] for key in trajectories))
  rows = [{(): 0} for _ in prompts]
  where = []
  for key in trajectories:
    prompt, *parts = key.split("#")
    tree = rows[prompts.index(prompt)]
    for d in range(1, len(parts) + 1):
      tree.setdefault(tuple(parts[:d]), len(tree))
    where.append((prompts.index(prompt), tree[tuple(parts)]))
  b, n, w = 3, 20, 10  # one shape for all, with rows, slots and trees that are not taken
  parent, depth = np.full((b, n), tree_lib.NO_PARENT), np.zeros((b, n), int)
  leaves, length = np.full((b, w), tree_lib.NO_ROW), np.zeros((b, n), int)
  for i, tree in enumerate(rows):
    for parts, row in tree.items():
      if parts:
        parent[i, row], depth[i, row] = tree[parts[:-1]], len(parts)
  for i, (tree, row) in enumerate(where):
    leaves[tree, i] = row
    length[tree, row] = lengths[i] if lengths else 1
  empty = jnp.zeros((b, n, 1))
  tree = tree_lib.Tree(
    prompt=jnp.ones((b, 1), jnp.int32),
    prompt_length=jnp.ones(b, jnp.int32),
    prompt_id=jnp.arange(b, dtype=jnp.uint32),
    tokens=empty.astype(jnp.int32),
    log_probs=empty,
    sampled_log_probs=empty,
    length=jnp.asarray(length),
    parent=jnp.asarray(parent),
    depth=jnp.asarray(depth),
    status=jnp.zeros((b, n), jnp.int32),
    source=jnp.zeros((b, n), jnp.int32),
    size=jnp.full(b, n),
    leaves=jnp.asarray(leaves),
  )
  # of each trajectory: its tree, its place among the leaves and its row
  where = [(tree, i, row) for i, (tree, row) in enumerate(where)]
  return tree, tuple(np.transpose(where))


def estimate(trajectories, rewards, lengths=None, **switches):
  """Returns raw and whitened advantages in the order of the trajectories."""
  tree, where = forest(trajectories, lengths)
  reward = np.zeros(tree.parent.shape, np.float32)
  reward[where[0], where[2]] = rewards
  got = advantages.estimate(tree, jnp.asarray(reward), config=settings(**switches))
  return np.asarray(got.raw)[where], np.asarray(got.white)[where]


@pytest.mark.parametrize("name", WORKED)
def test_worked_numbers(name):
  trajectories, rewards, cases = WORKED[name]
  for (aggregate, reject, repeat), expected in cases.items():
    raw, _ = estimate(trajectories, rewards, aggregate=aggregate, reject=reject, repeat=repeat)
    np.testing.assert_allclose(raw, expected, atol=1e-6)


@pytest.mark.parametrize("lengths", WHITENED)
def test_whitening_weighs_trajectories_by_their_tokens(lengths):
  _, white = estimate(FIGURE_3, FIGURE_3_REWARDS, list(lengths))
  np.testing.assert_allclose(white, WHITENED[lengths], atol=2e-6)


@pytest.mark.skipif(not VECTORS.exists(), reason=f"published vectors not at {VECTORS}")
def test_published_vectors():
  for vector in json.loads(VECTORS.read_text())["tree_advantage"]:
    for case in vector["cases"]:
      raw, white = estimate(
        vector["paths"],
        vector["rewards"],
        vector["lengths"],
        aggregate=case["strategy"],
        reject=case["reject_zero_std_subgroups"],
      )
      np.testing.assert_allclose(raw, case["raw_per_trajectory"], atol=1e-6)
      np.testing.assert_allclose(white, case["whitened_per_trajectory"], atol=2e-6)


@pytest.mark.parametrize("switches", [*SWITCHES, "grpo"], ids=str)
def test_equals_the_oracle_on_random_forests(switches):
  config = settings(estimator="grpo") if switches == "grpo" else settings(*switches)
  for seed in range(200):
    tree = toy.random_trees(seed)
    reward = toy.random_rewards(seed, tree)
    got = advantages.estimate(tree, jnp.asarray(reward), config=config)
    paths = toy.trajectories(tree)
    keys = ["#".join(map(str, [f"p{b}", *rows])) for b, _, rows in paths]
    where = leaves_of(tree)
    rewards = reward[where[0], where[2]].tolist()
    if switches == "grpo":
      mean = {}
      for prompt in {key.split("#")[0] for key in keys}:
        group = [r for k, r in zip(keys, rewards, strict=True) if k.split("#")[0] == prompt]
        mean[prompt] = sum(group) / len(group) if len(group) > 1 else 0.0
      expected = [r - mean[k.split("#")[0]] for k, r in zip(keys, rewards, strict=True)]
      white = oracle.grpo(keys, rewards)
    else:
      aggregate, reject, repeat = switches
      expected = oracle.advantages(keys, rewards, aggregate=aggregate, reject=reject, repeat=repeat)
      lengths = [int(np.asarray(tree.length)[b, rows].sum()) for b, _, rows in paths]
      white = oracle.whiten(expected, lengths)
    np.testing.assert_allclose(np.asarray(got.raw)[where], expected, atol=1e-6)
    np.testing.assert_allclose(np.asarray(got.white)[where], white, atol=5e-6)
    # One advantage a trajectory, along its path alone.
    on_path = np.asarray(got.weight) > 0
    for values in (np.asarray(got.raw), np.asarray(got.white)):
      assert not values[~on_path].any()
      leaf = np.zeros(on_path.shape[:2], np.float32)
      leaf[where[:2]] = values[where]
      np.testing.assert_array_equal(values, leaf[..., None] * on_path)
    for (b, _, rows), w in zip(paths, where[1], strict=True):
      assert np.nonzero(on_path[b, w])[0].tolist() == rows


def leaves_of(tree):
  """Returns tree, place among the leaves and row of every returned trajectory, as three arrays."""
  owner, place = np.nonzero(np.asarray(tree.leaves) != tree_lib.NO_ROW)
  return owner, place, np.asarray(tree.leaves)[owner, place]


def at_leaves(tree, values):
  """Returns what trajectories have at their leaves, by the leaf's row."""
  owner, place, row = leaves_of(tree)
  rows = np.zeros(tree.parent.shape, np.float32)
  rows[owner, row] = np.asarray(values)[owner, place, row]
  return rows


def random_raw(seed, reward=None, **switches):
  tree = toy.random_trees(seed)
  reward = toy.random_rewards(seed, tree) if reward is None else reward(tree)
  got = advantages.estimate(tree, jnp.asarray(reward), config=settings(**switches))
  return tree, np.asarray(reward), at_leaves(tree, got.raw), at_leaves(tree, got.white)


def returned(tree):
  return np.asarray(tree.status) >= tree_lib.EOS


@pytest.mark.parametrize("seed", range(5))
def test_shift_and_scale_of_a_prompts_rewards(seed):
  tree, reward, raw, white = random_raw(seed)
  several = (np.asarray(tree.leaves) != tree_lib.NO_ROW).sum(1) > 1
  shift = np.arange(1.0, 1 + len(several), dtype=np.float32)[:, None]
  moved = random_raw(seed, lambda _: (reward + shift) * returned(tree))[2]
  np.testing.assert_allclose(moved[several], raw[several], atol=1e-5)
  _, _, larger, same = random_raw(seed, lambda _: reward * 3)
  np.testing.assert_allclose(larger, raw * 3, atol=1e-5)
  np.testing.assert_allclose(same, white, atol=1e-5)


def test_a_flat_tree_is_the_mean_baseline_however_aggregated():
  rewards = np.asarray([1, -1, 0.5, -1, -2.25])
  for aggregate in ("average", "group_size"):
    raw, _ = estimate([f"q#{i}" for i in range(5)], rewards, aggregate=aggregate)
    np.testing.assert_allclose(raw, rewards - rewards.mean(), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_advantages_of_a_balanced_tree_sum_to_zero(seed):
  rewards = np.random.default_rng(seed).normal(size=8)
  raw, _ = estimate([f"u#{i // 4}#{i // 2}#{i}" for i in range(8)], rewards)
  assert abs(raw.sum()) < 1e-5
  unbalanced, _ = estimate(FIGURE_3, FIGURE_3_REWARDS)
  assert unbalanced.sum() == pytest.approx(0.097222, abs=1e-6)  # and of this one do not


@pytest.mark.parametrize("seed", range(5))
def test_signs_follow_plain_rewards_and_rejection_never_weakens(seed):
  def plain(tree):
    drawn = np.random.default_rng(seed).choice([-1.0, 1.0], tree.parent.shape)
    return (drawn * returned(tree)).astype(np.float32)

  _, reward, raw, _ = random_raw(seed, plain)
  assert ((np.sign(raw) == np.sign(reward)) | (np.abs(raw) < 1e-6)).all()
  rejecting = random_raw(seed, plain, reject=True)[2]
  assert (np.abs(rejecting) >= np.abs(raw) - 1e-6).all()


def test_a_prompt_of_equal_rewards_has_no_advantage():
  raw, white = estimate(FIGURE_3, [1] * 8)
  assert not raw.any() and not white.any()


@pytest.mark.parametrize("seed", range(5))
def test_whitened_tokens_have_mean_zero_and_variance_one(seed):
  tree, _, _, white = random_raw(seed)
  tokens = np.concatenate(
    [
      np.full(np.asarray(tree.length)[b, rows].sum(), white[b, leaf])
      for b, leaf, rows in toy.trajectories(tree)
    ]
  )
  assert abs(tokens.mean()) < 1e-5 and tokens.var(ddof=1) == pytest.approx(1, abs=1e-4)


def test_the_order_of_trees_and_of_finishing_does_not_matter():
  tree, reward, raw, white = random_raw(3)
  order = np.random.default_rng(0).permutation(len(reward))
  moved = jax.tree.map(lambda x: x[order], tree)
  moved = replace(moved, leaves=tree.leaves[order, ::-1])
  got = advantages.estimate(moved, jnp.asarray(reward[order]), config=settings())
  np.testing.assert_allclose(at_leaves(moved, got.raw), raw[order], atol=1e-6)
  np.testing.assert_allclose(at_leaves(moved, got.white), white[order], atol=1e-5)


def test_trees_without_trajectories_have_no_advantage():
  tree = toy.random_trees(0)
  tree = replace(tree, leaves=jnp.full_like(tree.leaves, tree_lib.NO_ROW))
  for estimator in config_lib.ESTIMATORS:
    got = advantages.estimate(
      tree, jnp.ones(tree.parent.shape), jnp.ones(4), config=settings(estimator=estimator)
    )
    for values in (got.raw, got.white, got.weight):
      assert not np.asarray(values).any()  # and no NaN


def test_every_name_has_an_estimator():
  assert tuple(advantages.ESTIMATORS) == config_lib.ESTIMATORS
  assert set(advantages.BY_SEGMENT) | set(advantages.SWITCHES) <= set(config_lib.ESTIMATORS)


def test_one_compilation_serves_equal_settings():
  tree = toy.random_trees(0)
  advantages.estimate(tree, jnp.ones(tree.parent.shape), config=settings())
  estimate: Any = advantages.estimate
  before = estimate._cache_size()
  advantages.estimate(toy.random_trees(1), jnp.ones(tree.parent.shape), config=settings())
  assert estimate._cache_size() == before
