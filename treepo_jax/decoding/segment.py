"""The jitted segment decoder over shared pages.

A call decodes up to a stride of tokens of each row's segment, from the page on that the row has
come to. All rows of a call start together and take one token a step, so the step is common: a
call's own keys and values lie in a small buffer indexed by it and go to the pool as whole pages at
the end.

Row i of a node's pages holds the keys and values of the token *fed* at step i: first the last token
before the node, then the node's own but for its last, which its children feed. So a sampled token
costs one forward pass, and none is ever repeated to open a branch.

Axes: G groups, M rows of a group (all of one tree), U shared pages of a group, J pages of a
call, C tokens of a call, N layers, K key-value heads, D head size, T tokens of a page,
V vocabulary, A automaton states.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int8, UInt32

from treepo_jax import struct
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import sampling, stopping
from treepo_jax.model import attention, transformer
from treepo_jax.model.kernels import shared as shared_kernel

CONTINUES, AT_EOS, AT_ANSWER = 0, 1, 2  # Segment.stop
NO_ROW = -1


@dataclasses.dataclass(frozen=True)
class Settings:
  """What of the decoder is fixed at compilation."""

  segment: int
  stride: int  # tokens of a call at most, whole pages
  temperature: float
  vocabulary: int  # tokens of the tokenizer; logits beyond are never drawn
  eos_ids: tuple[int, ...]
  closed: int  # automaton state of a closed \\boxed{...}
  top_k: int = 0  # filters of what is drawn (sampling.draw)
  top_p: float = 1.0
  min_p: float = 0.0
  stop_at: str = "box"  # "box": a row stops where its box closes | "segment", "eos": it does not
  blind_eos: bool = False  # published: EOS is missed as a segment's first token, or one of many
  entropy: bool = False  # note the policy's entropy
  # Axes of the mesh whose shards run as many steps: where weights are split over another axis,
  # whose devices talk in each step, none may leave the loop before the others.
  together: tuple[str, ...] = ()

  def is_raw(self, size: int) -> bool:
    """Returns whether tokens are drawn from the softmax of all `size` logits as they are."""
    filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
    return self.temperature == 1 and self.vocabulary >= size and not filtered


@struct.dataclass
class Rows:
  """What is to be decoded.

  Attributes:
    live: whether the row is in use.
    base: tokens of the segment that lie in pages already, whole pages; the call goes on from there.
    room: tokens that the segment has left.
    last: the token before, fed first.
    position: position of `last` in its trajectory, prompt included.
    state: automaton state after `last`.
    prompt_id, node: identity of the draws.
    given: tokens of the call that are known already.
    tokens: those tokens; anything beyond.
    pages: where the call's keys and values go; NO_PAGE drops them.
    context: shared pages of the group, NO_PAGE where fewer.
    start: first valid token of each context page (prompts are padded on the left).
    sees: whether the page holds what precedes the row.
  """

  live: Bool[Array, "g m"]
  base: Int[Array, "g m"]
  room: Int[Array, "g m"]
  last: Int[Array, "g m"]
  position: Int[Array, "g m"]
  state: Int[Array, "g m"]
  prompt_id: UInt32[Array, "g m"]
  node: Int[Array, "g m"]
  given: Int[Array, "g m"]
  tokens: Int[Array, "g m c"]
  pages: Int[Array, "g m j"]
  context: Int[Array, "g u"]
  start: Int[Array, "g u"]
  sees: Bool[Array, "g m u"]


@struct.dataclass
class Segment:
  """What was decoded.

  Attributes:
    tokens, log_probs: of the sampled tokens, 0 beyond length; log-probs at temperature 1.
    sampled_log_probs: the same under the distribution that was drawn from, with its temperature
      and filters.
    low, high: uniform numbers that draw a token, [low, high) (sampling.Draw); 0 where it is given.
    entropy: of the policy at temperature 1 where each token stands, if Settings.entropy.
    states: automaton state after each token.
    length: tokens sampled; 0 for rows not in use.
    stop: CONTINUES, AT_EOS or AT_ANSWER.
    steps: steps run until the last row ended.
    read_shared: tokens whose keys and values were read, each context page once a group and step.
    read_flat: the same were each row to read its own path.
  """

  tokens: Int[Array, "g m c"]
  log_probs: Float[Array, "g m c"]
  sampled_log_probs: Float[Array, "g m c"]
  low: Float[Array, "g m c"]
  high: Float[Array, "g m c"]
  entropy: Float[Array, "g m c"]
  states: Int8[Array, "g m c"]
  length: Int[Array, "g m"]
  stop: Int[Array, "g m"]
  steps: Int[Array, ""]
  read_shared: Float[Array, ""]
  read_flat: Float[Array, ""]


def nothing(shape: tuple[int, int], stride: int) -> Segment:
  """Returns what is decoded of rows that are not in use."""
  zero, none = jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, stride))
  count = jnp.zeros(())
  return Segment(
    tokens=none.astype(jnp.int32),
    log_probs=none,
    sampled_log_probs=none,
    low=none,
    high=none,
    entropy=none,
    states=none.astype(jnp.int8),
    length=zero,
    stop=zero,
    steps=count.astype(jnp.int32),
    read_shared=count,
    read_flat=count,
  )


def decode(
  pool: pages_lib.Pool,
  rows: Rows,
  params: dict,
  layers: list[dict] | None,
  table: Int8[Array, "a v"],
  key: jax.Array,
  *,
  graph: nnx.GraphDef,
  settings: Settings,
  choice: attention.Choice = attention.REFERENCE,
) -> tuple[pages_lib.Pool, Segment]:
  """Decodes up to a stride of every live row's segment and writes its pages.

  Stops when every row has reached EOS, closed its box or filled its segment or the stride. Nothing
  here waits for the host. `key` is folded from seed and step; the rest of a draw's identity is in
  `rows`.

  layers: transformer.unstack of the params, to decode with the layers unrolled; None: scanned.
  """
  model = nnx.merge(graph, params)
  unroll, stride = layers is not None, settings.stride
  visible = _visible(rows, pool.key.shape[3])
  if choice.kernel(model.arch.head_dim, pool.key.shape[3]):
    walked = shared_kernel.table(rows.context, visible)
    context = transformer.Pages(key=pool.key, value=pool.value, table=walked)
  else:
    context = transformer.Context(
      key=_gather(pool.key, rows.context, unroll, (0, 2, 4, 1, 3)),
      value=_gather(pool.value, rows.context, unroll, (0, 2, 1, 3, 4)),
      visible=visible,
    )
  identity = sampling.row_keys(key, rows.prompt_id, rows.node)
  noise = sampling.uniform(identity, rows.base, stride).reshape(stride, -1)
  groups, members = rows.live.shape
  shape = (groups, members)
  raw = settings.is_raw(model.arch.vocab_size)

  def going(alive):
    any_ = alive.any()
    return jax.lax.pmax(any_, settings.together) if settings.together else any_

  def running(carry):
    step, alive = carry[:2]
    return (step < stride) & alive

  def body(carry):
    step, _, alive, last, state, own, out = carry
    hidden, own = transformer.decode_step(
      model, layers, last, rows.position + step, context, own, step, choice=choice
    )
    logits = model.logits(hidden).reshape(-1, model.arch.vocab_size)
    drawn = sampling.draw(
      logits,
      noise[step],
      settings.temperature,
      settings.vocabulary,
      settings.top_k,
      settings.top_p,
      settings.min_p,
    )
    known = step < rows.given
    token = jnp.where(known, rows.tokens[..., step], drawn.token.reshape(shape))
    flat = token.reshape(-1)
    state = jnp.where(alive, table[state, token].astype(jnp.int32), state)
    each = {
      "tokens": token,
      "low": jnp.where(known, 0, drawn.low.reshape(shape)),
      "high": jnp.where(known, 0, drawn.high.reshape(shape)),
      "states": state.astype(jnp.int8),
    }
    sampled = sampling.sampled_log_prob(logits, flat, drawn.norm, settings.temperature)
    if raw:
      each["log_probs"] = sampled.reshape(shape)
    else:
      each["sampled_log_probs"] = sampled.reshape(shape)
      each["log_probs"] = sampling.log_prob(logits, flat).reshape(shape)
    if settings.entropy:
      each["entropy"] = sampling.entropy(logits).reshape(shape)
    stop = _stop(token, state, rows.base + step, settings)
    out = out | {
      name: out[name].at[..., step].set(jnp.where(alive, x, 0)) for name, x in each.items()
    }
    out |= {"length": out["length"] + alive, "stop": jnp.where(alive, stop, out["stop"])}
    alive &= (stop == CONTINUES) & (step + 1 < rows.room)
    return step + 1, going(alive), alive, token, state, own, out

  empty = nothing(shape, stride)
  names = ["tokens", "log_probs", "low", "high", "states", "length", "stop"]
  names += [] if raw else ["sampled_log_probs"]
  names += ["entropy"] if settings.entropy else []
  out = {name: getattr(empty, name) for name in names}
  own = _buffers(pool, shape, stride, unroll)
  carry = (jnp.zeros((), jnp.int32), going(rows.live), rows.live, rows.last, rows.state, own, out)
  steps, *_, own, out = jax.lax.while_loop(running, body, carry)
  length = out["length"].astype(jnp.float32)
  inner = (length * (length + 1) / 2).sum()
  group_tokens = visible.any(1).sum(-1).astype(jnp.float32)
  if raw:
    out["sampled_log_probs"] = out["log_probs"]
  segment = dataclasses.replace(
    empty,
    steps=steps,
    read_shared=(length.max(1) * group_tokens).sum() + inner,
    read_flat=(length * visible.sum(-1)).sum() + inner,
    **out,
  )
  return _commit(pool, rows.pages, own), segment


def prefill(
  pool: pages_lib.Pool,
  prompt: Int[Array, "b p"],
  length: Int[Array, "b"],
  pages: Int[Array, "b u"],
  params: dict,
  *,
  graph: nnx.GraphDef,
  choice: attention.Choice = attention.REFERENCE,
) -> pages_lib.Pool:
  """Writes the keys and values of every prompt token but the last, which its branches feed.

  pages: right aligned, NO_PAGE in front where a prompt needs fewer. The tokens are padded on the
  left, so that the last page ends where the first segment begins.
  """
  page = pool.key.shape[3]
  slots = pages.shape[1] * page
  cache = transformer.prefill(graph, params, prompt, length, choice=choice)
  source = jnp.arange(slots)[None] - (slots - (length[:, None] - 1))  # token of each slot
  source = jnp.clip(source, 0, prompt.shape[1] - 1)

  def pack(x):  # [N, B, P, K, D] -> [N, B * U, K, T, D]
    x = jnp.take_along_axis(x, source[None, :, :, None, None], 2)
    n, b, _, k, d = x.shape
    return x.reshape(n, b * pages.shape[1], page, k, d).swapaxes(2, 3)

  return pages_lib.write(pool, pages.reshape(-1), pack(cache[0]), pack(cache[1]))


def _stop(
  token: Int[Array, "g m"], state: Int[Array, "g m"], place: Int[Array, "g m"], settings: Settings
) -> Int[Array, "g m"]:
  """Returns why each row stops after its token, `place` of its segment, or that it CONTINUES."""
  ends = settings.eos_ids
  if settings.blind_eos and len(ends) > 1:
    ends = ()
  eos = stopping.is_any(token, ends)
  if settings.blind_eos:
    eos &= place > 0
  answer = (state == settings.closed) & (settings.stop_at == "box")
  return jnp.where(eos, AT_EOS, jnp.where(answer, AT_ANSWER, CONTINUES))


def _visible(rows: Rows, page: int) -> Bool[Array, "g m c"]:
  """Returns which context tokens each row sees."""
  held = (rows.context != pages_lib.NO_PAGE)[..., None]
  valid = held & (jnp.arange(page)[None, None] >= rows.start[..., None])
  visible = rows.sees[..., None] & valid[:, None]
  return visible.reshape(*rows.sees.shape[:2], -1)


def _gather(
  pool: Float[Array, "n p k t d"], pages: Int[Array, "g u"], unroll: bool, order: tuple[int, ...]
):
  """Returns each group's shared pages side by side a layer: read from the pool once a segment.

  order: of [G, U, K, T, D], with U and T next to each other: they become the context's tokens.
  """
  spot = jnp.maximum(pages, 0)  # entries without a page are masked

  def layer(x):
    x = x[spot].transpose(order)
    at = order.index(1)
    return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])

  return [layer(x) for x in pool] if unroll else jax.vmap(layer)(pool)


def _buffers(pool: pages_lib.Pool, shape: tuple[int, int], stride: int, unroll: bool):
  """Returns the empty key and value buffers of a call."""
  n, _, k, _, d = pool.key.shape
  g, m = shape
  layers = () if unroll else (n,)
  key = jnp.zeros((*layers, g, k, m, d, stride), pool.key.dtype)
  value = jnp.zeros((*layers, g, k, m, stride, d), pool.key.dtype)
  return ([key] * n, [value] * n) if unroll else (key, value)


def _commit(pool: pages_lib.Pool, pages: Int[Array, "g m j"], own) -> pages_lib.Pool:
  """Writes the segments' buffers to the pool as whole pages."""
  page = pool.key.shape[3]

  def pack(x):  # [N, G, K, M, S, D] -> [N, G * M * J, K, T, D]
    n, g, k, m, s, d = x.shape
    x = x.reshape(n, g, k, m, s // page, page, d).transpose(0, 1, 3, 4, 2, 5, 6)
    return x.reshape(n, g * m * (s // page), k, page, d)

  key, value = (jnp.stack(x) if isinstance(x, list) else x for x in own)
  return pages_lib.write(pool, pages.reshape(-1), pack(key.swapaxes(-1, -2)), pack(value))
