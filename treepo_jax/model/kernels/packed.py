"""Attention over packed rows of trees as Pallas TPU kernels, forward and backward.

FlashAttention (arXiv 2205.14135) with the interval mask: token i sees token j iff j <= i < end[j].
The tiles of a row, a block of queries by a block of keys of which some token is seen, are listed
beforehand and prefetched as scalars. The grid walks the list, so what no token sees is neither
fetched nor computed and costs no step. Tiles on the diagonal are always listed: there a block of
queries meets its last keys, and a block of keys its first queries.

Axes: R packed rows, L tokens of a row, H heads, K key-value heads, D head size, T tiles of a row.
In a kernel: I query and J key tokens of a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from treepo_jax.model.kernels.tpu import LANES, MASKED, check_scalars, dot

BLOCKS = (512, 256, 128)  # tokens of a block: the largest that pads a row by an eighth at most


def forward(
  query: Float[Array, "r l h d"],
  key: Float[Array, "r l k d"],
  value: Float[Array, "r l k d"],
  end: Int[Array, "r l"],
  *,
  interpret: Any = False,
) -> tuple[Float[Array, "r l h d"], Float[Array, "r h l"]]:
  """Returns the output and, in float32, the logarithm of each softmax's sum.

  A token that sees nothing gets zeros. interpret: where there is no TPU, True or
  pltpu.InterpretParams.
  """
  length, block = query.shape[1], block_of(query.shape[1])
  query, key, value = (_by_head(x, block) for x in (query, key, value))
  end = _pad(end, block, 1)
  (r, h, padded, d), k = query.shape, key.shape[1]
  tiles, count = _tiles(end, block, by_key=False)
  at = _specs(padded, block, d, h // k)
  out, sums = pl.pallas_call(
    functools.partial(_forward_kernel, n=padded // block),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(r, h, count.max()),
      in_specs=[at["query"], at["key"], at["key"], at["end"]],
      out_specs=[at["query"], at["number"]],
      scratch_shapes=[pltpu.VMEM((block, size), jnp.float32) for size in (LANES, LANES, d)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(query.shape, query.dtype),
      jax.ShapeDtypeStruct((r, h, 1, padded), jnp.float32),
    ],
    compiler_params=_params(1),
    interpret=interpret,
    name="packed_forward",
  )(tiles, count, query, key, value, end[:, None])
  return out.swapaxes(1, 2)[:, :length], sums[:, :, 0, :length]


def backward(
  query: Float[Array, "r l h d"],
  key: Float[Array, "r l k d"],
  value: Float[Array, "r l k d"],
  end: Int[Array, "r l"],
  out: Float[Array, "r l h d"],
  sums: Float[Array, "r h l"],
  gradient: Float[Array, "r l h d"],
  *,
  interpret: Any = False,
) -> tuple[Float[Array, "r l h d"], Float[Array, "r l k d"], Float[Array, "r l k d"]]:
  """Returns the gradients of query, key and value, from `forward`'s results and the output's."""
  length, block = query.shape[1], block_of(query.shape[1])
  # The sum over keys of a weight times its gradient.
  delta = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
  sums, delta = (_pad(x, block, 2)[:, :, None] for x in (sums, delta))
  query, key, value, gradient = (_by_head(x, block) for x in (query, key, value, gradient))
  end = _pad(end, block, 1)
  (r, h, padded, d), k = query.shape, key.shape[1]
  arrays = query, key, value, end[:, None], gradient, sums, delta
  names = "query", "key", "key", "end", "query", "number", "number"

  tiles, count = _tiles(end, block, by_key=False)
  at = _specs(padded, block, d, h // k)
  to_query = pl.pallas_call(
    functools.partial(_query_kernel, n=padded // block),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(r, h, count.max()),
      in_specs=[at[name] for name in names],
      out_specs=at["query"],
      scratch_shapes=[pltpu.VMEM((block, size), jnp.float32) for size in (LANES, LANES, d)],
    ),
    out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    compiler_params=_params(1),
    interpret=interpret,
    name="packed_backward_query",
  )(tiles, count, *arrays)

  tiles, count = _tiles(end, block, by_key=True)
  at = _specs_by_key(padded, block, d, h // k)
  to_key, to_value = pl.pallas_call(
    functools.partial(_key_kernel, n=padded // block),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(r, k, count.max(), h // k),
      in_specs=[at[name] for name in names],
      out_specs=[at["key"], at["key"]],
      scratch_shapes=[
        pltpu.VMEM((block, LANES), jnp.int32),
        pltpu.VMEM((block, d), jnp.float32),
        pltpu.VMEM((block, d), jnp.float32),
      ],
    ),
    out_shape=[jax.ShapeDtypeStruct(key.shape, key.dtype)] * 2,
    compiler_params=_params(2),
    interpret=interpret,
    name="packed_backward_key",
  )(tiles, count, *arrays)
  back = lambda x: x.swapaxes(1, 2)[:, :length]
  return back(to_query), back(to_key), back(to_value)


def block_of(length: int) -> int:
  """Returns the tokens of a block for rows of `length` tokens."""
  return next(b for b in BLOCKS if -length % b <= length // 8 or b == BLOCKS[-1])


def _forward_kernel(tiles, count, query, key, value, end, out, sums, top, total, mixed, *, n: int):
  """One tile for one head; `top`, `total` [I, LANES] and `mixed` [I, D] so far, in scratch."""
  r, t = pl.program_id(0), pl.program_id(2)
  i, j = _tile(tiles, r, t, n)

  @pl.when(t < count[r])
  def _():
    @pl.when((t == 0) | _on_diagonal(tiles, r, t - 1, n))
    def _():
      # Above MASKED: what is not seen weighs exp(MASKED - top) = 0 also where nothing is seen.
      top[...] = jnp.full_like(top, MASKED / 2)
      total[...] = jnp.zeros_like(total)
      mixed[...] = jnp.zeros_like(mixed)

    seen = _seen(i, j, end[0], (query.shape[2], key.shape[2]), queries=0)
    score = jnp.where(seen, dot(query[0, 0], key[0, 0], 1, 1) * query.shape[-1] ** -0.5, MASKED)
    above = jnp.maximum(top[...], score.max(-1, keepdims=True))
    fade = jnp.exp(top[...] - above)
    weight = jnp.exp(score - above[:, :1])
    top[...] = above
    total[...] = fade * total[...] + weight.sum(-1, keepdims=True)
    mixed[...] = fade[:, :1] * mixed[...] + dot(weight.astype(value.dtype), value[0, 0], 1, 0)

    @pl.when(i == j)
    def _():
      # The largest score adds 1: only where nothing is seen it is less.
      whole = jnp.maximum(total[...], 1)
      out[0, 0] = (mixed[...] / whole[:, :1]).astype(out.dtype)
      sums[0, 0] = (top[...] + jnp.log(whole)).T[:1]


def _query_kernel(
  tiles, count, query, key, value, end, gradient, sums, delta, to_query, sum_of, delta_of, so_far,
  *, n: int,
):  # fmt: skip
  """One tile of the gradient of the queries of one head; sums and delta upright in scratch."""
  r, t = pl.program_id(0), pl.program_id(2)
  i, j = _tile(tiles, r, t, n)

  @pl.when(t < count[r])
  def _():
    @pl.when((t == 0) | _on_diagonal(tiles, r, t - 1, n))
    def _():
      sum_of[...] = _upright(sums[0, 0])
      delta_of[...] = _upright(delta[0, 0])
      so_far[...] = jnp.zeros_like(so_far)

    scale = query.shape[-1] ** -0.5
    seen = _seen(i, j, end[0], (query.shape[2], key.shape[2]), queries=0)
    score = jnp.where(seen, dot(query[0, 0], key[0, 0], 1, 1) * scale, MASKED)
    weight = jnp.exp(score - sum_of[:, :1])
    to_score = weight * (dot(gradient[0, 0], value[0, 0], 1, 1) - delta_of[:, :1])
    so_far[...] += dot(to_score.astype(key.dtype), key[0, 0], 1, 0)

    @pl.when(i == j)
    def _():
      to_query[0, 0] = (so_far[...] * scale).astype(to_query.dtype)


def _key_kernel(
  tiles, count, query, key, value, end, gradient, sums, delta, to_key, to_value, end_of, key_so_far,
  value_so_far, *, n: int,
):  # fmt: skip
  """One tile of the gradients of keys and values from one of the heads that share them.

  Scores are [J, I] here: the sums over queries are then plain products of matrices.
  """
  r, t, head = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  j, i = _tile(tiles, r, t, n)

  @pl.when(t < count[r])
  def _():
    @pl.when((i == j) & (head == 0))
    def _():
      end_of[...] = _upright(end[0])
      key_so_far[...] = jnp.zeros_like(key_so_far)
      value_so_far[...] = jnp.zeros_like(value_so_far)

    scale = query.shape[-1] ** -0.5
    seen = _seen(i, j, end_of[:, :1], (key.shape[2], query.shape[2]), queries=1)
    score = jnp.where(seen, dot(key[0, 0], query[0, 0], 1, 1) * scale, MASKED)
    weight = jnp.exp(score - sums[0, 0])
    to_score = weight * (dot(value[0, 0], gradient[0, 0], 1, 1) - delta[0, 0])
    key_so_far[...] += dot(to_score.astype(query.dtype), query[0, 0], 1, 0)
    value_so_far[...] += dot(weight.astype(gradient.dtype), gradient[0, 0], 1, 0)

    last = (t + 1 == count[r]) | _on_diagonal(tiles, r, t + 1, n)

    @pl.when(last & (head == pl.num_programs(3) - 1))
    def _():
      to_key[0, 0] = (key_so_far[...] * scale).astype(to_key.dtype)
      to_value[0, 0] = value_so_far[...].astype(to_value.dtype)


def _by_head(x: Float[Array, "r l h d"], block: int) -> Float[Array, "r h m d"]:
  """Returns x with heads before tokens, padded to whole blocks."""
  return _pad(x.swapaxes(1, 2), block, 2)


def _pad(x: Array, block: int, axis: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, widths)


def _tiles(
  end: Int[Array, "r m"], block: int, *, by_key: bool
) -> tuple[Int[Array, "r t"], Int[Array, "r"]]:
  """Returns the tiles of each row and their number; the last one fills up.

  A tile is query block * blocks + key block, in this order, or the other way round `by_key`.
  """
  n = end.shape[1] // block
  index = jnp.arange(n)
  i, j = index[:, None], index[None, :]
  reach = end.reshape(-1, 1, n, block).max(-1)
  seen = (i == j)[None] | ((j < i)[None] & ((i * block)[None] < reach))
  if by_key:
    seen = seen.swapaxes(1, 2)
  size = n * (n + 1) // 2
  check_scalars(
    end.shape[0] * size,
    f"tiles of {end.shape[0]} rows of {end.shape[1]} tokens (config.learn: lower micro_rows or "
    "row_length)",
  )
  # The last tile is (n - 1, n - 1) either way.
  list_row = lambda x: jnp.nonzero(x, size=size, fill_value=n * n - 1)[0]
  tiles = jax.vmap(list_row)(seen.reshape(-1, n * n))
  return tiles.astype(jnp.int32), seen.sum((1, 2), dtype=jnp.int32)


def _tile(tiles, r, t, n: int):
  """Returns the two blocks of a tile."""
  return jax.lax.div(tiles[r, t], n), jax.lax.rem(tiles[r, t], n)


def _on_diagonal(tiles, r, t, n: int):
  first, second = _tile(tiles, r, jnp.clip(t, 0, tiles.shape[1] - 1), n)
  return first == second


def _specs(padded: int, block: int, d: int, share: int) -> dict[str, pl.BlockSpec]:
  """Returns where the blocks of tile (r, h, t) lie in arrays with heads before tokens."""
  n = padded // block

  def spec(shape, place):
    return pl.BlockSpec(shape, lambda r, h, t, tiles, count: place(r, h, *_tile(tiles, r, t, n)))

  return {
    "query": spec((1, 1, block, d), lambda r, h, i, j: (r, h, i, 0)),
    "number": spec((1, 1, 1, block), lambda r, h, i, j: (r, h, 0, i)),
    "key": spec((1, 1, block, d), lambda r, h, i, j: (r, jax.lax.div(h, share), j, 0)),
    "end": spec((1, 1, block), lambda r, h, i, j: (r, 0, j)),
  }


def _specs_by_key(padded: int, block: int, d: int, share: int) -> dict[str, pl.BlockSpec]:
  """Returns where the blocks of tile (r, k, t, one of the heads that share k) lie."""
  n = padded // block

  def spec(shape, place):
    return pl.BlockSpec(
      shape, lambda r, k, t, s, tiles, count: place(r, k, k * share + s, *_tile(tiles, r, t, n))
    )

  return {
    "query": spec((1, 1, block, d), lambda r, k, h, j, i: (r, h, i, 0)),
    "number": spec((1, 1, 1, block), lambda r, k, h, j, i: (r, h, 0, i)),
    "key": spec((1, 1, block, d), lambda r, k, h, j, i: (r, k, j, 0)),
    "end": spec((1, 1, block), lambda r, k, h, j, i: (r, 0, j)),
  }


def _params(inner: int) -> pltpu.CompilerParams:
  """Rows and heads go to either core of a chip; `inner` more axes of the grid run in order."""
  return pltpu.CompilerParams(dimension_semantics=("parallel",) * 2 + ("arbitrary",) * inner)


def _seen(i, j, end, shape: tuple[int, int], *, queries: int):
  """Returns who sees whom in tile (i, j); `queries` is their axis, keys lie along the other."""
  at = i * shape[queries] + jax.lax.broadcasted_iota(jnp.int32, shape, queries)
  to = j * shape[1 - queries] + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - queries)
  return (to <= at) & (at < end)


def _upright(x):
  """Returns [1, B] as [B, LANES], a row of it being one number."""
  return jnp.broadcast_to(x, (LANES, x.shape[1])).T
