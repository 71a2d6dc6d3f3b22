"""The KL to a reference policy: in the loss, in the reward, averaged, and steered to a target."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from tests.learn.test_lora import ARCHITECTURE, GRAPH, PARAMS, batch, settings
from treepo_jax import config as config_lib
from treepo_jax.learn import packing, update
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer

MESH = mesh_lib.single()
OTHER = transformer.create(ARCHITECTURE, jax.random.key(5))[1]


def step(state, config, batches=None):
  return update.step(state, batches or [batch(config)], graph=GRAPH, config=config, mesh=MESH)


def test_without_a_kl_nothing_is_kept():
  state = update.create(PARAMS, settings(rank=0), MESH)
  assert state.reference is None and state.base is None
  _, metrics = step(state, settings(rank=0))
  assert "loss/kl_reference" not in metrics and "update/kl_weight" not in metrics


def test_the_initial_weights_stay_and_pull_back():
  """The stronger the KL, the nearer the policy stays."""
  distance = {}
  for weight in (0.0, 10.0):
    config = settings(rank=0, kl="k3", kl_weight=weight)
    state = update.create(PARAMS, config, MESH)
    for _ in range(6):
      state, metrics = step(state, config)
    jax.tree.map(np.testing.assert_array_equal, state.reference, PARAMS)
    distance[weight] = float(metrics["loss/kl_reference"])
  assert 0 < distance[10.0] < distance[0.0]


def test_an_averaged_reference_follows():
  config = settings(rank=0, kl="k3", reference="average", average=0.75)
  state = update.create(PARAMS, config, MESH)
  state, _ = step(state, config)
  expected = jax.tree.map(lambda old, new: old + 0.25 * (new - old), PARAMS, state.params)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), state.reference, expected
  )


@pytest.mark.parametrize(("target", "factor"), [(1e-9, 1.02), (1e9, 0.98)])
def test_the_weight_is_steered_to_the_target(target, factor):
  config = settings(rank=0, kl="k3", kl_weight=0.5, kl_target=target)
  state = replace(update.create(PARAMS, config, MESH), reference=jax.tree.map(jnp.array, OTHER))
  state, metrics = step(state, config)
  assert float(metrics["update/kl_weight"]) == 0.5  # what the step used
  assert float(state.kl_weight) == pytest.approx(0.5 * factor)


def test_in_the_reward_the_loss_has_none():
  config = settings(rank=0, kl="k1", kl_in="reward", kl_weight=7.0)
  plain = settings(rank=0)
  state = replace(update.create(PARAMS, config, MESH), reference=jax.tree.map(jnp.array, OTHER))
  got, metrics = step(state, config)
  expected, _ = step(update.create(PARAMS, plain, MESH), plain)
  jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)
  assert float(metrics["loss/kl_reference"]) != 0


def test_divergence_is_the_log_ratio_of_each_nodes_tokens():
  config = settings(rank=0, kl="k1", kl_in="reward")
  tree = toy.random_trees(0, vocabulary=64)
  packed = packing.pack(tree, toy.along_paths(tree, np.ones(tree.parent.shape)), config=config)
  state = replace(update.create(PARAMS, config, MESH), reference=jax.tree.map(jnp.array, OTHER))
  got = update.divergence(state, packed, tree.parent.size, graph=GRAPH, config=config, mesh=MESH)
  got = np.asarray(got).reshape(tree.parent.shape)
  for b, _, rows in toy.trajectories(tree):
    tokens = np.asarray(tree.prompt[b, : int(tree.prompt_length[b])])
    parts = [np.asarray(tree.tokens[b, r, : int(tree.length[b, r])]) for r in rows]
    path = jnp.asarray(np.concatenate([tokens, *parts]), jnp.int32)[None]
    end = jnp.full(path.shape, path.shape[1])
    hidden = transformer.hidden(GRAPH, OTHER, path, jnp.arange(path.shape[1])[None], end)
    reference, _ = transformer.log_probs(GRAPH, OTHER, hidden[:, :-1], path[:, 1:])
    at = len(tokens) - 1
    for row, part in zip(rows, parts, strict=True):
      old = np.asarray(tree.log_probs[b, row, : len(part)])
      expected = (old - np.asarray(reference[0, at : at + len(part)])).sum()
      assert got[b, row] == pytest.approx(expected, rel=1e-4, abs=1e-4)
      at += len(part)


def test_only_k1_can_be_taken_off_a_reward():
  with pytest.raises(config_lib.UserError, match=r"learn.kl = 'k3'.*learn.kl_in"):
    settings(rank=0, kl="k3", kl_in="reward")


def test_correction_scores_with_the_trainer_before_the_first_step():
  """Mini-batches take steps in turn, but all their old log-probs are of the weights before."""
  config = settings(rank=0, correction="token", minibatches=2)
  tree = toy.random_trees(1, vocabulary=64)
  batches = packing.pack(tree, toy.along_paths(tree, np.ones(tree.parent.shape)), config=config)
  assert len(batches) == 2
  state = update.create(PARAMS, config, MESH)
  scored = [
    update.scorer(GRAPH, config, MESH)(state, update.place(b, config, MESH)) for b in batches
  ]
  for before, after in zip(batches, scored, strict=True):
    trained = before.count > 0
    rollout = np.asarray(after.rollout_log_probs).reshape(trained.shape)
    np.testing.assert_array_equal(rollout, before.old_log_probs)
    old = np.asarray(after.old_log_probs).reshape(trained.shape)
    assert np.abs(old - before.old_log_probs)[trained].max() > 0.1
  state, metrics = step(state, config, batches)
  assert float(metrics["loss/kl_old"]) != 0  # the second mini-batch was off its old policy
  assert 0 < float(metrics["loss/correction"]) <= config.learn.correction_cap
  assert 0 < float(metrics["loss/effective_sample"]) <= 1
