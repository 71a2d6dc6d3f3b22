"""The kernel of shared pages, with a row's own segment, is the reference; interpreted on a CPU."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from scipy import special

from treepo_jax.model import attention
from treepo_jax.model.kernels import shared

INTERPRETED = attention.Choice("pallas", "cpu")
LAYERS, POOL, OWN = 2, 24, 6  # layers and pages of the pool, tokens of a segment
# Groups, rows, shared pages, key-value heads, heads that share one, head size, tokens a page:
# a row alone, an odd number of heads, more rows than a word has bits, more pages than a step reads.
SHAPES = [(2, 1, 3, 2, 1, 128, 16), (2, 3, 11, 1, 7, 128, 8), (1, 40, 2, 2, 2, 64, 128)]
# Of what is compared, in root mean square. The last bit of bfloat16 alone makes 1e-3 of an output,
# and as much where a softmax of few tokens is multiplied in it.
KERNEL = {jnp.float32: 1e-5, jnp.bfloat16: 2e-3}
MERGED = {jnp.float32: 1e-5, jnp.bfloat16: 4e-3}


def case(shape, dtype, seed: int, held: float, sees: float, valid: float):
  """Returns query, pool, page numbers, who sees which token, and the rows' own segments.

  held, sees, valid: shares of places that have a page, of pages that a row sees, and of pages that
  are seen from their first token on.
  """
  g, m, u, k, share, d, size = shape
  random = np.random.default_rng(seed)
  normal = lambda *s: jnp.asarray(random.normal(size=s), dtype)
  pages = np.stack([random.permutation(POOL)[:u] for _ in range(g)])
  pages = np.where(random.random((g, u)) < held, pages, -1).astype(np.int32)
  start = np.where(random.random((g, u)) < valid, 0, random.integers(0, size, (g, u)))
  visible = (random.random((g, m, u)) < sees) & (pages != -1)[:, None]
  visible = visible[..., None] & (np.arange(size) >= start[..., None])[:, None]
  pool = normal(LAYERS, POOL, k, size, d), normal(LAYERS, POOL, k, size, d)
  own = normal(g, k, m, d, OWN), normal(g, k, m, OWN, d)
  return normal(g, m, k * share, d), pool, pages, visible.reshape(g, m, u * size), own


def flat(pages):
  """Returns pages [G, U, K, T, D] side by side: [G, K, C, D]."""
  pages = pages.swapaxes(1, 2)
  return pages.reshape(*pages.shape[:2], -1, pages.shape[-1])


def dense(query, key, value, visible, scale: float):
  """Returns output and sums of rows [G, K, R, D] over keys [G, K, C, D], all scores at once."""
  query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  seen = jnp.repeat(visible, query.shape[2] // visible.shape[1], 1)[:, None]
  score = scale * jnp.einsum("gkrd,gkcd->gkrc", query, key, precision="highest")
  sums = jax.nn.logsumexp(jnp.where(seen, score, -jnp.inf), -1)
  weight = jnp.where(seen, jnp.exp(score - jnp.where(jnp.isfinite(sums), sums, 0)[..., None]), 0)
  return jnp.einsum("gkrc,gkcd->gkrd", weight, value, precision="highest"), sums


@functools.cache
def program(shape, dtype):
  """Returns the jitted pairs (found, expected): the kernel's output and sums, and the merged."""
  g, m, _, k, share, d, _ = shape

  def pairs(query, pool, layer, pages, visible, own, step):
    table = shared.table(pages, visible)
    key, value = (flat(x[layer][jnp.maximum(pages, 0)]) for x in pool)
    rows = query.reshape(g, m, k, share, d).swapaxes(1, 2).reshape(g, k, m * share, d)
    attend = functools.partial(shared.attend, rows=m, scale=d**-0.5, interpret=True)
    out, sums = attend(rows, pool[0], pool[1], layer, table)
    expected, expected_sums = dense(rows, key, value, visible, d**-0.5)
    sees = jnp.isfinite(expected_sums)
    sums, expected_sums = (jnp.where(sees, x, 0) for x in (sums, expected_sums))
    found = attention.shared_pages(query, pool, layer, table, own, step, INTERPRETED)
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), (query, key, value, own))
    context = whole[1].swapaxes(2, 3), whole[2]
    merged = attention.shared(whole[0], context, visible, whole[3], step)
    assert found.dtype == dtype and out.dtype == sums.dtype == jnp.float32
    return (out, expected), (sums, expected_sums), (found, merged)

  return jax.jit(pairs)


def distance(found, expected) -> float:
  """Returns the error as a share of what is expected, in root mean square."""
  found, expected = (np.asarray(x, np.float64) for x in (found, expected))
  return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference(shape, dtype):
  worst = np.zeros(3)
  share = st.sampled_from([0.0, 0.3, 0.8, 1.0])

  @hypothesis.settings(max_examples=15)
  @hypothesis.given(
    st.integers(0, 2**31), share, share, share, st.integers(0, LAYERS - 1), st.integers(0, OWN - 1)
  )
  def check(seed, held, sees, valid, layer, step):
    nonlocal worst
    query, pool, pages, visible, own = case(shape, dtype, seed, held, sees, valid)
    given = query, pool, jnp.asarray(layer), pages, visible, own, jnp.asarray(step)
    errors = np.array([distance(*pair) for pair in program(shape, dtype)(*given)])
    worst = np.maximum(worst, errors)
    assert (errors < [KERNEL[dtype], KERNEL[dtype], MERGED[dtype]]).all(), errors

  check()
  print(f"{shape} {dtype.__name__}: largest errors of output, sums, merged {worst}")


@pytest.mark.parametrize(
  "interpret", [True, pltpu.InterpretParams(uninitialized_memory="nan")], ids=["plain", "simulated"]
)
def test_sums_are_those_of_the_softmax_and_what_is_not_seen_is_not_read(interpret):
  shape = SHAPES[1]
  g, m, u, k, share, d, size = shape
  _, (key, value), pages, visible, _ = case(shape, jnp.float32, 7, 0.6, 0.5, 0.7)
  visible[0, 0] = False  # a row that sees nothing
  unused = np.setdiff1d(np.arange(POOL), pages[visible.any(1).reshape(g, u, size).any(-1)])
  assert unused.size and (pages == -1).any()
  key, value = (x.at[:, unused].set(np.nan) for x in (key, value))
  query = jnp.asarray(np.random.default_rng(8).normal(size=(g, k, m * share, d)), jnp.float32)
  table = shared.table(jnp.asarray(pages), jnp.asarray(visible))
  attend = functools.partial(shared.attend, rows=m, scale=0.5, interpret=interpret)
  out, sums = jax.jit(attend)(query, key, value, jnp.asarray(1), table)
  sees = np.repeat(visible, share, 1)  # [G, R, C]
  for group, head, row in np.ndindex(g, k, m * share):
    at = np.nonzero(sees[group, row])[0]
    if not at.size:
      assert not out[group, head, row].any() and sums[group, head, row] < -1e29
      continue
    place = 1, pages[group, at // size], head, at % size
    keys, values = (np.asarray(x, np.float64)[place] for x in (key, value))
    score = keys @ np.asarray(query[group, head, row], np.float64) / 2
    weight = special.softmax(score)
    np.testing.assert_allclose(out[group, head, row], weight @ values, atol=1e-5)
    np.testing.assert_allclose(sums[group, head, row], special.logsumexp(score), atol=1e-5)
  assert not sees[0, 0].any()


def test_table_lists_the_seen_pages_first_and_repeats_them():
  u, size, few = 10, 64, 8  # 8 pages a step: places 8 and 9 and those of a second step
  visible = np.zeros((2, 33, u, size), bool)
  visible[0, 32, [1, 4, 9], 5:] = True
  visible[1, :2] = True
  pages = np.stack([np.arange(u), np.arange(u)[::-1]]).astype(np.int32) + 100
  table = shared.table(jnp.asarray(pages), jnp.asarray(visible.reshape(2, 33, -1)))
  assert table.count.tolist() == [3, 10] and table.pages.shape == (2, 2 * few)
  assert table.pages[0, :3].tolist() == [101, 104, 109]
  assert table.pages[0, few : few + 3].tolist() == [101, 104, 109]  # nothing is read anew
  assert table.pages[1, :10].tolist() == pages[1].tolist()
  bits = np.asarray(table.bits).reshape(2, 2, 2 * few, size)
  assert (bits[0, 1, :3, 5:] == 1).all() and not bits[0, :, :3, :5].any()
  assert not bits[0, :, 3:].any() and not bits[0, 0].any()
  assert (bits[1, 0, :10] == 0b11).all() and not bits[1, :, 10:].any()
