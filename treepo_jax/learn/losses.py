"""Log-probs to losses, as sums and counts that are added before they are divided.

Axes: R packed rows, L tokens of a row.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from treepo_jax import struct
from treepo_jax.learn.packing import Batch

MAX_LOG_RATIO = 20.0  # exp of it is finite in float32, and far outside of every clip


@struct.dataclass
class Ratio:
  """A mean still to be taken: micro-batches, devices and mini-batches add up exactly."""

  sum: Float[Array, ""]
  count: Float[Array, ""]

  def __add__(self, other: "Ratio") -> "Ratio":
    return Ratio(sum=self.sum + other.sum, count=self.count + other.count)

  def mean(self) -> Float[Array, ""]:
    """Returns sum / count, 0 where nothing was counted."""
    return jnp.where(self.count > 0, self.sum / jnp.where(self.count > 0, self.count, 1), 0)


# (log_probs[r, l], batch) -> ratios by metric name; the update descends "loss/policy".
LossFn = Callable[[Float[Array, "r l"], Batch], dict[str, Ratio]]


def policy(log_probs: Float[Array, "r l"], batch: Batch, *, config) -> dict[str, Ratio]:
  """Returns the clipped policy loss as a token mean over trajectories, with its diagnostics.

  With r = exp(log_prob - old_log_prob), a token that stands in trajectories of advantages A_i
  contributes the sum over i of

      max(-A r, -A clip(r, 1 - low, 1 + high))                   (TreePO, Eq 1; DAPO's clip-higher)
      for A < 0 at most -A c                                     (dual clip)

  Both are linear in |A| for each sign of A, so the sum needs only gain = sum of positive A_i and
  cost = sum of negative A_i:

      -gain min(r, 1 + high) + |cost| min(c, max(r, 1 - low))

  Eq 1 divides by the tokens of all trajectories, which is the sum of `count`.

  Args:
    log_probs: of the batch's tokens under the policy being trained, in nats; not read where the
      batch's count is 0.
    batch: packed rows.
    config: learn.clip_low, learn.clip_high, learn.clip_dual.

  Returns:
    loss/policy: the loss.
    loss/clip_fraction: share of tokens of trajectories whose gradient low or high cuts off.
    loss/dual_clip_fraction: share of them where the dual clip does.
    loss/kl_old: mean of old_log_prob - log_prob, an estimate of KL(old || new) in nats.
    loss/logprob_gap: mean of |log_prob - old_log_prob| over sampled tokens, each once, in nats.
  """
  settings = config.learn
  low, high, dual = 1 - settings.clip_low, 1 + settings.clip_high, settings.clip_dual
  trained = batch.count > 0
  difference = jnp.where(trained, log_probs.astype(jnp.float32) - batch.old_log_probs, 0)
  # An infinite ratio would turn its zero gradient into NaN.
  ratio = jnp.exp(jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  # min(r, clip(r)) = min(r, high) and max(r, clip(r)) = max(r, low), without a tie inside the clip.
  loss = -batch.gain * jnp.minimum(ratio, high)
  loss -= batch.cost * jnp.minimum(jnp.maximum(ratio, low), dual)
  clipped = batch.positive * (ratio > high) + batch.negative * (ratio < low)
  count = batch.count.sum()
  return {
    "loss/policy": Ratio(sum=loss.sum(), count=count),
    "loss/clip_fraction": Ratio(sum=clipped.sum(), count=count),
    "loss/dual_clip_fraction": Ratio(sum=(batch.negative * (ratio > dual)).sum(), count=count),
    "loss/kl_old": Ratio(sum=-(batch.count * difference).sum(), count=count),
    "loss/logprob_gap": Ratio(sum=jnp.abs(difference).sum(), count=trained.sum(dtype=jnp.float32)),
  }
