"""The page pool: every page is free or held by one, and holds what was last written to it."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treepo_jax.decoding import pages

PAGES, WANTED = 7, 6
TAKE, RELEASE, WRITE = jax.jit(pages.take), jax.jit(pages.release), jax.jit(pages.write)


def pool() -> pages.Pool:
  return pages.create(2, PAGES, 1, 3, 2, jnp.float32)


def free(held: pages.Pool) -> list[int]:
  return held.free[: int(held.size)].tolist()


@given(st.data())
def test_every_page_is_free_or_held_once(data):
  state, held = pool(), set()
  for _ in range(data.draw(st.integers(1, 12))):
    if data.draw(st.booleans()):
      most = min(WANTED, PAGES - len(held))
      mask = data.draw(st.permutations([1] * data.draw(st.integers(0, most)) + [0] * WANTED))
      mask = np.array(mask[:WANTED], np.int32)
      state, got = TAKE(state, mask)
      got = np.asarray(got)
      assert ((got == pages.NO_PAGE) == (mask == 0)).all()
      taken = got[mask == 1].tolist()
      assert len(set(taken)) == len(taken) and not held & set(taken)
      held |= set(taken)
    else:
      back = sorted(held)
      back = back[: data.draw(st.integers(0, min(len(back), WANTED)))]
      named = data.draw(st.permutations(back + [pages.NO_PAGE] * (WANTED - len(back))))
      state = RELEASE(state, np.array(named, np.int32))
      held -= set(back)
    assert sorted([*free(state), *held]) == [*range(PAGES)]


def test_all_pages_can_be_held():
  state, got = pages.take(pool(), jnp.ones(PAGES, jnp.int32))
  assert sorted(got.tolist()) == [*range(PAGES)] and state.size == 0
  state, none = pages.take(state, jnp.zeros(3, jnp.int32))
  assert none.tolist() == [pages.NO_PAGE] * 3
  state = pages.release(state, got)
  assert sorted(free(state)) == [*range(PAGES)]


def test_pages_keep_the_shape_they_are_asked_in():
  state, got = pages.take(pool(), jnp.array([[1, 0], [0, 1], [1, 1]]))
  assert got.shape == (3, 2)
  assert (got == pages.NO_PAGE).tolist() == [[False, True], [True, False], [False, False]]
  assert sorted(free(pages.release(state, got))) == [*range(PAGES)]


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
