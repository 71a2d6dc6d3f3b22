"""The page pool: a page is free where nobody holds it, and holds what was last written to it."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treepo_jax.decoding import pages

PAGES, WANTED = 7, 6
TAKE, HOLD, RELEASE = jax.jit(pages.take), jax.jit(pages.hold), jax.jit(pages.release)
WRITE = jax.jit(pages.write)


def pool() -> pages.Pool:
  return pages.create(2, PAGES, 1, 3, 2, jnp.float32)


def free(held: pages.Pool) -> list[int]:
  return held.free[: int(held.size)].tolist()


def check(state: pages.Pool, held: collections.Counter) -> None:
  """Asserts that each page has the holders that it should have, and that the others are free."""
  assert state.count.tolist() == [held[page] for page in range(PAGES)]
  assert sorted(free(state)) == [page for page in range(PAGES) if not held[page]]


@given(st.data())
def test_a_page_is_free_exactly_where_nobody_holds_it(data):
  state, held = pool(), collections.Counter()
  for _ in range(data.draw(st.integers(1, 12))):
    step = data.draw(st.sampled_from(["take", "hold", "release"]))
    if step == "take":
      most = min(WANTED, PAGES - len(held))
      mask = data.draw(st.permutations([True] * data.draw(st.integers(0, most)) + [False] * WANTED))
      mask = np.array(mask[:WANTED], bool)
      state, got = TAKE(state, mask)
      got = np.asarray(got)
      assert ((got == pages.NO_PAGE) == ~mask).all()
      taken = got[mask].tolist()
      assert len(set(taken)) == len(taken) and not set(held) & set(taken)
      held.update(taken)
    else:
      # a page may be named as often as it is held
      entries = sorted(held.elements()) if step == "release" else sorted(held) * 2
      named = data.draw(st.permutations(entries))[: data.draw(st.integers(0, WANTED))]
      named += [pages.NO_PAGE] * (WANTED - len(named))
      named = data.draw(st.permutations(named))
      change = collections.Counter(page for page in named if page != pages.NO_PAGE)
      if step == "hold":
        state = HOLD(state, np.array(named, np.int32))
        held.update(change)
      else:
        state = RELEASE(state, np.array(named, np.int32))
        held -= change  # drops those of nobody
    check(state, held)


def test_all_pages_can_be_held():
  state, got = TAKE(pool(), np.ones(PAGES, bool))
  assert sorted(got.tolist()) == [*range(PAGES)] and state.size == 0
  state, none = TAKE(state, np.zeros(PAGES, bool))
  assert none.tolist() == [pages.NO_PAGE] * PAGES
  check(RELEASE(state, got), collections.Counter())


def test_pages_keep_the_shape_they_are_asked_in():
  state, got = TAKE(pool(), np.array([[1, 0], [0, 1], [1, 1]], bool))
  assert got.shape == (3, 2)
  assert (got == pages.NO_PAGE).tolist() == [[False, True], [True, False], [False, False]]
  state = HOLD(state, got)
  check(state, collections.Counter({page: 2 for page in got.ravel().tolist() if page >= 0}))
  check(RELEASE(RELEASE(state, got), got), collections.Counter())


def test_a_page_that_several_give_back_at_once_is_free_once():
  state, got = TAKE(pool(), np.array([True, True, False]))
  first, second, _ = got.tolist()
  state = HOLD(state, np.array([first, pages.NO_PAGE, first], np.int32))
  check(state, collections.Counter({first: 3, second: 1}))
  state = RELEASE(state, np.array([first, second, first], np.int32))
  check(state, collections.Counter({first: 1}))
  state, again = TAKE(state, np.ones(PAGES - 1, bool))
  assert first not in again.tolist()
  state = HOLD(state, again[:2])
  everything = np.array([*again.tolist(), first, *again[:2].tolist()], np.int32)
  check(RELEASE(state, everything), collections.Counter())


def test_pages_hold_what_was_written_last():
  random, state = np.random.default_rng(0), pool()
  key, value = np.zeros(state.key.shape), np.zeros(state.key.shape)
  for named in ([3, pages.NO_PAGE, 0], [6, 1, pages.NO_PAGE], [3, 6, 5], [pages.NO_PAGE] * 3):
    new = random.normal(size=(2, 2, 3, 1, 3, 2)).astype(np.float32)  # keys and values
    state = WRITE(state, np.array(named, np.int32), *new)
    for i, page in enumerate(named):
      if page != pages.NO_PAGE:
        key[:, page], value[:, page] = new[0][:, i], new[1][:, i]
    np.testing.assert_array_equal(state.key, key.astype(np.float32))
    np.testing.assert_array_equal(state.value, value.astype(np.float32))
