"""How many branches each open path of a prompt grows; one tree, lifted with vmap by the caller.

Axes: N nodes, W width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from treepo_jax.rollout.tree import NO_PARENT


def initial(key: jax.Array, least: int, most: int) -> Int[Array, ""]:
  """Returns the branches of the prompt itself, uniform in least..most.

  least = most is the paper's Fixed Init Divergence, 2..8 its More Init Divergence (section 4).
  """
  return jax.random.randint(key, (), least, most + 1)


def budget(
  finished: Int[Array, ""],
  wave: Int[Array, ""],
  active: Int[Array, ""],
  *,
  width: int,
  branching: int,
) -> Int[Array, ""]:
  """Returns how many paths a prompt continues with: max(min(w - W, b * wave), n).

  The budget b * wave counts the paths that ended in this wave too, so theirs goes to the active
  ones (budget transfer, section 2.3); width bounds it and every active path goes on.

  finished: W, trajectories ended so far. wave: paths decoded in this wave. active: n of them.
  """
  return jnp.maximum(jnp.minimum(width - finished, branching * wave), active)


def even(active: Bool[Array, "n"], total: Int[Array, ""], remainder: str) -> Int[Array, "n"]:
  """Returns the branches of each node: total shared evenly over the active ones.

  remainder: "spread" gives what is left over to the first nodes, one each; "last" gives all of it
  to the last, as published.
  """
  count = active.sum()
  share, rest = jnp.divmod(total, jnp.maximum(count, 1))
  rank = jnp.cumsum(active) - 1
  if remainder == "last":
    extra = jnp.where(rank == count - 1, rest, 0)
  else:
    extra = rank < rest
  return jnp.where(active, share + extra, 0).astype(jnp.int32)


def parents(counts: Int[Array, "n"], width: int) -> Int[Array, "w"]:
  """Returns the parent of each new node, every node as often as `counts` says; NO_PARENT beyond."""
  rows = jnp.repeat(jnp.arange(counts.shape[0]), counts, total_repeat_length=width)
  return jnp.where(jnp.arange(width) < counts.sum(), rows, NO_PARENT).astype(jnp.int32)
