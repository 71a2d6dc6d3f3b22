"""One decoder for Qwen2, Qwen2.5, Qwen3, Llama and Mistral: flax.nnx modules, stacked layers.

Axes: R packed rows, L tokens of a row, Q = G x M decode rows in groups, S tokens of a segment,
W width, H heads, K key-value heads, D head size, V vocabulary, N layers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from treepo_jax import struct
from treepo_jax.model import attention
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model.kernels import shared as shared_kernel


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.x frequency scaling (llama3 rope type)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What a checkpoint's config.json says of the decoder; hashable, so it can be static."""

  family: str  # "qwen2" | "qwen3" | "llama" | "mistral"
  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  hidden: int
  norm_eps: float
  rope_theta: float
  rope_scaling: RopeScaling | None
  max_positions: int
  tied: bool
  qkv_bias: bool
  output_bias: bool
  qk_norm: bool


# config.model.remat -> what is kept of a layer for the backward pass, beside its input; the rest is
# computed anew. Attention over long rows takes time quadratic in L, so "dots" keeps its output too.
KEEP = {
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(attention.SAVED),
  ),
  "layer": jax.checkpoint_policies.nothing_saveable,
}

Rotation = tuple[Float[Array, "*b 1 e"], Float[Array, "*b 1 e"]]  # cosine and sine, E = D / 2


@struct.dataclass
class Context:
  """What a group of decode rows sees beyond its own segment.

  Attributes:
    key, value: one array a layer, or one array over all layers where the layers are scanned; keys
      with their tokens last (attention.shared).
    visible: which context tokens each row of the group sees.
  """

  key: list[Float[Array, "g k d c"]] | Float[Array, "n g k d c"]
  value: list[Float[Array, "g k c d"]] | Float[Array, "n g k c d"]
  visible: Bool[Array, "g m c"]


@struct.dataclass
class Pages:
  """The same where it is read from the pool of pages, by a kernel.

  Attributes:
    key, value: of the pool, all layers.
    table: which pages each group reads.
  """

  key: Float[Array, "n p k t d"]
  value: Float[Array, "n p k t d"]
  table: shared_kernel.Table


class Adapter(nnx.Module):
  """x @ a @ b, in x's dtype: what a low-rank adapter adds to a projection."""

  def __init__(self, a: Float[Array, "*n i r"], b: Float[Array, "*n r o"]):
    self.a, self.b = nnx.Param(a), nnx.Param(b)

  def __call__(self, x: Float[Array, "t i"]) -> Float[Array, "t o"]:
    for factor in (self.a[...], self.b[...]):
      x = jnp.matmul(x, factor.astype(x.dtype), precision=attention._precision(x.dtype))
    return x


class Linear(nnx.Module):
  """x @ kernel + bias; float32 weights multiply in float32 on every backend."""

  def __init__(self, inputs: int, outputs: int, bias: bool, dtype, rngs: nnx.Rngs):
    scale = inputs**-0.5
    self.kernel = nnx.Param(scale * jax.random.normal(rngs(), (inputs, outputs), dtype))
    self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
    self.adapter: Adapter | None = nnx.data(None)  # set by `adapted`

  def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    kernel = self.kernel[...]
    # As one product of matrices: with more axes the gradients are 2.5 times as slow on a CPU.
    flat = x.reshape(-1, x.shape[-1])
    out = jnp.matmul(flat, kernel, precision=attention._precision(kernel.dtype))
    if self.adapter is not None:
      out += self.adapter(flat)
    x = out.reshape(*x.shape[:-1], -1)
    return x if self.bias is None else x + along(self.bias[...], x)


class Norm(nnx.Module):
  """Root-mean-square norm in float32, scaled in the model's dtype (as transformers does)."""

  def __init__(self, size: int, eps: float, dtype):
    self.scale = nnx.Param(jnp.ones(size, dtype))
    self.eps = eps

  def __call__(self, x: Float[Array, "*b w"]) -> Float[Array, "*b w"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return along(self.scale[...], y) * y.astype(x.dtype)


class Block(nnx.Module):
  """One layer: attention and a gated feed-forward, each with its residual."""

  def __init__(self, arch: Architecture, dtype, rngs: nnx.Rngs):
    a, d = arch, arch.head_dim
    self.arch = arch
    self.query = Linear(a.width, a.heads * d, a.qkv_bias, dtype, rngs)
    self.key = Linear(a.width, a.kv_heads * d, a.qkv_bias, dtype, rngs)
    self.value = Linear(a.width, a.kv_heads * d, a.qkv_bias, dtype, rngs)
    self.output = Linear(a.heads * d, a.width, a.output_bias, dtype, rngs)
    self.query_norm = Norm(d, a.norm_eps, dtype) if a.qk_norm else None
    self.key_norm = Norm(d, a.norm_eps, dtype) if a.qk_norm else None
    self.gate = Linear(a.width, a.hidden, False, dtype, rngs)
    self.up = Linear(a.width, a.hidden, False, dtype, rngs)
    self.down = Linear(a.hidden, a.width, False, dtype, rngs)
    self.attention_norm = Norm(a.width, a.norm_eps, dtype)
    self.feed_norm = Norm(a.width, a.norm_eps, dtype)

  def project(self, x: Float[Array, "*b w"], turn: Rotation):
    """Returns query [*b, H, D], key and value [*b, K, D] of normed x, rotated by `turn`."""
    a = self.arch
    split = lambda y, heads: y.reshape(*y.shape[:-1], heads, a.head_dim)
    query = split(self.query(x), a.heads)
    key, value = split(self.key(x), a.kv_heads), split(self.value(x), a.kv_heads)
    if self.query_norm is not None and self.key_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    return rotate(query, turn), rotate(key, turn), value

  def merge(self, x: Float[Array, "*b w"], mixed: Float[Array, "*b h d"]) -> Float[Array, "*b w"]:
    """Adds the attention's output and the feed-forward to the residual x."""
    x = x + self.output(mixed.reshape(*mixed.shape[:-2], -1))
    y = self.feed_norm(x)
    return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))

  def packed(self, x, turn, end, choice: attention.Choice):
    """One layer over packed rows; returns x and the layer's (key, value) [R, L, K, D]."""
    query, key, value = self.project(self.attention_norm(x), turn)
    return self.merge(x, attention.packed(query, key, value, end, choice)), (key, value)

  def decode(self, x, turn, attend, own, step):
    """One layer for one new token a row; returns x and `own` with the token's key and value.

    attend: (query, own) -> output, over the layer's context and the row's own tokens.
    """
    query, key, value = self.project(self.attention_norm(x), turn)
    put = lambda buffer, new, axis: jax.lax.dynamic_update_slice_in_dim(
      buffer, jnp.expand_dims(new.swapaxes(1, 2), axis), step, axis
    )
    own = put(own[0], key, -1), put(own[1], value, -2)
    return self.merge(x, attend(query, own)), own


class Transformer(nnx.Module):
  """The decoder: embedding, stacked layers, final norm, tied or own head."""

  def __init__(self, arch: Architecture, dtype, rngs: nnx.Rngs):
    self.arch = arch
    self.embed = nnx.Param(0.02 * jax.random.normal(rngs(), (arch.vocab_size, arch.width), dtype))
    make = nnx.vmap(lambda r: Block(arch, dtype, r), in_axes=0, out_axes=0)
    self.blocks = make(rngs.split(arch.layers))
    self.norm = Norm(arch.width, arch.norm_eps, dtype)
    self.head = None if arch.tied else Linear(arch.width, arch.vocab_size, False, dtype, rngs)

  def packed(
    self,
    tokens: Int[Array, "r l"],
    positions: Int[Array, "r l"],
    end: Int[Array, "r l"],
    *,
    remat: str,
    choice: attention.Choice = attention.REFERENCE,
  ):
    """Returns final hidden states [R, L, W] and every layer's (key, value) [N, R, L, K, D].

    remat: "none": everything is kept for the backward pass; else as KEEP says.
    """
    graph, layers = nnx.split(self.blocks)
    turn = rotation(positions, self.arch)
    mesh, table = choice.spread, self.embed[...]
    x = table[tokens] if mesh is None else mesh_lib.look_up(table, tokens, mesh)
    # Left to itself XLA would split the width of a layer over fsdp, and send activations about.
    lie = lambda x, tokens: x if mesh is None else mesh_lib.split_rows(x, mesh, tokens)

    def body(x, layer):
      if mesh is not None:
        layer = mesh_lib.gathered(layer, mesh)
      x, cache = nnx.merge(graph, layer).packed(lie(x, False), turn, end, choice)
      return lie(lie(x, False), True), cache  # else the feed-forward would be split by tokens

    if remat != "none":
      body = jax.checkpoint(body, policy=KEEP[remat], prevent_cse=False)  # scan prevents it
    x, cache = jax.lax.scan(body, lie(x, True), layers)
    return self.norm(lie(x, False)), cache

  def logits(self, hidden: Float[Array, "*b w"]) -> Float[Array, "*b v"]:
    """Returns float32 logits over the vocabulary."""
    kernel = self.embed[...].T if self.head is None else self.head.kernel[...]
    precision = attention._precision(kernel.dtype)
    return jnp.matmul(hidden, kernel, precision=precision, preferred_element_type=jnp.float32)


def create(arch: Architecture, key: jax.Array, dtype=jnp.float32) -> tuple[nnx.GraphDef, dict]:
  """Returns (graph, params): a static, hashable graph and the nested dict of random weights."""
  graph, params = nnx.split(Transformer(arch, dtype, nnx.Rngs(key)))
  return graph, nnx.to_pure_dict(params)


def abstract(arch: Architecture, dtype=jnp.float32) -> tuple[nnx.GraphDef, dict]:
  """Returns what `create` does with shapes and dtypes in place of arrays: nothing is computed."""
  graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(arch, dtype, nnx.Rngs(0))))
  return graph, nnx.to_pure_dict(params)


def architecture(graph: nnx.GraphDef) -> Architecture:
  """Returns the architecture that the graph was made of."""
  return next(
    x.value for name, x in graph.attributes if name == "arch" and isinstance(x, nnx.graph.Static)
  )


def adapted(
  graph: nnx.GraphDef, params: dict, adapters: dict, *, scale: float
) -> tuple[nnx.GraphDef, dict]:
  """Returns (graph, params) of the model with low-rank adapters beside projections of its layers.

  It computes what weights with scale * A B added would, without ever holding those, nor the
  gradient of a whole weight.

  Args:
    adapters: projection -> {"a": [N, inputs, rank], "b": [N, rank, outputs]}.
    scale: of what they add.
  """
  model = nnx.merge(graph, params)
  for name, adapter in adapters.items():
    getattr(model.blocks, name).adapter = Adapter(adapter["a"], scale * adapter["b"])
  graph, state = nnx.split(model)
  return graph, nnx.to_pure_dict(state)


def hidden(
  graph: nnx.GraphDef,
  params: dict,
  tokens: Int[Array, "r l"],
  positions: Int[Array, "r l"],
  end: Int[Array, "r l"],
  *,
  remat: str = "none",
  choice: attention.Choice = attention.REFERENCE,
) -> Float[Array, "r l w"]:
  """Returns hidden states of packed trees: token i sees token j iff j <= i < end[j]."""
  model = nnx.merge(graph, params)
  return model.packed(tokens, positions, end, remat=remat, choice=choice)[0]


def log_probs(
  graph: nnx.GraphDef,
  params: dict,
  hidden: Float[Array, "*b w"],
  targets: Int[Array, "*b"],
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
  """Returns log p(target | hidden) and the entropy in nats, at temperature 1, in float32."""
  logits = nnx.merge(graph, params).logits(hidden)
  total = jax.nn.logsumexp(logits, -1)
  chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - total
  entropy = total - (jax.nn.softmax(logits, -1) * logits).sum(-1)
  return chosen, entropy


def prefill(
  graph: nnx.GraphDef,
  params: dict,
  tokens: Int[Array, "b p"],
  length: Int[Array, "b"],
  *,
  choice: attention.Choice = attention.REFERENCE,
):
  """Returns the keys and values [N, B, P, K, D] of prompts, left aligned; junk beyond `length`."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  end = jnp.broadcast_to(length[:, None], tokens.shape)
  return nnx.merge(graph, params).packed(tokens, positions, end, remat="none", choice=choice)[1]


def unstack(params: dict) -> list[dict]:
  """Returns the weights of the layers one by one, for decoding with the layers unrolled."""
  leaves, structure = jax.tree.flatten(params["blocks"])
  return [structure.unflatten(row) for row in zip(*(list(leaf) for leaf in leaves), strict=True)]


def decode_step(
  model: Transformer,
  weights: list[dict] | None,
  tokens: Int[Array, "g m"],
  positions: Int[Array, "g m"],
  context: Context | Pages,
  own,
  step,
  *,
  choice: attention.Choice = attention.REFERENCE,
):
  """Feeds one token a row; returns hidden states [G, M, W] and `own` with its keys and values.

  weights: of each layer, from `unstack`, to unroll them; None: the model's own, scanned.
  own: (key, value), lists of [G, K, M, D, S] and [G, K, M, S, D] a layer where the layers are
  unrolled, else one array with a leading layer axis.
  """
  x = model.embed[...][tokens]
  # Behind a barrier, or the compiler takes the sines anew in every layer.
  turn = jax.lax.optimization_barrier(rotation(positions, model.arch))
  graph, stacked = nnx.split(model.blocks)

  def layer(x, part):
    weights, own_key, own_value, *far = part

    def attend(query, own):
      if isinstance(context, Pages):
        pool = context.key, context.value
        return attention.shared_pages(query, pool, far[0], context.table, own, step, choice)
      key, value = far
      return attention.shared(query, (key, value), context.visible, own, step)

    block = nnx.merge(graph, weights)
    return block.decode(x, turn, attend, (own_key, own_value), step)

  if isinstance(context, Pages):
    far = (jnp.arange(model.arch.layers),)  # the pool itself stays outside of the scan, whole
  else:
    far = context.key, context.value
  if weights is None:
    x, own = jax.lax.scan(layer, x, (stacked, *own, *far))
    return model.norm(x), own
  news = []
  for part in zip(weights, *own, *far, strict=True):
    x, new = layer(x, part)
    news.append(new)
  keys, values = zip(*news, strict=True)
  return model.norm(x), (list(keys), list(values))


def inverse_frequencies(arch: Architecture) -> np.ndarray:
  """Returns the rotation frequencies f32[D / 2]; Llama 3.x stretches the long wavelengths."""
  exponent = np.arange(0, arch.head_dim, 2, dtype=np.float32) / arch.head_dim
  frequency = (1.0 / arch.rope_theta**exponent).astype(np.float32)
  scaling = arch.rope_scaling
  if scaling is None:
    return frequency
  wavelength = 2 * math.pi / frequency
  span = scaling.high_freq_factor - scaling.low_freq_factor
  smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / span
  smooth = np.clip(smooth, 0, 1)
  return ((1 - smooth) * frequency / scaling.factor + smooth * frequency).astype(np.float32)


def along(vector: Float[Array, "w"], x: Float[Array, "..."]) -> Float[Array, "... w"]:
  """Returns the vector with axes of one in front, as many as x has."""
  return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def rotation(positions: Int[Array, "*b"], arch: Architecture) -> Rotation:
  """Returns cosine and sine of each position's angle at each frequency (RoPE), in float32."""
  angle = positions[..., None].astype(jnp.float32)
  angle = angle * along(jnp.asarray(inverse_frequencies(arch)), angle)
  return jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]


def rotate(x: Float[Array, "*b h d"], turn: Rotation) -> Float[Array, "*b h d"]:
  """Rotates the two halves of each head by the angles of `rotation`, in float32."""
  cos, sin = turn
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
    x.dtype
  )
