"""The update against training path by path, in micro-batches, on one device and on eight."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AxisType

from tests import toy
from treepo_jax import config as config_lib
from treepo_jax.learn import packing, update
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer
from treepo_jax.rollout import tree as tree_lib

ARCHITECTURE = transformer.Architecture(
  family="qwen2",
  vocab_size=96,
  width=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  hidden=48,
  norm_eps=1e-6,
  rope_theta=1e4,
  rope_scaling=None,
  max_positions=64,
  tied=False,
  qkv_bias=True,
  output_bias=False,
  qk_norm=False,
)
GRAPH, PARAMS = transformer.create(ARCHITECTURE, jax.random.key(0))
WHOLE, CUT = 80, 32  # row lengths: every tree in one piece; the large ones cut

accumulate = jax.jit(update.accumulate, static_argnames=("graph", "config", "mesh"))


def settings(row_length=WHOLE, micro_rows=8, how="tree", dtype="float32", **train):
  c: Any = config_lib.default()
  c.learn.row_length, c.learn.micro_rows, c.learn.packing = row_length, micro_rows, how
  c.learn.clip_dual = 3.0
  c.model.dtype = dtype
  c.train.eps = 1e-2  # smooth: without it Adam blows rounding errors of zero gradients up
  c.train.learning_rate, c.train.warmup = 0.01, 4
  c.train.final_rate = 1.0
  c.train.update(train)
  return ml_collections.FrozenConfigDict(c)


def mesh_of(data=1, fsdp=1, tensor=1):
  if data * fsdp * tensor == 1:
    return mesh_lib.single()
  return jax.make_mesh(
    (data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
  )


def sample(seed=0):
  """Returns trees whose log-probs are near the model's, some beyond every clip, and advantages."""
  tree = toy.random_trees(seed, nodes=20, vocabulary=ARCHITECTURE.vocab_size)
  rng = np.random.default_rng(seed)
  old = rng.normal(-np.log(ARCHITECTURE.vocab_size), 0.7, tree.log_probs.shape)
  advantage = rng.normal(size=tree.parent.shape) * (np.asarray(tree.status) >= tree_lib.EOS)
  return replace(tree, log_probs=jnp.asarray(old, jnp.float32)), advantage.astype(np.float32)


def pack(config, seed=0):
  tree, advantage = sample(seed)
  (batch,) = packing.pack(tree, toy.along_paths(tree, advantage), config=config)
  return batch


def gradients(config, batch, mesh=None):
  """Returns the update's gradient and the means of its ratios."""
  mesh = mesh or mesh_of()
  state = update.create(PARAMS, config, mesh)
  gradient, ratios = accumulate(
    state, update.place(batch, config, mesh), graph=GRAPH, config=config, mesh=mesh
  )
  return gradient, {name: float(ratio.mean()) for name, ratio in ratios.items()}


@functools.cache
def path_by_path(low, high, dual, seed=0):
  """The same with each trajectory in a row of its own, plainly causal, the loss as published."""
  tree, advantage = sample(seed)
  tree = jax.tree.map(np.asarray, tree)
  prompts, lengths = tree.prompt, tree.length
  width = prompts.shape[1] + 6 * tree.tokens.shape[2]
  rows = []
  for b, leaf, path in toy.trajectories(tree):
    prompt = prompts[b, : tree.prompt_length[b]]
    tokens = [tree.tokens[b, row, : lengths[b, row]] for row in path]
    old = [tree.log_probs[b, row, : lengths[b, row]] for row in path]
    row = np.zeros((4, width))
    n, p = len(prompt) + sum(map(len, tokens)), len(prompt)
    row[0, :n] = np.concatenate([prompt, *tokens])
    row[1, p:n], row[2, p:n], row[3, :n] = np.concatenate(old), 1, n
    rows.append((row, advantage[b, leaf]))
  tokens, old, mask, end = np.moveaxis(np.stack([row for row, _ in rows]), 1, 0)
  tokens, end = jnp.asarray(tokens, jnp.int32), jnp.asarray(end, jnp.int32)
  a = jnp.asarray([[a] for _, a in rows])

  def loss(params):
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    hidden = transformer.hidden(GRAPH, params, tokens, positions, end)
    log_probs, _ = transformer.log_probs(GRAPH, params, hidden[:, :-1], tokens[:, 1:])
    ratio = jnp.exp(log_probs - old[:, 1:])
    plain, clipped = -a * ratio, -a * jnp.clip(ratio, 1 - low, 1 + high)
    each = jnp.maximum(plain, clipped)
    each = jnp.where(a < 0, jnp.minimum(each, -a * dual), each)
    return (each * mask[:, 1:]).sum() / mask.sum()

  value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS)
  return gradient, float(value)


def assert_close(got, expected, tolerance=1e-5):
  """Compares every leaf by its norm."""
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
  ):
    error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(y)
    assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize("how", ["tree", "path"])
@pytest.mark.parametrize("row_length", [WHOLE, CUT])
def test_packed_training_equals_training_path_by_path(row_length, how):
  config = settings(row_length, how=how)
  batch = pack(config)
  repeated = int(batch.tokens_trained.sum() - (batch.count > 0).sum())
  assert (repeated > 0) == (row_length == CUT and how == "tree")
  gradient, means = gradients(config, batch)
  expected, loss = path_by_path(0.2, 0.28, 3.0)
  assert means["loss/policy"] == pytest.approx(loss, rel=1e-5)
  assert 0 < means["loss/dual_clip_fraction"] < means["loss/clip_fraction"] < 1
  assert_close(gradient, expected)


def test_metrics_do_not_depend_on_packing():
  tree, path = (gradients(c, pack(c))[1] for c in (settings(), settings(how="path")))
  once = ("loss/logprob_gap", "loss/ratio")  # of sampled tokens, each once
  same = {name: value for name, value in tree.items() if not name.startswith(once)}
  assert same == pytest.approx({name: path[name] for name in same}, rel=1e-5)


def test_micro_batches_add_up_to_the_batch():
  one, several = settings(CUT, micro_rows=16), settings(CUT, micro_rows=2)
  whole, cut = pack(one), pack(several)
  assert update.place(whole, one, mesh_of()).tokens.shape[0] == 1
  assert update.place(cut, several, mesh_of()).tokens.shape[0] == 4
  gradient, means = gradients(several, cut)
  expected, expected_means = gradients(one, whole)
  assert_close(gradient, expected)
  assert means == pytest.approx(expected_means, rel=1e-5)


def test_empty_micro_batches_change_nothing():
  config = settings(CUT, micro_rows=2)
  batch = pack(config)
  padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
  gradient, means = gradients(config, padded)
  expected, expected_means = gradients(config, batch)
  jax.tree.map(np.testing.assert_array_equal, gradient, expected)
  assert means == expected_means


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_eight_devices_take_the_step_of_one(axes):
  config = settings(CUT)
  batch = pack(config)
  one, many = mesh_of(), mesh_of(*axes)
  assert_close(gradients(config, batch, many)[0], gradients(config, batch, one)[0])

  states = []
  for mesh in (one, many):
    state = update.create(PARAMS, config, mesh)
    for _ in range(2):
      before = state
      state, metrics = update.step(state, [batch], graph=GRAPH, config=config, mesh=mesh)
      assert jax.tree.leaves(before.params)[0].is_deleted()  # donated
    layout = jax.tree.leaves(mesh_lib.shardings(state, mesh))
    assert [x.sharding for x in jax.tree.leaves(state)] == layout
    states.append((state, {name: float(value) for name, value in metrics.items()}))
  (expected, expected_metrics), (got, metrics) = states
  assert_close(got.params, expected.params)
  assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)
  assert int(got.step) == 2
  kernel = got.params["blocks"]["gate"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // (axes[1] * axes[2])


def test_a_tokens_log_prob_depends_on_its_ancestors_alone():
  """The gradient of one token's log-prob is exactly 0 at the embedding of every other branch."""
  tree = toy.random_trees(5, trees=1, nodes=10, vocabulary=None)
  config = settings()
  ones = toy.along_paths(tree, np.ones(tree.parent.shape))
  (batch,) = packing.pack(tree, ones, config=config)
  tokens, end = batch.tokens[:1], batch.end[:1]  # ids count up: each token has an embedding alone
  assert tokens.max() < ARCHITECTURE.vocab_size

  @jax.jit
  def jacobian(params):
    def log_probs(embed):
      arrays = (jnp.asarray(x) for x in (tokens, batch.positions[:1], end))
      hidden = transformer.hidden(GRAPH, params | {"embed": embed}, *arrays)
      hidden = jnp.take_along_axis(hidden, batch.previous[:1, :, None], axis=1)
      return transformer.log_probs(GRAPH, params, hidden, jnp.asarray(tokens))[0][0]

    return jax.jacrev(log_probs)(params["embed"])

  reached = np.abs(np.asarray(jacobian(PARAMS))).sum(-1)  # [token, embedding]
  for i in np.nonzero(batch.count[0])[0]:
    ancestors = {int(tokens[0, j]) for j in range(i) if i < end[0, j]}
    assert set(np.nonzero(reached[i])[0]) == ancestors
  assert (np.diff(batch.previous[0][batch.count[0] > 0]) < 0).any()  # there was a branch


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
  config = settings()
  good = pack(config)
  bad = replace(good, old_log_probs=np.where(good.count > 0, np.nan, 0).astype(np.float32))
  state = update.create(PARAMS, config, mesh_of())
  before = jax.tree.map(np.array, state)
  state, metrics = update.step(state, [bad], graph=GRAPH, config=config, mesh=mesh_of())
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params, state.opt_state),
    (before.params, before.opt_state),
  )
  assert int(state.step) == 1 and int(metrics["update/skipped"]) == 1
  assert all(np.isfinite(value) for value in metrics.values())

  state, mixed = update.step(state, [bad, good], graph=GRAPH, config=config, mesh=mesh_of())
  alone = update.create(PARAMS, config, mesh_of())
  alone, metrics = update.step(alone, [good], graph=GRAPH, config=config, mesh=mesh_of())
  jax.tree.map(np.testing.assert_array_equal, state.params, alone.params)
  assert int(mixed["update/skipped"]) == 1
  for name in ("loss/policy", "update/grad_norm", "update/learning_rate"):
    assert float(mixed[name]) == float(metrics[name])


def test_each_mini_batch_is_a_step_of_the_optimizer():
  config = settings()
  batches = [pack(config, seed) for seed in (0, 1)]
  together = update.create(PARAMS, config, mesh_of())
  together, metrics = update.step(together, batches, graph=GRAPH, config=config, mesh=mesh_of())
  state, each = update.create(PARAMS, config, mesh_of()), []
  for batch in batches:
    state, one = update.step(state, [batch], graph=GRAPH, config=config, mesh=mesh_of())
    each.append({name: float(value) for name, value in one.items()})
  jax.tree.map(np.testing.assert_array_equal, together.params, state.params)
  assert int(together.step) == 1 and int(state.step) == 2
  assert [one["update/learning_rate"] for one in each] == pytest.approx([0.0025, 0.005])
  assert float(metrics["update/learning_rate"]) == pytest.approx(0.00375)
  # Before any weight has changed: of the first batch alone.
  assert float(metrics["loss/logprob_gap"]) == each[0]["loss/logprob_gap"]
  counts = [batch.count.sum() for batch in batches]
  mean = np.average([one["loss/policy"] for one in each], weights=counts)
  assert float(metrics["loss/policy"]) == pytest.approx(mean, rel=1e-5)
  for name in ("update/tokens_trained", "update/tokens_path"):
    assert int(metrics[name]) == sum(one[name] for one in each)
  saving = 1 - int(metrics["update/tokens_trained"]) / int(metrics["update/tokens_path"])
  assert float(metrics["update/token_saving"]) == pytest.approx(saving)


def test_no_batch_only_counts_the_step():
  config = settings()
  state, metrics = update.step(
    update.create(PARAMS, config, mesh_of()), [], graph=GRAPH, config=config, mesh=mesh_of()
  )
  jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
  assert int(state.step) == 1 and not any(float(value) for value in metrics.values())


def test_rows_of_many_batches_compile_a_few_programs():
  config = settings(CUT, micro_rows=4)
  state = update.create(PARAMS, config, mesh_of())
  program: Any = update.program(state, graph=GRAPH, config=config, mesh=mesh_of())
  rows = []
  for seed in range(8):
    batch = pack(config, seed)
    rows.append(len(batch.tokens))
    state, _ = update.step(state, [batch], graph=GRAPH, config=config, mesh=mesh_of())
  assert set(rows) <= {4, 8, 16} and len(set(rows)) > 1
  assert program._cache_size() == len(set(rows))


def test_bfloat16_models_keep_float32_weights():
  config = settings(dtype="bfloat16", learning_rate=1e-6, warmup=0)
  small = update.cast(PARAMS, jnp.bfloat16)
  state = update.create(small, config, mesh_of())
  state, metrics = update.step(state, [pack(config)], graph=GRAPH, config=config, mesh=mesh_of())
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, small)
  assert all(jax.tree.leaves(moved)), "an update below bfloat16's resolution was lost"
  _, exact = gradients(settings(), pack(config))
  assert float(metrics["loss/policy"]) == pytest.approx(exact["loss/policy"], abs=0.02)


def test_the_head_may_be_computed_in_chunks(monkeypatch):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(2, 21, ARCHITECTURE.width)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, ARCHITECTURE.vocab_size, (2, 21)), jnp.int32)
  whole = transformer.log_probs(GRAPH, PARAMS, hidden, targets)
  monkeypatch.setattr(update, "HEAD_TOKENS", 8)
  chunked = update.head(GRAPH, PARAMS, hidden, targets)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), chunked, whole)


def test_rows_that_the_mesh_cannot_split_name_the_key():
  with pytest.raises(config_lib.UserError, match=r"learn.micro_rows = 6 .* 4 devices .* 8"):
    update.create(PARAMS, settings(micro_rows=6), mesh_of(2, 2, 2))


def test_steps_on_one_batch_lower_its_loss():
  config = settings()
  batch = pack(config)
  state, trace = update.create(PARAMS, config, mesh_of()), []
  for _ in range(5):
    with jax.transfer_guard("disallow"):  # a step moves nothing but the batch it is given
      state, metrics = update.step(state, [batch], graph=GRAPH, config=config, mesh=mesh_of())
    trace.append(float(metrics["loss/policy"]))
  assert (np.diff(trace) < 0).all()
