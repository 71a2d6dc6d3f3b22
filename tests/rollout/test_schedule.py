"""Which nodes are decoded next, and that each row is told of its own path and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import rollout_oracle as oracle
from tests.rollout import drive
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.rollout import schedule
from treepo_jax.rollout import tree as tree_lib

TREES, WIDTH, DEPTH = 3, 4, 2


@functools.cache
def _fill(groups: int, members: int, followers: int = 0):
  return jax.jit(lambda tree, paths: schedule.fill(tree, paths, groups, members, followers))


def _paths(trees: int, nodes: int, **changes) -> schedule.Paths:
  zero = np.zeros((trees, nodes), np.int32)
  pages = {"prompt": zero[:, :1], "pages": zero[..., None], "state": zero}
  bundles = {"twin": zero - 1, "guide": zero, "given": zero}
  none = np.zeros((trees, nodes, 1), np.float32)
  shares = {"low": none, "high": none, "entropy": none[..., 0]}
  return schedule.Paths(**jax.tree.map(jnp.asarray, pages | bundles | shares | changes))


@given(
  st.lists(st.sets(st.integers(1, WIDTH * DEPTH)), min_size=TREES, max_size=TREES),
  st.sampled_from([(1, 1), (2, 3), (4, 2), (12, 2)]),
)
def test_open_nodes_fill_the_groups_in_order(opened, shape):
  groups, members = shape
  tree = tree_lib.create(
    jnp.ones((TREES, 1), jnp.int32),
    jnp.ones(TREES, jnp.int32),
    jnp.arange(TREES, dtype=jnp.uint32),
    width=WIDTH,
    depth=DEPTH,
    segment=1,
  )
  status = np.array(tree.status)
  expected = []
  for b, rows in enumerate(opened):
    status[b, sorted(rows)] = tree_lib.OPEN
    rows = [(b, row) for row in sorted(rows)]
    expected += [rows[i : i + members] for i in range(0, len(rows), members)]
  tree = dataclasses.replace(tree, status=jnp.asarray(status))
  slots, used = _fill(*shape)(tree, _paths(*status.shape))
  expected = expected[:groups]
  assert used == len(expected)
  for g in range(groups):
    live = np.asarray(slots.live[g])
    found = np.stack([slots.tree[g], slots.node[g]], -1)[live]
    assert found.tolist() == [list(row) for row in (expected[g] if g < len(expected) else [])]


def test_open_nodes_of_one_context_follow_the_first():
  #        0        1, 4, 5, 6 and 7 are open below the prompt: 4 and 6 left guide 2 after 3 tokens,
  #    1 2 3 4..7   7 left it after 2; below 2 and its twin 3 are 8 and 9, all three one context
  #      |/           with 10 below 2
  #   8 10 9
  parent = np.array([[-1, 0, 0, 0, 0, 0, 0, 0, 2, 3, 2, -1, -1]], np.int32)
  status = np.full(parent.shape, tree_lib.UNUSED, np.int32)
  status[0, [1, 4, 5, 6, 7, 8, 9, 10]] = tree_lib.OPEN
  status[0, [0, 2, 3]] = tree_lib.INNER
  twin, guide, given_ = np.full(parent.shape, -1), np.zeros_like(parent), np.zeros_like(parent)
  twin[0, 3], guide[0, [4, 6, 7]], given_[0, [4, 6]], given_[0, 7] = 2, 2, 3, 2
  paths = _paths(*parent.shape, twin=twin.astype(np.int32), guide=guide, given=given_)
  tree = tree_lib.create(
    jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32),
    width=12, depth=1, segment=1,
  )  # fmt: skip
  tree = dataclasses.replace(tree, parent=jnp.asarray(parent), status=jnp.asarray(status))
  slots, used = _fill(3, 2, 11)(tree, paths)
  bundles = {}
  for at in zip(*np.nonzero(slots.live), strict=True):
    row = slots.followers[at].tolist()
    bundles[int(slots.node[at])] = [f for f in row if f != tree_lib.NO_ROW]
  assert bundles == {1: [5], 4: [6], 7: [], 8: [9, 10]} and used == 2
  rows, shared = schedule.rows(
    tree, paths, slots, jnp.zeros((3, 2, 1), jnp.int32), shared=2, depth=2, page=1
  )
  assert shared == 1 and rows.given[slots.live].tolist() == [0, 3, 2, 0]


@pytest.mark.parametrize(
  "changes",
  [
    {"pages": 2, "groups": 3, "group": 2},
    {"segment": 4, "page": 1, "depth": 3, "group": 8},
    {"depth": 1, "page": 4},
  ],
)
def test_rows_see_the_pages_of_their_path_alone(changes):
  # The pages are followed as a pool would be: what was last written to each, by its name.
  lengths = [1, 2, 3, 4, 5, 6]
  names = [3, 2, 9, 14, 19, 1]
  shape = drive.settings(prompts=6, **changes)
  segment, page, per_node = shape.decoder.segment, shape.page, shape.pages_of_segment
  written: dict[int, tuple] = {}
  checked = 0
  for growth, need in drive.run(shape, names, drive.hazards(segment), lengths=lengths):
    for b in np.flatnonzero(growth.fresh):
      for i, p in enumerate(growth.paths.prompt[b][::-1].tolist()):
        if p != pages_lib.NO_PAGE:
          written[p] = (names[b], "prompt", i)
    rows, slots, tree = growth.rows, growth.slots, growth.tree
    fullest = 0
    for g in range(shape.groups):
      live = np.flatnonzero(slots.live[g])
      assert live.tolist() == [*range(len(live))] and len(set(slots.tree[g, live].tolist())) <= 1
      above = set()
      for m in range(shape.group):
        if m not in live:
          assert not rows.live[g, m] and not rows.sees[g, m].any()
          assert (rows.pages[g, m] == pages_lib.NO_PAGE).all()
          continue
        b, node = int(slots.tree[g, m]), int(slots.node[g, m])
        name, n = names[b], lengths[b]
        path = oracle.path(tree.parent[b].tolist(), node)
        above |= set(path[:-1])
        seen = {int(p): int(s) for p, s, w in _context(rows, g, m) if w}
        of_prompt = -(-(n - 1) // page)
        expected = {(name, "prompt", i) for i in range(of_prompt)}
        expected |= {(name, row, j) for row in path[:-1] for j in range(per_node)}
        assert sorted(map(str, (written[p] for p in seen))) == sorted(map(str, expected))
        for p, start in seen.items():  # of the first page the prompt fills only the end
          first = written[p] == (name, "prompt", of_prompt - 1)
          assert start == (of_prompt * page - (n - 1) if first else 0)
        above_row = path[-2] if len(path) > 1 else 0
        last = drive.token(name, 0, n - 1)
        if above_row:
          last = int(tree.tokens[b, above_row, segment - 1])
          assert tree.length[b, above_row] == segment
        assert rows.live[g, m] and rows.prompt_id[g, m] == name and rows.node[g, m] == node
        assert rows.last[g, m] == last and rows.state[g, m] == drive.state(name, above_row)
        assert rows.position[g, m] == n - 1 + segment * (len(path) - 1)
        assert growth.paths.pages[b, node].tolist() == rows.pages[g, m].tolist()
        checked += 1
      fullest = max(fullest, len(above))
    own = rows.pages[slots.live].ravel().tolist()
    assert len(set(own)) == len(own) and pages_lib.NO_PAGE not in own
    live_groups = int(slots.live.any(1).sum())
    assert need.tolist() == [live_groups, fullest, growth.fresh.sum(), (~growth.done).sum()]
    for at in zip(*np.nonzero(slots.live), strict=True):
      name = names[slots.tree[at]]
      for j, p in enumerate(rows.pages[at].tolist()):
        written[p] = (name, int(slots.node[at]), j)
  assert checked >= 6 * shape.width


def _context(rows, g: int, m: int):
  """Returns (page, first token, whether row m sees it) of the pages that group g shares."""
  pages, start, sees = rows.context[g], rows.start[g], rows.sees[g, m]
  there = pages != pages_lib.NO_PAGE
  return zip(pages[there], start[there], sees[there], strict=True)
