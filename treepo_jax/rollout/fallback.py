"""Where finished trajectories are cut and grown again; one tree, lifted with vmap by the caller.

Axes: N nodes, W width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from treepo_jax.rollout.tree import ANSWER, EOS, NO_PARENT, NO_ROW, Tree


def ancestor_at(
  tree: Tree, row: Int[Array, "w"], depth: Int[Array, "w"], most: int
) -> Int[Array, "w"]:
  """Returns each row's ancestor at a depth, at most `most` steps up; itself if less deep."""
  up = lambda _, row: jnp.where(tree.depth[row] > depth, tree.parent[row], row)
  return jax.lax.fori_loop(0, most, up, row)


def random(
  tree: Tree,
  key: jax.Array,
  *,
  branching: int,
  most: int,
) -> tuple[Int[Array, "w"], Int[Array, "w"]]:
  """Returns (parents, sources) of the nodes that regrow cut trajectories, until width is filled.

  Depth-first fallback (section 2.3): sources are the trajectories that ended with an answer or EOS,
  in random order; each is cut back 1..d of its d segments, uniformly, and grows up to `branching`
  new branches there. Without a source the prompt itself is grown again (source row 0). The new
  branches decode from the pages of the ancestor they are cut to, so their context is exactly the
  tokens before them.

  most: segments of a trajectory at most.
  """
  width = tree.leaves.shape[0]
  order_key, cut_key = jax.random.split(key)
  row = jnp.maximum(tree.leaves, 0)
  eligible = (tree.leaves != NO_ROW) & ((tree.status[row] == ANSWER) | (tree.status[row] == EOS))
  priority = jnp.where(eligible, jax.random.uniform(order_key, (width,)), 2.0)
  cut = 1 + jnp.floor(jax.random.uniform(cut_key, (width,)) * tree.depth[row]).astype(jnp.int32)
  kept = ancestor_at(tree, row, jnp.maximum(tree.depth[row] - cut, 0), most)

  left = width - (tree.leaves != NO_ROW).sum()
  sources = eligible.sum()
  chosen = jnp.argsort(priority)[jnp.arange(width) // branching]
  live = jnp.arange(width) < jnp.minimum(left, jnp.maximum(sources, 1) * branching)
  none = sources == 0  # nothing to cut: the prompt itself
  parent = jnp.where(live, jnp.where(none, 0, kept[chosen]), NO_PARENT)
  source = jnp.where(live, jnp.where(none, 0, row[chosen]), NO_ROW)
  return parent.astype(jnp.int32), source.astype(jnp.int32)
