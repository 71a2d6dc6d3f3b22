"""Budgets and their allocation: published numbers, and their laws for any sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests import rollout_oracle as oracle
from treepo_jax.rollout import branching

NODES, WIDTH = 20, 16


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
  found = branching.budget(
    jnp.int32(finished), jnp.int32(ended + active), jnp.int32(active), width=width, branching=b
  )
  assert found == total == oracle.budget(width, b, finished, ended, active)


@functools.cache
def _even(remainder: str):
  return jax.jit(functools.partial(branching.even, remainder=remainder))


def even(active: list[int], total: int, remainder: str) -> list[int]:
  """Returns the branches of the nodes in `active`, having asserted that no other grows any."""
  mask = np.zeros(NODES, bool)
  mask[active] = True
  counts = np.asarray(_even(remainder)(mask, jnp.int32(total)))
  assert counts.dtype == np.int32 and not counts[~mask].any()
  return counts[mask].tolist()


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
  assert even([*range(3, 3 + active)], total, "last") == counts
  spread = even([*range(3, 3 + active)], total, "spread")
  assert sum(spread) == total and max(spread) - min(spread) <= 1
  assert spread == sorted(spread, reverse=True)  # the first ones get one more


@given(st.sets(st.integers(0, NODES - 1)), st.integers(0, 40), st.sampled_from(["last", "spread"]))
def test_every_active_node_gets_its_share(active, total, remainder):
  total = max(total, len(active)) if active else 0
  counts = even(sorted(active), total, remainder)
  assert sum(counts) == total and all(counts)
  assert not active or counts == oracle.shares(total, len(active), remainder)


@given(st.lists(st.integers(0, 4), min_size=NODES, max_size=NODES))
def test_parents_are_repeated_in_row_order(counts):
  while sum(counts) > WIDTH:
    counts[counts.index(max(counts))] -= 1
  parents = jax.jit(branching.parents, static_argnums=1)(jnp.array(counts, jnp.int32), WIDTH)
  expected = [row for row, count in enumerate(counts) for _ in range(count)]
  assert parents.tolist() == expected + [-1] * (WIDTH - len(expected))


def test_first_branches_are_uniform_with_both_ends():
  keys = jax.random.split(jax.random.key(0), 7000)
  draw = jax.jit(jax.vmap(functools.partial(branching.initial, least=2, most=8)))
  found = np.bincount(draw(keys), minlength=10)
  assert not found[:2].any() and not found[9:].any()
  assert stats.chisquare(found[2:9]).pvalue > 1e-4  # of a right sampler 1 in 10,000 seeds fails
  assert set(draw(keys[:5]).tolist()) <= set(range(2, 9))
  always = jax.vmap(functools.partial(branching.initial, least=3, most=3))(keys[:50])
  assert set(always.tolist()) == {3}
