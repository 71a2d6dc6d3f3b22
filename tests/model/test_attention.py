"""Attention over packed trees: who sees whom."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from treepo_jax import config as config_lib
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


@pytest.fixture
def blocks(monkeypatch) -> int:
  """Lets rows above 8 tokens go block by block."""
  monkeypatch.setattr(attention, "BLOCK", 8)
  return 8


def _trees(seed: int, rows: int, length: int) -> np.ndarray:
  """Returns `end` [R, L] of random trees in depth-first order, with padding after them."""
  random = np.random.default_rng(seed)
  end = np.zeros((rows, length), np.int32)
  for row in end:
    path = []
    for token in range(length - random.integers(length // 4)):
      if random.random() < 0.2:
        path = path[: random.integers(len(path) + 1)]  # a branch; from nothing, the next tree
      path.append(token)
      row[path] = token + 1
  return end


def _random(shape: tuple[int, int, int, int], heads: int, dtype=jnp.float32):
  """Returns query and gradient [R, L, H, D], key and value [R, L, K, D] for shape (R, L, K, D)."""
  r, length, k, d = shape
  random = np.random.default_rng(length)
  wide = (r, length, heads, d)
  return [jnp.asarray(random.normal(size=s), dtype) for s in (wide, wide, shape, shape)]


def _dense(query, key, value, end):
  """Attends with all scores at once, in float32; nothing where nothing is seen."""
  share = query.shape[2] // key.shape[2]
  query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  key, value = jnp.repeat(key, share, 2), jnp.repeat(value, share, 2)
  index = jnp.arange(end.shape[1])
  i, j = index[None, :, None], index[None, None, :]
  seen = ((j <= i) & (i < end[:, None, :]))[:, None]
  score = jnp.einsum("rihd,rjhd->rhij", query, key, precision="highest") * key.shape[-1] ** -0.5
  weight = jax.nn.softmax(jnp.where(seen, score, -1e9), -1) * seen
  return jnp.einsum("rhij,rjhd->rihd", weight, value, precision="highest")


def _program(attend):
  """Returns the jitted (query, key, value, end, gradient) -> output, gradients of their product."""

  def both(query, key, value, end, gradient):
    out, back = jax.vjp(lambda *x: attend(*x, end), query, key, value)
    return out, *back(gradient.astype(out.dtype))

  return jax.jit(both)


@pytest.mark.parametrize(("share", "length"), [(1, 64), (2, 45), (4, 45), (2, 9)])
def test_blocks_are_the_dense_softmax(blocks, share, length):
  query, gradient, key, value = _random((3, length, 2, 8), 2 * share)
  end = _trees(length, 3, length)
  found = _program(attention.packed)(query, key, value, end, gradient)
  expected = _program(_dense)(query, key, value, end, gradient)
  chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)
  assert (end == 0).any() and (np.asarray(found[0])[end == 0] == 0).all()


def test_short_rows_are_the_dense_softmax():
  query, gradient, key, value = _random((3, 45, 2, 8), 4)
  end = _trees(45, 3, 45)
  gradient *= jnp.asarray(end > 0)[..., None, None]  # what padding takes is not said
  found = _program(attention.packed)(query, key, value, end, gradient)
  expected = _program(_dense)(query, key, value, end, gradient)
  chex.assert_trees_all_close(found[1:], expected[1:], atol=1e-5, rtol=1e-5)
  real = end > 0
  np.testing.assert_allclose(found[0][real], expected[0][real], atol=1e-5)


def test_blocks_of_large_scores_stay_finite(blocks):
  query, gradient, key, value = _random((1, 20, 1, 8), 1)
  end = _trees(1, 1, 20)
  found = _program(attention.packed)(300 * query, 300 * key, value, end, gradient)
  expected = _program(_dense)(300 * query, 300 * key, value, end, gradient)
  chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)


def test_blocks_in_bfloat16_sum_in_float32(blocks):
  query, gradient, key, value = _random((3, 45, 2, 8), 4, jnp.bfloat16)
  end = _trees(1, 3, 45)
  found = _program(attention.packed)(query, key, value, end, gradient)
  expected = _program(_dense)(query, key, value, end, gradient)
  for x, y in zip(found, expected, strict=True):
    assert x.dtype == jnp.bfloat16
    error = np.asarray(x, np.float32) - np.asarray(y, np.float32)
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(np.asarray(y, np.float32))


def test_tiles_are_those_in_which_a_token_is_seen(blocks):
  length = 8 * blocks
  end = _trees(3, 2, length)
  index = np.arange(length)
  seen = (index[None, None] <= index[None, :, None]) & (index[None, :, None] < end[:, None])
  tiles = seen.any(0).reshape(8, blocks, 8, blocks).any((1, 3))
  cut = np.moveaxis(end.reshape(2, 8, blocks), 1, 0)
  query_of, key_of, count = attention._tiles(jnp.asarray(cut))
  found = set(zip(query_of[:count].tolist(), key_of[:count].tolist(), strict=True))
  assert found == set(zip(*np.nonzero(tiles), strict=True))
  assert int(count) < 8 * 9 // 2  # more is skipped than what comes later


def test_blocks_keep_rows_on_their_devices(blocks):
  mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  query, gradient, key, value = _random((8, 45, 1, 8), 2)
  arguments = query, key, value, jnp.asarray(_trees(5, 8, 45)), gradient
  program = _program(attention.packed)
  placed = jax.device_put(arguments, rows)
  compiled = program.lower(*placed).compile()
  found = compiled(*placed)
  chex.assert_trees_all_close(found, program(*arguments), atol=1e-6)
  assert all(x.sharding.is_equivalent_to(rows, 4) for x in found)
  text = str(compiled.as_text())
  moved = re.findall(r"= (.*) (?:all-\w+|collective-\w+|reduce-scatter)\(", text)
  assert moved  # which tiles are live is agreed on
  assert all(set(re.findall(r"\w+(?=\[)", shape)) <= {"s32", "pred"} for shape in moved), moved


def test_memory_of_blocks_is_linear():
  def temporary(length: int) -> int:
    wide = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    narrow = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    end = jax.ShapeDtypeStruct((1, length), jnp.int32)
    loss = lambda *x: attention.packed(*x).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(wide, narrow, narrow, end).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes

  sizes = [temporary(length) for length in (4096, 8192, 16384)]
  assert sizes[1] < 2.3 * sizes[0] and sizes[2] < 2.3 * sizes[1], sizes
  assert sizes[0] < 4096 * 4096  # a quarter of one matrix of scores


@pytest.mark.parametrize(
  ("head_dim", "page", "why"),
  [
    (32, 128, "heads of 32: the kernels take multiples of 64"),
    (64, 16, "config.rollout.page = 16: for heads of 64 the kernels take multiples of 128"),
    (128, 24, "config.rollout.page = 24: for heads of 128 .* of 16, so use for example 32"),
    (128, 16, None),
    (64, 256, None),
  ],
)
def test_kernels_are_chosen_where_they_fit(head_dim, page, why):
  config = config_lib.default()
  config.rollout.page = page
  attention.check(config, head_dim)  # "auto" runs everywhere
  fits = attention.Choice("auto", "tpu").kernel(head_dim, page)
  assert fits == (why is None)
  assert not attention.Choice("auto", "gpu").kernel(head_dim, page)
  assert not attention.Choice("xla", "tpu").kernel(head_dim, page)
  assert attention.Choice("auto", "tpu").kernel(head_dim) == (head_dim % 64 == 0)
  config.model.attention = "pallas"
  if why is None:
    attention.check(config, head_dim)
  else:
    with pytest.raises(config_lib.UserError, match=f"model.attention = 'pallas': {why}"):
      attention.check(config, head_dim)
