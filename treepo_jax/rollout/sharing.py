"""Which nodes have drawn what another node of the same context holds: natural sharing.

A token is drawn where the node's own uniform number falls into the token's share of the unit
interval. A node that is decoded keeps these shares of its tokens; another node with the same
context whose numbers fall into them draws the very same tokens, without a forward pass, up to the
first that does not. Its numbers are its own, so it stays an independent sample, and the tree is the
same as if it had been decoded by itself; only the cost is not. (The usual rule keeps each token
with its probability and draws another at the first refusal; this is that rule, with the refusal
decided by the number that would have drawn the token.)

Axes: N nodes, W width, C nodes compared with, S tokens of a segment, J pages of a segment.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treepo_jax import struct
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.rollout.schedule import Paths
from treepo_jax.rollout.tree import ACTIVE, INNER, NO_ROW, OPEN, PRUNED, UNUSED, Tree


@struct.dataclass
class Match:
  """How far nodes go with others, one entry a node.

  Attributes:
    other: the node that it goes with longest; its own row where there is none.
    common: tokens that both are known to have, from the segment's first on.
    known: tokens that are then known of the node.
    whole: it is the other, from its first token to its last.
    waits: another node asked knows as much, and is to be decoded first.
  """

  other: Int[Array, "*b w"]
  common: Int[Array, "*b w"]
  known: Int[Array, "*b w"]
  whole: Bool[Array, "*b w"]
  waits: Bool[Array, "*b w"]


def walk(
  tree: Tree,
  paths: Paths,
  above: Int[Array, "n"],
  rows: Int[Array, "w"],
  uniform: Float[Array, "w s"],
) -> Match:
  """Returns how far each node goes with any other of its context (one tree).

  above: node that holds the pages of each node's context. rows: nodes asked, N where there is none;
  open ones draw what they do not know with their numbers, complete ones are compared. uniform: the
  numbers that they draw with.
  """
  n, s = tree.tokens.shape
  size = 2 * rows.shape[0]  # the first so many; with others nothing is shared
  status, open_ = tree.status, tree.status == OPEN
  knows = jnp.where(open_, paths.given, tree.length)
  x = jnp.minimum(rows, n - 1)
  asked = jnp.zeros(n, bool).at[jnp.where(rows < n, above[x], n)].set(True, mode="drop")
  ones = (status != UNUSED) & (status != PRUNED) & (paths.twin == NO_ROW) & (tree.depth > 0)
  others = jnp.nonzero(ones & asked[above], size=size, fill_value=n)[0].astype(jnp.int32)
  y = jnp.minimum(others, n - 1)

  pair = (above[x][:, None] == above[y][None]) & (rows < n)[:, None] & (others < n)[None]
  before = y[None] < x[:, None]
  pair &= jnp.where(open_[x][:, None], y[None] != x[:, None], before & ~open_[y][None])
  mine, theirs, step = knows[x][:, None], knows[y][None], jnp.arange(s)
  equal = tree.tokens[x][:, None] == tree.tokens[y][None]
  drawn = (paths.low[y][None] <= uniform[:, None]) & (uniform[:, None] < paths.high[y][None])
  drawn &= open_[x][:, None, None]
  same = jnp.where(step[None, None] < mine[..., None], equal, drawn)
  same &= step[None, None] < theirs[..., None]
  count = jnp.where(pair, jnp.cumprod(same, -1).sum(-1, dtype=jnp.int32), -1)

  whole = (~open_[y])[None] & (count == theirs) & (theirs > 0)
  whole &= jnp.where(open_[x][:, None], mine <= theirs, mine == theirs)
  score = jnp.where(whole, s + 1, count)
  best = jnp.argmax(score, 1)
  pick = lambda a: jnp.take_along_axis(a, best[:, None], 1)[:, 0]
  most, whole = pick(count), pick(whole)
  known = jnp.maximum(most, knows[x])
  # Of open nodes that now know the same the first is decoded.
  text = jnp.where(step[None] < most[:, None], tree.tokens[y[best]], tree.tokens[x])
  inside = step[None, None] < known[:, None, None]
  level = ((text[:, None] == text[None]) | ~inside).all(-1)
  level &= (known[:, None] == known[None]) & (above[x][:, None] == above[x][None])
  going = open_[x] & ~whole & (rows < n)
  level &= going[:, None] & going[None] & (x[None] < x[:, None])
  other = jnp.where(most >= 0, y[best], x).astype(jnp.int32)
  # A twin has no twin: of a copy found just now it is what the copy is of.
  twin = jnp.full(n, NO_ROW).at[jnp.where(whole, rows, n)].set(other, mode="drop")
  other = jnp.where(whole & (twin[other] != NO_ROW), twin[other], other)
  return Match(
    other=other,
    common=jnp.maximum(most, 0),
    known=known,
    whole=whole,
    waits=level.any(1),
  )


def apply(
  tree: Tree, paths: Paths, rows: Int[Array, "w"], match: Match
) -> tuple[Tree, Paths, Int[Array, "w j"], Int[Array, "w j"]]:
  """Writes what nodes have in common to them (one tree).

  Returns the tree, the paths, and the pages that are held once more and once less.
  """
  n, s = tree.tokens.shape
  j = paths.pages.shape[1]
  page, other, none = s // j, match.other, pages_lib.NO_PAGE
  x = jnp.minimum(rows, n - 1)
  step, place = jnp.arange(s)[None], jnp.arange(j)[None]
  note = lambda old, new: old.at[rows].set(new.astype(old.dtype), mode="drop")
  tokens = lambda old: note(old, jnp.where(step < match.common[:, None], old[other], old[x]))
  twin = lambda old, new: note(old, jnp.where(match.whole, new, old[x]))

  status = tree.status[other]
  status = jnp.where(status == INNER, ACTIVE, status)  # to be branched by itself
  complete = tree.status[x] != OPEN
  live = (rows < n)[:, None]
  mine, theirs = paths.pages[x], paths.pages[other]
  ready = jnp.cumprod(theirs != none, 1) * (place < (match.common // page)[:, None])
  taken = live & (ready > 0) & (mine == none) & ~(match.whole | complete)[:, None]
  dropped = live & (mine != none) & match.whole[:, None]
  pages = jnp.where(taken, theirs, jnp.where(dropped, none, mine))
  tree = dataclasses.replace(
    tree,
    tokens=tokens(tree.tokens),
    log_probs=tokens(tree.log_probs),
    sampled_log_probs=tokens(tree.sampled_log_probs),
    length=twin(tree.length, tree.length[other]),
    status=twin(tree.status, jnp.where(complete, tree.status[x], status)),
  )
  paths = dataclasses.replace(
    paths,
    pages=note(paths.pages, pages),
    given=note(paths.given, match.known),
    waits=note(paths.waits, match.waits),
    twin=twin(paths.twin, other),
    states=tokens(paths.states),
    low=tokens(paths.low),
    high=tokens(paths.high),
    entropy=tokens(paths.entropy),
  )
  return tree, paths, jnp.where(taken, theirs, none), jnp.where(dropped, mine, none)
