"""The kernels of packed rows are the reference, forward and backward; interpreted on a CPU."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from treepo_jax.config import UserError
from treepo_jax.model import attention, transformer
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model.kernels import packed

BLOCK = 16
INTERPRETED = attention.Choice("pallas", "cpu")
# Rows, their tokens, heads, key-value heads, head size: the few that are compiled.
SHAPES = [(2, 45, 4, 2, 64), (1, 70, 3, 1, 128)]
# Of the root mean square: of a single number the last bit of bfloat16 alone is up to 8e-3.
ERROR = {jnp.float32: 1e-5, jnp.bfloat16: 2e-3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(packed, "BLOCKS", (BLOCK,))
  monkeypatch.setattr(attention, "BLOCK", BLOCK)


def ends(length: int, choices: list[tuple[float, float]], padding: int) -> np.ndarray:
  """Returns `end` of trees in depth-first order; of each token (when to branch, how high up)."""
  row, path = np.zeros(length, np.int32), []
  for token, (branch, height) in zip(range(length - padding), choices, strict=False):
    if branch < 0.3:
      path = path[: int(height * (len(path) + 1))]  # from nothing: the next tree of the row
    path.append(token)
    row[path] = token + 1
  return row


@st.composite
def rows(draw, shape) -> np.ndarray:
  """Draws `end` [R, L]: paths, bushes and padding."""
  r, length = shape[:2]
  unit = st.floats(0, 1, exclude_max=True)
  token = st.tuples(unit, unit)
  return np.stack(
    [
      ends(
        length,
        draw(st.lists(token, min_size=length, max_size=length)),
        draw(st.integers(0, length - 1)),
      )
      for _ in range(r)
    ]
  )


def arrays(shape, dtype, seed: int, scale: float):
  """Returns query, key, value and the output's gradient."""
  r, length, h, k, d = shape
  random = np.random.default_rng(seed)
  sizes = [(r, length, n, d) for n in (h, k, k, h)]
  query, *others = (jnp.asarray(random.normal(size=size), dtype) for size in sizes)
  return scale * query, *others


@functools.cache
def program(shape, dtype, choice: attention.Choice):
  """Returns the jitted (query, key, value, gradient, end) -> output and gradients."""

  def both(query, key, value, gradient, end):
    attend = lambda query, key, value: attention.packed(query, key, value, end, choice)
    out, back = jax.vjp(attend, query, key, value)
    return out, *back(gradient)

  return jax.jit(both)


def distance(found, expected) -> float:
  """Returns the largest error of an array, as a share of it in root mean square."""
  pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(found, expected, strict=True)]
  return max(float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1)) for x, y in pairs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_the_reference(shape, dtype):
  worst = 0.0

  @hypothesis.settings(max_examples=15)
  @hypothesis.given(rows(shape), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 4.0]))
  def check(end, seed, scale):
    nonlocal worst
    given = *arrays(shape, dtype, seed, scale), jnp.asarray(end)
    found = program(shape, dtype, INTERPRETED)(*given)
    expected = program(shape, dtype, attention.REFERENCE)(*given)
    assert all(x.dtype == dtype for x in found)
    error = distance(found, expected)
    worst = max(worst, error)
    assert error < ERROR[dtype]

  check()
  print(f"{shape} {dtype.__name__}: largest error {worst:.1e}")


def test_a_tpu_that_is_simulated_with_its_memory_agrees():
  """Memory that was never written holds NaN there, and blocks travel as on a TPU."""
  shape = SHAPES[0]
  random = np.random.default_rng(2)
  end = np.stack([ends(45, random.random((45, 2)).tolist(), n) for n in (0, 20)])
  query, key, value, gradient = arrays(shape, jnp.float32, 1, 1.0)
  interpret = pltpu.InterpretParams(uninitialized_memory="nan")

  @jax.jit
  def run(query, key, value, gradient, end):
    given = query, key, value, end
    out, sums = packed.forward(*given, interpret=interpret)
    return out, *packed.backward(*given, out, sums, gradient, interpret=interpret)

  given = query, key, value, gradient, jnp.asarray(end)
  expected = program(shape, jnp.float32, attention.REFERENCE)(*given)
  assert distance(run(*given), expected) < 1e-5


@pytest.mark.parametrize("by_key", [False, True])
def test_tiles_are_those_of_which_a_token_is_seen_and_the_diagonal(by_key):
  n, random = 6, np.random.default_rng(0)
  length = n * BLOCK
  end = np.stack([ends(length, random.random((length, 2)).tolist(), p) for p in (0, 9, 70)])
  index = np.arange(length)
  seen = (index[None, None] <= index[None, :, None]) & (index[None, :, None] < end[:, None])
  seen = seen.reshape(3, n, BLOCK, n, BLOCK).any((2, 4)) | np.eye(n, dtype=bool)
  tiles, count = packed._tiles(jnp.asarray(end), BLOCK, by_key=by_key)
  for row, found, size in zip(seen, tiles, count, strict=True):
    pairs = [divmod(int(tile), n) for tile in found]
    expected = [*zip(*np.nonzero(row.T if by_key else row), strict=True)]
    assert pairs[:size] == expected
    assert set(pairs[size:]) <= {(n - 1, n - 1)}
  assert count[2] < count[0] < n * (n + 1) // 2  # something is skipped


def test_what_no_token_sees_is_not_read():
  shape = (1, 4 * BLOCK, 2, 1, 64)
  query, key, value, gradient = arrays(shape, jnp.float32, 3, 1.0)
  end = np.repeat([2 * BLOCK, 4 * BLOCK], 2 * BLOCK)[None].astype(np.int32)  # two paths
  hidden = slice(0, 2 * BLOCK)  # the second does not see the first
  given = query, key, value, gradient, jnp.asarray(end)
  run = program(shape, jnp.float32, INTERPRETED)
  out, to_query, *_ = run(*given)
  spoilt = key.at[:, hidden].set(np.nan), value.at[:, hidden].set(np.nan)
  again, to_query_again, *_ = run(query, *spoilt, gradient, jnp.asarray(end))
  np.testing.assert_array_equal(again[:, 2 * BLOCK :], out[:, 2 * BLOCK :])
  np.testing.assert_array_equal(to_query_again[:, 2 * BLOCK :], to_query[:, 2 * BLOCK :])
  assert np.isnan(again[:, hidden]).all()


@pytest.mark.parametrize(
  ("length", "block"), [(100, 128), (512, 512), (520, 128), (1280, 256), (8192, 512), (8200, 512)]
)
def test_blocks_pad_a_row_by_an_eighth_at_most(monkeypatch, length, block):
  monkeypatch.setattr(packed, "BLOCKS", (512, 256, 128))
  assert packed.block_of(length) == block


def test_rows_that_a_core_cannot_list_are_refused():
  sizes = [(8, 2**17, n, 64) for n in (2, 1, 1)]
  given = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
  end = jax.ShapeDtypeStruct((8, 2**17), jnp.int32)
  with pytest.raises(UserError, match="8 rows of 131072 tokens .*micro_rows"):
    jax.eval_shape(packed.forward, *given, end)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (3, 1)])
def test_rows_and_heads_are_split_over_the_mesh(heads, kv_heads):
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  shape = (4, 40, heads, kv_heads, 64)
  random = np.random.default_rng(4)
  end = np.stack([ends(40, random.random((40, 2)).tolist(), n) for n in (0, 3, 9, 30)])
  given = *arrays(shape, jnp.float32, 5, 1.0), jnp.asarray(end)
  expected = program(shape, jnp.float32, attention.REFERENCE)(*given)
  choice = attention.Choice("pallas", "cpu", mesh)
  assert distance(program(shape, jnp.float32, choice)(*given), expected) < 1e-5


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_gradients_of_a_model_over_a_mesh_are_the_reference_s(remat):
  arch = transformer.Architecture(
    family="qwen2", vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=16,
    norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, max_positions=64, tied=True, qkv_bias=True,
    output_bias=False, qk_norm=False,
  )  # fmt: skip
  graph, params = transformer.create(arch, jax.random.key(0))
  random = np.random.default_rng(6)
  end = np.stack([ends(40, random.random((40, 2)).tolist(), n) for n in (0, 3, 9, 30)])
  tokens = jnp.asarray(random.integers(0, 32, (4, 40)))
  places = jnp.broadcast_to(jnp.arange(40), tokens.shape)
  weight = jnp.asarray(random.normal(size=(4, 40, 16)) * (end > 0)[..., None], jnp.float32)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

  def gradient(choice):
    def loss(params):
      run = functools.partial(transformer.hidden, graph, remat=remat, choice=choice)
      return (run(params, tokens, places, jnp.asarray(end)) * weight).sum()

    placed = jax.device_put(params, mesh_lib.shardings(params, mesh))
    return jax.tree.leaves(jax.jit(jax.grad(loss))(placed))

  found = gradient(attention.Choice("pallas", "cpu", mesh))
  expected = gradient(attention.REFERENCE)
  assert distance(found, expected) < 1e-5
