"""The optax chain of the update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def create(config) -> optax.GradientTransformation:
  """Returns AdamW behind a global-norm clip, with linear warm-up and then a constant rate.

  The rate at optimizer step k, from 0, is train.learning_rate * min((k + 1) / train.warmup, 1):
  already the first step learns. (The published schedule starts at 0 and counts rollout batches.)
  Weight decay is on every weight, as published.
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
  warmup = max(config.train.warmup, 1)
  return config.train.learning_rate * jnp.minimum((jnp.asarray(step) + 1) / warmup, 1)
