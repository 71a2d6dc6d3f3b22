"""Repeated windows are those of counting by hand; members of a set are found."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_jax.decoding import stopping

SHAPES = [(1, 1), (1, 4), (2, 2), (2, 3), (3, 2), (4, 3)]


@functools.cache
def _repeats(window: int, count: int):
  return jax.jit(functools.partial(stopping.repeats, window=window, count=count))


def repeats(text: list[int], window: int, count: int) -> bool:
  """Calls it with `text` right aligned behind junk that would itself repeat."""
  room = window * count
  padded = np.zeros(room, np.int32)
  if text:
    padded[-len(text) :] = text
  return bool(_repeats(window, count)(padded, jnp.int32(len(text))))


def by_hand(text: list[int], window: int, count: int) -> bool:
  """Returns whether some `window` tokens occur `count` times; they may overlap."""
  windows = Counter(tuple(text[i : i + window]) for i in range(len(text) - window + 1))
  return max(windows.values(), default=0) >= count


@given(st.sampled_from(SHAPES), st.data())
def test_repeats_are_counted_as_by_hand(shape, data):
  window, count = shape
  letters = data.draw(st.sampled_from([2, 3, 30]))
  text = data.draw(st.lists(st.integers(0, letters - 1), max_size=window * count))
  assert repeats(text, window, count) == by_hand(text, window, count)


@pytest.mark.parametrize(("window", "count"), [(4, 3), (8, 4)])
def test_loops_of_every_period_up_to_the_window(window, count):
  room = window * count
  for period in range(1, 2 * window + 1):
    text = ([*range(100, 100 + period)] * room)[:room]
    assert repeats(text, window, count) == by_hand(text, window, count)
    assert period > window or repeats(text, window, count)
  assert not repeats([*range(room)], window, count)
  once_less = [7] * (window + count - 2)  # one token short of `count` overlapping windows
  assert not repeats(once_less, window, count) and repeats([*once_less, 7], window, count)


def test_published_length_of_one_repeated_letter():
  assert not repeats([1] * 38, 32, 8) and repeats([1] * 39, 32, 8)


def test_no_count_no_check():
  assert not stopping.repeats(jnp.zeros(1, jnp.int32), jnp.int32(1), 4, 0)


@pytest.mark.parametrize("members", [(), (3,), (3, 0, 7)])
def test_members_of_a_set(members):
  tokens = jnp.array([[0, 3, 4], [7, 3, -1]])
  found = stopping.is_any(tokens, members)
  assert found.tolist() == [[int(t) in members for t in row] for row in tokens]
