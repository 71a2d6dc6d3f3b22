"""Budgets and their allocation: published numbers, and their laws for any sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests import rollout_oracle as oracle
from treepo_jax import config as config_lib
from treepo_jax.rollout import branching

WIDTH = 16
POLICY = branching.Policy(
  branching=2,
  branching_max=2,
  initial=2,
  initial_max=2,
  initial_draw="prompt",
  step_paths=0,
  response_tokens=0,
  min_width=0,
  allocation="even",
  remainder="spread",
  favour="low",
)


def policy(**changes) -> branching.Policy:
  return dataclasses.replace(POLICY, **changes)


@pytest.mark.parametrize(
  ("width", "b", "finished", "ended", "active", "total"),
  [
    (16, 2, 0, 0, 2, 4),
    (16, 2, 1, 1, 3, 8),
    (16, 2, 4, 3, 5, 12),
    (16, 2, 8, 1, 8, 8),
    (16, 8, 0, 0, 8, 16),
    (8, 4, 3, 1, 3, 5),
    (16, 2, 15, 2, 1, 1),
    (16, 2, 14, 0, 3, 3),  # no active path is dropped
  ],
)
def test_budgets(width, b, finished, ended, active, total):
  rules = policy(branching=b, branching_max=b)
  count = jnp.int32(active)
  reach = branching.reachable(jnp.int32(finished), count, count, count, width, 4, policy=rules)
  wave = jnp.int32(ended + active)
  found = branching.budget(reach - finished, wave, count, jnp.float32(0.5), policy=rules)
  assert found == total == oracle.budget(width, b, finished, ended, active)


def test_a_budget_of_step_tokens_is_shared_and_drops_nobody():
  for active, total in [(3, 5), (5, 5), (7, 7)]:
    count = jnp.int32(active)
    found = branching.budget(
      jnp.int32(16), count, count, jnp.float32(0), policy=policy(step_paths=5)
    )
    assert found == total


@pytest.mark.parametrize(
  ("tokens", "least", "finished", "used", "active", "growing", "total"),
  [
    (0, 0, 3, 100, 2, 40, 16),  # no budget of tokens
    (200, 0, 0, 0, 2, 32, 10),  # 200 / (16 + 4) more
    (200, 0, 3, 120, 2, 32, 7),  # 80 / 20 and the three
    (200, 6, 1, 180, 2, 32, 6),  # one more, but six are asked for
    (9000, 0, 1, 10, 1, 8, 16),  # never more than the width
    (200, 0, 4, 120, 0, 0, 6),  # by fallback: 80 / 30
    (200, 0, 4, 250, 0, 0, 4),  # spent
    (200, 5, 4, 250, 0, 0, 5),
  ],
)
def test_what_a_budget_of_response_tokens_reaches(
  tokens, least, finished, used, active, growing, total
):
  rules = policy(response_tokens=tokens, min_width=least)
  reach = functools.partial(branching.reachable, width=WIDTH, segment=4, policy=rules)
  assert reach(*map(jnp.int32, (finished, used, active, growing))) == total


def even(active: int, total: int, remainder: str) -> list[int]:
  """Returns the branches of `active` paths, having asserted that no other grows any."""
  counts = np.asarray(_even(remainder)(np.arange(WIDTH) < active, jnp.int32(total)))
  assert counts.dtype == np.int32 and not counts[active:].any()
  return counts[:active].tolist()


@functools.cache
def _even(remainder: str):
  return jax.jit(functools.partial(branching.even, remainder=remainder))


@pytest.mark.parametrize(
  ("active", "total", "counts"),
  [
    (4, 7, [1, 1, 1, 4]),
    (3, 8, [2, 2, 4]),
    (5, 12, [2, 2, 2, 2, 4]),
    (2, 4, [2, 2]),
    (6, 6, [1] * 6),
    (5, 16, [3, 3, 3, 3, 4]),
  ],
)
def test_published_allocation_gives_the_last_what_is_left(active, total, counts):
  assert even(active, total, "last") == counts
  spread = even(active, total, "spread")
  assert sum(spread) == total and max(spread) - min(spread) <= 1
  assert spread == sorted(spread, reverse=True)  # the first ones get one more


@given(st.integers(0, WIDTH), st.integers(0, 40), st.sampled_from(["last", "spread"]))
def test_every_active_path_gets_its_share(active, total, remainder):
  total = max(total, active) if active else 0
  counts = even(active, total, remainder)
  assert sum(counts) == total and all(counts)
  assert not active or counts == oracle.shares(total, active, remainder)


@functools.cache
def _weighted(favour: str):
  return jax.jit(functools.partial(branching.weighted, favour=favour))


def weighted(score: list[float], total: int, heat: float, favour: str = "low") -> list[int]:
  padded = np.full(WIDTH, 7.0, np.float32)
  padded[: len(score)] = score
  live = np.arange(WIDTH) < len(score)
  counts = np.asarray(_weighted(favour)(live, jnp.int32(total), padded, jnp.float32(heat)))
  assert not counts[len(score) :].any()
  return counts[: len(score)].tolist()


@pytest.mark.parametrize(
  ("share", "total", "counts"),
  [
    ([0.25] * 4, 7, [2, 2, 2, 1]),
    ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
    ([0.7, 0.2, 0.1], 3, [1, 1, 1]),
    ([0.6, 0.4], 5, [3, 2]),
    ([0.05, 0.05, 0.9], 13, [2, 1, 10]),
    ([1 / 3] * 3, 8, [3, 3, 2]),
  ],
)
def test_shares_are_made_whole_by_largest_remainder(share, total, counts):
  assert weighted(np.log(share).tolist(), total, 1.0, "high") == counts
  assert weighted((-np.log(share)).tolist(), total, 1.0, "low") == counts


@pytest.mark.parametrize(
  ("heat", "counts"), [(2.0, [4, 4, 4, 4]), (1.0, [3, 4, 5, 4]), (0.1, [1, 2, 12, 1])]
)
def test_published_shares_by_log_prob(heat, counts):
  assert weighted([-0.2, -0.5, -0.8, -0.3], 16, heat) == counts  # at 2, as published, all alike


@given(
  st.lists(st.floats(-5, 0, width=32), min_size=1, max_size=WIDTH),
  st.integers(0, 30),
  st.sampled_from([0.1, 1.0, 5.0]),
)
def test_the_less_likely_gets_no_less(score, more, heat):
  total = len(score) + more
  counts = weighted(score, total, heat)
  assert sum(counts) == total and min(counts) >= 1
  for i, j in [(i, j) for i in range(len(score)) for j in range(len(score))]:
    if score[i] < score[j]:
      assert counts[i] >= counts[j] - (abs(score[i] - score[j]) < 1e-3)
  assert max(weighted(score, total, 1e6)) - min(weighted(score, total, 1e6)) <= 1


@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 2**23 - 1))
def test_draws_reach_both_ends(least, more, number):
  u = number / 2**23
  found = int(branching.between(jnp.float32(u), least, least + more))
  assert found == oracle.integer(u, least, least + more) and least <= found <= least + more


def test_first_branches_are_uniform_and_bounded():
  uniform = jax.random.uniform(jax.random.key(0), (7000,))
  first = lambda width=WIDTH, **changes: jax.vmap(
    functools.partial(branching.initial, width=width, segment=4, policy=policy(**changes))
  )(uniform)
  found = np.bincount(first(initial_max=8), minlength=10)
  assert not found[:2].any() and not found[9:].any()
  assert stats.chisquare(found[2:9]).pvalue > 1e-4  # of a right sampler 1 in 10,000 seeds fails
  assert set(first().tolist()) == {2}
  # The published fixed divergence is not bounded, so that a prompt may exceed its width.
  assert set(first(initial=9, initial_max=9, width=5).tolist()) == {5}
  assert set(first(initial_max=8, response_tokens=14).tolist()) == {2, 3}
  assert set(first(initial_max=8, step_paths=6).tolist()) == {6}


def test_the_temperature_follows_half_a_sine():
  def heats(schedule: str) -> list[float]:
    c = config_lib.default()
    c.train.steps = 4
    c.rollout.allocation_schedule = schedule
    return [branching.heat(step, c) for step in range(6)]

  half = 2 - 2 * 0.5**0.5
  rising = [1, 1 + half, 3, 5 - half, 5, 5]
  assert heats("ascending") == pytest.approx(rising)
  assert heats("descending") == pytest.approx([6 - x for x in rising])  # the paper's 5.0 to 1.0
  assert heats("constant") == [1.0] * 6
