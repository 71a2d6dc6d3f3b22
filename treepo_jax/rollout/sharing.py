"""Which new nodes have drawn what another node of the same context holds: natural sharing.

A token is drawn where the node's own uniform number falls into the token's share of the unit
interval. A node that was decoded keeps these shares of its tokens; a new node with the same context
whose numbers fall into them draws the very same tokens, without a forward pass, up to the first
that does not. Its numbers are its own, so it stays an independent sample, and the tree is the same
as if it had been decoded by itself; only the cost is not. (The usual rule keeps each token with its
probability and draws another at the first refusal; this is that rule, with the refusal decided by
the number that would have drawn the token.)

Axes: N nodes, W width, C nodes compared with, S tokens of a segment.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treepo_jax import struct
from treepo_jax.rollout.tree import ACTIVE, INNER, NO_ROW, OPEN, PRUNED, UNUSED, Tree


@struct.dataclass
class Shared:
  """What new nodes have in common with others, one entry a node.

  Attributes:
    guide: the other node, 0 where there is none.
    given: tokens in common, from the segment's first on.
    whole: the segments are the same from their first token to their last.
  """

  guide: Int[Array, "*b w"]
  given: Int[Array, "*b w"]
  whole: Bool[Array, "*b w"]


def candidates(tree: Tree, twin: Int[Array, "n"]) -> Bool[Array, "n"]:
  """Returns the nodes that can be walked: decoded themselves, and not given up."""
  status = tree.status
  known = (status != UNUSED) & (status != OPEN) & (status != PRUNED) & (twin == NO_ROW)
  return known & (tree.depth > 0)


def walk(
  tree: Tree,
  above: Int[Array, "n"],
  walkable: Bool[Array, "n"],
  low: Float[Array, "n s"],
  high: Float[Array, "n s"],
  new: Int[Array, "w"],
  guide: Int[Array, "w"],
  given: Int[Array, "w"],
  uniform: Float[Array, "w s"],
) -> Shared:
  """Returns with which node each new one goes longest (one tree; lift with vmap).

  above: node that holds the pages of each node's context. low, high: share of the unit interval
  that draws each token. new: rows of new nodes, N where there is none. guide, given: tokens that
  they begin with. uniform: the numbers that they draw with.
  """
  n, s = tree.tokens.shape
  row = jnp.minimum(new, n - 1)
  asked = jnp.zeros(n, bool).at[jnp.where(new < n, above[row], n)].set(True, mode="drop")
  other = jnp.nonzero(walkable & asked[above], size=2 * new.shape[0], fill_value=n)[0]
  at = jnp.minimum(other, n - 1)
  context = (above[row][:, None] == above[at][None]) & (new < n)[:, None] & (other < n)[None]
  step = jnp.arange(s)
  token = tree.tokens[at]
  begun = token[None] == tree.tokens[guide][:, None]
  drawn = (low[at][None] <= uniform[:, None]) & (uniform[:, None] < high[at][None])
  same = jnp.where(step[None, None] < given[:, None, None], begun, drawn)
  same &= step[None, None] < tree.length[at][None, :, None]
  count = jnp.cumprod(same, -1).sum(-1, dtype=jnp.int32) * context
  best = jnp.argmax(count, 1)
  most = jnp.max(count, 1)
  whole = (most > 0) & (most == tree.length[at[best]])
  longer = whole | (most > given)
  return Shared(
    guide=jnp.where(longer, at[best], guide).astype(jnp.int32),
    given=jnp.where(longer, most, given).astype(jnp.int32),
    whole=whole,
  )


def status_of(tree: Tree, guide: Int[Array, "w"]) -> Int[Array, "w"]:
  """Returns the status of a node that is the same as its guide: ended too, or to be branched."""
  status = tree.status[guide]
  return jnp.where(status == INNER, ACTIVE, status)


def put(x, new: Int[Array, "w"], guide: Int[Array, "w"], given: Int[Array, "w"]):
  """Returns x [N, S] with the first `given` entries of each new row as the guide has them."""
  own = jnp.where(jnp.arange(x.shape[1])[None] < given[:, None], x[guide], 0)
  return x.at[new].set(own, mode="drop")
