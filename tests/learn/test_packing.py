"""Packed rows against the trees they came from: who sees whom, what precedes what, whose credit."""

import collections
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import toy
from treepo_jax import config as config_lib
from treepo_jax.learn import packing
from treepo_jax.rollout import tree as tree_lib

LONGEST = 5 + 6 * 4  # toy.random_trees: prompt, depth segments


def settings(row_length=64, micro_rows=1, minibatches=1, how="tree"):
  c: Any = config_lib.default()
  c.learn.row_length, c.learn.micro_rows = row_length, micro_rows
  c.learn.minibatches, c.learn.packing = minibatches, how
  return ml_collections.FrozenConfigDict(c)


def random_advantage(seed, tree):
  """Returns advantages of both signs at the leaves, some of them 0."""
  rng = np.random.default_rng(seed)
  drawn = rng.choice([0.0, 1.0, -1.0], tree.parent.shape) * rng.random(tree.parent.shape)
  return (drawn * (np.asarray(tree.status) >= tree_lib.EOS)).astype(np.float32)


def describe(tree, advantage):
  """Returns, by token id, the ids on the path to it, its log-prob, and the advantages through it.

  Token ids count up through the batch, so that each names one token of one node or prompt.
  """
  prompt, prompt_length = np.asarray(tree.prompt), np.asarray(tree.prompt_length)
  tokens, length = np.asarray(tree.tokens), np.asarray(tree.length)
  sampled = np.asarray(tree.log_probs)
  paths, log_probs, through = {}, {}, collections.defaultdict(list)
  for b, leaf, rows in toy.trajectories(tree):
    path = []
    for token in prompt[b, : prompt_length[b]]:
      path = [*path, int(token)]
      paths[path[-1]] = path
    for row in rows:
      for t in range(length[b, row]):
        path = [*path, int(tokens[b, row, t])]
        paths[path[-1]], log_probs[path[-1]] = path, sampled[b, row, t]
        through[path[-1]].append(float(advantage[b, leaf]))
  return paths, log_probs, dict(through)


def check(batches, tree, advantage, config):
  """Asserts all that a batch promises; returns how many tokens of context it repeats."""
  paths, log_probs, through = describe(tree, advantage)
  seen = collections.Counter()
  context = 0
  for batch in batches:
    micro_batches = batch.tokens.shape[0] / config.learn.micro_rows
    assert micro_batches == 2 ** round(np.log2(micro_batches))
    used = (batch.end > 0).any(1)
    assert (np.diff(used.astype(int)) <= 0).all()  # empty rows last
    repeated = np.zeros(len(used), int)
    for r, i in np.argwhere(batch.end == 0):  # padding: nobody's, and seen by nobody
      assert all(x[r, i] == 0 for x in batch.values() if x is not None and x.ndim == 2)
    for r, i in np.argwhere(batch.end > 0):
      token = int(batch.tokens[r, i])
      visible = batch.tokens[r, : i + 1][i < batch.end[r, : i + 1]].tolist()
      assert visible == paths[token]
      assert batch.positions[r, i] == len(visible) - 1
      if batch.count[r, i] == 0:
        assert batch.gain[r, i] == batch.cost[r, i] == batch.old_log_probs[r, i] == 0
        assert batch.positive[r, i] == batch.negative[r, i] == batch.previous[r, i] == 0
        repeated[r] += token in through
        continue
      assert batch.tokens[r, batch.previous[r, i]] == visible[-2]
      assert batch.previous[r, i] < i < batch.end[r, batch.previous[r, i]]
      assert batch.old_log_probs[r, i] == log_probs[token]
      seen[token] += int(batch.count[r, i])
      if config.learn.packing == "tree":
        credit = through[token]
      else:
        credit = [batch.gain[r, i] + batch.cost[r, i]]
        assert credit[0] in np.asarray(through[token], np.float32)
      assert batch.gain[r, i] == pytest.approx(sum(a for a in credit if a > 0), abs=1e-5)
      assert batch.cost[r, i] == pytest.approx(sum(a for a in credit if a < 0), abs=1e-5)
      assert batch.positive[r, i] == sum(a > 0 for a in credit)
      assert batch.negative[r, i] == sum(a < 0 for a in credit)
      assert batch.count[r, i] == len(credit)
    np.testing.assert_array_equal(batch.tokens_trained, (batch.count > 0).sum(1) + repeated)
    np.testing.assert_array_equal(batch.tokens_path, batch.count.sum(1))
    context += repeated.sum()
  assert seen == {token: len(credit) for token, credit in through.items()}
  return context


@given(
  seed=st.integers(0, 10_000),
  row_length=st.integers(LONGEST, 120),
  micro_rows=st.integers(1, 3),
  minibatches=st.integers(1, 3),
  how=st.sampled_from(["tree", "path"]),
)
def test_rows_hold_what_the_trees_say(seed, row_length, micro_rows, minibatches, how):
  tree = toy.random_trees(seed)
  advantage = random_advantage(seed, tree)
  config = settings(row_length, micro_rows, minibatches, how)
  check(
    packing.pack(tree, toy.along_paths(tree, advantage), config=config), tree, advantage, config
  )


def test_trees_too_long_for_a_row_are_cut_and_repeat_their_ancestors():
  whole = cut = 0
  for seed in range(10):
    tree = toy.random_trees(seed)
    advantage = random_advantage(seed, tree)
    for row_length in (LONGEST, 200):
      config = settings(row_length)
      context = check(
        packing.pack(tree, toy.along_paths(tree, advantage), config=config), tree, advantage, config
      )
      if row_length == LONGEST:
        cut += context
      else:
        whole += context
  assert cut > 0 and whole == 0


def test_a_token_stands_once_in_trees_and_once_a_trajectory_in_paths():
  tree = toy.random_trees(2)
  advantage = random_advantage(2, tree)
  (once,) = packing.pack(tree, toy.along_paths(tree, advantage), config=settings(400))
  (paths,) = packing.pack(tree, toy.along_paths(tree, advantage), config=settings(400, how="path"))
  length = np.asarray(tree.length)
  assert once.tokens_trained.sum() == length.sum()
  total = sum(length[b, rows].sum() for b, _, rows in toy.trajectories(tree))
  assert once.tokens_path.sum() == paths.tokens_path.sum() == paths.tokens_trained.sum() == total


def small_tree():
  """Returns the tree of the module's drawing: prompt p, trajectories a-b-c and a-d."""
  tree = toy.random_trees(0, trees=1, nodes=4, segment=2, prompt=1)

  def row(values):
    return jnp.asarray([values], jnp.int32)

  return replace(
    tree,
    prompt=row([7]),
    prompt_length=jnp.asarray([1]),
    tokens=jnp.asarray([[[0, 0], [1, 0], [2, 3], [4, 0]]], jnp.int32),
    log_probs=-jnp.asarray([[[0, 0], [1, 0], [2, 3], [4, 0]]], jnp.float32),
    length=row([0, 1, 2, 1]),
    parent=row([tree_lib.NO_PARENT, 0, 1, 1]),
    depth=row([0, 1, 2, 2]),
    status=row([tree_lib.INNER, tree_lib.INNER, tree_lib.EOS, tree_lib.EOS]),
    size=jnp.asarray([4]),
    leaves=row([3, 2, tree_lib.NO_ROW]),
  )


def test_the_drawing():
  advantage = np.asarray([[0, 0, 0.5, -2]], np.float32)
  (batch,) = packing.pack(
    small_tree(), toy.along_paths(small_tree(), advantage), config=settings(6)
  )
  np.testing.assert_array_equal(batch.tokens, [[7, 1, 2, 3, 4, 0]])
  np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 2, 0]])
  np.testing.assert_array_equal(batch.end, [[5, 5, 4, 4, 5, 0]])
  np.testing.assert_array_equal(batch.previous, [[0, 0, 1, 2, 1, 0]])
  np.testing.assert_array_equal(batch.count, [[0, 2, 1, 1, 1, 0]])
  np.testing.assert_array_equal(batch.gain, [[0, 0.5, 0.5, 0.5, 0, 0]])
  np.testing.assert_array_equal(batch.cost, [[0, -2, 0, 0, -2, 0]])
  np.testing.assert_array_equal(batch.old_log_probs, [[0, -1, -2, -3, -4, 0]])


def test_the_drawing_cut_in_two():
  advantage = np.asarray([[0, 0, 0.5, -2]], np.float32)
  (batch,) = packing.pack(
    small_tree(), toy.along_paths(small_tree(), advantage), config=settings(4)
  )
  np.testing.assert_array_equal(batch.tokens, [[7, 1, 2, 3], [7, 1, 4, 0]])
  np.testing.assert_array_equal(batch.end, [[4, 4, 4, 4], [3, 3, 3, 0]])
  np.testing.assert_array_equal(batch.previous, [[0, 0, 1, 2], [0, 0, 1, 0]])
  np.testing.assert_array_equal(batch.count, [[0, 2, 1, 1], [0, 0, 1, 0]])
  np.testing.assert_array_equal(batch.tokens_trained, [3, 2])
  np.testing.assert_array_equal(batch.tokens_path, [4, 1])


def test_nodes_that_no_returned_trajectory_passes_are_left_out():
  tree = toy.random_trees(4)
  advantage = random_advantage(4, tree)
  dropped = replace(tree, leaves=tree.leaves.at[:, 0].set(tree_lib.NO_ROW))
  config = settings()
  check(
    packing.pack(dropped, toy.along_paths(dropped, advantage), config=config),
    dropped,
    advantage,
    config,
  )
  none = replace(tree, leaves=jnp.full_like(tree.leaves, tree_lib.NO_ROW))
  assert packing.pack(none, toy.along_paths(none, advantage), config=config) == []


def test_first_fit_decreasing():
  row, column = packing._first_fit(np.asarray([2, 6, 5, 4, 3]), 10)
  np.testing.assert_array_equal(row, [1, 0, 1, 0, 1])
  np.testing.assert_array_equal(column, [8, 0, 0, 6, 5])


def test_trees_are_dealt_whole():
  tree = toy.random_trees(1, trees=5)
  advantage = random_advantage(1, tree)
  config = settings(LONGEST, minibatches=2)
  batches = packing.pack(tree, toy.along_paths(tree, advantage), config=config)
  assert check(batches, tree, advantage, config) > 0  # also where they are cut
  ids = [set(np.asarray(tree.tokens[b]).ravel()) - {0} for b in range(5)]
  for m, batch in enumerate(batches):
    assert set(batch.tokens[batch.count > 0]) == set().union(*ids[m::2])

  fewer = replace(tree, leaves=tree.leaves.at[0].set(tree_lib.NO_ROW))  # takes no turn
  batches = packing.pack(fewer, toy.along_paths(fewer, advantage), config=config)
  for m, batch in enumerate(batches):
    assert set(batch.tokens[batch.count > 0]) == set().union(*ids[1 + m :: 2])


def test_a_trajectory_longer_than_a_row_names_the_key():
  tree = small_tree()
  with pytest.raises(config_lib.UserError, match=r"learn.row_length = 3 .* 4 tokens"):
    packing.pack(tree, toy.along_paths(tree, np.zeros((1, 4))), config=settings(3))


def test_an_empty_prompt_is_refused():
  tree = replace(small_tree(), prompt_length=jnp.asarray([0]))
  with pytest.raises(ValueError, match="prompt has no tokens"):
    packing.pack(tree, toy.along_paths(tree, np.zeros((1, 4))), config=settings())


@pytest.mark.parametrize("how", ["tree", "path"])
def test_a_leaf_that_stands_twice_counts_twice(how):
  tree = toy.random_trees(8)
  advantage = random_advantage(8, tree)
  leaves = np.asarray(tree.leaves)
  twice = np.where(np.arange(leaves.shape[1]) % 2 == 0, leaves, tree_lib.NO_ROW)
  wide = np.concatenate([leaves, twice], 1)

  def packed(rows):
    grown = replace(tree, leaves=jnp.asarray(rows))
    return packing.pack(grown, toy.along_paths(grown, advantage), config=settings(how=how))[0]

  batch, both = packed(wide), [packed(leaves), packed(twice)]
  for name in ("gain", "cost", "count", "positive", "negative", "tokens_path"):
    total = sum(np.asarray(getattr(b, name)).sum() for b in both)
    assert np.asarray(getattr(batch, name)).sum() == pytest.approx(total), name
  if how == "tree":
    assert batch.tokens_trained.sum() == both[0].tokens_trained.sum()
