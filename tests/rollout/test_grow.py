"""The whole rollout with a small random policy: every token's context is its path, and only that.

A tree is its prompt's and the key's alone: other prompts, rows, groups, pages and devices move
nothing but the last bits of log-probs.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import rollout_oracle as oracle
from tests import toy
from treepo_jax import config as config_lib
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer
from treepo_jax.rollout import grow, programs, schedule
from treepo_jax.rollout import tree as tree_lib

ARCH = transformer.Architecture(
  family="qwen2",
  vocab_size=64,
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
  tied=True,
  qkv_bias=True,
  output_bias=False,
  qk_norm=False,
)
EOS_IDS, CLOSED, VOCABULARY = (1, 5, 9, 21, 40), 2, 60
SEGMENT, PROMPT, DEPTH = 4, 6, 3


@dataclasses.dataclass(frozen=True)
class Prompt:
  id: int
  tokens: list[int]


@functools.cache
def prompts() -> list[Prompt]:
  random = np.random.default_rng(0)
  lengths = [1, 2, 3, 4, 5, 6, 3, 6, 2]  # pages of 2 from the second token on
  ids = [5, 11, 2**32 - 1, 3, 8, 2**31, 0, 4, 17]
  return [
    Prompt(i, random.integers(2, VOCABULARY, n).tolist()) for i, n in zip(ids, lengths, strict=True)
  ]


@functools.cache
def policy():
  """Returns (graph, params) far from the trivial start, yet no token certain."""
  random = np.random.default_rng(1)
  graph, abstract = transformer.abstract(ARCH, jnp.float32)
  make = lambda x: jnp.asarray(0.25 * random.normal(size=x.shape), x.dtype)
  return graph, jax.tree.map(make, abstract)


@functools.cache
def table() -> np.ndarray:
  """Returns an automaton: a box is open after every 11th token, closed by one that follows it."""
  tokens = np.arange(ARCH.vocab_size)
  rows = [tokens % 11 == 0, 1 + (tokens % 11 == 1), np.full(len(tokens), CLOSED)]
  return np.array(rows, np.int8)


def settings(eos_ids=EOS_IDS, closed=CLOSED, **rollout) -> grow.Settings:
  config = config_lib.default()
  config.model.unroll = False
  config.rollout.update(width=6, depth=DEPTH, segment=SEGMENT, page=2, group=4, rows=64)
  config.rollout.update(prompt_length=PROMPT, branching=2, initial=2, initial_max=3)
  config.rollout.update(repetition_window=2, repetition_count=3, merge=False)
  config.rollout.update(rollout)
  config = config_lib.validate(config)
  return grow.settings(config, vocabulary=VOCABULARY, eos_ids=eos_ids, closed=closed)


@functools.cache
def one_device():
  return mesh_lib.single()


def run(
  shape: grow.Settings,
  asked: list[Prompt] | None = None,
  seed: int = 0,
  mesh=None,
  judge: grow.Judge | None = None,
  room: int = 0,
):
  graph, params = policy()
  return grow.grow(
    params,
    jax.random.key(seed),
    asked or prompts(),
    graph=graph,
    table=table(),
    shape=shape,
    mesh=mesh or one_device(),
    judge=judge,
    room=room,
  )


@functools.cache
def usual(seed: int = 0):
  """Returns (tree, cost) of the usual settings."""
  return run(settings(), seed=seed)


def same(found: tree_lib.Tree, expected: tree_lib.Tree, order=None) -> None:
  """Asserts that tree i of `found` is tree order[i] of `expected`; log-probs to rounding."""
  order = range(len(expected.size)) if order is None else order
  expected = jax.tree.map(lambda x: x[list(order)], expected)
  for name in ("size", "parent", "depth", "status", "source", "length", "leaves", "tokens"):
    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
  np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)


def path_tokens(tree: tree_lib.Tree) -> int:
  paths = toy.trajectories(tree)
  return sum(int(tree.length[b, row]) for b, _, rows in paths for row in rows)


@functools.cache
def _forward():
  graph, _ = policy()

  def run(params, tokens, ends):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    end = jnp.broadcast_to(ends[:, None], tokens.shape)
    hidden = transformer.hidden(graph, params, tokens, positions, end)
    return jax.nn.log_softmax(nnx.merge(graph, params).logits(hidden))

  return jax.jit(run)


def every_log_prob(texts: list[list[int]]) -> np.ndarray:
  """Returns log p of every token after each token of the texts, by one plain forward."""
  length = PROMPT + DEPTH * SEGMENT
  tokens = np.array([text + [0] * (length - len(text)) for text in texts], np.int32)
  return np.asarray(_forward()(policy()[1], tokens, np.array([len(text) for text in texts])))


def plain_log_probs(texts: list[list[int]]) -> list[np.ndarray]:
  """Returns log p of each token but the first of each text."""
  found = every_log_prob(texts)
  return [x[np.arange(len(t) - 1), t[1:]] for x, t in zip(found, texts, strict=True)]


# One branch a node: every tree is a chain that is cut again and again, where the published sampler
# went on from the context of the trajectory before the cut (303 of 384 were incoherent).
CHAINS = {"branching": 1, "initial": 1, "initial_max": 1}


WINDOWS = {"fallback_window": 3, "merge": True}  # cuts inside segments
UNLIKELY = {"fallback": "log_prob", "top_k": 20, "temperature": 0.8}


@pytest.mark.parametrize(
  ("changes", "cut"),
  [({}, 10), (CHAINS, 100), (WINDOWS, 10), (UNLIKELY, 10)],
  ids=["trees", "chains", "windows", "unlikely"],
)
def test_every_token_was_drawn_after_the_tokens_before_it(changes, cut):
  regrown = split_boxes = 0
  for seed in range(4):
    tree, _ = run(settings(**changes), seed=seed)
    paths = toy.trajectories(tree)
    before = [tree.prompt[b, : tree.prompt_length[b]].tolist() for b, *_ in paths]
    said = [tree_lib.response(tree, b, leaf) for b, leaf, _ in paths]
    found = plain_log_probs([p + s for p, s in zip(before, said, strict=True)])
    for (b, _, rows), p, s, log_probs in zip(paths, before, said, found, strict=True):
      kept = np.concatenate([tree.log_probs[b, r, : tree.length[b, r]] for r in rows])
      np.testing.assert_allclose(kept, log_probs[len(p) - 1 :][: len(s)], atol=1e-5)
      regrown += any(tree.source[b, r] > 0 for r in rows)
      split_boxes += _check_stop(tree, b, rows)
  assert regrown > cut and split_boxes > 0


def _check_stop(tree: tree_lib.Tree, b: int, rows: list[int]) -> bool:
  """Asserts that a trajectory ends at its first stop; returns whether a box lay in two segments."""
  state, status = 0, int(tree.status[b, rows[-1]])
  opened = 0
  said = tree_lib.response(tree, b, rows[-1])
  for i, token in enumerate(said):
    opened = i if state == 0 else opened
    state = int(table()[state, token])
    last = i == len(said) - 1
    assert last or (token not in EOS_IDS and state != CLOSED)
  if said[-1] in EOS_IDS:
    assert status == tree_lib.EOS
  elif state == CLOSED:
    assert status == tree_lib.ANSWER
  else:
    assert status in (tree_lib.LENGTH, tree_lib.REPETITION) and len(said) % SEGMENT == 0
  assert (tree.length[b, rows[:-1]] == SEGMENT).all()
  return status == tree_lib.ANSWER and opened // SEGMENT < (len(said) - 1) // SEGMENT


def test_every_prompt_has_its_width_and_every_row_its_place():
  tree, cost = usual()
  assert (tree.leaves > 0).all()
  for b, size in enumerate(tree.size):
    leaves = tree.leaves[b].tolist()
    assert sorted(leaves) == np.flatnonzero(tree.status[b] >= tree_lib.EOS).tolist()
    parents = tree.parent[b, 1:size]
    assert (parents < np.arange(1, size)).all() and not set(parents.tolist()) & set(leaves)
    assert (tree.status[b, :size] >= tree_lib.INNER).all()
  decoded = int(tree.length.sum())  # nothing is cut off and nothing decoded in vain
  assert cost["rollout/tokens_decoded"] == decoded < path_tokens(tree)
  assert cost["rollout/tokens_prefilled"] == sum(len(p.tokens) for p in prompts())
  assert cost["rollout/pages_held"] == 0
  assert 0 < cost["rollout/row_occupancy"] <= 1
  per_token = 2 * ARCH.layers * ARCH.kv_heads * ARCH.head_dim * 4
  assert per_token < cost["rollout/kv_bytes_read_per_token"]
  assert cost["rollout/kv_bytes_read_per_token"] < cost["rollout/kv_bytes_flat_per_token"]


def test_the_same_call_twice_is_the_same_to_the_last_bit():
  jax.tree.map(np.testing.assert_array_equal, run(settings()), usual())
  assert not np.array_equal(usual(1)[0].tokens, usual(0)[0].tokens)


def test_prompts_in_another_order_give_the_same_trees():
  order = np.random.default_rng(2).permutation(len(prompts()))
  tree, _ = run(settings(), [prompts()[i] for i in order])
  same(tree, usual()[0], order)


def test_prompts_one_at_a_time_give_the_same_trees():
  for i, prompt in enumerate(prompts()):
    tree, _ = run(settings(), [prompt])
    same(tree, usual()[0], [i])


@pytest.mark.parametrize(
  ("changes", "trees", "unroll"),
  [
    ({"rows": 1, "group": 1, "page": 1}, 1, False),  # one row at a time, one tree at a time
    ({"rows": 16, "group": 2, "page": 4}, 9, True),
  ],
  ids=["least", "other"],
)
def test_rows_groups_pages_and_unrolling_do_not_matter(changes, trees, unroll, monkeypatch):
  monkeypatch.setattr(programs, "PREFILL", 4)  # 9 prompts in three calls
  monkeypatch.setattr(programs, "LEAST_ROWS", 1)  # as many sizes of the decoder as there can be
  monkeypatch.setattr(programs, "LEAST_SHARED", 1)
  shape = settings(**changes)
  shape = dataclasses.replace(shape, unroll=unroll, pages=trees * shape.pages_of_tree)
  tree, cost = run(shape)
  same(tree, usual()[0])
  assert cost["rollout/tokens_decoded"] == usual()[1]["rollout/tokens_decoded"]
  assert cost["rollout/pages_held"] == 0


def test_decoders_are_large_enough_and_few():
  for most, factor in itertools.product((1, 5, 64), (2, 4)):
    sizes = schedule.sizes(most, 2, factor)
    assert max(sizes) == most and min(sizes) >= min(most, 2)
    assert len(sizes) <= math.log(max(most // 2, 1), factor) + 1


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_eight_devices_grow_what_one_does(axes):
  config = config_lib.default()
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = axes
  mesh = mesh_lib.create(config)
  # Of eight shards each has two prompts, most of them padding.
  assert mesh_lib.shards(mesh) == 8 // axes[2] and len(prompts()) == 9
  tree, cost = run(settings(), mesh=mesh)
  same(tree, usual()[0])
  assert cost["rollout/tokens_decoded"] == usual()[1]["rollout/tokens_decoded"]
  assert cost["rollout/pages_held"] == 0


INDEPENDENT = {"branching": 1, "initial": 6, "initial_max": 6, "fallback": "none"}


@pytest.mark.parametrize("changes", [{}, CHAINS, INDEPENDENT], ids=["trees", "chains", "answers"])
def test_merging_siblings_changes_the_cost_alone(changes):
  changes = changes | {"temperature": 0.02, "width": 6}
  plain, cost = run(settings(**changes))
  merged, less = run(settings(merge=True, **changes))
  same_trajectories(merged, plain)
  assert less["rollout/tokens_decoded"] == merged.length.sum() <= cost["rollout/tokens_decoded"]
  assert less["rollout/pages_held"] == 0
  assert less["rollout/tokens_decoded"] < 0.8 * cost["rollout/tokens_decoded"]
  twice = [row for row in merged.leaves if len(set(row.tolist())) < len(row)]
  assert twice  # some answers were drawn more than once
  for b, parent in enumerate(merged.parent):
    texts = [(int(parent[r]), *merged.tokens[b, r].tolist()) for r in np.flatnonzero(parent >= 0)]
    assert len(set(texts)) == len(texts)  # what is one text is one node, whenever it was drawn


@pytest.mark.parametrize("tensor", [1, 2])
def test_kernels_grow_the_trees_of_the_reference(tensor):
  """Interpreted, for no TPU is here; over 8 devices, with heads split over `tensor` of them."""
  config = config_lib.default()
  config.mesh.tensor = tensor
  shape = dataclasses.replace(settings(), attention="pallas")
  tree, _ = run(shape, mesh=mesh_lib.create(config))
  same(tree, usual()[0])


def test_merged_trees_do_not_depend_on_rows_and_devices():
  changes = {"temperature": 0.02, "merge": True}
  tree, _ = run(settings(**changes))
  for shape, mesh in (
    (settings(rows=2, group=1, **changes), None),
    (settings(group=2, **changes), mesh_lib.create(config_lib.default())),
  ):
    found, cost = run(shape, mesh=mesh)
    same(found, tree)
    assert cost["rollout/tokens_decoded"] >= tree.length.sum()  # who waits depends on the rows
    assert cost["rollout/pages_held"] == 0


def same_trajectories(found: tree_lib.Tree, expected: tree_lib.Tree) -> None:
  """Asserts that both hold the same trajectories in the same order; log-probs to rounding."""
  for b in range(len(expected.size)):
    for row, other in zip(found.leaves[b].tolist(), expected.leaves[b].tolist(), strict=True):
      assert tree_lib.response(found, b, row) == tree_lib.response(expected, b, other)
      assert found.status[b, row] == expected.status[b, other]
      log_probs, others = (
        np.concatenate([t.log_probs[b, r, : t.length[b, r]] for r in tree_lib.path(t, b, i)])
        for t, i in ((found, row), (expected, other))
      )
      np.testing.assert_allclose(log_probs, others, atol=1e-5)


def test_width_one_is_plain_sampling():
  # Sampled by hand from a plain forward of the whole text, with the draws that the identity gives.
  shape = settings(width=1, initial=1, initial_max=1, group=1, temperature=0.7, closed=-1)
  tree, cost = run(shape, seed=3)
  texts = [list(p.tokens) for p in prompts()]
  key = jax.random.fold_in(jax.random.key(3), 0)
  identity = lambda p, row: jax.random.fold_in(jax.random.fold_in(key, np.uint32(p.id)), row)
  ended: set[int] = set()
  for position in range(DEPTH * SEGMENT):
    ends = [len(t) for t in texts]
    log_probs = every_log_prob(texts)
    for b, p in enumerate(prompts()):
      if b in ended:
        continue
      row, step = 1 + position // SEGMENT, position % SEGMENT
      u = float(jax.random.uniform(jax.random.fold_in(identity(p, row), step)))
      chance = np.exp(log_probs[b, ends[b] - 1, :VOCABULARY].astype(np.float64) / 0.7)
      texts[b].append(int(np.searchsorted(np.cumsum(chance) / chance.sum(), u)))
      said = texts[b][len(p.tokens) :]
      looping = len(said) % SEGMENT == 0 and _repeats(said[-6:])
      if said[-1] in EOS_IDS or looping:
        ended.add(b)
  for b, p in enumerate(prompts()):
    leaf = int(tree.leaves[b, 0])
    assert tree_lib.response(tree, b, leaf) == texts[b][len(p.tokens) :]
  assert cost["rollout/tokens_decoded"] == path_tokens(tree)
  assert len(ended) > 3


def _repeats(said: list[int]) -> bool:
  pairs = [tuple(said[i : i + 2]) for i in range(len(said) - 1)]
  return max(map(pairs.count, pairs)) >= 3


def test_independent_answers_share_nothing():
  shape = grow.sequential(settings(), samples=5, temperature=1.0)
  tree, cost = run(shape)
  assert (tree.leaves > 0).all() and tree.leaves.shape[1] == 5
  assert (tree.source == tree_lib.NO_ROW).all()
  assert (tree.parent[:, 1:6] == 0).all()
  for parent in tree.parent:  # below the prompt a row has one child at most
    below = parent[parent > 0]
    assert len(set(below.tolist())) == len(below)
  assert cost["rollout/tokens_decoded"] == path_tokens(tree)


def test_saving_where_nothing_stops_early_is_that_of_the_shape():
  endless = settings(eos_ids=(), closed=-1, initial_max=2)
  shape = dataclasses.replace(endless, repetition_count=0, width=8, depth=4, response_length=16)
  tree, cost = run(shape, prompts()[:3])
  assert path_tokens(tree) == 3 * 8 * 16
  saving = 1 - cost["rollout/tokens_decoded"] / path_tokens(tree)
  assert saving == pytest.approx(oracle.saving(width=8, branching=2, initial=2, depth=4))
  assert tree.tokens.max() < VOCABULARY  # the padding of the vocabulary is never drawn


def test_a_second_call_compiles_nothing(caplog):
  def calls():
    run(settings(), seed=1)
    run(settings(), prompts()[::-1])

  calls()  # their trees may need other sizes of the decoder
  with jax.log_compiles():
    calls()
    compiled = [r.getMessage() for r in caplog.records if "ompiling" in r.getMessage()]
    assert not compiled
    jax.jit(lambda x: x + 12345)(jnp.ones(3))  # else the assertion above would say nothing
  assert any("ompiling" in r.getMessage() for r in caplog.records)


def test_fewer_prompts_run_the_programs_of_more(caplog):
  """With room for more the trees are the same, and prompts lie alike on all eight devices."""
  shape, asked, judged = settings(fallback="disagree"), prompts()[:6], set()
  mesh = mesh_lib.create(config_lib.default())

  def judge(ended):
    judged.update(b for b, _ in ended)
    return np.array([len(tokens) % 2 for _, tokens in ended], np.float32)

  whole, _ = run(shape, mesh=mesh, judge=judge)
  assert judged == set(range(9))
  judged.clear()
  with jax.log_compiles():
    some, _ = run(shape, asked, mesh=mesh, judge=judge, room=9)
    assert not any("Compiling jit(_start)" in r.getMessage() for r in caplog.records)
  assert judged == set(range(6))
  same(some, whole, order=range(6))


def test_what_is_raised_between_segments_ends_the_rollout():
  graph, params = policy()
  calls = []

  def check():
    calls.append(None)
    if len(calls) == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    grow.grow(
      params,
      jax.random.key(0),
      prompts(),
      graph=graph,
      table=table(),
      shape=settings(),
      mesh=one_device(),
      check=check,
    )
  same(run(settings())[0], usual()[0])  # nothing of it is left


def test_the_state_is_donated():
  shape = grow.fit(settings(), len(prompts()), one_device())
  graph, params = policy()
  usual()
  calls = programs.build(graph, jnp.dtype("float32"), shape, len(prompts()), one_device())
  params = jax.device_put(params, mesh_lib.replicated(one_device()))
  size = next(iter(calls.decode.used))
  old, segment = calls.start(*grow._arrays(prompts(), 1, shape, len(prompts())))
  key = jax.random.key(0)

  def gone(state) -> bool:
    assert state.pool.key.is_deleted() == state.pool.value.is_deleted()
    return state.pool.key.is_deleted() and state.tree.tokens.is_deleted()

  reward = np.zeros((1, len(prompts()), shape.width), np.float32)
  new, _ = calls.advance(old, segment, reward, key, np.float32(1))
  assert gone(old) and not gone(new)
  old, new = new, calls.prefill(new, params, jnp.asarray(0))
  assert gone(old) and not gone(new)
  old, (new, _) = new, calls.decode(new, params, None, table(), key, *size)
  assert gone(old) and not gone(new)


@pytest.mark.parametrize("length", [0, PROMPT + 1])
def test_a_prompt_of_a_wrong_length_is_named(length):
  bad = Prompt(77, [3] * length)
  with pytest.raises(config_lib.UserError, match=f"prompt 77 has {length} tokens.*1 to {PROMPT}"):
    run(settings(), [prompts()[0], bad])


def test_a_pool_that_holds_no_tree_is_named():
  shape = settings()
  small = dataclasses.replace(shape, pages=shape.pages_of_tree - 1)
  with pytest.raises(config_lib.UserError, match=f"needs at least {shape.pages_of_tree}"):
    run(small)


def test_settings_are_those_of_the_config():
  shape = settings(response_length=9, initial=2, initial_max=5)
  assert (shape.response_length, shape.branch.initial, shape.branch.initial_max) == (9, 2, 5)
  assert settings().response_length == DEPTH * SEGMENT
  assert settings(response_length=50).response_length == 50  # then depth ends a trajectory
  assert settings(stop_at="eos").decoder.stop_at == "eos"
  wide = grow.with_width(settings(initial=4, initial_max=6), samples=3, temperature=0.5)
  assert (wide.width, wide.branch.initial, wide.branch.initial_max) == (3, 3, 3)
  assert wide.decoder.temperature == 0.5 and wide.branch.branching == 2
  alone = grow.sequential(settings(), samples=2, temperature=0.5)
  assert (alone.width, alone.branch.branching, alone.group) == (2, 1, 2)
  assert alone.groups * alone.group == 64 and alone.fallback.place == "none"
