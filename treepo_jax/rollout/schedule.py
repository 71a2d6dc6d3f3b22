"""Which open nodes are decoded next, in groups of rows that share their pages.

Open nodes with one context form a bundle: the first of them is decoded, the others follow it as
long as their own draws give the same tokens. One that follows to the end is its twin: it needs no
decoding, pages or training of its own. One that leaves it is decoded later, from the tokens that
they have in common, again with all that left at the same place. Nothing is drawn in another way
than alone, so the trees are the same with bundles and without; only the cost is not.

Open nodes of all prompts fill the rows in order; a group holds rows of one tree only. What does not
fit waits, and a prompt is not branched before its whole wave is decoded: trees do not depend on
how many rows there are.

Axes: B trees, N nodes, Q rows = G groups x M rows of a group, D depth, U shared nodes of a group,
J pages of a segment, X pages of a prompt, P tokens of a prompt, S tokens of a segment, F followers
of a row, W width.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treepo_jax import struct
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding.segment import Rows
from treepo_jax.rollout.tree import NO_ROW, OPEN, Tree


@struct.dataclass
class Slots:
  """Which node each row decodes, and who follows it; rows not live name tree 0, node 0."""

  live: Bool[Array, "g m"]
  tree: Int[Array, "g m"]
  node: Int[Array, "g m"]
  followers: Int[Array, "g m f"]


@struct.dataclass
class Paths:
  """Pages of each tree, and where its automaton stands.

  Attributes:
    prompt: pages of the prompt, right aligned.
    pages: pages of each node, NO_PAGE where it holds none.
    state: automaton state at the end of each node.
    twin: the node that holds the same tokens after the same context and the pages, NO_ROW where a
      node is decoded itself.
    guide: the node that an open one has followed last, 0 where none.
    given: tokens that it has in common with its guide; the tree holds them already.
    low, high: of each token of a node the uniform numbers that draw it, [low, high); 0 beyond.
    entropy: mean over a node's tokens of the policy's entropy, if Settings.decoder.entropy.
  """

  prompt: Int[Array, "*b x"]
  pages: Int[Array, "*b n j"]
  state: Int[Array, "*b n"]
  twin: Int[Array, "*b n"]
  guide: Int[Array, "*b n"]
  given: Int[Array, "*b n"]
  low: Float[Array, "*b n s"]
  high: Float[Array, "*b n s"]
  entropy: Float[Array, "*b n"]


def ancestry(tree: Tree, paths: Paths) -> Int[Array, "b n"]:
  """Returns each node's parent, or the parent's twin: the node that holds the context's pages."""
  own = jnp.arange(tree.parent.shape[1], dtype=jnp.int32)
  holder = jnp.where(paths.twin == NO_ROW, own[None], paths.twin)
  return jnp.take_along_axis(holder, jnp.maximum(tree.parent, 0), 1)


@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
def bundles(
  opened: Bool[Array, "n"],
  parent: Int[Array, "n"],
  guide: Int[Array, "n"],
  given: Int[Array, "n"],
  width: int,
) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
  """Returns of every open node the first of its bundle and how many of the bundle precede it.

  Nodes of one parent that left one guide at one place have one context. `width`: open nodes at
  most, so that the comparison of all with all stays small.
  """
  n = opened.shape[0]
  row = jnp.nonzero(opened, size=width, fill_value=n)[0]
  get = lambda x: x.at[row].get(mode="fill", fill_value=-2)
  equal = lambda x: get(x)[:, None] == get(x)[None]
  same = equal(parent) & equal(guide) & equal(given) & (row < n)[:, None] & (row < n)[None]
  put = lambda x: jnp.zeros(n, jnp.int32).at[row].set(x.astype(jnp.int32), mode="drop")
  before = jnp.tril(same, -1).sum(1)
  return put(row[jnp.argmax(same, 1)]), put(before)


def fill(
  tree: Tree, paths: Paths, groups: int, members: int, followers: int
) -> tuple[Slots, Int[Array, ""]]:
  """Returns the rows of the next decoding and how many of its groups are in use.

  followers: F, those of a row at most: width - 1, or 0 to decode every node by itself.
  """
  opened = tree.status == OPEN
  own = jnp.broadcast_to(jnp.arange(opened.shape[1], dtype=jnp.int32), opened.shape)
  first_of, before = own, jnp.zeros_like(own)
  if followers:
    parent = ancestry(tree, paths)
    first_of, before = bundles(opened, parent, paths.guide, paths.given, followers + 1)
  leads = opened & (first_of == own)
  needed = -(-leads.sum(1) // members)
  first = jnp.cumsum(needed) - needed
  slot = first[:, None] * members + jnp.cumsum(leads, 1) - 1
  rows, none = (groups, members), groups * members  # slot `none` is dropped
  slot = jnp.where(leads & (slot < none), slot, none)
  put = lambda x: jnp.zeros(none, x.dtype).at[slot].set(x, mode="drop").reshape(rows)
  behind = jnp.where(opened & ~leads, jnp.take_along_axis(slot, first_of, 1), none)
  follow = jnp.full((none, followers), NO_ROW, jnp.int32)
  follow = follow.at[behind, before - 1].set(own, mode="drop")
  slots = Slots(
    live=put(leads),
    tree=put(jnp.broadcast_to(jnp.arange(own.shape[0], dtype=jnp.int32)[:, None], own.shape)),
    node=put(own),
    followers=follow.reshape(*rows, followers),
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
  above = ancestry(tree, paths)
  parent = jnp.where(slots.live, above[slots.tree, slots.node], 0)

  up = lambda row, _: (above[slots.tree, row], row)
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
    given=paths.given[slots.tree, slots.node],
    tokens=tree.tokens[slots.tree, slots.node],
    followers=slots.followers,
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
