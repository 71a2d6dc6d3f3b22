"""Small made-up inputs: random trees of every shape that a rollout can grow."""

import jax.numpy as jnp
import numpy as np

from treepo_jax.learn import advantages
from treepo_jax.rollout import tree as tree_lib


def random_trees(
  seed: int,
  *,
  trees: int = 4,
  nodes: int = 24,
  segment: int = 4,
  depth: int = 6,
  prompt: int = 5,
  vocabulary: int | None = None,
) -> tree_lib.Tree:
  """Returns trees with chains that do not split, leaves at uneven depths and late siblings.

  A node is added below any node that may have children, most often below a recent one, so that as
  after a fallback a trajectory may leave an old node. Nodes with children are full. Token ids count
  up through the whole batch from 1, or are random below `vocabulary`.
  """
  rng = np.random.default_rng(seed)
  shape = (trees, nodes)
  parent = np.full(shape, tree_lib.NO_PARENT, np.int32)
  at = np.zeros(shape, np.int32)
  length = np.zeros(shape, np.int32)
  status = np.full(shape, tree_lib.UNUSED, np.int32)
  leaves = np.full((trees, nodes - 1), tree_lib.NO_ROW, np.int32)
  size = rng.integers(2, nodes + 1, trees).astype(np.int32)
  for b in range(trees):
    for row in range(1, size[b]):
      recent = np.arange(max(row - 3, 0), row) if rng.random() < 0.7 else np.arange(row)
      open_rows = recent[at[b, recent] < depth]
      parent[b, row] = rng.choice(open_rows) if open_rows.size else 0
      at[b, row] = at[b, parent[b, row]] + 1
    inner = np.isin(np.arange(nodes), parent[b, 1 : size[b]])
    taken = np.arange(nodes) < size[b]
    ends = rng.integers(tree_lib.EOS, tree_lib.REPETITION + 1, nodes)
    status[b] = np.where(taken, np.where(inner, tree_lib.INNER, ends), tree_lib.UNUSED)
    length[b] = np.where(inner, segment, rng.integers(1, segment + 1, nodes)) * taken
    length[b, 0] = 0
    rows = np.nonzero(taken & ~inner)[0]
    leaves[b, : rows.size] = rng.permutation(rows)
  prompt_length = rng.integers(1, prompt + 1, trees).astype(np.int32)
  prompt_valid = np.arange(prompt) < prompt_length[:, None]
  valid = np.arange(segment) < length[..., None]
  total = int(prompt_valid.sum() + valid.sum())
  ids = np.arange(1, total + 1) if vocabulary is None else rng.integers(0, vocabulary, total)
  prompts, tokens = np.zeros((trees, prompt), np.int32), np.zeros((*shape, segment), np.int32)
  prompts[prompt_valid], tokens[valid] = ids[: prompt_valid.sum()], ids[prompt_valid.sum() :]
  log_probs = np.where(valid, -rng.random(valid.shape) * 4, 0).astype(np.float32)
  return tree_lib.Tree(
    prompt=jnp.asarray(prompts),
    prompt_length=jnp.asarray(prompt_length),
    prompt_id=jnp.arange(trees, dtype=jnp.uint32),
    tokens=jnp.asarray(tokens),
    log_probs=jnp.asarray(log_probs),
    sampled_log_probs=jnp.asarray(2 * log_probs),
    length=jnp.asarray(length),
    parent=jnp.asarray(parent),
    depth=jnp.asarray(at),
    status=jnp.asarray(status),
    source=jnp.full(shape, tree_lib.NO_ROW, jnp.int32),
    size=jnp.asarray(size),
    leaves=jnp.asarray(leaves),
  )


def random_rewards(seed: int, tree: tree_lib.Tree) -> np.ndarray:
  """Returns rewards at the rows of leaves, mostly 1 or -1, some with a length penalty."""
  rng = np.random.default_rng(seed)
  reward = rng.choice([1.0, -1.0, -1.5, 0.25], tree.parent.shape, p=[0.4, 0.4, 0.1, 0.1])
  return np.where(np.asarray(tree.status) >= tree_lib.EOS, reward, 0).astype(np.float32)


def trajectories(tree: tree_lib.Tree) -> list[tuple[int, int, list[int]]]:
  """Returns (tree, leaf, rows from the first segment to the leaf) of every returned trajectory."""
  found, parent = [], np.asarray(tree.parent)
  for b, leaves in enumerate(np.asarray(tree.leaves)):
    for leaf in leaves[leaves != tree_lib.NO_ROW]:
      rows, row = [], int(leaf)
      while row > 0:
        rows.append(row)
        row = int(parent[b, row])
      found.append((b, int(leaf), rows[::-1]))
  return found


def along_paths(tree: tree_lib.Tree, at_leaves: np.ndarray) -> advantages.Advantage:
  """Returns one advantage a trajectory, given at the row of its leaf, along its whole path."""
  rows = np.zeros((*tree.leaves.shape, tree.parent.shape[1]), np.float32)
  parent = np.asarray(tree.parent)
  for b, w in np.argwhere(np.asarray(tree.leaves) != tree_lib.NO_ROW):
    row = int(tree.leaves[b, w])
    while row > 0:
      rows[b, w, row] = 1
      row = int(parent[b, row])
  value = np.take_along_axis(np.asarray(at_leaves), np.maximum(tree.leaves, 0), 1)[..., None]
  value = (value * rows).astype(np.float32)
  return advantages.Advantage(raw=value, white=value, weight=rows)
