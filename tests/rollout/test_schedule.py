"""Which nodes are decoded next, and that each row is told of its own path and nothing else."""

import collections
import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import rollout_oracle as oracle
from tests.rollout import drive
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import sampling
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.rollout import growth as growth_lib
from treepo_jax.rollout import planning, schedule
from treepo_jax.rollout import tree as tree_lib

TREES, WIDTH, DEPTH = 3, 4, 2
NODES, PER_NODE, STRIDE, SLOTS = 1 + WIDTH * DEPTH, 4, 2, 1000  # in pages of one token
SHAPES = [(1, 1), (2, 3), (4, 2), (12, 2)]  # groups, members


@given(st.integers(1, 300), st.integers(1, 40), st.integers(2, 5))
def test_sizes_are_the_most_and_ever_smaller_ones(most, least, factor):
  found = schedule.sizes(most, least, factor)
  assert found[0] == most
  assert all(b == a // factor and b >= least for a, b in zip(found, found[1:], strict=False))
  assert found[-1] // factor < least


@functools.cache
def _fill(groups: int, members: int):
  sizes = {"groups": groups, "members": members}
  return jax.jit(functools.partial(schedule.fill, stride=STRIDE, largest=SLOTS, **sizes))


def _paths(trees: int, nodes: int, **changes) -> schedule.Paths:
  zero = np.zeros((trees, nodes), np.int32)
  none = np.zeros((trees, nodes, PER_NODE), np.float32)
  missing = none.astype(np.int32) - 1
  pages = {"prompt": missing[:, :1, 0], "pages": missing, "states": none.astype(np.int8)}
  known = {"twin": zero - 1, "given": zero, "waits": zero > 0}
  shares = {"low": none, "high": none, "entropy": none}
  return schedule.Paths(**jax.tree.map(jnp.asarray, pages | known | shares | changes))


def _tree(status: np.ndarray) -> tree_lib.Tree:
  tree = tree_lib.create(
    jnp.ones((TREES, 1), jnp.int32),
    jnp.ones(TREES, jnp.int32),
    jnp.arange(TREES, dtype=jnp.uint32),
    width=WIDTH,
    depth=DEPTH,
    segment=PER_NODE,
  )
  return dataclasses.replace(tree, status=jnp.asarray(status, jnp.int32))


def _groups(status, waits, eager: bool, groups: int, members: int) -> list[list[tuple[int, int]]]:
  """Returns the nodes of each group that is filled, where there are pages for all."""
  parts = []
  for b in range(TREES):
    rows = [row for row in range(NODES) if status[b, row] == tree_lib.OPEN]
    rows = [(b, row) for row in rows if eager or not waits[b, row]]
    parts += [rows[i : i + members] for i in range(0, len(rows), members)]
  return parts[:groups]


NODE = st.sampled_from(["none", "none", "leads", "leads", "waits"])


@given(
  st.lists(st.lists(NODE, min_size=NODES - 1, max_size=NODES - 1), min_size=TREES, max_size=TREES),
  st.sampled_from(SHAPES),
  st.integers(0, 2**32 - 1),
  st.one_of(st.just(SLOTS), st.integers(0, 40)),  # pages that others than the oldest may take
  st.booleans(),
)
def test_open_nodes_that_do_not_wait_fill_the_groups_in_order(nodes, shape, seed, left, eager):
  groups, members = shape
  random = np.random.default_rng(seed)
  kinds = np.array([["prompt", *row] for row in nodes])
  status = np.where(kinds == "none", tree_lib.UNUSED, tree_lib.OPEN)
  status[:, 0] = tree_lib.INNER
  running = (status == tree_lib.OPEN).any(1) | (random.random(TREES) < 0.5)
  held, given_ = random.integers(0, PER_NODE, (2, TREES, NODES))
  held[status != tree_lib.OPEN] = 0
  names = np.arange(TREES * NODES * PER_NODE).reshape(TREES, NODES, PER_NODE) + 7
  names[:, :, 0] = 7 + NODES * PER_NODE * np.arange(TREES)[:, None]  # one that all nodes share
  own = np.where(np.arange(PER_NODE) < held[..., None], names, -1).astype(np.int32)
  prompt = np.arange(TREES, dtype=np.int32)[:, None]
  paths = _paths(
    TREES, NODES, prompt=prompt, pages=own, given=given_.astype(np.int32), waits=kinds == "waits"
  )
  oldest = int(np.argmax(running))
  mine = len({int(prompt[oldest, 0]), *own[oldest][own[oldest] >= 0].tolist()})
  pool = pages_lib.create(1, SLOTS, 1, 1, 1, jnp.float32)
  kept = SLOTS - mine if running.any() else 0
  pool = dataclasses.replace(pool, size=jnp.asarray(kept + left, jnp.int32))
  assert jax.device_get(schedule.left_over(pool, paths, jnp.asarray(running), SLOTS)[0]) == left

  slots, used, takes = jax.device_get(_fill(*shape)(_tree(status), paths, pool, running, eager))
  expected, most, full = {}, 0, False
  for g, group in enumerate(_groups(status, kinds == "waits", eager, *shape)):
    for m, (b, row) in enumerate(group):
      pages = min(PER_NODE - min(held[b, row], given_[b, row]), STRIDE)
      most += pages * (b != oldest)
      full |= most > left
      if b == oldest or not full:  # the oldest has pages of its own
        expected[g, m] = (b, row, pages)
  assert not full or left < SLOTS
  found = {}
  for g, m in np.ndindex(groups, members):
    if slots.live[g, m]:
      found[g, m] = (int(slots.tree[g, m]), int(slots.node[g, m]), int(takes[g, m]))
    else:
      assert slots.tree[g, m] == slots.node[g, m] == takes[g, m] == 0
  assert found == expected
  assert used == 1 + max((g for g, _ in expected), default=-1)
  assert sum(pages for b, _, pages in found.values() if b != oldest) <= left


# ------------------------------------------------------------------------------------------------
# Whole rollouts, decoded by hand: a token follows from the text before and the node's own number.
# ------------------------------------------------------------------------------------------------

ENDS = np.cumsum([0.55, 0.35, 0.1])  # of the three tokens' shares
EOS = 3


def _code(*what) -> int:
  return zlib.crc32(repr(what).encode())


def _state(name: int, text: tuple[int, ...]) -> int:
  """Returns the automaton's state after an answer's tokens so far; 0 before the first."""
  return _code("state", name, text) % 100 if text else 0


def _log_prob(name: int, text: tuple[int, ...]) -> float:
  return -(_code("log", name, text) % 192 + 1) / 64


def _drawn(name: int, text: tuple[int, ...], number: float) -> tuple[int, float, float, bool]:
  """Returns what follows a text: the token, its interval, and whether the answer ends there."""
  turn = _code("turn", name, text) % 3
  k = int(np.searchsorted(ENDS[:-1], number, side="right"))
  low = ENDS[k - 1] if k else 0.0
  token = 1 + (k + turn) % 3
  return token, low, ENDS[k], token == EOS and _code("end", name, text) % 4 == 0


class Scribe:
  """Decodes by hand, follows what lies in every page, and checks what each row is told."""

  def __init__(self, shape: growth_lib.Settings, names: list[int], lengths: list[int], seed: int):
    self.shape, self.names, self.lengths = shape, names, lengths
    nodes = tree_lib.capacity(shape.width, shape.depth, shape.spare)
    key = jax.random.fold_in(jax.random.key(seed), planning.TOKENS)
    ids = jnp.broadcast_to(jnp.asarray(names, jnp.uint32)[:, None], (len(names), nodes))
    rows = jnp.broadcast_to(jnp.arange(nodes)[None], ids.shape)
    keys = sampling.row_keys(key, ids, rows)
    numbers = sampling.uniform(keys, jnp.zeros_like(rows), shape.decoder.segment)
    self.numbers = np.moveaxis(np.asarray(numbers), 0, -1)
    self.holds: dict[int, tuple] = {}  # what was written to each page last
    self.ample = shape.pages == len(names) * shape.pages_of_tree
    self.seen = collections.Counter()

  def note(self, **events) -> None:
    self.seen.update({name: 1 for name, happened in events.items() if happened})

  def prefill(self, growth: growth_lib.Growth) -> None:
    for b in np.flatnonzero(growth.fresh):
      pages = growth.paths.prompt[b]
      pages = pages[pages != pages_lib.NO_PAGE].tolist()
      assert len(pages) == -(-(self.lengths[b] - 1) // self.shape.page)
      for i, page in enumerate(pages):
        self.holds[page] = ("prompt", self.names[b], i)

  def told(
    self, growth: growth_lib.Growth, g: int, m: int
  ) -> tuple[int, int, tuple[int, ...], int]:
    """Returns (tree, node, answer before its segment, tokens in pages), all checked."""
    shape, rows, tree, paths = self.shape, growth.rows, growth.tree, growth.paths
    s, page = shape.decoder.segment, shape.page
    b, node = int(growth.slots.tree[g, m]), int(growth.slots.node[g, m])
    name, n = self.names[b], self.lengths[b]
    path = oracle.path(tree.parent[b].tolist(), node)
    assert (tree.length[b, path[:-1]] == s).all() and tree.status[b, node] == tree_lib.OPEN
    answer = tuple(tree.tokens[b, path[:-1]].ravel().tolist())
    own, known = tree.tokens[b, node].tolist(), int(paths.given[b, node])
    base = int(rows.base[g, m])
    assert base % page == 0 and base <= known < s and not any(own[known:])
    text = answer + tuple(own[:base])
    of_prompt = -(-(n - 1) // page)
    expected = [("prompt", name, i) for i in range(of_prompt)]
    expected += [("answer", name, text[:i]) for i in range(page, len(text) + 1, page)]
    seen = [(int(p), int(start)) for p, start, sees in _context(rows, g, m) if sees]
    assert sorted(repr(self.holds[p]) for p, _ in seen) == sorted(map(repr, expected))
    for p, start in seen:  # of the first page the prompt fills only the end
      assert start == (of_prompt * page - (n - 1) if self.holds[p] == ("prompt", name, 0) else 0)
    last = text[-1] if text else drive.token(name, 0, n - 1)
    assert rows.live[g, m] and rows.prompt_id[g, m] == name and rows.node[g, m] == node
    assert rows.last[g, m] == last and rows.position[g, m] == n - 1 + len(text)
    assert rows.state[g, m] == _state(name, text)
    assert rows.room[g, m] == s - base and rows.given[g, m] == known - base
    until = min(known - base, shape.decoder.stride)
    assert rows.tokens[g, m, :until].tolist() == own[base : base + until]
    wanted = min(shape.decoder.stride, s - base) // page
    pages, first = rows.pages[g, m].tolist(), base // page
    assert all(p != pages_lib.NO_PAGE for p in pages[:wanted])
    assert set(pages[wanted:]) <= {pages_lib.NO_PAGE}
    assert paths.pages[b, node, first : first + wanted].tolist() == pages[:wanted]
    lent = growth.pool.count[paths.pages[b, node, :first]]
    beyond = known - base >= shape.decoder.stride
    self.note(begun=base > 0, lent=(lent > 1).any(), given=known > base, beyond=beyond)
    return b, node, answer, base

  def decode(self, growth: growth_lib.Growth) -> segment_lib.Segment:
    """Returns what the rows draw."""
    slots, shape, stride = growth.slots, self.shape, self.shape.decoder.stride
    out = jax.tree.map(np.array, segment_lib.nothing((shape.groups, shape.group), stride))
    wrote = {}
    for g, m in zip(*np.nonzero(slots.live), strict=True):
      b, node, answer, base = self.told(growth, int(g), int(m))
      name, own = self.names[b], growth.tree.tokens[b, node].tolist()
      text, known = (*answer, *own[:base]), int(growth.paths.given[b, node])
      for i in range(min(stride, shape.decoder.segment - base)):
        token, low, high, ends = _drawn(name, text, self.numbers[b, node, base + i])
        if base + i < known:
          token, low, high, ends = own[base + i], 0, 0, False
        out.log_probs[g, m, i] = out.sampled_log_probs[g, m, i] = _log_prob(name, (*text, token))
        text = (*text, token)
        out.tokens[g, m, i], out.low[g, m, i], out.high[g, m, i] = token, low, high
        out.states[g, m, i], out.length[g, m] = _state(name, text), i + 1
        if ends:
          out.stop[g, m] = segment_lib.AT_EOS
          break
      for i, page in enumerate(growth.rows.pages[g, m].tolist()):
        end = len(answer) + base + (i + 1) * shape.page
        if page != pages_lib.NO_PAGE:
          assert page not in wrote
          wrote[page] = ("answer", name, text[:end] if len(text) >= end else None)
    self.holds |= wrote
    return out

  def groups(self, growth: growth_lib.Growth, need: np.ndarray) -> None:
    """Checks that groups hold one tree, and what the host is told of them."""
    slots, parent, twin = growth.slots, growth.tree.parent, growth.paths.twin
    fullest = 0
    for g in range(self.shape.groups):
      live, nodes = np.flatnonzero(slots.live[g]), set()
      assert len(set(slots.tree[g, live].tolist())) <= 1
      for m in range(self.shape.group):
        b, row = int(slots.tree[g, m]), int(slots.node[g, m])
        if m not in live:
          assert not growth.rows.live[g, m] and not growth.rows.sees[g, m].any()
          assert (growth.rows.pages[g, m] == pages_lib.NO_PAGE).all()
          continue
        nodes |= {row} if growth.rows.base[g, m] else set()
        while (row := int(parent[b, row])) > 0:  # a twin's pages are the other's
          row = row if twin[b, row] == tree_lib.NO_ROW else int(twin[b, row])
          nodes.add(row)
      fullest = max(fullest, len(nodes))
    used = np.flatnonzero(slots.live.any(1))
    expected = [used[-1] + 1 if used.size else 0, fullest, growth.fresh.sum(), (~growth.done).sum()]
    assert need.tolist() == expected

  def pages(self, growth: growth_lib.Growth) -> None:
    """Checks who holds which page, and that the oldest prompt is served."""
    held = collections.Counter(drive.held(growth))
    assert growth.pool.count.tolist() == [held[page] for page in range(self.shape.pages)]
    free = growth.pool.free[: growth.pool.size].tolist()
    assert sorted([*free, *held]) == [*range(self.shape.pages)]
    running = growth.admitted & ~growth.done
    if running.any():
      oldest = int(np.argmax(running))
      mine = np.concatenate([growth.paths.prompt[oldest], growth.paths.pages[oldest].ravel()])
      mine = len(set(mine[mine != pages_lib.NO_PAGE].tolist()))
      # It can become the largest, whatever others hold.
      assert growth.pool.size + mine >= self.shape.pages_of_tree
      served = (growth.slots.live & (growth.slots.tree == oldest)).any()
      assert served == (growth.tree.status[oldest] == tree_lib.OPEN).any()

  def wait(self, growth: growth_lib.Growth) -> None:
    """Checks that the first of nodes that know the same leads, and who of the others is decoded."""
    slots, tree, paths = growth.slots, growth.tree, growth.paths
    opened = tree.status == tree_lib.OPEN
    served = np.zeros_like(opened)
    served[slots.tree[slots.live], slots.node[slots.live]] = True
    first: dict[tuple, int] = {}
    for b, row in zip(*np.nonzero(opened), strict=True):
      above, known = int(tree.parent[b, row]), int(paths.given[b, row])
      above = above if paths.twin[b, above] == tree_lib.NO_ROW else int(paths.twin[b, above])
      leader = first.setdefault((b, above, *tree.tokens[b, row, :known].tolist()), row)
      assert paths.waits[b, row] == (self.shape.merge and leader != row)
    leads, eager = opened & ~paths.waits, growth.missed > planning.PATIENCE * growth.saved
    assert eager or not (served & paths.waits).any()
    groups = -(-leads.sum(1) // self.shape.group)
    if self.ample and groups.sum() <= self.shape.groups and not eager:
      assert (served >= leads).all()
    self.note(waits=(opened & paths.waits).any(), fills=(served & paths.waits).any())


def _context(rows, g: int, m: int):
  """Returns (page, first token, whether row m sees it) of the pages that group g shares."""
  pages, start, sees = rows.context[g], rows.start[g], rows.sees[g, m]
  there = pages != pages_lib.NO_PAGE
  return zip(pages[there], start[there], sees[there], strict=True)


LENGTHS, COMPANY = [1, 2, 3, 4, 5, 6], [3, 2, 9, 14, 19, 1]


def _grown(shape: growth_lib.Settings, seed: int = 0) -> tuple[growth_lib.Growth, Scribe]:
  """Returns the trees that are drawn by hand, and their scribe."""
  scribe = Scribe(shape, COMPANY, LENGTHS, seed)
  create, take, plan = drive.programs(shape)
  tokens = np.zeros((len(COMPANY), shape.prompt_length), np.int32)
  for b, n in enumerate(LENGTHS):
    tokens[b, :n] = [drive.token(COMPANY[b], 0, i) for i in range(n)]
  identity, real = np.array(COMPANY, np.uint32), np.ones(len(COMPANY), bool)
  growth = create(tokens, np.array(LENGTHS, np.int32), identity, real)
  segment = segment_lib.nothing((shape.groups, shape.group), shape.decoder.stride)
  reward, key = np.zeros((len(COMPANY), shape.width), np.float32), jax.random.key(seed)
  for _ in range(400):
    growth = take(growth, segment, key)
    growth, need = jax.device_get(plan(growth, key, np.float32(1), reward))
    scribe.pages(growth)
    scribe.wait(growth)
    scribe.groups(growth, need)
    if not need[3]:
      return growth, scribe
    scribe.prefill(growth)
    segment = scribe.decode(growth)
  raise AssertionError("it does not end")


SAME = {"prompts": 6, "segment": 6, "depth": 3, "repetition_count": 0, "page": 2}
MERGED = ("begun", "lent", "waits")
CASES: list[tuple[dict, list[dict], tuple[str, ...]]] = [  # trees, engines, what must come about
  (
    {},
    [
      {"stride": 2, "merge": True, "pages": 2, "groups": 4, "group": 2},
      {"stride": 4, "pages": 1, "groups": 2, "group": 2},
    ],
    MERGED,
  ),
  (
    {"page": 1, "width": 6, "depth": 4},
    [{"stride": 2, "merge": True, "groups": 8, "group": 3}],
    MERGED,
  ),
  (
    {"page": 1, "fallback": "log_prob", "fallback_from": "longest", "response_length": 15},
    [{"stride": 2, "merge": True, "pages": 1}, {"stride": 2, "group": 3}],
    (*MERGED, "given", "beyond"),
  ),
]


@pytest.mark.parametrize(("tree", "engines", "events"), CASES, ids=str)
def test_rows_see_their_path_alone_and_the_trees_are_the_same_by_every_engine(
  tree, engines, events
):
  expected = _grown(drive.settings(**(SAME | tree)))[0]
  seen = collections.Counter()
  for engine in engines:
    shape = drive.settings(**(SAME | tree | engine))
    growth, scribe = _grown(shape)
    assert growth.done.all() and growth.pool.size == shape.pages
    jax.tree.map(np.testing.assert_array_equal, growth.tree, expected.tree)
    assert shape.merge == (growth.paths.twin != tree_lib.NO_ROW).any()
    assert not shape.merge or growth.counters.decoded < expected.counters.decoded
    seen.update(scribe.seen)
  assert all(seen[what] for what in events), seen
