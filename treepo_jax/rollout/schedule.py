"""Which open nodes are decoded next, in groups of rows that share their pages.

A call decodes a stride of each row's segment, so rows are filled anew while long segments are under
way. Open nodes of all prompts fill the rows in order; a group holds rows of one tree only. What
does not fit waits, and a prompt is not branched before its whole wave is decoded: trees do not
depend on how many rows there are.

A node that knows no more than another open one before it waits for that one (sharing.py): it may go
the same way at no cost. Where waiting has saved few tokens so far, none does: it would
only be later.

Pages: the oldest prompt that is not done can always become its largest tree; what it may need is
kept for it, and the others take what is left. So none waits for ever, however small the pool.

Axes: B trees, N nodes, Q rows = G groups x M rows of a group, D depth, U nodes whose pages a group
reads, J pages of a segment, X pages of a prompt, P tokens of a prompt, S tokens of a segment,
C tokens of a call, K pages of a call.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from treepo_jax import struct
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding.segment import Rows
from treepo_jax.rollout.tree import NO_ROW, OPEN, Tree


@struct.dataclass
class Slots:
  """Which node each row decodes; rows not live name tree 0, node 0."""

  live: Bool[Array, "g m"]
  tree: Int[Array, "g m"]
  node: Int[Array, "g m"]


@struct.dataclass
class Paths:
  """What is known of each node besides the tree, while it grows.

  Attributes:
    prompt: pages of the prompt, right aligned.
    pages: pages of each node, its first ones maybe another's too; NO_PAGE where it holds none.
    given: tokens of an open node that are known; the tree holds them already.
    waits: whether an open node knows no more than another does, which is to be decoded first.
    twin: the node that holds the same tokens after the same context and the pages, NO_ROW where a
      node is decoded itself.
    states: automaton state after each token.
    low, high: of each token the uniform numbers that draw it, [low, high).
    entropy: of the policy where each token stands, if Settings.decoder.entropy.
  """

  prompt: Int[Array, "*b x"]
  pages: Int[Array, "*b n j"]
  given: Int[Array, "*b n"]
  waits: Bool[Array, "*b n"]
  twin: Int[Array, "*b n"]
  states: Int8[Array, "*b n s"]
  low: Float[Array, "*b n s"]
  high: Float[Array, "*b n s"]
  entropy: Float[Array, "*b n s"]


def ancestry(tree: Tree, paths: Paths) -> Int[Array, "b n"]:
  """Returns each node's parent, or the parent's twin: the node that holds the context's pages."""
  own = jnp.arange(tree.parent.shape[1], dtype=jnp.int32)
  holder = jnp.where(paths.twin == NO_ROW, own[None], paths.twin)
  return jnp.take_along_axis(holder, jnp.maximum(tree.parent, 0), 1)


def ready(paths: Paths, page: int) -> Int[Array, "b n"]:
  """Returns how many pages of an open node hold what is known of it: where decoding goes on."""
  held = jnp.cumprod(paths.pages != pages_lib.NO_PAGE, -1).sum(-1, dtype=jnp.int32)
  return jnp.minimum(held, paths.given // page)


def sizes(most: int, least: int, factor: int) -> tuple[int, ...]:
  """Returns the sizes to compile for: most, `factor` times less, and so on down to `least`."""
  found = [most]
  while found[-1] // factor >= least:
    found.append(found[-1] // factor)
  return tuple(found)


def left_over(pool: pages_lib.Pool, paths: Paths, running: Bool[Array, "b"], largest: int):
  """Returns (pages that others than the oldest running prompt may take, that prompt).

  largest: pages of the largest tree.
  """
  oldest = jnp.argmax(running)
  none = pool.count.shape[0]
  pages = jnp.concatenate([paths.prompt[oldest], paths.pages[oldest].reshape(-1)])
  mine = jnp.zeros(none, bool).at[jnp.where(pages < 0, none, pages)].set(True, mode="drop")
  kept = jnp.where(running.any(), largest - mine.sum(), 0)
  return pool.size - kept, oldest


def fill(
  tree: Tree,
  paths: Paths,
  pool: pages_lib.Pool,
  running: Bool[Array, "b"],
  eager: Bool[Array, ""],
  *,
  groups: int,
  members: int,
  stride: int,
  largest: int,
) -> tuple[Slots, Int[Array, ""], Int[Array, "g m"]]:
  """Returns the rows of the next call, its groups in use, and how many pages each row takes.

  running: prompts that are under way. eager: no node waits. stride: pages of a call. largest: pages
  of the largest tree.
  """
  b, n = tree.parent.shape
  rows, none = (groups, members), groups * members  # slot `none` is dropped
  opened = (tree.status == OPEN) & (eager | ~paths.waits)
  rank = jnp.cumsum(opened, 1) - 1
  needed = -(-opened.sum(1) // members)  # groups of a tree
  first = jnp.cumsum(needed) - needed
  slot = first[:, None] * members + rank
  slot = jnp.where(opened & (slot < none), slot, none)

  page = tree.tokens.shape[2] // paths.pages.shape[2]
  takes = jnp.minimum(paths.pages.shape[2] - ready(paths, page), stride)
  own = jnp.arange(n, dtype=jnp.int32)
  put = lambda x: jnp.zeros(none, x.dtype).at[slot].set(x, mode="drop")
  owner = put(jnp.broadcast_to(jnp.arange(b, dtype=jnp.int32)[:, None], (b, n)))
  live, takes = put(opened), put(takes)
  left, oldest = left_over(pool, paths, running, largest)
  others = jnp.where(owner == oldest, 0, takes)
  live &= (owner == oldest) | (jnp.cumsum(others) <= left)
  shape = lambda x: jnp.where(live, x, 0).reshape(rows)
  slots = Slots(
    live=live.reshape(rows),
    tree=shape(owner),
    node=shape(put(jnp.broadcast_to(own, (b, n)))),
  )
  used = jnp.where(slots.live.any(1), jnp.arange(groups) + 1, 0).max().astype(jnp.int32)
  return slots, used, shape(takes)


def rows(
  tree: Tree,
  paths: Paths,
  slots: Slots,
  own: Int[Array, "g m k"],
  *,
  shared: int,
  depth: int,
  stride: int,
) -> tuple[Rows, Int[Array, ""]]:
  """Returns what the decoder needs for the slots, and the nodes that the fullest group reads.

  own: pages taken for the call. shared: U, room for nodes that a group reads (M x D always
  suffices). stride: C, tokens of a call. Linear in rows x depth.
  """
  g, m = slots.live.shape
  b, n = tree.parent.shape
  s, prompt_pages = tree.tokens.shape[2], paths.prompt.shape[1]
  page = s // paths.pages.shape[2]
  above = ancestry(tree, paths)
  parent = jnp.where(slots.live, above[slots.tree, slots.node], 0)
  pages = jnp.where(slots.live, ready(paths, page)[slots.tree, slots.node], 0)
  base = pages * page

  up = lambda row, _: (above[slots.tree, row], row)
  path = jax.lax.scan(up, parent, length=max(depth - 1, 1))[1]
  path = jnp.concatenate([path, jnp.where(pages > 0, slots.node, 0)[None]])
  path = jnp.moveaxis(path, 0, -1)  # ancestors and the node; row 0, the prompt, is left out below
  group = jnp.arange(g)[:, None, None]
  used = jnp.zeros((g, n), bool).at[group, path].set(True).at[:, 0].set(False)
  place = jnp.where(used, jnp.cumsum(used, 1) - 1, shared)
  nodes = jnp.zeros((g, shared), jnp.int32)
  nodes = nodes.at[jnp.arange(g)[:, None], place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
  held = jnp.arange(shared)[None] < used.sum(1)[:, None]
  owner = slots.tree[:, 0]
  node_pages = jnp.where(held[..., None], paths.pages[owner[:, None], nodes], pages_lib.NO_PAGE)
  per_node = node_pages.shape[2]
  spot = place[group, path]
  # Of an ancestor all pages are seen, of the node itself those that are ready.
  whole = jnp.full((*parent.shape, path.shape[-1] - 1), per_node)
  seen = jnp.concatenate([whole, pages[..., None]], -1)
  sees = jnp.zeros((g, m, shared), jnp.int32)
  sees = sees.at[group, jnp.arange(m)[:, None], spot].max(seen, mode="drop")
  sees = jnp.arange(per_node)[None, None, None] < sees[..., None]

  tokens = tree.prompt_length[owner] - 1  # of the prompt that lie in pages
  full = -(-tokens // page)
  first = jnp.arange(prompt_pages)[None] == (prompt_pages - full)[:, None]
  prompt_start = jnp.where(first, (full * page - tokens)[:, None], 0)
  last_of_prompt = tree.prompt[slots.tree, tree.prompt_length[slots.tree] - 1]
  before = jnp.where(parent == 0, last_of_prompt, tree.tokens[slots.tree, parent, s - 1])
  state = jnp.where(parent == 0, 0, paths.states[slots.tree, parent, s - 1])
  inside = slots.tree, slots.node, jnp.maximum(base - 1, 0)
  at = jnp.minimum(base[..., None] + jnp.arange(stride)[None, None], s - 1)
  return Rows(
    live=slots.live,
    base=base,
    room=s - base,
    last=jnp.where(pages > 0, tree.tokens[inside], before),
    position=tree.prompt_length[slots.tree] - 1 + tree.depth[slots.tree, parent] * s + base,
    state=jnp.where(pages > 0, paths.states[inside], state).astype(jnp.int32),
    prompt_id=tree.prompt_id[slots.tree],
    node=slots.node,
    given=paths.given[slots.tree, slots.node] - base,
    tokens=jnp.take_along_axis(tree.tokens[slots.tree, slots.node], at, -1),
    pages=own,
    context=jnp.concatenate([paths.prompt[owner], node_pages.reshape(g, -1)], 1),
    start=jnp.concatenate([prompt_start, jnp.zeros((g, shared * per_node), jnp.int32)], 1),
    sees=jnp.concatenate(
      [
        jnp.broadcast_to(slots.live[..., None], (g, m, prompt_pages)),
        sees.reshape(g, m, -1) & slots.live[..., None],
      ],
      -1,
    ),
  ), used.sum(1).max().astype(jnp.int32)
