"""Where trajectories are cut: only answers and EOS, uniformly, in random order, b branches each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests import rollout_oracle as oracle
from tests.rollout.test_branching import POLICY
from treepo_jax.rollout import fallback
from treepo_jax.rollout import tree as tree_lib

DEPTH = 5
FALSE_ALARM = 1e-4  # of a right sampler so many seeds fail


def forest(ends: list[tuple[int, int]], width: int) -> tree_lib.Tree:
  """Returns a tree whose trajectories end at (depth, status), each a path of its own."""
  tree = tree_lib.create(
    jnp.ones((1, 1), jnp.int32),
    jnp.ones(1, jnp.int32),
    jnp.zeros(1, jnp.uint32),
    width=width,
    depth=DEPTH,
    segment=1,
  )
  tree = jax.tree.map(lambda x: x[0], tree)
  leaves = []
  for depth, status in ends:
    row = 0
    for _ in range(depth):
      tree = tree_lib.attach(tree, jnp.full(1, row), jnp.full(1, -1))
      row = int(tree.size) - 1
    tree = dataclasses.replace(tree, status=tree.status.at[row].set(status))
    leaves.append(row)
  tree = dataclasses.replace(tree, length=(tree.depth > 0).astype(jnp.int32))
  return dataclasses.replace(tree, leaves=tree.leaves.at[: len(leaves)].set(jnp.array(leaves)))


@functools.cache
def _draws(branching: int, rules: fallback.Policy):
  branch = dataclasses.replace(POLICY, branching=branching, branching_max=branching)

  def run(tree, key, reward):
    width = tree.leaves.shape[0]
    draws = fallback.draw(key, width)
    room = width - tree_lib.finished(tree)
    cuts = fallback.regrow(tree, draws, reward, room, most=DEPTH, policy=rules, branch=branch)
    return cuts.parent, cuts.source

  return jax.jit(jax.vmap(run, in_axes=(None, 0, None)))


RANDOM = fallback.Policy(place="random", source="answered", window=0, windows=0, block=8, least=0)


def draws(
  tree: tree_lib.Tree, branching: int, count: int = 200, reward=None, **changes
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (parents, sources) of `count` fallbacks of the same tree, [count, W]."""
  keys = jax.random.split(jax.random.key(1), count)
  earned = np.zeros(tree.leaves.shape[0], np.float32)
  if reward is not None:
    earned[: len(reward)] = reward
  rules = dataclasses.replace(RANDOM, **changes)
  parent, source = _draws(branching, rules)(tree, keys, earned)
  return np.asarray(parent), np.asarray(source)


EOS, ANSWER, LENGTH, LOOP = tree_lib.EOS, tree_lib.ANSWER, tree_lib.LENGTH, tree_lib.REPETITION
MIXED = [(2, LENGTH), (3, EOS), (5, tree_lib.DEPTH), (1, ANSWER), (5, EOS), (4, LOOP)]


@pytest.mark.parametrize(("branching", "regrown"), [(1, 3), (2, 6), (3, 9), (4, 10)])
def test_every_source_is_cut_once_until_the_width_is_full(branching, regrown):
  tree = forest(MIXED, width=16)  # 10 are missing; 3 may be cut
  leaves = tree.leaves[:6].tolist()
  may = {leaves[1], leaves[3], leaves[4]}
  for parents, sources in zip(*draws(tree, branching), strict=True):
    assert (parents[regrown:] == -1).all() and (sources[regrown:] == -1).all()
    parts = [slice(i, min(i + branching, regrown)) for i in range(0, regrown, branching)]
    chosen = [sources[part] for part in parts]
    assert all(len(set(c.tolist())) == 1 for c in chosen)
    assert len({int(c[0]) for c in chosen}) == len(chosen) and {int(c[0]) for c in chosen} <= may
    for part in parts:  # siblings of one cut; never the trajectory itself
      path = [0, *oracle.path(tree.parent.tolist(), int(sources[part][0]))]
      assert len(set(parents[part].tolist())) == 1 and int(parents[part][0]) in path[:-1]


def test_sources_come_in_a_uniform_order():
  tree = forest(MIXED, width=16)
  _, sources = draws(tree, 2, 6000)
  orders, count = np.unique(sources[:, [0, 2, 4]], axis=0, return_counts=True)
  assert len(orders) == 6
  assert stats.chisquare(count).pvalue > FALSE_ALARM


@pytest.mark.parametrize("depth", range(1, DEPTH + 1))
def test_cuts_are_uniform_over_the_segments(depth):
  tree = forest([(depth, ANSWER)], width=3)
  parents, sources = draws(tree, 2, 4000)
  assert (sources == int(tree.leaves[0])).sum(1).tolist() == [2] * 4000
  kept = np.asarray(tree.depth)[parents[:, 0]]
  assert set(kept.tolist()) == set(range(depth))
  assert depth == 1 or stats.chisquare(np.bincount(kept)).pvalue > FALSE_ALARM


def test_cuts_of_different_sources_are_independent():
  tree = forest([(3, EOS), (3, EOS)], width=8)
  parents, sources = draws(tree, 1, 6000)
  kept = np.asarray(tree.depth)[parents[:, :2]]
  first = (sources[:, 0] == int(tree.leaves[0])).astype(int)
  cells = np.bincount(first * 9 + kept[:, 0] * 3 + kept[:, 1], minlength=18)
  assert stats.chisquare(cells).pvalue > FALSE_ALARM


@pytest.mark.parametrize("branching", [2, 7])
def test_without_a_source_the_prompt_is_grown_anew(branching):
  tree = forest([(2, LENGTH), (1, LOOP)], width=6)
  parents, sources = draws(tree, branching, 20)
  count = min(branching, 4)
  for found in (parents, sources):
    assert found.tolist() == [[0] * count + [-1] * (6 - count)] * 20


def test_a_full_tree_is_left_alone():
  tree = forest([(2, EOS), (1, ANSWER)], width=2)
  assert (np.stack(draws(tree, 2, 5)) == -1).all()


def test_ancestors_at_a_depth():
  tree = forest([(4, EOS), (2, EOS)], width=4)
  path = [0, *oracle.path(tree.parent.tolist(), int(tree.leaves[0]))]
  leaf = tree.leaves[0]
  found = fallback.ancestor_at(tree, jnp.full(6, leaf), jnp.arange(6), DEPTH)
  assert found.tolist() == path + [int(leaf)]


def test_no_failed_trajectory_is_preferred_to_a_finished_one():
  tree = forest([(2, LOOP), (2, ANSWER), (2, EOS), (2, tree_lib.DEPTH)], width=8)
  leaves = tree.leaves[:4].tolist()
  rank = {leaves[1]: 7, leaves[2]: 5, leaves[3]: 4, leaves[0]: 2}
  _, strict = draws(tree, 1, 5, source="strict")  # published: the reverse of its name
  assert strict[:, :4].tolist() == [[leaves[1], leaves[2], leaves[3], leaves[0]]] * 5
  _, first = draws(tree, 1, 6000, source="finished_first")
  names, count = np.unique(first[:, 0], return_counts=True)
  expected = np.array([rank[n] for n in names.tolist()]) / 18
  assert stats.chisquare(count, expected * 6000).pvalue > FALSE_ALARM


def test_longer_trajectories_are_cut_sooner():
  tree = forest([(1, ANSWER), (4, LENGTH), (5, EOS)], width=5)
  _, found = draws(tree, 1, 6000, source="longest")
  names, count = np.unique(found[:, 0], return_counts=True)
  assert names.tolist() == tree.leaves[:3].tolist()
  assert stats.chisquare(count, np.array([1, 4, 5]) * 600).pvalue > FALSE_ALARM


def test_regrowing_prefers_where_rewards_disagree():
  # Three trajectories each below two nodes: of one all are right, of the other one is.
  tree = tree_lib.create(
    jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32),
    width=12, depth=DEPTH, segment=1,
  )  # fmt: skip
  tree = jax.tree.map(lambda x: x[0], tree)
  tree = tree_lib.attach(tree, jnp.array([0, 0]), jnp.full(2, -1))
  tree = tree_lib.attach(tree, jnp.array([1, 1, 1, 2, 2, 2]), jnp.full(6, -1))
  leaves = jnp.arange(3, 9)
  tree = dataclasses.replace(
    tree,
    length=tree.length.at[1:9].set(1),
    status=tree.status.at[leaves].set(EOS),
    leaves=tree.leaves.at[:6].set(leaves),
  )
  parents, sources = draws(tree, 2, 4000, reward=[1, 1, 1, 1, -1, -1], place="disagree")
  names, count = np.unique(parents[:, 0], return_counts=True)
  assert names.tolist() == [0, 1, 2]
  spread = np.array([8 / 9, 0, 8 / 9]) + fallback.LEAST_SPREAD
  assert stats.chisquare(count, spread / spread.sum() * 4000).pvalue > FALSE_ALARM
  assert (parents[:, 0] == parents[:, 1]).all() and (parents[:, 6:] == -1).all()
  assert (sources[parents == 2] == 6).all() and (sources[parents == 0] == 3).all()
