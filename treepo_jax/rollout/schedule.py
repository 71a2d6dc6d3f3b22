"""Which open nodes are decoded next, in groups of rows that share their pages.

Open nodes of all prompts fill the rows in order; a group holds rows of one tree only. What does not
fit waits, and a prompt is not branched before its whole wave is decoded: trees do not depend on
how many rows there are.

Axes: B trees, N nodes, Q rows = G groups x M rows of a group, D depth, U shared nodes of a group,
J pages of a segment, X pages of a prompt, P tokens of a prompt, S tokens of a segment.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from treepo_jax import struct
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding.segment import Rows
from treepo_jax.rollout.tree import OPEN, Tree


@struct.dataclass
class Slots:
  """Which node each row decodes; rows not live name tree 0, node 0."""

  live: Bool[Array, "g m"]
  tree: Int[Array, "g m"]
  node: Int[Array, "g m"]


@struct.dataclass
class Paths:
  """Pages of each tree, and where its automaton stands.

  Attributes:
    prompt: pages of the prompt, right aligned.
    pages: pages of each node, NO_PAGE where it holds none.
    state: automaton state at the end of each node.
  """

  prompt: Int[Array, "b x"]
  pages: Int[Array, "b n j"]
  state: Int[Array, "b n"]


def fill(tree: Tree, groups: int, members: int) -> tuple[Slots, Int[Array, ""]]:
  """Returns the rows of the next decoding and how many of its groups are in use."""
  opened = tree.status == OPEN
  needed = -(-opened.sum(1) // members)
  first = jnp.cumsum(needed) - needed
  slot = first[:, None] * members + jnp.cumsum(opened, 1) - 1
  slot = jnp.where(opened & (slot < groups * members), slot, groups * members)  # else dropped
  b, n = opened.shape
  put = lambda x: (
    jnp.zeros(groups * members, x.dtype).at[slot].set(x, mode="drop").reshape(groups, members)
  )
  slots = Slots(
    live=put(opened),
    tree=put(jnp.broadcast_to(jnp.arange(b, dtype=jnp.int32)[:, None], (b, n))),
    node=put(jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))),
  )
  return slots, jnp.minimum(needed.sum(), groups).astype(jnp.int32)


def rows(
  tree: Tree,
  paths: Paths,
  slots: Slots,
  own: Int[Array, "g m j"],
  *,
  shared: int,
  depth: int,
  page: int,
) -> tuple[Rows, Int[Array, ""]]:
  """Returns what the decoder needs for the slots, and the shared nodes of the fullest group.

  own: pages taken for the new segments. shared: U, room for shared nodes (M x (D - 1) always
  suffices). Linear in rows x depth.
  """
  g, m = slots.live.shape
  b, n = tree.parent.shape
  s, prompt_pages = tree.tokens.shape[2], paths.prompt.shape[1]
  parent = tree.parent[slots.tree, slots.node]
  parent = jnp.where(slots.live, parent, 0)

  up = lambda row, _: (jnp.maximum(tree.parent[slots.tree, row], 0), row)
  path = jax.lax.scan(up, parent, length=max(depth - 1, 1))[1]
  path = jnp.moveaxis(path, 0, -1)  # proper ancestors; row 0, the prompt, is left out below
  group = jnp.arange(g)[:, None, None]
  used = jnp.zeros((g, n), bool).at[group, path].set(True).at[:, 0].set(False)
  place = jnp.where(used, jnp.cumsum(used, 1) - 1, shared)
  nodes = jnp.zeros((g, shared), jnp.int32)
  nodes = nodes.at[jnp.arange(g)[:, None], place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
  held = jnp.arange(shared)[None] < used.sum(1)[:, None]
  spot = place[group, path]
  sees = jnp.zeros((g, m, shared), bool)
  sees = sees.at[group, jnp.arange(m)[:, None], spot].set(True, mode="drop")

  owner = slots.tree[:, 0]
  node_pages = jnp.where(held[..., None], paths.pages[owner[:, None], nodes], pages_lib.NO_PAGE)
  per_node = node_pages.shape[2]
  tokens = tree.prompt_length[owner] - 1  # of the prompt that lie in pages
  full = -(-tokens // page)
  first = jnp.arange(prompt_pages)[None] == (prompt_pages - full)[:, None]
  prompt_start = jnp.where(first, (full * page - tokens)[:, None], 0)
  last_of_prompt = tree.prompt[slots.tree, tree.prompt_length[slots.tree] - 1]
  return Rows(
    live=slots.live,
    last=jnp.where(parent == 0, last_of_prompt, tree.tokens[slots.tree, parent, s - 1]),
    position=tree.prompt_length[slots.tree] - 1 + tree.depth[slots.tree, parent] * s,
    state=paths.state[slots.tree, parent],
    prompt_id=tree.prompt_id[slots.tree],
    node=slots.node,
    pages=own,
    context=jnp.concatenate([paths.prompt[owner], node_pages.reshape(g, -1)], 1),
    start=jnp.concatenate([prompt_start, jnp.zeros((g, shared * per_node), jnp.int32)], 1),
    sees=jnp.concatenate(
      [
        jnp.broadcast_to(slots.live[..., None], (g, m, prompt_pages)),
        jnp.repeat(sees & slots.live[..., None], per_node, -1),
      ],
      -1,
    ),
  ), used.sum(1).max().astype(jnp.int32)
