"""Logits to a token and its log-prob, with a draw that depends on identity alone.

Axes: Q rows, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from treepo_jax import struct

BLOCK = 128  # tokens of a block in the two-level inverse of the distribution function
MARGIN = 1e-6  # of an interval's ends: several roundings of numbers up to 1 (6e-8 each)


def row_keys(key: jax.Array, prompt_id: UInt32[Array, "*q"], node: Int[Array, "*q"]) -> jax.Array:
  """Returns a key a row, folded from the prompt's identity and the node's row in its tree."""
  fold = jax.random.fold_in
  one = lambda i, n: fold(fold(key, i), n)
  flat = jax.vmap(one)(prompt_id.reshape(-1), node.reshape(-1))
  return flat.reshape(prompt_id.shape)


def uniform(keys: jax.Array, first: Int[Array, "*q"], count: int) -> Float[Array, "c *q"]:
  """Returns numbers in [0, 1) for `count` tokens of each row's segment, from its `first` on."""
  one = lambda step, key, first: jax.random.uniform(jax.random.fold_in(key, first + step))
  rows = jax.vmap(one, (None, 0, 0))
  flat = jax.vmap(rows, (0, None, None))(jnp.arange(count), keys.reshape(-1), first.reshape(-1))
  return flat.reshape(count, *keys.shape)


@struct.dataclass
class Draw:
  """What was drawn.

  Attributes:
    token: the token.
    low, high: every uniform number in [low, high) draws the token from these logits. The interval
      is narrower than the token's share by MARGIN at each end that is not an end of all numbers,
      so that rounding cannot make it wrong: of numbers outside, the row's own among them, nothing
      is said, and it is empty where the share is small.
    norm: log of the sum of exp(logits / temperature) over all that can be drawn; 0 if greedy.
  """

  token: Int[Array, "*q"]
  low: Float[Array, "*q"]
  high: Float[Array, "*q"]
  norm: Float[Array, "*q"]


def draw(
  logits: Float[Array, "q v"],
  uniform: Float[Array, "q"],
  temperature: float,
  vocabulary: int,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
) -> Draw:
  """Draws a token a row from softmax(logits / temperature) over the tokens that the filters keep.

  Temperature 0 is greedy: the likeliest token, the first of equals.

  Filters, in the order of Hugging Face, after the temperature: top_k keeps the k likeliest tokens
  (0: all); top_p of these the fewest, likeliest first, that have this share of their probability
  (1: all); min_p of these all that are at least this share as likely as the likeliest (0: all).
  What is as likely as the last that is kept is kept too, so equals stay or go together.

  Inverts the cumulative distribution: one uniform number a token instead of one a vocabulary
  entry (Gumbel's way). The inverse is taken in two levels, blocks and then tokens of the block, so
  that the full cumulative sum is never formed. Tokens from `vocabulary` on (padding of the
  embedding beyond the tokenizer) are never drawn.
  """

  def one(logits, uniform):
    index = jnp.arange(logits.shape[0])
    within = jnp.where(index < vocabulary, logits, -jnp.inf)
    if temperature:
      scaled = within / temperature
      top = scaled.max()
      weight = _filtered(jnp.exp(scaled - top), top_k, top_p, min_p)
    else:
      weight = (index == jnp.argmax(within)).astype(logits.dtype)
    result, total = _invert(weight, uniform)
    return dataclasses.replace(result, norm=top + jnp.log(total)) if temperature else result

  return jax.vmap(one)(logits, uniform)


def _filtered(
  weight: Float[Array, "v"], top_k: int, top_p: float, min_p: float
) -> Float[Array, "v"]:
  """Returns the weights, of which the largest is 1, with 0 where a filter drops the token."""
  if top_k:
    least = _threshold(weight, jnp.ones_like(weight), jnp.asarray(top_k, weight.dtype))
    weight = jnp.where(weight >= least, weight, 0)
  if top_p < 1:
    weight = jnp.where(weight >= _threshold(weight, weight, top_p * weight.sum()), weight, 0)
  if min_p:
    weight = jnp.where(weight >= min_p * weight.max(), weight, 0)
  return weight


def _threshold(
  weight: Float[Array, "v"], share: Float[Array, "v"], target: Float[Array, ""]
) -> Float[Array, ""]:
  """Returns the largest number in [0, 1] whose equals and betters have `target` shares together.

  Found by halving: floats that are not negative have the order of their bits, so 30 passes over
  the vocabulary do what a sort would, and exactly.
  """
  real = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)

  def halve(_, ends):
    low, high = ends
    middle = low + (high - low + 1) // 2
    enough = jnp.where(weight >= real(middle), share, 0).sum() >= target
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

  ends = jnp.int32(0), jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
  return real(jax.lax.fori_loop(0, 30, halve, ends)[0])


def _invert(weight: Float[Array, "v"], uniform: Float[Array, ""]) -> tuple[Draw, Float[Array, ""]]:
  """Returns the token at `uniform` of the distribution function, and the weights' sum."""
  weight = jnp.pad(weight, (0, -weight.shape[0] % BLOCK)).reshape(-1, BLOCK)
  mass = weight.sum(-1)
  upto = jnp.cumsum(mass)
  total = upto[-1]
  block = _first(upto > uniform * total, mass)
  inside, before = weight[block], upto[block] - mass[block]
  reached = jnp.cumsum(inside)
  place = _first(reached > uniform * total - before, inside)
  outer, inner = _span(block, upto, mass), _span(place, reached, inside)
  low = jnp.maximum(outer[0], before + inner[0]) / total + MARGIN
  high = jnp.minimum(outer[1], before + inner[1]) / total - MARGIN
  low, high = jnp.maximum(low, 0), jnp.minimum(high, 1)
  result = Draw(
    token=(block * BLOCK + place).astype(jnp.int32),
    low=low,
    high=jnp.maximum(low, high),
    norm=jnp.zeros_like(total),
  )
  return result, total


@jax.vmap
def log_prob(logits: Float[Array, "v"], token: Int[Array, ""]) -> Float[Array, ""]:
  """Returns the token's log-prob at temperature 1, over all logits: the raw policy's."""
  return logits[token] - jax.nn.logsumexp(logits)


def sampled_log_prob(
  logits: Float[Array, "q v"], token: Int[Array, "q"], norm: Float[Array, "q"], temperature: float
) -> Float[Array, "q"]:
  """Returns the token's log-prob under the distribution that was drawn from; norm: of its Draw.

  Of a token that a filter drops by a hair of rounding, though another draw from the same context
  gave it, what it would have if it were kept.
  """
  if not temperature:
    return jnp.zeros_like(norm)
  return jnp.take_along_axis(logits, token[:, None], 1)[:, 0] / temperature - norm


@jax.vmap
def entropy(logits: Float[Array, "v"]) -> Float[Array, ""]:
  """Returns the entropy in nats at temperature 1, over all logits: the raw policy's."""
  log_probs = jax.nn.log_softmax(logits)
  chance = jnp.exp(log_probs)
  return -jnp.where(chance > 0, chance * log_probs, 0).sum()


def _span(
  index: Int[Array, ""], upto: Float[Array, "n"], weight: Float[Array, "n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Returns [low, high) of targets whose `_first(upto > target, weight)` is index; or infinite."""
  place, some = jnp.arange(weight.shape[0]), weight > 0
  low = jnp.max(jnp.where(some & (place < index), upto, -jnp.inf))
  last = jnp.max(jnp.where(some, place, 0))
  return low, jnp.where(index == last, jnp.inf, upto[index])


def _first(beyond: Bool[Array, "n"], weight: Float[Array, "n"]) -> Int[Array, ""]:
  """Returns the first index beyond the target that has any weight, else the last that has.

  Sums are rounded, so the target may lie a little before or after the place that it was scaled to:
  what has no weight is passed over all the same.
  """
  index, some = jnp.arange(weight.shape[0]), weight > 0
  last = jnp.max(jnp.where(some, index, 0))
  return jnp.min(jnp.where(some & beyond, index, last))
