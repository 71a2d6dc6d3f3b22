"""Attention: packed rows of trees for training, shared pages for decoding.

The reference runs everywhere, and is what the kernels for TPUs (model/kernels) are held to. Which
one a program holds is fixed where it is traced, by the platform of the mesh that it is for and not
by the host's: compiled ahead of time for a TPU, it is the program that a TPU runs.

Axes: R packed rows, L tokens of a row, G groups of decode rows, M rows of a group, C context
tokens of a group, S tokens of a segment, H heads, K key-value heads, D head size. In blocks of a
packed row: N blocks, I query and J key tokens of a block, H / K heads that share keys and values.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from treepo_jax.config import UserError
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model.kernels import packed as packed_kernel
from treepo_jax.model.kernels import shared as shared_kernel

MASKED = -1e30  # finite: a row that sees nothing stays finite
BLOCK = 128  # tokens of a block of packed rows; of 128, 256 and 512 the fastest on a CPU
SAVED = "attention"  # checkpoint_name of what the backward pass of long rows needs


@dataclasses.dataclass(frozen=True)
class Choice:
  """How attention is computed; fixed at compilation.

  Attributes:
    setting: config.model.attention. "auto": kernels on a TPU where they take the head size, and the
      page size when decoding, else the reference. "pallas": kernels; where there is no TPU they are
      interpreted, which is slow. "xla": the reference.
    platform: that is compiled for: "cpu" | "gpu" | "tpu".
    mesh: over whose data x fsdp rows are split and over whose tensor axis heads, for XLA does not
      split kernels by itself; None: nothing is split.
    local: whether the rows are a shard's own already, as inside shard_map over data x fsdp.
  """

  setting: str
  platform: str
  mesh: Mesh | None = None
  local: bool = False

  @property
  def interpret(self) -> bool:
    return self.platform != "tpu"

  @property
  def spread(self) -> Mesh | None:
    """The mesh over which XLA splits rows and weights; None where they are a shard's own."""
    return None if self.local else self.mesh

  def kernel(self, head_dim: int, page: int | None = None) -> bool:
    """Returns whether kernels run, over packed rows or, with tokens a page, over shared pages."""
    if self.setting == "auto":
      return self.platform == "tpu" and not _refused(head_dim, page)
    return self.setting == "pallas"


REFERENCE = Choice("xla", "cpu")


def choose(setting: str, mesh: Mesh, *, local: bool) -> Choice:
  """Returns how config.model.attention computes on the mesh; local: in shard_map over its rows."""
  return Choice(setting, mesh.devices.flat[0].platform, mesh, local)


def check(config, head_dim: int) -> None:
  """Raises UserError where config.model.attention asks for kernels that do not take the model."""
  reason = _refused(head_dim, config.rollout.page)
  if config.model.attention == "pallas" and reason:
    raise UserError(f"config.model.attention = 'pallas': {reason}, or 'auto' or 'xla'")


def _refused(head_dim: int, page: int | None) -> str:
  """Returns why the kernels do not take these sizes, and what they do take; "" where they do."""
  if head_dim % 64:
    return f"heads of {head_dim}: the kernels take multiples of 64, so use another model"
  least = 16 if head_dim % 128 == 0 else 128  # tokens lie last then: kernels/shared.py
  if page is not None and page % least:
    return (
      f"config.rollout.page = {page}: for heads of {head_dim} the kernels take multiples of "
      f"{least}, so use for example {-(-page // least) * least}"
    )
  return ""


def packed(
  query: Float[Array, "r l h d"],
  key: Float[Array, "r l k d"],
  value: Float[Array, "r l k d"],
  end: Int[Array, "r l"],
  choice: Choice = REFERENCE,
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
  if choice.kernel(query.shape[-1]):
    return _split(query, key, value, end, choice)
  if end.shape[1] > BLOCK:
    return _in_blocks(query, key, value, end)
  index = jnp.arange(end.shape[1])
  i, j = index[None, :, None], index[None, None, :]
  mask = (j <= i) & (i < end[:, None, :])
  exact = query.dtype == jnp.float32  # dot_product_attention takes no precision of its own
  with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


def _split(query, key, value, end, choice: Choice):
  """Runs the kernels on every device's own rows and heads."""
  h, k, tensor = query.shape[2], key.shape[2], _tensor(choice)
  if h % math.lcm(k, tensor) == 0:  # a device has heads that share whole key-value heads
    repeats = math.lcm(k, tensor) // k
    key, value = (jnp.repeat(x, repeats, 2) if repeats > 1 else x for x in (key, value))
  return _by_kernel(query, key, value, end, choice)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_kernel(query, key, value, end, choice: Choice):
  return _kernel_forward(query, key, value, end, choice)[0]


def _kernel_forward(query, key, value, end, choice: Choice):
  run = functools.partial(packed_kernel.forward, interpret=choice.interpret)
  wide, row, sums = _specs(query, key, choice)
  lifted = _lift(run, choice, (wide, wide, wide, row), (wide, sums))
  out, sums = (checkpoint_name(x, SAVED) for x in lifted(query, key, value, end))
  return out, (query, key, value, end, out, sums)


def _kernel_backward(choice: Choice, saved, gradient):
  run = functools.partial(packed_kernel.backward, interpret=choice.interpret)
  wide, row, sums = _specs(saved[0], saved[1], choice)
  lifted = _lift(run, choice, (wide, wide, wide, row, wide, sums, wide), (wide, wide, wide))
  return *lifted(*saved, gradient), None


_by_kernel.defvjp(_kernel_forward, _kernel_backward)


def _specs(query, key, choice: Choice) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
  """Returns how arrays [R, L, H, D], [R, L] and [R, H, L] are split over the choice's mesh.

  Heads that the tensor axis does not divide are whole on every device of it.
  """
  tensor, rows = _tensor(choice), None if choice.local else mesh_lib.BATCH_AXES
  heads = "tensor" if query.shape[2] % tensor == 0 and key.shape[2] % tensor == 0 else None
  return (
    PartitionSpec(rows, None, heads),
    PartitionSpec(rows),
    PartitionSpec(rows, heads),
  )


def _lift(run: Callable, choice: Choice, in_specs, out_specs) -> Callable:
  """Returns `run` for arrays split over the choice's mesh, where it has one."""
  if choice.mesh is None:
    return run
  lift = functools.partial(jax.shard_map, in_specs=in_specs, out_specs=out_specs, check_vma=False)
  if choice.local:  # the mesh is that of the shard_map around it
    return lift(run, axis_names={"tensor"})
  return lift(run, mesh=choice.mesh)


def _tensor(choice: Choice) -> int:
  """Returns over how many devices heads are split."""
  return 1 if choice.mesh is None else choice.mesh.shape["tensor"]


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


def shared_pages(
  query: Float[Array, "g m h d"],
  pool: tuple[Float[Array, "n p k t d"], Float[Array, "n p k t d"]],
  layer: Int[Array, ""],
  table: shared_kernel.Table,
  own: tuple[Float[Array, "g k m d s"], Float[Array, "g k m s d"]],
  step: Int[Array, ""],
  choice: Choice,
) -> Float[Array, "g m h d"]:
  """Does what `shared` does with the group's context read from the pool's pages, by the kernel."""
  g, m, h, d = query.shape
  own_key, own_value = own
  k = own_key.shape[1]
  precision, scale = _precision(query.dtype), d**-0.5
  query = query.reshape(g, m, k, h // k, d).swapaxes(1, 2)  # [G, K, M, H / K, D]
  attend = functools.partial(shared_kernel.attend, rows=m, scale=scale, interpret=choice.interpret)
  heads = PartitionSpec(None, "tensor" if k % _tensor(choice) == 0 else None)
  pages = PartitionSpec(None, *heads)
  in_specs = heads, pages, pages, PartitionSpec(), PartitionSpec()
  attend = _lift(attend, choice, in_specs, (heads, heads))
  far, sums = attend(query.reshape(g, k, -1, d), pool[0], pool[1], layer, table)
  far, sums = far.reshape(query.shape), sums.reshape(query.shape[:-1])

  dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
  near = scale * dot("gkmed,gkmds->gkmes", query, own_key)
  near = jnp.where(jnp.arange(own_key.shape[-1]) <= step, near, MASKED)
  # Both parts weigh what the logarithms of their sums say; the token itself is always seen.
  top = jnp.maximum(sums, near.max(-1))[..., None]
  far_total, near = jnp.exp(sums[..., None] - top), jnp.exp(near - top)
  total = far_total + near.sum(-1, keepdims=True)
  near = dot("gkmes,gkmsd->gkmed", near.astype(query.dtype), own_value)
  out = (far_total * far + near) / total
  return out.astype(query.dtype).swapaxes(1, 2).reshape(g, m, h, d)


def _precision(dtype) -> jax.lax.Precision | None:
  """float32 means float32 on every backend; bfloat16 takes the fast path."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
