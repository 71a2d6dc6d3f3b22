"""Trees as arrays: rows in order, ancestors, attaching, and room for the largest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import rollout_oracle as oracle
from tests import toy
from treepo_jax.rollout import tree as tree_lib

ATTACH = jax.jit(tree_lib.attach)


def one(prompts: int = 1, width: int = 4, depth: int = 3, segment: int = 2) -> tree_lib.Tree:
  """Returns a tree of its prompt alone."""
  tree = tree_lib.create(
    jnp.array([[7, 8, 0]] * prompts),
    jnp.full(prompts, 2),
    jnp.arange(prompts, dtype=jnp.uint32),
    width=width,
    depth=depth,
    segment=segment,
  )
  return jax.tree.map(lambda x: x[0], tree)


def test_a_new_tree_is_its_prompt():
  tree = one()
  assert tree.parent.shape == (1 + 4 * 3,) and tree.tokens.shape == (13, 2)
  assert tree.size == 1 and tree.status.tolist() == [tree_lib.INNER] + [tree_lib.UNUSED] * 12
  assert set(tree.parent.tolist()) == {tree_lib.NO_PARENT}
  assert tree.leaves.tolist() == [tree_lib.NO_ROW] * 4 and tree_lib.finished(tree) == 0


def test_attach_takes_rows_in_order():
  tree = ATTACH(one(), jnp.array([0, -1, 0, -1]), jnp.array([-1, -1, -1, -1]))
  assert tree.size == 3 and tree.parent[:4].tolist() == [-1, 0, 0, -1]
  tree = ATTACH(tree, jnp.array([-1, 2, 0, 2]), jnp.array([9, -1, 1, 5]))
  assert tree.parent[:7].tolist() == [-1, 0, 0, 2, 0, 2, -1]
  assert tree.depth[:7].tolist() == [0, 1, 1, 2, 1, 2, 0]
  assert tree.source[:7].tolist() == [-1, -1, -1, -1, 1, 5, -1]
  opened, inner, unused = tree_lib.OPEN, tree_lib.INNER, tree_lib.UNUSED
  assert tree.status[:7].tolist() == [inner, opened, inner, opened, opened, opened, unused]


def test_nothing_attached_changes_nothing():
  before = ATTACH(one(), jnp.array([0, 0, 0, 0]), jnp.full(4, -1))
  after = ATTACH(before, jnp.full(4, tree_lib.NO_PARENT), jnp.full(4, 3))
  jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_there_is_room_for_paths_that_share_nothing(width, depth):
  tree, parent = one(width=width, depth=depth), np.zeros(width, int)
  for _ in range(depth):
    tree = tree_lib.attach(tree, jnp.asarray(parent, jnp.int32), jnp.full(width, -1))
    parent = np.arange(int(tree.size) - width, int(tree.size))
  assert tree.size == tree_lib.capacity(width, depth) == tree.parent.shape[0]
  assert tree.depth[-width:].tolist() == [depth] * width


@functools.cache
def _ancestors():
  return jax.jit(tree_lib.ancestors)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 8, 9, 33]), st.floats(0, 1))
def test_ancestors_are_those_of_walking_up(seed, rows, reach):
  random = np.random.default_rng(seed)
  parent = [-1, *(int(i - 1 - random.integers(0, 1 + reach * (i - 1))) for i in range(1, rows))]
  taken = random.integers(1, rows + 1)
  parent = parent[:taken] + [-1] * (rows - taken)
  found = np.asarray(_ancestors()(jnp.array(parent, jnp.int32)))
  for row in range(rows):
    above = {row, *oracle.path(parent, row)} | ({0} if row < taken else set())
    assert set(np.flatnonzero(found[row]).tolist()) == above


def test_paths_and_responses():
  tree = jax.tree.map(np.asarray, toy.random_trees(3))
  for b, leaf, rows in toy.trajectories(tree):
    assert tree_lib.path(tree, b, leaf) == rows == oracle.path(tree.parent[b].tolist(), leaf)
    said = [t for r in rows for t in tree.tokens[b, r, : tree.length[b, r]].tolist()]
    assert tree_lib.response(tree, b, leaf) == said and 0 not in said
  assert tree_lib.path(tree, 0, 0) == [] == tree_lib.response(tree, 0, 0)


def test_merging_takes_twins_out_and_keeps_every_trajectory():
  # 3 is the twin of 2, 6 that of 5: 0 - 1, 0 - 2 - (5, 4), 0 - 3 - 6; 4 grew where 6 was cut
  tree = tree_lib.create(
    jnp.ones((1, 2), jnp.int32),
    jnp.array([2]),
    jnp.array([9], jnp.uint32),
    width=4,
    depth=2,
    segment=1,
  )
  tree = jax.tree.map(lambda x: np.array(x[0]), tree)
  tree.parent[:7] = [-1, 0, 0, 0, 2, 2, 3]
  tree.tokens[:7, 0] = [0, 11, 12, 12, 14, 15, 15]
  tree.log_probs[:], tree.sampled_log_probs[:] = -tree.tokens, -2.0 * tree.tokens
  tree.length[1:7], tree.depth[:7] = 1, [0, 1, 1, 1, 2, 2, 2]
  inner, ended = tree_lib.INNER, tree_lib.EOS
  tree.status[:7] = [inner, ended, inner, inner, ended, ended, ended]
  tree.source[4] = 6
  tree.leaves[:] = [1, 5, 6, 4]
  twin = np.full(tree.parent.shape, tree_lib.NO_ROW, np.int32)
  twin[3], twin[6] = 2, 5
  tree = dataclasses.replace(jax.tree.map(jnp.asarray, tree), size=jnp.asarray(7, jnp.int32))
  found = jax.jit(tree_lib.merge)(tree, jnp.asarray(twin))
  assert found.size == 5
  assert found.parent.tolist() == [-1, 0, 0, 2, 2, -1, -1, -1, -1]
  assert found.tokens[:, 0].tolist() == [0, 11, 12, 14, 15, 0, 0, 0, 0]
  np.testing.assert_array_equal(found.log_probs, -found.tokens)
  np.testing.assert_array_equal(found.sampled_log_probs, -2.0 * found.tokens)
  assert found.source.tolist() == [-1, -1, -1, 4, -1, -1, -1, -1, -1]
  assert found.leaves.tolist() == [1, 4, 4, 3]
  assert found.status.tolist() == [inner, ended, inner, ended, ended, 0, 0, 0, 0]
  same = jax.jit(tree_lib.merge)(tree, jnp.full(twin.shape, tree_lib.NO_ROW))
  jax.tree.map(np.testing.assert_array_equal, same, tree)
