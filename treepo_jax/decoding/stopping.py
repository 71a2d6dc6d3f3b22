"""Which rows end and why, on the device.

Axes: Q rows, V vocabulary, A states of the box automaton (tasks/text.py builds its table).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def is_any(token: Int[Array, "*q"], members: tuple[int, ...]) -> Bool[Array, "*q"]:
  """Returns whether each token is one of a fixed set, such as the EOS tokens."""
  found = jnp.zeros(token.shape, bool)
  for member in members:
    found |= token == member
  return found


def repeats(
  tokens: Int[Array, "h"], length: Int[Array, ""], window: int, count: int
) -> Bool[Array, ""]:
  """Returns whether some `window` of the last `length` tokens occurs at least `count` times.

  tokens is right aligned: the last `length` entries are valid. Windows may overlap, so any loop of
  a period up to `window` is found once it has filled window * count tokens. (TreePO's early stop
  for repeated patterns, on tokens; published: a 32-character window 8 times in a segment.)
  """
  if count == 0:
    return jnp.zeros((), bool)
  h = tokens.shape[0]
  starts = h - window + 1
  same = tokens[:, None] == tokens[None, :]
  match = jnp.ones((starts, starts), bool)
  for i in range(window):
    match &= jax.lax.dynamic_slice(same, (i, i), (starts, starts))
  valid = jnp.arange(starts) >= h - length
  return ((match & valid[:, None] & valid[None]).sum(-1) >= count).any()
