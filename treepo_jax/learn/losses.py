"""Log-probs to losses, as sums and counts that are added before they are divided.

Axes: R packed rows, L tokens of a row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treepo_jax import struct
from treepo_jax.learn.packing import Batch

MAX_LOG_RATIO = 20.0  # exp of it is finite in float32, and far outside of every clip
RATIO_BINS = (0.5, 0.8, 0.95, 1.05, 1.28, 2.0)  # edges of the reported histogram of ratios


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


Tokens = Float[Array, "r l"]
# (log_probs, ratio, batch, config) -> what each token adds to the loss, before the correction.
LossFn = Callable[[Tokens, Tokens, Batch, object], Tokens]


def ppo(log_probs: Tokens, ratio: Tokens, batch: Batch, config) -> Tokens:
  """Returns the clipped loss of PPO, DAPO (clip-higher), GRPO, Dr. GRPO and TreePO (Eq 1).

  A token that stands in trajectories of advantages A_i contributes the sum over i of

      max(-A r, -A clip(r, 1 - low, 1 + high))
      for A < 0 at most -A c                                     (dual clip; c = 0: none)

  Both are linear in |A| for each sign of A, so the sum needs only gain = sum of positive A_i and
  cost = sum of negative A_i:

      -gain min(r, 1 + high) + |cost| min(c, max(r, 1 - low))
  """
  settings = config.learn
  # min(r, clip(r)) = min(r, high) and max(r, clip(r)) = max(r, low), without a tie inside the clip.
  punished = jnp.maximum(ratio, 1 - settings.clip_low)
  if settings.clip_dual:
    punished = jnp.minimum(punished, settings.clip_dual)
  return -batch.gain * jnp.minimum(ratio, 1 + settings.clip_high) - batch.cost * punished


def cispo(log_probs: Tokens, ratio: Tokens, batch: Batch, config) -> Tokens:
  """Returns -A stop(clip(r, 1 - low, 1 + high)) log p (CISPO, arXiv 2506.13585, Eq 4 and 5)."""
  settings = config.learn
  weight = jnp.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
  return -(batch.gain + batch.cost) * jax.lax.stop_gradient(weight) * log_probs


def reinforce(log_probs: Tokens, ratio: Tokens, batch: Batch, config) -> Tokens:
  """Returns -A log p: the plain policy gradient, without a ratio."""
  return -(batch.gain + batch.cost) * log_probs


# Those by sequence take `ratio` of whole trajectories: (mean over tokens of log r), exponentiated.
LOSSES: dict[str, LossFn] = {"ppo": ppo, "gspo": ppo, "cispo": cispo, "reinforce": reinforce}


def policy(
  log_probs: Tokens, entropy: Tokens, batch: Batch, kl_weight: Float[Array, ""], *, config
) -> dict[str, Ratio]:
  """Returns the loss and its diagnostics.

      loss = policy + kl_weight KL(policy || reference) - entropy_weight entropy

  each the sum over trajectories and their tokens, over the denominator of learn.aggregate. With
  learn.correction the policy's part of a token is multiplied by min(q, learn.correction_cap), q the
  old log-prob's ratio to the one that sampled (truncated importance sampling; "sequence": the
  product over the trajectory).

  Args:
    log_probs: of the batch's tokens under the policy being trained, in nats; not read where the
      batch's count is 0.
    entropy: of its distribution at the token, in nats.
    batch: packed rows.
    kl_weight: of the KL to the reference, where learn.kl_in is "loss".
    config: learn.

  Returns:
    loss/total: what the update descends.
    loss/policy: its policy part.
    loss/clip_fraction: share of tokens of trajectories whose gradient low or high cuts off.
    loss/dual_clip_fraction: share of them where the dual clip does.
    loss/kl_old: mean of old_log_prob - log_prob, an estimate of KL(old || new) in nats.
    loss/entropy: mean entropy in nats.
    loss/kl_reference: mean of learn.kl, where there is a reference.
    loss/correction: mean of the truncated weights, where there are any.
    loss/logprob_gap: mean of |log_prob - rollout's| over sampled tokens, each once, in nats;
      loss/logprob_gap_depth_<d>: over those of the d-th segments.
    loss/ratio, loss/ratio_squared: mean of r and of r^2, each token once; together the effective
      sample, (sum r)^2 / (n sum r^2).
    loss/ratio_below_<x>: share of tokens with r < x, each once.
  """
  trained = batch.count > 0
  difference = _difference(log_probs, batch.old_log_probs, trained)
  ratio = jnp.exp(_by_sequence(difference, batch) if config.learn.loss == "gspo" else difference)
  log_probs = jnp.where(trained, log_probs, 0)
  entropy = jnp.where(trained, entropy, 0)
  each = LOSSES[config.learn.loss](log_probs, ratio, batch, config)
  count, divisor = batch.count.sum(), batch.divisor.sum()
  mean = lambda x: Ratio(sum=(batch.count * x).sum(), count=count)
  ratios = {}
  if batch.rollout_log_probs is not None:
    weight = _correction(batch, trained, config)
    each *= weight
    ratios["loss/correction"] = mean(weight)
  total = each.sum() - config.learn.entropy_weight * (batch.count * entropy).sum()
  reference = batch.reference_log_probs
  if reference is not None:
    distance = _kl(_difference(log_probs, reference, trained), config.learn.kl)
    ratios["loss/kl_reference"] = mean(distance)
    if config.learn.kl_in == "loss":
      total += kl_weight * (batch.count * distance).sum()
  low, high, dual = 1 - config.learn.clip_low, 1 + config.learn.clip_high, config.learn.clip_dual
  clipped = batch.positive * (ratio > high) + batch.negative * (ratio < low)
  beyond = batch.negative * (ratio > dual) if dual else jnp.zeros_like(ratio)
  ratios |= {
    "loss/total": Ratio(sum=total, count=divisor),
    "loss/policy": Ratio(sum=each.sum(), count=divisor),
    "loss/clip_fraction": Ratio(sum=clipped.sum(), count=count),
    "loss/dual_clip_fraction": Ratio(sum=beyond.sum(), count=count),
    "loss/kl_old": mean(-difference),
    "loss/entropy": mean(entropy),
  }
  return ratios | _gaps(log_probs, batch, config) | _histogram(jnp.exp(difference), trained)


def _difference(log_probs: Tokens, others: Tokens, trained) -> Tokens:
  """Returns log_probs - others where tokens are trained, else 0.

  Bounded: an infinite ratio would turn its zero gradient into NaN.
  """
  difference = jnp.where(trained, log_probs.astype(jnp.float32) - others, 0)
  return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _kl(difference: Tokens, kind: str) -> Tokens:
  """Returns an estimate of KL(policy || reference) from log p - log reference of a sampled token.

  k1: log r; k2: (log r)^2 / 2; k3: 1 / r - 1 + log r (Schulman, "Approximating KL Divergence").
  """
  if kind == "k1":
    return difference
  return difference**2 / 2 if kind == "k2" else jnp.exp(-difference) - 1 + difference


def _sequence_sums(value: Tokens, batch: Batch) -> Tokens:
  """Returns at each token the sum over its trajectory; rows hold each trajectory by itself."""
  width = value.shape[1]
  total = jnp.zeros((value.shape[0], width + 1), value.dtype)
  rows = jnp.arange(value.shape[0])[:, None]
  total = total.at[rows, batch.end].add(value)  # the tokens of a trajectory end together
  return jnp.take_along_axis(total, batch.end, 1)


def _by_sequence(difference: Tokens, batch: Batch) -> Tokens:
  """Returns the mean of log r over the token's trajectory (GSPO, arXiv 2507.18071, Eq 7)."""
  tokens = _sequence_sums((batch.count > 0).astype(jnp.float32), batch)
  return _sequence_sums(difference, batch) / jnp.maximum(tokens, 1)


def _correction(batch: Batch, trained, config) -> Tokens:
  """Returns min(old / rollout probability, cap) of a token or of its whole trajectory."""
  assert batch.rollout_log_probs is not None
  gap = _difference(batch.old_log_probs, batch.rollout_log_probs, trained)
  if config.learn.correction == "sequence":
    gap = jnp.clip(_sequence_sums(gap, batch), -MAX_LOG_RATIO, MAX_LOG_RATIO)
  return jnp.minimum(jnp.exp(gap), config.learn.correction_cap)


def _gaps(log_probs: Tokens, batch: Batch, config) -> dict[str, Ratio]:
  """Returns how far the policy is from what sampled, over all tokens and by depth, each once."""
  trained = batch.count > 0
  sampled = batch.old_log_probs if batch.rollout_log_probs is None else batch.rollout_log_probs
  gap = jnp.abs(jnp.where(trained, log_probs - sampled, 0))
  here = {"": trained}
  here |= {f"_depth_{d}": trained & (batch.depth == d) for d in range(1, config.rollout.depth + 1)}
  return {
    f"loss/logprob_gap{name}": Ratio(
      sum=jnp.where(mask, gap, 0).sum(), count=mask.sum(dtype=jnp.float32)
    )
    for name, mask in here.items()
  }


def _histogram(ratio: Tokens, trained) -> dict[str, Ratio]:
  """Returns the moments of the tokens' ratios and their cumulative histogram, each token once."""
  count = trained.sum(dtype=jnp.float32)
  values = {"": ratio, "_squared": ratio**2}
  values |= {f"_below_{edge}": ratio < edge for edge in RATIO_BINS}
  return {
    f"loss/ratio{name}": Ratio(sum=jnp.where(trained, value, 0).sum(dtype=jnp.float32), count=count)
    for name, value in values.items()
  }
