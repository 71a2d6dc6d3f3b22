"""Logits to a token and its log-prob, with a draw that depends on identity alone.

Axes: Q rows, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

BLOCK = 128  # tokens of a block in the two-level inverse of the distribution function


def row_keys(key: jax.Array, prompt_id: UInt32[Array, "*q"], node: Int[Array, "*q"]) -> jax.Array:
  """Returns a key a row, folded from the prompt's identity and the node's row in its tree."""
  fold = jax.random.fold_in
  one = lambda i, n: fold(fold(key, i), n)
  flat = jax.vmap(one)(prompt_id.reshape(-1), node.reshape(-1))
  return flat.reshape(prompt_id.shape)


def uniform(keys: jax.Array, count: int) -> Float[Array, "s *q"]:
  """Returns numbers in [0, 1) for the first `count` tokens of each row's segment."""
  one = lambda step, key: jax.random.uniform(jax.random.fold_in(key, step))
  rows = jax.vmap(one, (None, 0))
  flat = jax.vmap(rows, (0, None))(jnp.arange(count), keys.reshape(-1))
  return flat.reshape(count, *keys.shape)


@functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None))
def draw(
  logits: Float[Array, "v"],
  uniform: Float[Array, ""],
  others: Float[Array, "r"],
  temperature: float,
  vocabulary: int,
) -> tuple[Int[Array, ""], Bool[Array, "r"]]:
  """Returns a token drawn from softmax(logits / temperature), and which `others` draw the same.

  Temperature 0 is greedy: the likeliest token, the first of equals.

  Inverts the cumulative distribution: one uniform number a token instead of one a vocabulary
  entry (Gumbel's way). The inverse is taken in two levels, blocks and then tokens of the block, so
  that the full cumulative sum is never formed. Tokens from `vocabulary` on (padding of the
  embedding beyond the tokenizer) are never drawn.

  others: uniform numbers of rows that have the same context. Each draws this very token exactly
  where its number lies in the token's share of the unit interval, so no second draw is made.
  """
  size = logits.shape[0]
  index = jnp.arange(size)
  if temperature:
    scaled = jnp.where(index < vocabulary, logits / temperature, -jnp.inf)
    weight = jnp.exp(scaled - scaled.max())
  else:
    best = jnp.argmax(jnp.where(index < vocabulary, logits, -jnp.inf))
    weight = (index == best).astype(logits.dtype)
  weight = jnp.pad(weight, (0, -size % BLOCK)).reshape(-1, BLOCK)
  mass = weight.sum(-1)
  upto = jnp.cumsum(mass)
  block = _first(upto > uniform * upto[-1], mass)
  inside, before = weight[block], upto[block] - mass[block]
  reached = jnp.cumsum(inside)
  place = _first(reached > uniform * upto[-1] - before, inside)
  target = others * upto[-1]
  same = _is_first(block, upto, target, mass) & _is_first(place, reached, target - before, inside)
  return (block * BLOCK + place).astype(jnp.int32), same


@jax.vmap
def log_prob(logits: Float[Array, "v"], token: Int[Array, ""]) -> Float[Array, ""]:
  """Returns the token's log-prob at temperature 1, over all logits: the raw policy's."""
  return logits[token] - jax.nn.logsumexp(logits)


def _is_first(
  index: Int[Array, ""], upto: Float[Array, "n"], target: Float[Array, "r"], weight
) -> Bool[Array, "r"]:
  """Returns where `_first(upto > target, weight)` is index: the same comparisons, no search."""
  place, some = jnp.arange(weight.shape[0]), weight > 0
  low = jnp.max(jnp.where(some & (place < index), upto, -jnp.inf))
  last = jnp.max(jnp.where(some, place, 0))
  return (low <= target) & ((target < upto[index]) | (index == last))


def _first(beyond: Bool[Array, "n"], weight: Float[Array, "n"]) -> Int[Array, ""]:
  """Returns the first index beyond the target that has any weight, else the last that has.

  Sums are rounded, so the target may lie a little before or after the place that it was scaled to:
  what has no weight is passed over all the same.
  """
  index, some = jnp.arange(weight.shape[0]), weight > 0
  last = jnp.max(jnp.where(some, index, 0))
  return jnp.min(jnp.where(some & beyond, index, last))
