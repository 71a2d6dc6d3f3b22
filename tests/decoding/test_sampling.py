"""Draws follow softmax exactly, never leave the vocabulary, and depend on identity alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from treepo_jax.decoding import sampling

SIZE, VOCABULARY = 300, 290  # three blocks, the last of them in part, and padding
FALSE_ALARM = 1e-4  # of a right sampler so many seeds fail


@functools.cache
def _draw(temperature: float, vocabulary: int):
  def run(logits, u):
    token = sampling.draw(logits, u, temperature, vocabulary).token
    return token, sampling.log_prob(logits, token)

  return jax.jit(run)


def draw(logits, u, temperature=1.0, vocabulary=VOCABULARY):
  """Returns the tokens that one row of logits gives for many u."""
  u = np.asarray(u, np.float32)
  logits = np.broadcast_to(np.asarray(logits, np.float32), (len(u), len(logits)))
  return [np.asarray(x) for x in _draw(temperature, vocabulary)(logits, u)]


def some_logits(seed: int, scale: float = 2.0) -> np.ndarray:
  return (scale * np.random.default_rng(seed).normal(size=SIZE)).astype(np.float32)


@functools.cache
def _uniform(count: int):
  return jax.jit(lambda keys, first: sampling.uniform(keys, first, count))


def numbers_at(keys, first, step: int) -> np.ndarray:
  """Returns the numbers of one step, asked for from each row's own first step on."""
  found = _uniform(step + 1)(keys, first)
  return np.take_along_axis(np.asarray(found), step - np.asarray(first)[None], 0)[0]


def law(logits: np.ndarray, temperature: float) -> np.ndarray:
  chance = special.softmax(logits[:VOCABULARY].astype(np.float64) / temperature)
  return np.concatenate([chance, np.zeros(SIZE - VOCABULARY)])


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_draws_pass_a_chi_square_test(temperature):
  count, logits = 40_000, some_logits(0)
  prompts = np.repeat(np.arange(count // 8, dtype=np.uint32), 8)
  keys = sampling.row_keys(jax.random.key(5), jnp.asarray(prompts), jnp.arange(count) % 8)
  first = jnp.asarray(np.arange(count) % 3)  # the fourth token of each, wherever it is asked for
  token, _ = draw(logits, numbers_at(keys, first, 3), temperature)
  expected = count * law(logits, temperature)
  found = np.bincount(token, minlength=SIZE)
  rare = expected < 5
  assert not found[VOCABULARY:].any()
  pool = lambda x: np.append(x[~rare], x[rare].sum())
  assert stats.chisquare(pool(found), pool(expected)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("padding", [-5.0, 0.0, 60.0])
def test_every_token_has_its_share_of_the_unit_interval(temperature, padding):
  logits = some_logits(1)
  logits[VOCABULARY:] = padding  # the rows beyond the tokenizer may hold anything
  grid = 20_000
  token, _ = draw(logits, (np.arange(grid) + 0.5) / grid, temperature)
  assert (np.diff(token) >= 0).all()  # the inverse of the distribution function
  share = np.bincount(token, minlength=SIZE) - grid * law(logits, temperature)
  assert np.abs(share).max() < 1.1


def test_both_ends_of_the_unit_interval():
  logits = some_logits(2)
  first, last = draw(logits, [0.0, np.nextafter(np.float32(1), np.float32(0))])[0]
  assert first == 0 and last == VOCABULARY - 1
  logits[[0, 1, VOCABULARY - 1]] = -np.inf
  first, last = draw(logits, [0.0, np.nextafter(np.float32(1), np.float32(0))])[0]
  assert first == 2 and last == VOCABULARY - 2


@pytest.mark.parametrize("second", [1, 128])  # of the same block, of the next
def test_intervals_are_open_on_the_right(second):
  logits = np.full(SIZE, -np.inf, np.float32)
  logits[[0, second]] = 1.0
  below = np.nextafter(np.float32(0.5), np.float32(0))
  assert draw(logits, [0.0, below, 0.5])[0].tolist() == [0, 0, second]


@pytest.mark.parametrize("size", [5, 128, 129, 700])
def test_any_size_of_vocabulary(size):
  logits = np.linspace(-1, 1, size)
  grid = (np.arange(3000) + 0.5) / 3000
  token, log_prob = draw(logits, grid, 1.0, size)
  share = np.bincount(token, minlength=size) - 3000 * special.softmax(logits)
  assert np.abs(share).max() < 1.1
  np.testing.assert_allclose(log_prob, special.log_softmax(logits)[token], atol=1e-5)


def test_tokens_without_probability_are_never_drawn():
  # Aim at the borders of the blocks, where rounding could step to either side.
  random = np.random.default_rng(3)
  for seed in range(60):
    logits = some_logits(seed)
    gone = random.random(SIZE) < 0.5
    gone[[0, 128, 256]] = True  # the first of each block
    gone[128:256] |= seed % 3 == 0  # and a whole block
    logits[gone] = (-np.inf, -1e9, -200.0)[seed % 3]
    mass = np.add.reduceat(law(logits, 1.0), [0, 128, 256])
    edges = np.cumsum(mass)[:2].astype(np.float32)
    near = (edges[:, None].view(np.int32) + np.arange(-40, 41, dtype=np.int32)).view(np.float32)
    token, log_prob = draw(logits, near.ravel())
    assert not gone[token].any(), seed
    assert np.isfinite(log_prob).all()


def test_one_token_alone_is_always_drawn():
  logits = np.full(SIZE, -np.inf, np.float32)
  logits[137] = 4.0
  token, log_prob = draw(logits, [0.0, 0.3, 0.999999])
  assert token.tolist() == [137] * 3 and log_prob.tolist() == [0.0] * 3


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_log_prob_is_the_policys_at_temperature_one(temperature):
  logits = some_logits(4)
  token, log_prob = draw(logits, np.linspace(0, 0.999, 500), temperature)
  np.testing.assert_allclose(log_prob, special.log_softmax(logits)[token], atol=1e-5)


@functools.cache
def _filtered(temperature: float, vocabulary: int, top_k: int, top_p: float, min_p: float):
  def run(logits, u):
    rows = jnp.broadcast_to(logits[None], (len(u), len(logits)))
    drawn = sampling.draw(rows, u, temperature, vocabulary, top_k, top_p, min_p)
    return drawn, sampling.sampled_log_prob(rows, drawn.token, drawn.norm, temperature)

  return jax.jit(run)


def filtered(logits, u, temperature=1.0, vocabulary=VOCABULARY, top_k=0, top_p=1.0, min_p=0.0):
  """Returns what one row of logits gives for many u, and the log-probs under what was sampled."""
  run = _filtered(temperature, vocabulary, top_k, top_p, min_p)
  return jax.device_get(run(jnp.asarray(logits, jnp.float32), jnp.asarray(u, jnp.float32)))


def filtered_law(logits, temperature, vocabulary=VOCABULARY, top_k=0, top_p=1.0, min_p=0.0):
  """Returns the probability of every token, token by token in order of likelihood."""
  chance = special.softmax(np.asarray(logits[:vocabulary], np.float64) / temperature)
  order = np.argsort(-chance, kind="stable").tolist()
  if top_k:
    order = [i for i in order if chance[i] >= chance[order[min(top_k, len(order)) - 1]]]
  left, before, kept = sum(chance[i] for i in order), 0.0, []
  for i in order:
    if before < top_p * left or chance[i] == chance[kept[-1]]:
      kept.append(i)
    before += chance[i]
  kept = [i for i in kept if chance[i] >= min_p * chance[order[0]]]
  law = np.zeros(len(logits))
  law[kept] = chance[kept] / chance[kept].sum()
  return law


FILTERS: list[dict] = [
  {"top_k": 1},
  {"top_k": 20},
  {"top_p": 0.8},
  {"top_p": 0.05},
  {"min_p": 0.1},
  {"top_k": 40, "top_p": 0.9},
  {"top_k": 15, "top_p": 0.95, "min_p": 0.1},
  {"top_k": 1000, "top_p": 0.99},  # more than there are tokens
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filtered_draws_pass_a_chi_square_test(filters):
  count, temperature, logits = 20_000, 0.6, some_logits(7)
  logits[VOCABULARY:] = 60.0  # padding
  expected = count * filtered_law(logits, temperature, **filters)
  u = np.random.default_rng(8).random(count).astype(np.float32)
  drawn, _ = filtered(logits, u, temperature, **filters)
  found = np.bincount(drawn.token, minlength=SIZE)
  assert not found[expected == 0].any()
  if np.count_nonzero(expected) == 1:
    return
  rare = expected < 5
  pool = lambda x: np.append(x[~rare], x[rare].sum()) if expected[rare].sum() else x[~rare]
  assert stats.chisquare(pool(found), pool(expected)).pvalue > FALSE_ALARM / len(FILTERS)


@pytest.mark.parametrize("temperature", [0.6, 3.0])
@pytest.mark.parametrize("filters", [{}, *FILTERS], ids=str)
def test_every_token_that_is_kept_has_its_share_of_the_unit_interval(filters, temperature):
  logits, grid = some_logits(9), 20_000
  logits[VOCABULARY:] = 60.0
  expected = filtered_law(logits, temperature, **filters)
  drawn, log_prob = filtered(logits, (np.arange(grid) + 0.5) / grid, temperature, **filters)
  assert (np.diff(drawn.token) >= 0).all() and (drawn.token < VOCABULARY).all()
  assert np.abs(np.bincount(drawn.token, minlength=SIZE) - grid * expected).max() < 1.1
  np.testing.assert_allclose(log_prob, np.log(expected[drawn.token]), atol=2e-5)


def test_log_probs_of_what_is_kept_sum_to_one():
  logits = np.log([0.4, 0.3, 0.15, 0.1, 0.05])
  u = np.linspace(0, 0.999, 50)
  cases: list[tuple[dict, list[int]]] = [
    ({}, [0, 1, 2, 3, 4]),
    ({"top_k": 3}, [0, 1, 2]),
    ({"top_p": 0.69}, [0, 1]),
    ({"top_p": 0.71}, [0, 1, 2]),
    ({"min_p": 0.2}, [0, 1, 2, 3]),
    ({"top_k": 3, "top_p": 0.8}, [0, 1]),  # 0.7 / 0.85 of what the first filter leaves
    ({"top_p": 0.99, "min_p": 0.5}, [0, 1]),
  ]
  for filters, kept in cases:
    drawn, log_prob = filtered(logits, u, vocabulary=5, **filters)
    found = dict(zip(drawn.token.tolist(), log_prob.tolist(), strict=True))
    assert sorted(found) == kept
    assert sum(np.exp(list(found.values()))) == pytest.approx(1, abs=1e-6)


def test_equals_stay_or_go_together():
  logits = np.log([0.1, 0.25, 0.25, 0.25, 0.15])
  u = np.linspace(0, 0.999, 200)
  cases: list[dict] = [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"top_p": 0.74}]
  for filters in cases:
    drawn, _ = filtered(logits, u, vocabulary=5, **filters)
    assert set(drawn.token.tolist()) == {1, 2, 3}


def test_a_known_token_that_was_not_kept_has_a_finite_log_prob():
  @jax.jit
  def run(logits):
    drawn = sampling.draw(logits, jnp.zeros(1), 0.5, 3, 1)
    return sampling.sampled_log_prob(logits, jnp.asarray([1]), drawn.norm, 0.5)

  assert run(jnp.asarray([[2.0, 1.0, 0.0]])).tolist() == [-2.0]


INTERVALS: list[tuple[float, dict]] = [
  (1.0, {}),
  (0.6, {}),
  (3.0, {"top_k": 50}),
  (0.9, {"top_k": 9, "top_p": 0.7}),
]


@pytest.mark.parametrize("size", [68, 1000, 151_936])
@pytest.mark.parametrize(("temperature", "filters"), INTERVALS, ids=str)
def test_numbers_inside_the_interval_draw_the_token(size, temperature, filters):
  random = np.random.default_rng(size)
  few, scales = (4, (3.0,)) if size > 1000 else (64, (1.0, 4.0))
  for scale in scales:
    logits = (scale * random.normal(size=size)).astype(np.float32)
    logits[random.random(size) < 0.1] = -np.inf
    first, log_prob = filtered(
      logits, random.random(few), temperature, vocabulary=size - 3, **filters
    )
    assert (first.high - first.low >= np.exp(log_prob.astype(np.float64)) - 4e-6).all()
    assert (0 <= first.low).all() and (first.low <= first.high).all() and (first.high <= 1).all()
    wide = np.flatnonzero(first.high > first.low)
    bits = lambda x, by: (np.float32(x).view(np.int32) + by).astype(np.int32).view(np.float32)
    tried = []
    for i in wide:
      low, high = first.low[i], first.high[i]
      steps = np.arange(12, dtype=np.int32)
      near = np.concatenate([bits(low, steps), bits(high, -1 - steps)])
      near = np.concatenate([near, low + (high - low) * random.random(8).astype(np.float32)])
      tried += [(i, u) for u in near[(low <= near) & (near < high)]]
    owner = np.array([i for i, _ in tried], int)
    again, _ = filtered(
      logits,
      np.resize(np.array([u for _, u in tried], np.float32), few * 32),  # one size: one program
      temperature,
      vocabulary=size - 3,
      **filters,
    )
    np.testing.assert_array_equal(again.token[: len(owner)], first.token[owner])
    # numbers anywhere: those inside draw the token, those outside may
    u = random.random(few * 32).astype(np.float32)
    anywhere, _ = filtered(logits, u, temperature, vocabulary=size - 3, **filters)
    inside = (first.low[:, None] <= u[None]) & (u[None] < first.high[:, None])
    equal = first.token[:, None] == anywhere.token[None]
    assert not (inside & ~equal).any()


def test_the_interval_of_a_certain_token_is_everything():
  greedy, log_prob = filtered(some_logits(3), [0.0, 0.4, 0.999], temperature=0.0)
  assert greedy.low.tolist() == [0] * 3 and greedy.high.tolist() == [1] * 3
  assert log_prob.tolist() == [0] * 3
  only, _ = filtered(some_logits(3), [0.0, 0.4, 0.999], top_k=1)
  assert only.low.tolist() == [0] * 3 and only.high.tolist() == [1] * 3


def test_intervals_at_both_ends_reach_them():
  logits = np.zeros(300)
  drawn, _ = filtered(logits, [0.0, 0.99999], vocabulary=300)
  assert drawn.token.tolist() == [0, 299]
  assert drawn.low[0] == 0 and drawn.high[1] == 1


def test_entropy_is_the_policys_at_temperature_one():
  logits = np.stack([some_logits(i) for i in range(5)])
  logits[1, ::3] = -np.inf
  expected = [stats.entropy(special.softmax(row.astype(np.float64))) for row in logits]
  np.testing.assert_allclose(sampling.entropy(jnp.asarray(logits)), expected, rtol=1e-5)


IDS = np.array([0, 1, 7, 7, 2**31, 2**32 - 1], np.uint32)
NODES = np.array([1, 1, 3, 4, 3, 12], np.int32)


def numbers(ids, nodes, step: int, seed: int = 0) -> np.ndarray:
  keys = sampling.row_keys(jax.random.key(seed), jnp.asarray(ids), jnp.asarray(nodes))
  return numbers_at(keys, np.zeros(nodes.shape, np.int32), step)


def test_draws_follow_the_identity_and_not_the_place():
  alone = numbers(IDS, NODES, 2)
  order = np.random.default_rng(0).permutation(len(IDS))
  np.testing.assert_array_equal(numbers(IDS[order], NODES[order], 2), alone[order])
  grouped = numbers(IDS.reshape(2, 3), NODES.reshape(2, 3), 2)
  np.testing.assert_array_equal(grouped, alone.reshape(2, 3))
  np.testing.assert_array_equal(numbers(IDS[3:4], NODES[3:4], 2), alone[3:4])


def test_draws_follow_the_step_and_not_where_the_call_began():
  keys = sampling.row_keys(jax.random.key(0), jnp.asarray(IDS), jnp.asarray(NODES))
  whole = np.asarray(_uniform(8)(keys, jnp.zeros(len(IDS), jnp.int32)))
  first = np.array([0, 5, 2, 2, 4, 1], np.int32)
  found = np.asarray(_uniform(3)(keys, first))
  steps = first[None] + np.arange(3)[:, None]
  np.testing.assert_array_equal(found, np.take_along_axis(whole, steps, 0))
  grouped = _uniform(3)(keys.reshape(2, 3), first.reshape(2, 3))
  np.testing.assert_array_equal(np.reshape(grouped, (3, 6)), found)


def test_every_part_of_the_identity_counts():
  found = [numbers(IDS, NODES, step, seed) for step in range(4) for seed in range(3)]
  found.append(numbers(IDS, NODES + 1, 0))
  found = np.concatenate(found)
  assert len(np.unique(found)) == len(found) - 1  # (7, 3 + 1) is (7, 4), the row after it
  assert (found >= 0).all() and (found < 1).all()


def test_temperature_zero_takes_the_likeliest_token_of_the_vocabulary():
  for seed in range(5):
    logits = some_logits(seed)
    logits[VOCABULARY:] = 100.0  # padding
    tokens, log_probs = draw(logits, [0.0, 0.3, 0.999], temperature=0.0)
    assert set(tokens) == {logits[:VOCABULARY].argmax()}
    np.testing.assert_allclose(log_probs, special.log_softmax(logits)[tokens], rtol=1e-5)
  ties = np.zeros(SIZE)
  assert set(draw(ties, [0.0, 0.9], temperature=0.0)[0]) == {0}
