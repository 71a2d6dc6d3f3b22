"""Reference attention: packed rows of trees for training, shared pages for decoding.

Axes: R packed rows, L tokens of a row, G groups of decode rows, M rows of a group, C context
tokens of a group, S tokens of a segment, H heads, K key-value heads, D head size. In blocks of a
packed row: N blocks, I query and J key tokens of a block, H / K heads that share keys and values.
"""

import contextlib

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite: a row that sees nothing stays finite
BLOCK = 128  # tokens of a block of packed rows; of 128, 256 and 512 the fastest on a CPU
SAVED = "attention"  # checkpoint_name of what the backward pass of long rows needs


def packed(
  query: Float[Array, "r l h d"],
  key: Float[Array, "r l k d"],
  value: Float[Array, "r l k d"],
  end: Int[Array, "r l"],
) -> Float[Array, "r l h d"]:
  """Attends along the paths of packed trees: token i sees token j iff j <= i < end[j].

  With tokens in depth-first order and end[j] one past the last token below j, the visible tokens
  are exactly the ancestors:

      tokens   a b c d        a -> b -> c      end  4 3 3 4
                               `-> d
      a sees   a . . .
      b        a b . .
      c        a b c .
      d        a . . d

  Rows above BLOCK go block by block: memory is linear in L, forward and backward.
  """
  if end.shape[1] > BLOCK:
    return _in_blocks(query, key, value, end)
  index = jnp.arange(end.shape[1])
  i, j = index[None, :, None], index[None, None, :]
  mask = (j <= i) & (i < end[:, None, :])
  exact = query.dtype == jnp.float32  # dot_product_attention takes no precision of its own
  with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


def _in_blocks(query, key, value, end):
  """Cuts rows into blocks, padded to whole ones, and heads into groups that share keys."""
  (r, length, h, d), k = query.shape, key.shape[2]
  n = -(-length // BLOCK)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, n * BLOCK - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(r, n, BLOCK, *x.shape[2:]), 1, 0)

  query = cut(query).reshape(n, r, BLOCK, k, h // k, d).transpose(0, 1, 3, 4, 2, 5)
  key, value = cut(key).swapaxes(2, 3), cut(value).swapaxes(2, 3)
  out = _blocked(query, key, value, cut(end))  # [N, R, K, H / K, I, D]
  out = out.transpose(1, 0, 4, 2, 3, 5).reshape(r, n * BLOCK, h, d)
  return out[:, :length]


@jax.custom_vjp
def _blocked(
  query: Float[Array, "n r k g i d"],
  key: Float[Array, "n r k j d"],
  value: Float[Array, "n r k j d"],
  end: Int[Array, "n r j"],
) -> Float[Array, "n r k g i d"]:
  """Attends tile by tile with a running softmax (FlashAttention, arXiv 2205.14135).

  A tile is a block of queries and a block of keys of which some token is seen; the others cost
  nothing. Beyond its inputs and its output it holds the scores of one tile; the backward pass keeps
  the output and the softmax's logarithmic sums, and takes the scores anew.
  """
  return _forward(query, key, value, end)[0]


def _forward(query, key, value, end):
  query_of, key_of, count = _tiles(end)
  total = jnp.zeros(query.shape[:-1], jnp.float32)
  # Above MASKED: what is not seen weighs exp(MASKED - top) = 0 also where nothing is seen.
  top = jnp.full_like(total, MASKED / 2)
  out = jnp.zeros(query.shape, jnp.float32)

  def step(t, carry):
    i, j = query_of[t], key_of[t]
    out, top, total = (x[i] for x in carry)  # of block i so far
    score = _scores(query, key, end, i, j)
    above = jnp.maximum(top, score.max(-1))
    fade = jnp.exp(top - above)
    weight = jnp.exp(score - above[..., None])
    total = fade * total + weight.sum(-1)
    out = fade[..., None] * out + _dot("rkgij,rkjd->rkgid", weight.astype(value.dtype), value[j])
    return tuple(_put(x, new, i) for x, new in zip(carry, (out, above, total), strict=True))

  out, top, total = jax.lax.fori_loop(0, count, step, (out, top, total))
  total = jnp.maximum(total, 1)  # the largest score adds 1: only where nothing is seen it is less
  out = checkpoint_name((out / total[..., None]).astype(query.dtype), SAVED)
  sums = checkpoint_name(top + jnp.log(total), SAVED)
  return out, (query, key, value, end, out, sums)


def _backward(saved, gradient):
  query, key, value, end, out, sums = saved
  query_of, key_of, count = _tiles(end)
  # The sum over keys of a weight times its gradient.
  delta = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1)
  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))

  def step(t, carry):
    i, j = query_of[t], key_of[t]
    to_query, to_key, to_value = carry
    weight = jnp.exp(_scores(query, key, end, i, j) - sums[i][..., None])
    to_score = weight * (_dot("rkgid,rkjd->rkgij", gradient[i], value[j]) - delta[i][..., None])
    weight, to_score = weight.astype(query.dtype), to_score.astype(query.dtype)
    return (
      _put(to_query, to_query[i] + _dot("rkgij,rkjd->rkgid", to_score, key[j]), i),
      _put(to_key, to_key[j] + _dot("rkgij,rkgid->rkjd", to_score, query[i]), j),
      _put(to_value, to_value[j] + _dot("rkgij,rkgid->rkjd", weight, gradient[i]), j),
    )

  to_query, to_key, to_value = jax.lax.fori_loop(0, count, step, zeros)
  scale = query.shape[-1] ** -0.5
  gradients = to_query * scale, to_key * scale, to_value
  return *(x.astype(query.dtype) for x in gradients), None


_blocked.defvjp(_forward, _backward)


def _tiles(end: Int[Array, "n r j"]) -> tuple[Int[Array, "t"], Int[Array, "t"], Int[Array, ""]]:
  """Returns query and key block of the tiles in which any row sees a token, and their number."""
  n, _, block = end.shape
  index = jnp.arange(n)
  i, j = index[:, None], index[None, :]
  seen = (j <= i) & (i * block < end.max((1, 2))[None, :])
  query_of, key_of = jnp.nonzero(seen, size=n * (n + 1) // 2, fill_value=0)
  return query_of, key_of, seen.sum()


def _scores(query, key, end, i, j) -> Float[Array, "r k g i j"]:
  """Returns the scaled scores of tile (i, j) in float32, MASKED where a token is not seen."""
  block = end.shape[-1]
  score = _dot("rkgid,rkjd->rkgij", query[i], key[j]) * query.shape[-1] ** -0.5
  at = (i * block + jnp.arange(block))[None, :, None]
  to = (j * block + jnp.arange(block))[None, None, :]
  seen = (to <= at) & (at < end[j][:, None, :])
  return jnp.where(seen[:, None, None], score, MASKED)


def _dot(axes: str, x: Array, y: Array) -> Float[Array, "..."]:
  """Returns the product in float32."""
  return jnp.einsum(axes, x, y, precision=_precision(x.dtype), preferred_element_type=jnp.float32)


def _put(x: Float[Array, "n ..."], new: Float[Array, "..."], at) -> Float[Array, "n ..."]:
  """Returns x with its block `at` replaced; in place where x is carried through a loop."""
  return jax.lax.dynamic_update_index_in_dim(x, new, at, 0)


def shared(
  query: Float[Array, "g m h d"],
  context: tuple[Float[Array, "g k d c"], Float[Array, "g k c d"]],
  visible: Bool[Array, "g m c"],
  own: tuple[Float[Array, "g k m d s"], Float[Array, "g k m s d"]],
  step: Int[Array, ""],
) -> Float[Array, "g m h d"]:
  """Attends one new token a row to its group's shared context and to its own segment so far.

  Each context token is read once for the group; `visible` says which rows it is an ancestor of.
  Of a row's own segment the tokens 0..step are seen. Softmax over both parts together, in float32.
  Keys lie with their tokens last, so that both products run along contiguous memory: on a CPU the
  whole is 2 to 4 times as fast as with tokens before head size.
  """
  g, m, h, d = query.shape
  context_key, context_value = context
  own_key, own_value = own
  k, c = context_value.shape[1:3]
  rows = (m, h // k)
  query = (query * d**-0.5).reshape(g, m, k, h // k, d).swapaxes(1, 2)  # [G, K, M, H / K, D]
  precision = _precision(query.dtype)

  def dot(x, y, batch: int, dtype=query.dtype):
    """Matrix products of x [..., I, J] and y [..., J, L] over `batch` common axes."""
    axes = tuple(range(batch))
    dims = ((batch + 1,), (batch,)), (axes, axes)
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=dtype)

  far = dot(query.reshape(g, k, -1, d), context_key, 2, jnp.float32).reshape(g, k, *rows, c)
  far = jnp.where(visible[:, None, :, None], far, MASKED)
  near = dot(query, own_key, 3, jnp.float32)
  near = jnp.where(jnp.arange(own_key.shape[-1]) <= step, near, MASKED)
  top = jnp.maximum(far.max(-1), near.max(-1))[..., None]  # the token itself is always seen
  far, near = jnp.exp(far - top), jnp.exp(near - top)
  total = far.sum(-1, keepdims=True) + near.sum(-1, keepdims=True)
  far, near = far.astype(query.dtype), near.astype(query.dtype)
  out = dot(far.reshape(g, k, -1, c), context_value, 2, jnp.float32).reshape(g, k, *rows, d)
  out = (out + dot(near, own_value, 3, jnp.float32)) / total
  return out.astype(query.dtype).swapaxes(1, 2).reshape(g, m, h, d)


def _precision(dtype) -> jax.lax.Precision | None:
  """float32 means float32 on every backend; bfloat16 takes the fast path."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
