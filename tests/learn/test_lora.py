"""Adapters: no change at the start, W + scale A B after, and only they are trained."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from treepo_jax import config as config_lib
from treepo_jax.learn import lora, packing, update
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer

ARCHITECTURE = transformer.Architecture(
  family="qwen2",
  vocab_size=64,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=4,
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
GRAPH, PARAMS = transformer.create(ARCHITECTURE, jax.random.key(0))


def settings(rank=4, **learn):
  c: Any = config_lib.default()
  c.lora.rank, c.lora.alpha = rank, 8.0
  c.learn.row_length, c.learn.micro_rows = 144, 4
  c.train.learning_rate, c.train.warmup = 0.01, 0
  c.learn.update(learn)
  return config_lib.validate(c)


def batch(config):
  tree = toy.random_trees(0, vocabulary=64)
  advantage = np.random.default_rng(0).normal(size=tree.parent.shape)
  (packed,) = packing.pack(tree, toy.along_paths(tree, advantage), config=config)
  return packed


def steps(config, count=3, mesh=None):
  mesh = mesh or mesh_lib.single()
  state = update.create(PARAMS, config, mesh)
  for _ in range(count):
    state, metrics = update.step(state, [batch(config)], graph=GRAPH, config=config, mesh=mesh)
  return state, metrics


def test_new_adapters_change_nothing_and_later_ones_add_a_product():
  adapters = lora.create(PARAMS, jax.random.key(0), rank=3, targets=("query", "down"))
  merged = lora.merge(PARAMS, adapters, scale=2.0)
  jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)
  adapters["down"]["b"] = jnp.ones_like(adapters["down"]["b"])
  merged = lora.merge(PARAMS, adapters, scale=2.0)
  before, after = (p["blocks"]["down"]["kernel"] for p in (PARAMS, merged))
  expected = np.asarray(before) + 2 * np.asarray(adapters["down"]["a"]).sum(-1, keepdims=True)
  np.testing.assert_allclose(after, expected, rtol=1e-5)
  np.testing.assert_array_equal(
    merged["blocks"]["gate"]["kernel"], PARAMS["blocks"]["gate"]["kernel"]
  )


def test_only_the_adapters_move_and_the_loss_falls():
  config = settings()
  state, metrics = steps(config, 5)
  assert state.base is not None
  jax.tree.map(np.testing.assert_array_equal, state.base, PARAMS)
  assert all(np.abs(adapter["b"]).max() > 0 for adapter in state.params.values())
  _, first = steps(config, 1)
  assert float(metrics["loss/policy"]) < float(first["loss/policy"])
  changed = update.weights(state, config, mesh_lib.single())["blocks"]["gate"]["kernel"]
  assert not np.array_equal(changed, PARAMS["blocks"]["gate"]["kernel"])


def test_the_gradient_is_that_of_the_whole_weights():
  """d loss / d B = scale A^T (d loss / d W), with B zero: what the chain rule says."""
  config, whole = settings(), settings(rank=0)
  mesh, packed = mesh_lib.single(), batch(settings())
  gradient = {}
  for c in (config, whole):
    state = update.create(PARAMS, c, mesh)
    placed = update.place(packed, c, mesh)
    gradient[c.lora.rank], _ = jax.jit(
      update.accumulate, static_argnames=("graph", "config", "mesh")
    )(state, placed, graph=GRAPH, config=c, mesh=mesh)
    if c.lora.rank:
      adapters = state.params
  for name in config_lib.PROJECTIONS:
    a = np.asarray(adapters[name]["a"])
    expected = 2.0 * np.einsum("lir,lio->lro", a, gradient[0]["blocks"][name]["kernel"])
    np.testing.assert_allclose(gradient[4][name]["b"], expected, rtol=1e-3, atol=1e-6)
    assert not np.asarray(gradient[4][name]["a"]).any()  # B is zero


def _adapters(params, targets, rank=3):
  """Returns adapters whose B is not zero."""
  adapters = lora.create(params, jax.random.key(0), rank=rank, targets=targets)
  for i, adapter in enumerate(adapters.values()):
    adapter["b"] = 0.1 * jax.random.normal(jax.random.key(i), adapter["b"].shape)
  return adapters


@pytest.mark.parametrize("targets", [("query", "down"), config_lib.PROJECTIONS])
@pytest.mark.parametrize("remat", ["none", "layer"])
def test_beside_the_weights_they_compute_what_merged_ones_do(targets, remat):
  """Hidden states, and the gradient of A and B, of all projections and of some."""
  tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 64)
  positions = jnp.broadcast_to(jnp.arange(20), tokens.shape)
  end = jnp.full(tokens.shape, 20)

  def forward(graph, params):
    return transformer.hidden(graph, params, tokens, positions, end, remat=remat)

  weight = jax.random.normal(jax.random.key(2), (2, 20, 16))

  def merged(adapters):
    x = forward(GRAPH, lora.merge(PARAMS, adapters, scale=2.0))
    return (weight * x).sum(), x

  def beside(adapters):
    x = forward(*transformer.adapted(GRAPH, PARAMS, adapters, scale=2.0))
    return (weight * x).sum(), x

  adapters = _adapters(PARAMS, targets)
  found, expected = (jax.jit(jax.grad(f, has_aux=True))(adapters) for f in (beside, merged))
  plain = forward(GRAPH, PARAMS)
  assert np.abs(expected[1] - plain).max() > 0.1
  np.testing.assert_allclose(found[1], expected[1], atol=2e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max()),
    found[0],
    expected[0],
  )


def test_the_update_holds_no_second_copy_of_the_weights():
  """What its program takes beside its arguments is less than the adapted projections are."""
  wide = replace(ARCHITECTURE, width=512, hidden=2048, head_dim=128, layers=4)
  graph, params = transformer.abstract(wide)
  kernels = sum(params["blocks"][name]["kernel"].size * 4 for name in config_lib.PROJECTIONS)
  c: Any = config_lib.default()
  c.lora.rank, c.model.remat = 4, "layer"
  c.learn.row_length, c.learn.micro_rows = 144, 1
  config, mesh = config_lib.validate(c), mesh_lib.single()
  packed = update.place(batch(config), config, mesh)
  state = jax.eval_shape(lambda p: update.create(p, config, mesh), params)
  program = update.program(state, graph=graph, config=config, mesh=mesh)
  analysis = program.lower(state, packed).compile().memory_analysis()
  assert analysis is not None  # a backend may not say; the CPU's does
  assert analysis.temp_size_in_bytes < kernels  # merged: 2.4 times as much as they


def test_the_base_is_the_reference():
  config = settings(kl="k3", kl_weight=0.1)
  state, metrics = steps(config, 1)
  assert state.reference is None
  assert abs(float(metrics["loss/kl_reference"])) < 1e-6  # of the first step, before any change
  _, metrics = steps(config, 3)
  assert float(metrics["loss/kl_reference"]) > 0


@pytest.mark.parametrize("targets", [("query", "heads"), ()])
def test_unknown_projections_are_named(targets):
  c: Any = config_lib.default()
  c.lora.targets = targets
  with pytest.raises(config_lib.UserError, match=r"lora.targets.* query, key"):
    config_lib.validate(c)


def test_a_state_with_adapters_is_a_pytree_without_holes():
  state = update.create(PARAMS, settings(), mesh_lib.single())
  again = replace(state, step=state.step)
  assert jax.tree.structure(again) == jax.tree.structure(state)
