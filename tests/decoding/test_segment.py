"""Segments decoded over shared pages are what a plain forward of each path says.

Trees are kept as plain lists here and their pages laid out by hand, in random order, in a pool
whose other pages hold junk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.model import attention, transformer

ARCH = transformer.Architecture(
  family="qwen3",
  vocab_size=48,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  hidden=24,
  norm_eps=1e-6,
  rope_theta=1e4,
  rope_scaling=None,
  max_positions=64,
  tied=False,
  qkv_bias=True,
  output_bias=False,
  qk_norm=True,
)
VOCABULARY, EOS_IDS, CLOSED = 40, (1, 5), 2
PAGE, SEGMENT, LONG = 2, 4, 8  # a long segment is decoded in strides
PROMPTS = [1, 2, 3, 4, 6]  # tokens: all but the last are in pages, so none, half a page, one, ...
GROUPS, MEMBERS, NODES = len(PROMPTS), 3, 8
PER_PROMPT, PER_NODE = 3, SEGMENT // PAGE
PAGES = GROUPS * PER_PROMPT + 5 * GROUPS * MEMBERS * PER_NODE
LONGEST = max(PROMPTS) + 4 * SEGMENT
SETTINGS = segment_lib.Settings(
  segment=SEGMENT,
  stride=SEGMENT,
  temperature=1.0,
  vocabulary=VOCABULARY,
  eos_ids=EOS_IDS,
  closed=CLOSED,
)


def automaton() -> np.ndarray:
  """Returns a table in which a box is open after a 7th token and closed by one that follows it."""
  table = np.zeros((3, ARCH.vocab_size), np.int8)
  tokens = np.arange(ARCH.vocab_size)
  table[0], table[1], table[2] = tokens % 7 == 0, 1 + (tokens % 7 == 1), CLOSED
  return table


TABLE = automaton()


@functools.cache
def model():
  """Returns (graph, params) whose weights are far from their trivial start."""
  random = np.random.default_rng(0)
  graph, abstract = transformer.abstract(ARCH, jnp.float32)
  params = jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), abstract)
  return graph, params


@functools.cache
def decoder(settings: segment_lib.Settings):
  return jax.jit(functools.partial(segment_lib.decode, graph=model()[0], settings=settings))


@functools.cache
def prefill():
  return jax.jit(functools.partial(segment_lib.prefill, graph=model()[0]))


@functools.cache
def _forward():
  graph = model()[0]

  def run(params, tokens, length):
    positions = jnp.broadcast_to(jnp.arange(LONGEST), tokens.shape)
    end = jnp.broadcast_to(length[:, None], tokens.shape)
    hidden = transformer.hidden(graph, params, tokens, positions, end)
    return transformer.log_probs(graph, params, hidden[:, :-1], tokens[:, 1:])[0]

  return jax.jit(run)


def forward(paths: list[list[int]]) -> np.ndarray:
  """Returns log p of each token but the first of each path, by one plain forward."""
  tokens = np.array([path + [0] * (LONGEST - len(path)) for path in paths], np.int32)
  return np.asarray(_forward()(model()[1], tokens, np.array([len(path) for path in paths])))


@functools.cache
def _every():
  graph = model()[0]

  def run(params, tokens, length):
    positions = jnp.broadcast_to(jnp.arange(LONGEST), tokens.shape)
    end = jnp.broadcast_to(length[:, None], tokens.shape)
    hidden = transformer.hidden(graph, params, tokens, positions, end)
    return nnx.merge(graph, params).logits(hidden)

  return jax.jit(run)


def every_logit(paths: list[list[int]]) -> np.ndarray:
  """Returns the logits of what follows each token of each path, by one plain forward."""
  tokens = np.array([path + [0] * (LONGEST - len(path)) for path in paths], np.int32)
  return np.asarray(_every()(model()[1], tokens, np.array([len(path) for path in paths])))


@dataclasses.dataclass
class Node:
  path: list[int]  # all tokens up to its end, prompt included
  above: list["Node"] | None  # the nodes of the path before it, without the prompt's; its own: None
  state: int
  pages: list[int]

  @property
  def nodes(self) -> list["Node"]:
    """The nodes of the path, without the prompt's."""
    return [] if self.above is None else [*self.above, self]


@dataclasses.dataclass
class Begun:
  """What is known of a node when decoding goes on, and its whole pages, maybe of another node."""

  tokens: list[int] = dataclasses.field(default_factory=list)
  states: list[int] = dataclasses.field(default_factory=list)  # of the tokens that lie in pages
  pages: list[int] = dataclasses.field(default_factory=list)


Parents = list[list[Node | None]]


class Garden:
  """Trees in lists, a pool, and the pages that are still to be given away."""

  def __init__(self, seed: int):
    self.random = np.random.default_rng(seed)
    self.spare = self.random.permutation(PAGES).tolist()
    pool = pages_lib.create(ARCH.layers, PAGES, ARCH.kv_heads, PAGE, ARCH.head_dim, jnp.float32)
    junk = lambda x: jnp.asarray(50 * self.random.normal(size=x.shape), jnp.float32)
    self.pool = dataclasses.replace(pool, key=junk(pool.key), value=junk(pool.value))
    self.roots = []
    prompt = np.zeros((GROUPS, max(PROMPTS)), np.int32)
    table = np.full((GROUPS, PER_PROMPT), pages_lib.NO_PAGE, np.int32)
    for g, n in enumerate(PROMPTS):
      prompt[g, :n] = self.random.integers(0, VOCABULARY, n)
      held = [self.spare.pop() for _ in range(-(-(n - 1) // PAGE))]
      table[g, PER_PROMPT - len(held) :] = held
      self.roots.append(Node(prompt[g, :n].tolist(), None, 0, table[g].tolist()))
    self.pool = prefill()(self.pool, prompt, np.array(PROMPTS, np.int32), table, model()[1])

  def below_the_prompts(self) -> Parents:
    return [[root] * MEMBERS for root in self.roots]

  def rows(
    self,
    parents: Parents,
    wave: int,
    stride: int = SEGMENT,
    length: int = SEGMENT,
    begun: dict[tuple[int, int], Begun] | None = None,
  ) -> segment_lib.Rows:
    """Returns what to decode below the parents [G][M]; None is a row that is not in use.

    length: tokens of the whole segment. begun: what there is of it already, by row.
    """
    shared = NODES * PER_NODE
    empty = lambda *axes: np.zeros((GROUPS, MEMBERS, *axes), np.int32)
    names = ("base", "room", "last", "position", "state", "prompt_id", "node", "given")
    rows = {name: empty() for name in names} | {"tokens": empty(stride)}
    pages = np.full((GROUPS, MEMBERS, stride // PAGE), pages_lib.NO_PAGE, np.int32)
    width = PER_PROMPT + shared + (MEMBERS * length // PAGE if begun else 0)
    context = np.full((GROUPS, width), pages_lib.NO_PAGE, np.int32)
    start = np.zeros_like(context)
    sees = empty(width).astype(bool)
    for g, row in enumerate(parents):
      root = self.roots[g]
      context[g, :PER_PROMPT] = root.pages
      held = sum(p != pages_lib.NO_PAGE for p in root.pages)
      if held:
        start[g, PER_PROMPT - held] = held * PAGE - (PROMPTS[g] - 1)
      above = {id(n): n for p in row if p for n in p.nodes}
      order = self.random.permutation(len(above)) if above else []
      place = {list(above)[i]: PER_PROMPT + PER_NODE * k for k, i in enumerate(order)}
      for key, at in place.items():
        context[g, at : at + PER_NODE] = above[key].pages
      for m, parent in enumerate(row):
        if parent is None:
          continue
        own = (begun or {}).get((g, m), Begun())
        base = len(own.pages) * PAGE
        if base:
          mine = PER_PROMPT + shared + m * length // PAGE
          context[g, mine : mine + len(own.pages)] = own.pages
          sees[g, m, mine : mine + len(own.pages)] = True
        rows["base"][g, m], rows["room"][g, m] = base, length - base
        rows["last"][g, m] = own.tokens[base - 1] if base else parent.path[-1]
        rows["position"][g, m] = len(parent.path) - 1 + base
        rows["state"][g, m] = own.states[base - 1] if base else parent.state
        rows["prompt_id"][g, m] = g
        rows["node"][g, m] = wave * MEMBERS + m
        rows["given"][g, m] = len(own.tokens) - base
        here = own.tokens[base : base + stride]
        rows["tokens"][g, m, : len(here)] = here
        rows["tokens"][g, m, len(here) :] = 3  # not read
        taken = min(stride, length - base) // PAGE
        pages[g, m, :taken] = [self.spare.pop() for _ in range(taken)]
        sees[g, m, :PER_PROMPT] = True
        for node in parent.nodes:
          sees[g, m, place[id(node)] : place[id(node)] + PER_NODE] = True
    fields = rows | {"pages": pages, "context": context, "start": start, "sees": sees}
    fields["live"] = np.array([[p is not None for p in row] for row in parents])
    fields["prompt_id"] = rows["prompt_id"].astype(np.uint32)
    return jax.device_get(segment_lib.Rows(**jax.tree.map(jnp.asarray, fields)))

  def decode(self, rows: segment_lib.Rows, unroll: bool = False, **changes):
    params, key = model()[1], jax.random.key(7)
    layers = transformer.unstack(params) if unroll else None
    run = decoder(dataclasses.replace(SETTINGS, stride=rows.tokens.shape[-1], **changes))
    return jax.device_get(run(self.pool, rows, params, layers, TABLE, key))


def last_state(rows: segment_lib.Rows, segment: segment_lib.Segment, at) -> int:
  """Returns the automaton's state after what a row has decoded."""
  n = int(segment.length[at])
  return int(segment.states[at][n - 1] if n else rows.state[at])


def stopping_at(
  parent: Node, tokens: list[int], eos_ids=EOS_IDS, stop_at="box", blind=False
) -> tuple[int, int, int]:
  """Returns (length, stop, state) that these tokens must have, token by token."""
  state = parent.state
  for i, token in enumerate(tokens):
    state = int(TABLE[state, token])
    if token in eos_ids and not (blind and (i == 0 or len(eos_ids) > 1)):
      return i + 1, segment_lib.AT_EOS, state
    if state == CLOSED and stop_at == "box":
      return i + 1, segment_lib.AT_ANSWER, state
  return len(tokens), segment_lib.CONTINUES, state


@functools.cache
def grown(seed: int):
  """Returns (parents, rows, segment, pool before, pool after) of four waves of random trees."""
  garden, waves = Garden(seed), []
  full: list[list[Node]] = [[root] for root in garden.roots]
  for wave in range(4):
    pick = lambda nodes: nodes[-1 - garden.random.integers(min(len(nodes), 2))]
    parents = [
      [None if wave and garden.random.random() < 0.2 else pick(nodes) for _ in range(MEMBERS)]
      for nodes in full
    ]
    rows = garden.rows(parents, wave)
    before = garden.pool
    garden.pool, segment = garden.decode(rows)
    waves.append((parents, rows, segment, jax.device_get(before), garden.pool))
    for g, m in zip(*np.nonzero(rows.live), strict=True):
      parent = parents[g][m]
      if segment.stop[g, m] == segment_lib.CONTINUES and len(full[g]) <= NODES - MEMBERS:
        path = parent.path + segment.tokens[g, m].tolist()
        state, pages = last_state(rows, segment, (g, m)), rows.pages[g, m].tolist()
        full[g].append(Node(path, parent.nodes, state, pages))
  return waves


SEEDS = [0, 1, 2]


def test_log_probs_are_those_of_a_plain_forward():
  deepest = 0
  for parents, rows, segment, *_ in [wave for seed in SEEDS for wave in grown(seed)]:
    at = [*zip(*np.nonzero(rows.live), strict=True)]
    assert (segment.tokens < VOCABULARY).all()
    lengths = [int(segment.length[i]) for i in at]
    paths = [parents[g][m].path for g, m in at]
    deepest = max(deepest, *(len(parents[g][m].nodes) for g, m in at))
    said = [segment.tokens[i][:n].tolist() for i, n in zip(at, lengths, strict=True)]
    room = [[0]] * (GROUPS * MEMBERS - len(at))  # one shape for every wave
    found = forward([p + s for p, s in zip(paths, said, strict=True)] + room)
    for i, path, n, log_probs in zip(at, paths, lengths, found, strict=False):
      expected = log_probs[len(path) - 1 : len(path) - 1 + n]
      np.testing.assert_allclose(segment.log_probs[i][:n], expected, atol=1e-5)
  assert deepest == 3  # segments above the one that is decoded


@pytest.mark.parametrize("unroll", [False, True], ids=["scanned", "unrolled"])
def test_kernels_decode_what_the_reference_does(unroll):
  choice = attention.Choice("pallas", "cpu")
  run = jax.jit(
    functools.partial(segment_lib.decode, graph=model()[0], settings=SETTINGS, choice=choice)
  )
  params = model()[1]
  layers = transformer.unstack(params) if unroll else None
  for _, rows, expected, before, after in grown(0)[1:]:
    pool, found = run(before, rows, params, layers, TABLE, jax.random.key(7))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.length, expected.length)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    np.testing.assert_allclose(pool.key, after.key, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(pool.value, after.value, atol=1e-5, rtol=1e-5)


def test_rows_stop_where_they_must_and_write_nothing_beyond():
  seen = []
  for seed in SEEDS:
    for parents, rows, segment, *_ in grown(seed):
      assert segment.steps == segment.length.max()
      for i in zip(*np.nonzero(~rows.live), strict=True):
        assert segment.length[i] == segment.stop[i] == 0
      for g, m in zip(*np.nonzero(rows.live), strict=True):
        parent, n = parents[g][m], int(segment.length[g, m])
        tokens = segment.tokens[g, m, :n].tolist()
        expected = stopping_at(parent, tokens)
        assert (n, segment.stop[g, m], last_state(rows, segment, (g, m))) == expected
        assert n == SEGMENT or expected[1] != segment_lib.CONTINUES
        seen.append((expected[1], parent.state, tokens[-1]))
      beyond = np.arange(SEGMENT) >= segment.length[..., None]
      for name in ("tokens", "log_probs", "sampled_log_probs", "low", "high", "states"):
        assert not segment[name][beyond].any(), name
      assert not segment.entropy.any()  # not asked for
  assert {token for stop, _, token in seen if stop == segment_lib.AT_EOS} == set(EOS_IDS)
  # some box was opened in the segment before
  assert any(stop == segment_lib.AT_ANSWER and state == 1 for stop, state, _ in seen)


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_rows_own_pages_are_written(seed):
  for _, rows, _, before, after in grown(seed):
    others = np.setdiff1d(np.arange(before.free.shape[0]), rows.pages[rows.live])
    np.testing.assert_array_equal(after.key[:, others], before.key[:, others])
    np.testing.assert_array_equal(after.value[:, others], before.value[:, others])
    np.testing.assert_array_equal(after.free, before.free)
    assert after.size == before.size


def test_layers_one_by_one_or_scanned_are_the_same():
  garden = Garden(0)
  for _, rows, segment, before, after in grown(0):
    garden.pool = before
    pool, found = garden.decode(rows, unroll=True)
    for name in ("tokens", "length", "states", "stop", "steps"):
      np.testing.assert_array_equal(found[name], segment[name], name)
    np.testing.assert_allclose(found.log_probs, segment.log_probs, atol=1e-5)
    held = rows.pages[rows.live & (segment.stop == segment_lib.CONTINUES)]
    np.testing.assert_allclose(pool.key[:, held], after.key[:, held], atol=1e-5)
    np.testing.assert_allclose(pool.value[:, held], after.value[:, held], atol=1e-5)


def test_reads_are_counted():
  for parents, _, segment, *_ in grown(1):
    shared = flat = 0
    for row, length, prompt in zip(parents, segment.length.tolist(), PROMPTS, strict=True):
      tokens = lambda nodes, stored=prompt - 1: stored + SEGMENT * len(nodes)
      shared += max(length) * tokens({id(n) for p in row if p for n in p.nodes})
      flat += sum(n * tokens(p.nodes) for p, n in zip(row, length, strict=True) if p)
    own = sum(n * (n + 1) // 2 for n in segment.length.ravel().tolist())
    assert segment.read_shared == shared + own
    assert segment.read_flat == flat + own


def test_decoding_ends_with_its_last_row():
  garden, lengths = Garden(3), []
  nobody: Parents = [[None] * MEMBERS for _ in range(GROUPS)]
  for node in range(12):
    parents = [*nobody[1:], [garden.roots[-1], None, None]]
    rows = garden.rows(parents, node)
    _, segment = garden.decode(rows)
    assert segment.steps == segment.length[-1, 0] == segment.length.sum()
    lengths.append(int(segment.steps))
  assert min(lengths) < SEGMENT
  _, segment = garden.decode(garden.rows(nobody, 0))
  assert segment.steps == 0 and not segment.length.any()


def test_draws_follow_the_identity_and_not_the_place():
  garden = Garden(4)
  parents = garden.below_the_prompts()
  rows = garden.rows(parents, 0)
  _, segment = garden.decode(rows)
  turned = jax.tree.map(lambda x: x[:, ::-1] if x.ndim > 1 and x.shape[1] == MEMBERS else x, rows)
  _, found = garden.decode(turned)
  for name in ("tokens", "length", "stop"):
    np.testing.assert_array_equal(found[name], segment[name][:, ::-1], name)
  np.testing.assert_allclose(found.log_probs, segment.log_probs[:, ::-1], atol=1e-5)
  assert len({tuple(t) for t in segment.tokens.reshape(-1, SEGMENT).tolist()}) > MEMBERS


def changed(rows: segment_lib.Rows, **fields: np.ndarray) -> segment_lib.Rows:
  """Returns the rows with other i32 fields."""
  new = {name: jnp.asarray(x, jnp.int32) for name, x in fields.items()}
  return dataclasses.replace(jax.tree.map(jnp.asarray, rows), **new)


def test_known_tokens_are_taken_and_the_rest_drawn_as_before():
  garden = Garden(6)
  parents = garden.below_the_prompts()
  rows = garden.rows(parents, 0)
  _, whole = garden.decode(rows)
  given = np.minimum(np.arange(GROUPS * MEMBERS).reshape(GROUPS, MEMBERS) % 4, whole.length)
  known = np.arange(SEGMENT) < given[..., None]
  tokens = np.where(known, whole.tokens, 3)  # what lies beyond is not read
  _, found = garden.decode(changed(rows, given=given, tokens=tokens))
  for name in ("tokens", "length", "stop", "states"):
    np.testing.assert_array_equal(found[name], whole[name], name)
  np.testing.assert_allclose(found.log_probs, whole.log_probs, atol=1e-5)
  np.testing.assert_allclose(found.sampled_log_probs, whole.sampled_log_probs, atol=1e-5)
  for name in ("low", "high"):  # of a token that was not drawn here nothing is said
    expected = np.where(known, 0, whole[name])
    np.testing.assert_allclose(found[name], expected, atol=1e-5)
  other = np.where(known, (whole.tokens + 1) % 50, 3)  # other tokens are taken too
  _, found = garden.decode(changed(rows, given=given, tokens=other))
  taken = known & (np.arange(SEGMENT) < found.length[..., None])
  np.testing.assert_array_equal(found.tokens[taken], other[taken])
  assert taken.sum() > 3


def planted(seed: int) -> tuple[Garden, Parents]:
  """Returns a garden with a wave of nodes, and parents: the prompts and nodes below them."""
  garden = Garden(seed)
  parents, rows = garden.below_the_prompts(), garden.rows(garden.below_the_prompts(), 0)
  garden.pool, segment = garden.decode(rows)
  for g, m in np.ndindex(GROUPS, MEMBERS):
    root = garden.roots[g]
    if segment.stop[g, m] == segment_lib.CONTINUES:
      path = root.path + segment.tokens[g, m].tolist()
      state = last_state(rows, segment, (g, m))
      parents[g][(m + 1) % MEMBERS] = Node(path, [], state, rows.pages[g, m].tolist())
  assert any(p and p.nodes for row in parents for p in row)
  return garden, parents


NAMES = ("tokens", "log_probs", "sampled_log_probs", "low", "high", "entropy", "states")


def in_strides(
  garden: Garden,
  parents: Parents,
  stride: int,
  begun: dict[tuple[int, int], Begun],
  wave: int = 9,
  **options,
) -> dict[tuple[int, int], tuple[dict, int, list[int]]]:
  """Decodes long segments in calls of a stride; returns by row (what each token has, stop, pages).

  Rows join one by one, so that those of a call have come to different places.
  """
  begun = {at: dataclasses.replace(begun.get(at, Begun())) for at in np.ndindex(GROUPS, MEMBERS)}
  first = {at: len(own.pages) * PAGE for at, own in begun.items()}
  found, ended = {at: {name: [] for name in NAMES} for at in begun}, {}
  for call in range(LONG // stride + MEMBERS + 1):
    here = [
      [parent if m <= call and (g, m) not in ended else None for m, parent in enumerate(row)]
      for g, row in enumerate(parents)
    ]
    rows = garden.rows(here, wave, stride, LONG, begun)
    garden.pool, segment = garden.decode(rows, **options)
    assert segment.steps == segment.length.max() <= stride
    for at in zip(*np.nonzero(rows.live), strict=True):
      at, n, own = (int(at[0]), int(at[1])), int(segment.length[at]), begun[int(at[0]), int(at[1])]
      base = int(rows.base[at])
      for name in NAMES:
        found[at][name] += segment[name][at][:n].tolist()
        assert not segment[name][at][n:].any()
      assert base == first[at] + len(found[at]["tokens"]) - n
      assert segment.stop[at] != segment_lib.CONTINUES or n == min(stride, LONG - base)
      own.tokens = own.tokens[:base] + segment.tokens[at][:n].tolist() + own.tokens[base + n :]
      own.states = own.states[:base] + segment.states[at][:n].tolist()
      own.pages = own.pages + rows.pages[at][rows.pages[at] != pages_lib.NO_PAGE].tolist()
      if segment.stop[at] != segment_lib.CONTINUES or base + n == LONG:
        ended[at] = int(segment.stop[at])
  return {at: (found[at], ended[at], begun[at].pages) for at in begun}


def check_alike(strided: tuple, whole: tuple, skip=None) -> None:
  """Asserts that rows hold the same but for rounding, beyond the first tokens that are skipped.

  Each: what in_strides returned, and the pool after.
  """
  for at, (found, stop, pages) in strided[0].items():
    expected, other_stop, other_pages = whole[0][at]
    assert stop == other_stop
    first = (skip or {}).get(at, 0)
    for name in NAMES:
      exact = name in ("tokens", "states")
      np.testing.assert_allclose(
        found[name], expected[name][first:], atol=0 if exact else 1e-5, err_msg=name
      )
    full = (first + len(found["tokens"])) // PAGE
    assert full == LONG // PAGE or stop != segment_lib.CONTINUES
    for name in ("key", "value"):
      mine, theirs = getattr(strided[1], name), getattr(whole[1], name)
      mine, theirs = mine[:, pages[:full]], theirs[:, other_pages[:full]]
      np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=name)


STRIDES: list[tuple[int, dict]] = [
  (2, {"entropy": True}),
  (4, {"temperature": 0.7, "top_k": 8, "min_p": 0.02, "unroll": True}),
  (6, {"stop_at": "segment", "vocabulary": ARCH.vocab_size, "eos_ids": (1,)}),
  (2, {"blind_eos": True, "eos_ids": (8,)}),
]


@pytest.mark.parametrize(("stride", "options"), STRIDES, ids=str)
def test_a_segment_in_strides_is_the_segment_in_one_call(stride, options):
  found, known, seen = [], {}, []
  random = np.random.default_rng(3)
  for at in np.ndindex(GROUPS, MEMBERS):  # some of what is known lies beyond the first stride
    n = int(random.integers(0, LONG)) if sum(at) % 2 else 0
    known[at] = random.choice([8, 9, 10, 11, 13], n).tolist()
  for size in (stride, LONG):
    garden, parents = planted(11)
    begun = {at: Begun(tokens) for at, tokens in known.items()}
    found.append((in_strides(garden, parents, size, begun, **options), garden.pool))
  check_alike(found[0], found[1])
  settings = dataclasses.replace(SETTINGS, **{k: v for k, v in options.items() if k != "unroll"})
  for (g, m), (row, stop, _) in found[0][0].items():
    parent, n = parents[g][m], len(row["tokens"])
    assert parent is not None
    same = min(n, len(known[g, m]))
    assert row["tokens"][:same] == known[g, m][:same]
    assert not any(row["low"][:same]) and not any(row["high"][:same])
    state, states = parent.state, []
    for token in row["tokens"]:
      state = int(TABLE[state, token])
      states.append(state)
    assert row["states"] == states
    length, why, _ = stopping_at(
      parent, row["tokens"], settings.eos_ids, settings.stop_at, settings.blind_eos
    )
    assert (length, why) == (n, stop)
    assert all(row["entropy"]) if settings.entropy else not any(row["entropy"])
    seen.append((n, stop, row["tokens"]))
  assert any(n == LONG for n, *_ in seen) and any(n <= stride for n, *_ in seen)
  ends = {1 + (n - 1) // stride for n, stop, _ in seen if stop != segment_lib.CONTINUES}
  assert len(ends) > 1  # in more than one call
  if settings.blind_eos:  # a first token is not seen to end, one that is first in its call is
    assert any(tokens[0] in settings.eos_ids and n > 1 for n, _, tokens in seen)
    assert any(n > 1 and n % stride == 1 and stop == segment_lib.AT_EOS for n, stop, _ in seen)


def test_a_node_that_begins_with_the_pages_of_another_is_decoded_the_same():
  options = {"temperature": 0.7, "entropy": True}
  found, first = [], {}
  for stride in (2, LONG):
    random = np.random.default_rng(4)
    garden, parents = planted(12)
    others = in_strides(garden, parents, LONG, {}, **options)
    before, begun = garden.pool, {}
    for at, (said, _, pages) in others.items():
      n = int(random.integers(0, len(said["tokens"])))
      first[at] = n // PAGE * PAGE
      begun[at] = Begun(said["tokens"][:n])
      if stride < LONG:
        begun[at].states, begun[at].pages = said["states"][:n], pages[: n // PAGE]
    after = in_strides(garden, parents, stride, begun, wave=10, **options)
    for _, _, pages in others.values():  # they are read only
      np.testing.assert_array_equal(garden.pool.key[:, pages], before.key[:, pages])
      np.testing.assert_array_equal(garden.pool.value[:, pages], before.value[:, pages])
    found.append((after, garden.pool))
    leaves = [
      row["tokens"] != others[at][0]["tokens"][first[at] :] for at, (row, *_) in after.items()
    ]
    assert any(leaves)  # the numbers are its own
  check_alike(found[0], found[1], first)
  assert {0, 2, 4} <= set(first.values())


SAMPLED: list[dict] = [
  {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
  {"temperature": 1.3, "min_p": 0.2},
  {"vocabulary": ARCH.vocab_size, "eos_ids": ()},  # the policy itself
  {"temperature": 0.0},
]


@pytest.mark.parametrize("changes", SAMPLED, ids=str)
def test_log_probs_and_entropy_are_those_of_the_laws_they_name(changes):
  garden = Garden(8)
  parents = garden.below_the_prompts()
  rows = garden.rows(parents, 0)
  _, segment = garden.decode(rows, entropy=True, **changes)
  at = [*zip(*np.nonzero(rows.live), strict=True)]
  said = [segment.tokens[i][: segment.length[i]].tolist() for i in at]
  paths = [garden.roots[g].path for g, _ in at]
  logits = every_logit([p + s for p, s in zip(paths, said, strict=True)]).astype(np.float64)
  settings = dataclasses.replace(SETTINGS, **changes)
  dropped = 0
  for i, path, tokens, row in zip(at, paths, said, logits, strict=True):
    n, row = len(tokens), row[len(path) - 1 :][: len(tokens)]
    raw = special.log_softmax(row, -1)
    each = np.arange(n)
    np.testing.assert_allclose(segment.log_probs[i][:n], raw[each, tokens], atol=1e-5)
    entropy = -(np.exp(raw) * raw).sum(-1)
    np.testing.assert_allclose(segment.entropy[i][:n], entropy, rtol=1e-4)
    assert not segment.entropy[i][n:].any()
    heat = settings.temperature or 1e-9
    chance = special.softmax(row[:, : settings.vocabulary] / heat, -1)
    first = -np.sort(-chance, -1)
    if settings.top_k:
      chance = np.where(chance >= first[:, settings.top_k - 1, None], chance, 0)
      first = -np.sort(-chance, -1)
    if settings.top_p < 1:
      share = np.cumsum(first, -1) / first.sum(-1, keepdims=True)
      least = first[each, (share < settings.top_p).sum(-1)]
      chance = np.where(chance >= least[:, None], chance, 0)
    chance = np.where(chance >= settings.min_p * first[:, :1], chance, 0)
    dropped += (chance == 0).sum()
    expected = np.log(chance[each, tokens] / chance.sum(-1))
    np.testing.assert_allclose(segment.sampled_log_probs[i][:n], expected, atol=2e-5)
    width = segment.high[i][:n] - segment.low[i][:n]
    np.testing.assert_allclose(width, np.exp(expected), atol=5e-6)
  assert dropped or settings.is_raw(ARCH.vocab_size) == (settings.temperature == 1)
  assert settings.is_raw(ARCH.vocab_size) == ("vocabulary" in changes)
  if settings.is_raw(ARCH.vocab_size):
    np.testing.assert_array_equal(segment.sampled_log_probs, segment.log_probs)


@pytest.mark.parametrize("stop_at", ["box", "segment", "eos"])
@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("eos_ids", [EOS_IDS, (5,)])
def test_rows_stop_as_the_settings_say(stop_at, blind, eos_ids):
  garden, reached = Garden(9), set()
  for wave in range(4):
    parents = garden.below_the_prompts()
    for row in parents:  # as if a box were open, so that some close
      row[0] = dataclasses.replace(row[0], state=1) if row[0] else None
    rows = garden.rows(parents, wave)
    # the first token is often one that ends
    tokens = np.full((GROUPS, MEMBERS, SEGMENT), 8 if wave % 2 else 5)
    given = np.array([[1, 0, 1]] * GROUPS)
    rows = changed(rows, tokens=tokens, given=given)
    _, segment = garden.decode(rows, stop_at=stop_at, blind_eos=blind, eos_ids=eos_ids)
    for g, m in np.ndindex(GROUPS, MEMBERS):
      parent, n = parents[g][m], int(segment.length[g, m])
      assert parent is not None
      said = segment.tokens[g, m, :n].tolist()
      expected = stopping_at(parent, said, eos_ids, stop_at, blind)
      assert (n, segment.stop[g, m], last_state(rows, segment, (g, m))) == expected
      assert n == SEGMENT or expected[1] != segment_lib.CONTINUES
      reached |= {(expected[1], n == 1), ("closed", last_state(rows, segment, (g, m)) == CLOSED)}
  seen = len(eos_ids) == 1 or not blind
  assert ((segment_lib.AT_EOS, False) in reached) == seen
  assert ((segment_lib.AT_EOS, True) in reached) == (not blind)
  assert ((segment_lib.AT_ANSWER, True) in reached) == (stop_at == "box")
  assert ("closed", True) in reached
