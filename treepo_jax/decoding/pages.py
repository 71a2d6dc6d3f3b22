"""The page pool: keys and values of every held page, and the stack of free ones.

A page holds the keys and values of `page` consecutive input tokens of one node of one tree, in
every layer. Pages are written once and never moved: the children of a node reach its pages through
their parent, and nodes that begin with the same tokens name the same pages, so a branch copies no
keys and values at all. A tree gives all its pages back when its last trajectory has ended.

Axes: N layers, P pages of the pool, K key-value heads, T tokens of a page, D head size.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treepo_jax import struct

NO_PAGE = -1


@struct.dataclass
class Pool:
  """Pages of a device.

  Attributes:
    key, value: contents of the pages.
    count: nodes that hold each page, 0 where it is free.
    free: page numbers; the first `size` are free.
    size: free pages.
  """

  key: Float[Array, "n p k t d"]
  value: Float[Array, "n p k t d"]
  count: Int[Array, "p"]
  free: Int[Array, "p"]
  size: Int[Array, ""]


def create(layers: int, pages: int, kv_heads: int, page: int, head_dim: int, dtype) -> Pool:
  """Returns a pool whose pages are all free."""
  shape = (layers, pages, kv_heads, page, head_dim)
  return Pool(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),  # a buffer of its own: both are donated
    count=jnp.zeros(pages, jnp.int32),
    free=jnp.arange(pages, dtype=jnp.int32),
    size=jnp.asarray(pages, jnp.int32),
  )


def take(pool: Pool, wanted: Bool[Array, "*w"]) -> tuple[Pool, Int[Array, "*w"]]:
  """Takes a page for every entry that is wanted; NO_PAGE elsewhere.

  The caller keeps within what is free (schedule.fill asks for no more).
  """
  flat = wanted.reshape(-1)
  rank = jnp.cumsum(flat) - 1
  page = jnp.where(flat, pool.free[pool.size - 1 - rank], NO_PAGE)
  pool = dataclasses.replace(pool, size=pool.size - flat.sum(dtype=jnp.int32))
  return hold(pool, page), page.reshape(wanted.shape)


def hold(pool: Pool, pages: Int[Array, "*w"]) -> Pool:
  """Counts one node more for every page named; NO_PAGE is none."""
  return dataclasses.replace(pool, count=pool.count.at[_spots(pool, pages)].add(1, mode="drop"))


def release(pool: Pool, pages: Int[Array, "*w"]) -> Pool:
  """Counts one node less for every page named, which must be held; those of no node are free."""
  count = pool.count.at[_spots(pool, pages)].add(-1, mode="drop")
  freed = (count == 0) & (pool.count > 0)
  spot = jnp.where(freed, pool.size + jnp.cumsum(freed) - 1, pool.free.shape[0])
  free = pool.free.at[spot].set(jnp.arange(freed.shape[0], dtype=jnp.int32), mode="drop")
  size = pool.size + freed.sum(dtype=jnp.int32)
  return dataclasses.replace(pool, count=count, free=free, size=size)


def _spots(pool: Pool, pages: Int[Array, "*w"]) -> Int[Array, "w"]:
  """Returns the pages' places in the pool, beyond its end for NO_PAGE."""
  return jnp.where(pages == NO_PAGE, pool.free.shape[0], pages).reshape(-1)


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
