"""Attention over packed trees: who sees whom."""

import jax
import jax.numpy as jnp
import numpy as np

from treepo_jax.model import attention

# a -> b -> c and a -> d, as the docstring draws it
END = [4, 3, 3, 4]
DRAWN = ["a . . .", "a b . .", "a b c .", "a . . d"]


def _weights(end) -> np.ndarray:
  """Returns how much each token takes of each other one where all scores are equal."""
  length = len(end)
  flat = jnp.zeros((1, length, 1, length))
  value = jnp.eye(length)[None, :, None]
  return np.asarray(attention.packed(flat, flat, value, jnp.array([end])))[0, :, 0]


def test_packed_sees_what_its_docstring_draws():
  weights = _weights(END)
  assert attention.packed.__doc__ is not None
  for row, drawn in zip(weights, DRAWN, strict=True):
    assert drawn in attention.packed.__doc__
    seen = np.array([letter != "." for letter in drawn.split()])
    np.testing.assert_allclose(row, seen / seen.sum(), rtol=1e-6)
    assert (row[~seen] == 0).all()


def test_packed_keeps_trees_of_a_row_apart_and_padding_unseen():
  weights = _weights([3, 2, 3, 5, 5, 0, 0])  # a tree of 3, a path of 2, padding
  seen = weights[:5] > 0
  np.testing.assert_array_equal(
    seen.astype(int),
    [
      [1, 0, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0, 0],
      [1, 0, 1, 0, 0, 0, 0],
      [0, 0, 0, 1, 0, 0, 0],
      [0, 0, 0, 1, 1, 0, 0],
    ],
  )
  assert np.isfinite(weights).all()  # padding sees nothing, and stays finite


def test_packed_shares_key_value_heads():
  random = np.random.default_rng(0)
  query, key, value = (
    random.normal(size=(2, 4, heads, 8)).astype(np.float32) for heads in (6, 2, 2)
  )
  packed = jax.jit(attention.packed)
  end = jnp.array([END, END])
  wide = packed(query, np.repeat(key, 3, 2), np.repeat(value, 3, 2), end)
  np.testing.assert_allclose(packed(query, key, value, end), wide, atol=1e-6)
