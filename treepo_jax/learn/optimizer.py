"""The optax chain of the update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def create(config) -> optax.GradientTransformation:
  """Returns AdamW behind a global-norm clip, with linear warm-up and linear decay.

  The rate at optimizer step k, from 0, is train.learning_rate * min((k + 1) / train.warmup, 1):
  already the first step learns. (The published schedule starts at 0 and counts rollout batches.)
  It falls to train.final_rate of that over the run; at 1 it is constant, as published. Weight
  decay is on every weight, as published.
  """
  t = config.train
  return optax.chain(
    optax.clip_by_global_norm(t.grad_clip),
    optax.scale_by_adam(b1=t.b1, b2=t.b2, eps=t.eps),
    optax.add_decayed_weights(t.weight_decay),
    optax.scale_by_learning_rate(lambda step: _rate(step, config)),
  )


def learning_rate(opt_state: Any, config) -> Float[Array, ""]:
  """Returns the rate of the next optimizer step, given the state of the chain above."""
  return _rate(opt_state[-1].count, config)  # its last link counts the steps taken


def _rate(step: jax.typing.ArrayLike, config) -> Float[Array, ""]:
  t = config.train
  done = jnp.minimum(jnp.asarray(step) / (t.steps * config.learn.minibatches), 1)
  left = 1 - (1 - t.final_rate) * done
  return t.learning_rate * left * jnp.minimum((jnp.asarray(step) + 1) / max(t.warmup, 1), 1)
