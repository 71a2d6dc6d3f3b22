"""The optimizer's schedule, clip and decay, by hand."""

from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from treepo_jax import config as config_lib
from treepo_jax.learn import optimizer


def settings(**values):
  c: Any = config_lib.default()
  c.train.update({"learning_rate": 0.1, "warmup": 4, "grad_clip": 1.0, "weight_decay": 0.0})
  c.train.update({"final_rate": 1.0, "steps": 10})
  c.train.update(values)
  return ml_collections.FrozenConfigDict(c)


def run(config, gradients, weight=1.0):
  """Returns the weight and the rate after each step."""
  tx = optimizer.create(config)
  params: Any = {"w": jnp.asarray([weight])}
  state = tx.init(params)
  trace = []
  for gradient in gradients:
    rate = float(optimizer.learning_rate(state, config))
    updates, state = tx.update({"w": jnp.asarray([gradient])}, state, params)
    params = optax.apply_updates(params, updates)
    trace.append((float(params["w"][0]), rate))
  return np.asarray(trace).T


def test_the_rate_warms_up_from_the_first_step_on():
  weights, rates = run(settings(), [0.5] * 6)
  np.testing.assert_allclose(rates, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-6)
  # Adam's step is the rate itself while the gradient stays the same.
  np.testing.assert_allclose(weights, 1 - np.cumsum(rates), rtol=1e-5)


def test_the_rate_falls_to_its_share_over_all_optimizer_steps():
  config = settings(warmup=0, final_rate=0.2, steps=2)
  with_two = ml_collections.ConfigDict(config)
  with_two.learn.minibatches = 2
  _, rates = run(ml_collections.FrozenConfigDict(with_two), [0.5] * 6)
  np.testing.assert_allclose(rates, [0.1, 0.08, 0.06, 0.04, 0.02, 0.02], rtol=1e-6)


def test_no_warm_up():
  _, rates = run(settings(warmup=0), [0.5] * 2)
  np.testing.assert_allclose(rates, [0.1, 0.1], rtol=1e-6)


def test_gradients_are_clipped_by_their_norm():
  spike, _ = run(settings(), [0.5, 1000.0])
  clipped, _ = run(settings(), [0.5, 1.0])
  np.testing.assert_allclose(spike, clipped, rtol=1e-6)


def test_weights_decay_in_proportion_to_the_rate():
  (weight,), (rate,) = run(settings(weight_decay=0.5), [0.0], weight=2.0)
  assert weight == pytest.approx(2.0 * (1 - rate * 0.5))
