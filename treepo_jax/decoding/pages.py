"""The page pool: keys and values of every held page, and the stack of free ones.

A page holds the keys and values of `page` consecutive input tokens of one node of one tree, in
every layer. Pages are written once and never moved: the children of a node reach its pages through
their parent, so a branch copies no keys and values at all. A tree gives all its pages back when its
last trajectory has ended.

Axes: N layers, P pages of the pool, K key-value heads, T tokens of a page, D head size.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from treepo_jax import struct

NO_PAGE = -1


@struct.dataclass
class Pool:
  """Pages of a device.

  Attributes:
    key, value: contents of the pages.
    free: page numbers; the first `size` are free.
    size: free pages.
  """

  key: Float[Array, "n p k t d"]
  value: Float[Array, "n p k t d"]
  free: Int[Array, "p"]
  size: Int[Array, ""]


def create(layers: int, pages: int, kv_heads: int, page: int, head_dim: int, dtype) -> Pool:
  """Returns a pool whose pages are all free."""
  shape = (layers, pages, kv_heads, page, head_dim)
  return Pool(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),  # a buffer of its own: both are donated
    free=jnp.arange(pages, dtype=jnp.int32),
    size=jnp.asarray(pages, jnp.int32),
  )


def take(pool: Pool, wanted: Int[Array, "*w"]) -> tuple[Pool, Int[Array, "*w"]]:
  """Takes a page for every nonzero entry of `wanted`; NO_PAGE elsewhere.

  The caller keeps within what is free (grow admits a prompt only when the pool can hold the
  largest tree it may become).
  """
  flat = wanted.reshape(-1) != 0
  rank = jnp.cumsum(flat) - 1
  page = jnp.where(flat, pool.free[pool.size - 1 - rank], NO_PAGE)
  return dataclasses.replace(pool, size=pool.size - flat.sum(dtype=jnp.int32)), page.reshape(
    wanted.shape
  )


def release(pool: Pool, pages: Int[Array, "*w"]) -> Pool:
  """Gives back every page of `pages` that is not NO_PAGE; each must be held, and named once."""
  flat = pages.reshape(-1)
  held = flat != NO_PAGE
  spot = jnp.where(held, pool.size + jnp.cumsum(held) - 1, pool.free.shape[0])
  free = pool.free.at[spot].set(flat, mode="drop")
  return dataclasses.replace(pool, free=free, size=pool.size + held.sum(dtype=jnp.int32))


def write(
  pool: Pool,
  pages: Int[Array, "w"],
  key: Float[Array, "n w k t d"],
  value: Float[Array, "n w k t d"],
) -> Pool:
  """Writes whole pages; entries whose page is NO_PAGE are dropped."""
  spot = jnp.where(pages == NO_PAGE, pool.free.shape[0], pages)
  return dataclasses.replace(
    pool,
    key=pool.key.at[:, spot].set(key, mode="drop"),
    value=pool.value.at[:, spot].set(value, mode="drop"),
  )
