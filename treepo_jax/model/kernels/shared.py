"""Decode attention over the pages that a group of rows shares, as a Pallas TPU kernel.

Each page that any row of a group sees is read from the pool once for all of them: the rows and the
heads that share a key-value head are the rows of one matrix. Which row sees which token is one bit
of a word a token. The softmax runs online in float32, and its logarithmic sum comes back with the
output, so that the caller can merge what the rows do not share.

Axes: G groups, M rows of a group, U shared pages of a group, C = U x T context tokens, W words of
bits, N layers, P pages of the pool, T tokens of a page, H heads, K key-value heads, D head size,
R = M x H / K rows of the matrix.

A TPU keeps the last axis of an array in vector registers of 128 numbers, and XLA lays a pool out so
that none are empty: head size last where it is a multiple of 128, else tokens last where a page
has a multiple of 128. The kernel takes it as it lies, or the whole pool would be copied.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from treepo_jax import struct
from treepo_jax.model.kernels.tpu import LANES, MASKED, SUBLANES, check_scalars, dot

WORD = 32  # bits of a word

# A step of the grid reads STEP tokens, in PAGES pages at most: of 4 key-value heads of 128 in
# bfloat16 1 MiB of keys and values, twice to overlap reading and computing, of the 16 MiB that a
# kernel is given by default.
STEP, PAGES = 512, 8


@struct.dataclass
class Table:
  """The pages that each group reads, in a row, and who sees them.

  Attributes:
    pages: first `count` of them are seen by a row; the others repeat what was read before.
    count: pages that any row sees.
    bits: bit m of a token's words: whether row m sees it.
  """

  pages: Int[Array, "g u"]
  count: Int[Array, "g"]
  bits: Int[Array, "g w c"]


def table(pages: Int[Array, "g u"], visible: Bool[Array, "g m c"]) -> Table:
  """Returns what `attend` walks: once a call of the decoder, for it is the same in every step.

  pages: of the pool; entries that no row sees may hold anything. visible: which tokens of these
  pages, side by side, each row sees.
  """
  g, m, c = visible.shape
  u = pages.shape[1]
  size = c // u
  few = _pages_of_step(size)
  seen = visible.reshape(g, m, u, size)
  held = seen.any((1, 3))
  order = jnp.argsort(~held, stable=True)
  count = held.sum(1, dtype=jnp.int32)

  place = jnp.arange(-(-u // few) * few)[None]
  # Beyond the last page, what stood there a step before: the same page is not read again.
  beyond = jnp.maximum(place - count[:, None] + few, 0) // few
  place = jnp.clip(place - beyond * few, 0, u - 1)
  pages = jnp.take_along_axis(jnp.where(held, pages, 0), order, 1)
  pages = jnp.take_along_axis(pages, place, 1)

  words = -(-m // WORD)
  seen = jnp.pad(seen, ((0, 0), (0, words * WORD - m), (0, 0), (0, 0)))
  seen = seen.reshape(g, words, WORD, u, size)
  bit = jnp.left_shift(jnp.int32(1), jnp.arange(WORD)).reshape(1, 1, WORD, 1, 1)
  bits = jnp.where(seen, bit, 0).sum(2, dtype=jnp.int32)
  bits = jnp.take_along_axis(bits, order[:, None, :, None], 2)
  bits = jnp.pad(bits, ((0, 0), (0, 0), (0, place.shape[1] - u), (0, 0)))
  return Table(pages=pages.astype(jnp.int32), count=count, bits=bits.reshape(g, words, -1))


def attend(
  query: Float[Array, "g k r d"],
  key: Float[Array, "n p k t d"],
  value: Float[Array, "n p k t d"],
  layer: Int[Array, ""],
  seen: Table,
  *,
  rows: int,
  scale: float,
  interpret: Any = False,
) -> tuple[Float[Array, "g k r d"], Float[Array, "g k r"]]:
  """Returns the output and the logarithm of the softmax's sum, both in float32.

  The rows of `query` are `rows` of the group, each with the heads that share a key-value head.
  A row that sees nothing gets zeros, and a sum so low that it weighs nothing in a merge.
  interpret: where there is no TPU, True or pltpu.InterpretParams.
  """
  g, k, r, d = query.shape
  check_scalars(
    seen.pages.size,
    f"{seen.pages.shape[1]} pages of each of {g} groups (config.rollout: raise page or group, or "
    "lower rows or depth)",
  )
  size, few = key.shape[3], _pages_of_step(key.shape[3])
  query = jnp.pad(query, ((0, 0), (0, 0), (0, -r % SUBLANES), (0, 0)))
  padded = query.shape[2]

  tokens_last = d % LANES > 0
  if tokens_last:
    key, value = key.swapaxes(3, 4), value.swapaxes(3, 4)

  def page(place: int):
    def at(g, s, layer, pages, count):
      return layer[0], pages[g, s * few + place], 0, 0, 0

    return pl.BlockSpec((1, 1, *key.shape[2:]), at)

  whole = lambda g, s, *_: (g, 0, 0, 0)
  by_row = pl.BlockSpec((1, k, padded, d), whole)
  bits = pl.BlockSpec((1, seen.bits.shape[1], few * size), lambda g, s, *_: (g, 0, s))
  steps = -(-seen.count.max() // few)
  tokens = 1 if tokens_last else 0
  out, sums = pl.pallas_call(
    functools.partial(_kernel, few=few, share=r // rows, scale=scale, tokens=tokens),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(g, jnp.maximum(steps, 1)),
      in_specs=[by_row, bits, *(page(i) for i in range(few)), *(page(i) for i in range(few))],
      out_specs=[by_row, pl.BlockSpec((1, k, 1, padded), whole)],
      scratch_shapes=[pltpu.VMEM((k, padded, n), jnp.float32) for n in (LANES, LANES, d)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(query.shape, jnp.float32),
      jax.ShapeDtypeStruct((g, k, 1, padded), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    interpret=interpret,
    name="shared_pages",
  )(layer[None], seen.pages, seen.count, query, seen.bits, *[key] * few, *[value] * few)
  return out[:, :, :r], sums[:, :, 0, :r]


def _pages_of_step(size: int) -> int:
  """Returns how many pages of `size` tokens a step reads."""
  return max(1, min(PAGES, STEP // size))


def _kernel(
  layer, pages, count, query, bits, *refs, few: int, share: int, scale: float, tokens: int
):
  """Some pages of a group; `top`, `total` [K, R, LANES] and `mixed` [K, R, D] so far, in scratch.

  tokens: their axis in a page.
  """
  keys, values, (out, sums, top, total, mixed) = refs[:few], refs[few : 2 * few], refs[2 * few :]
  group, step = pl.program_id(0), pl.program_id(1)

  @pl.when(step == 0)
  def _():
    # Above MASKED: what is not seen weighs exp(MASKED - top) = 0 also where nothing is seen.
    top[...] = jnp.full_like(top, MASKED / 2)
    total[...] = jnp.zeros_like(total)
    mixed[...] = jnp.zeros_like(mixed)

  @pl.when(step * few < count[group])
  def _():
    rows = query.shape[2]
    seen = _bit(bits[0], jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0), share)
    for head in range(query.shape[1]):
      key, value = (jnp.concatenate([x[0, 0, head] for x in xs], tokens) for xs in (keys, values))
      score = jnp.where(seen, scale * dot(query[0, head], key, 1, 1 - tokens), MASKED)
      above = jnp.maximum(top[head], score.max(-1, keepdims=True))
      fade = jnp.exp(top[head] - above)
      weight = jnp.exp(score - above[:, :1])
      top[head] = above
      total[head] = fade * total[head] + weight.sum(-1, keepdims=True)
      mixed[head] = fade[:, :1] * mixed[head] + dot(weight.astype(value.dtype), value, 1, tokens)

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    for head in range(query.shape[1]):
      # The largest score adds 1: only where nothing is seen it is less.
      whole = jnp.maximum(total[head], 1)
      out[0, head] = mixed[head] / whole[:, :1]
      sums[0, head] = (top[head] + jnp.log(whole)).T[:1]


def _bit(words, row, share: int):
  """Returns which tokens [R, C] the rows [R, 1] of the matrix see, of the words [W, C]."""
  member = jax.lax.div(row, share)
  seen = jnp.zeros((row.shape[0], words.shape[1]), jnp.int32)
  for w in range(words.shape[0]):
    word = jnp.right_shift(jnp.broadcast_to(words[w : w + 1], seen.shape), member % WORD)
    seen = jnp.where(jax.lax.div(member, WORD) == w, word & 1, seen)
  return seen == 1
