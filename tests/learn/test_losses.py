"""The clipped loss against published numbers, the plain-Python oracle and its own limits."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests import oracle
from treepo_jax import config as config_lib
from treepo_jax.learn import losses
from treepo_jax.learn.packing import Batch

CONFIG = ml_collections.FrozenConfigDict(config_lib.default())

# ratio, advantage, loss at low 0.2, high 0.28, dual clip 10
PUBLISHED = [
  (0.5, 1, -0.5),
  (1.5, 1, -1.28),
  (0.5, -1, 0.8),
  (1.5, -1, 1.5),
  (20, -1, 10),
  (1.1, 2, -2.2),
]


def batch_of(old_log_probs, credit):
  """Returns one row whose token i stands in trajectories of the advantages credit[i]."""
  per_token = lambda f: jnp.asarray([[f(a) for a in credit]], jnp.float32)
  old = jnp.asarray([old_log_probs], jnp.float32)
  zeros = jnp.zeros(old.shape, jnp.int32)
  return Batch(
    tokens=zeros,
    positions=zeros,
    end=zeros,
    previous=zeros,
    old_log_probs=old,
    gain=per_token(lambda a: sum(x for x in a if x > 0)),
    cost=per_token(lambda a: sum(x for x in a if x < 0)),
    count=per_token(len),
    positive=per_token(lambda a: sum(x > 0 for x in a)),
    negative=per_token(lambda a: sum(x < 0 for x in a)),
    node=zeros,
    depth=zeros,
    divisor=jnp.asarray([sum(map(len, credit))], jnp.float32),
    tokens_trained=jnp.zeros(1, jnp.int32),
    tokens_path=jnp.zeros(1, jnp.int32),
  )


def policy(log_probs, old_log_probs, credit):
  return ratios(jnp.asarray([log_probs], jnp.float32), batch_of(old_log_probs, credit))


def ratios(log_probs, batch, config=CONFIG, kl_weight=0.0):
  """Returns the loss's ratios, with the log-probs for entropies: not read but by their bonus."""
  return losses.policy(log_probs, -log_probs, batch, jnp.float32(kl_weight), config=config)


def means(found):
  return {name: float(ratio.mean()) for name, ratio in found.items()}


def gradient(ratio, credit):
  """Returns d loss / d log_prob of one token, divided by the ratio: d loss / d ratio."""
  batch = batch_of([0.0], [credit])
  total = lambda x: ratios(x, batch)["loss/policy"].sum
  return float(jax.grad(total)(jnp.log(jnp.asarray([[ratio]]))).squeeze()) / ratio


def test_published_numbers():
  ratio, advantage, expected = np.transpose(PUBLISHED)
  for r, a, loss in PUBLISHED:
    assert means(policy([np.log(r)], [0.0], [[a]]))["loss/policy"] == pytest.approx(loss, rel=1e-6)
    assert oracle.token_loss(r, a) == pytest.approx(loss)
  got = means(policy(np.log(ratio), [0.0] * 6, [[a] for a in advantage]))
  assert got["loss/policy"] == pytest.approx(expected.mean(), rel=1e-6)  # 1.3866667
  assert got["loss/clip_fraction"] == pytest.approx(2 / 6)
  assert got["loss/dual_clip_fraction"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_advantages_are_all_that_the_loss_needs(seed):
  """One token in many trajectories equals the token in each of them, and so do the metrics."""
  rng = np.random.default_rng(seed)
  old = -rng.random(200) * 3
  new = old + rng.normal(size=200) * 1.5
  credit = [rng.normal(size=rng.integers(1, 17)).tolist() + [0.0] * (i % 3) for i in range(200)]
  got = means(policy(new, old, credit))
  one_by_one = [
    ([n], [o], a) for n, o, through in zip(new, old, credit, strict=True) for a in through
  ]
  for name, value in oracle.policy(one_by_one).items():
    assert got[name] == pytest.approx(value, rel=2e-6, abs=1e-6), name
  assert got["loss/logprob_gap"] == pytest.approx(np.abs(new - old).mean(), rel=1e-5)  # each once


@pytest.mark.parametrize(
  ("ratio", "advantage", "expected"),
  [
    (1.29, 1, 0),  # already above the clip
    (0.79, -1, 0),  # already below it
    (10.1, -1, 0),  # beyond the dual clip
    (1.27, 1, -1),
    (0.79, 1, -1),  # too low for a good token: pulled up
    (0.81, -1, 1),
    (9.9, -1, 1),  # too high for a bad one: pushed down
    (1.0, 1, -1),
    (1.0, -1, 1),
  ],
)
def test_gradient_stops_where_the_clip_says(ratio, advantage, expected):
  assert gradient(ratio, [advantage]) == pytest.approx(expected, rel=1e-5)


def test_gradient_of_a_shared_token_is_the_sum_over_its_trajectories():
  assert gradient(1.1, [2.0, -0.5, 0.25, -3]) == pytest.approx(-2.25 + 3.5, rel=1e-5)
  assert gradient(1.5, [2.0, -0.5, 0.25, -3]) == pytest.approx(3.5, rel=1e-5)


def test_untrained_positions_are_not_read():
  batch = batch_of([0.0, -1.0], [[], [1.0]])
  log_probs = jnp.asarray([[jnp.nan, -1.0]])
  total = lambda x: ratios(x, batch)["loss/policy"].sum
  np.testing.assert_array_equal(jax.grad(total)(log_probs), [[0, -1]])
  assert means(ratios(log_probs, batch))["loss/policy"] == -1


@pytest.mark.parametrize("log_prob", [-1e4, 1e4])
def test_ratios_beyond_float32_have_finite_loss_and_gradient(log_prob):
  for advantage in (1.0, -1.0):
    batch = batch_of([0.0], [[advantage]])
    total = lambda x, b=batch: ratios(x, b)["loss/policy"].sum
    value, slope = jax.value_and_grad(total)(jnp.asarray([[log_prob]]))
    assert np.isfinite(value) and slope == 0


def test_ratios_add_before_they_divide():
  one = policy([0.0, 0.0], [0.0, 0.0], [[1.0], [1.0]])["loss/policy"]
  other = policy([0.0], [0.0], [[-2.0, -2.0, -2.0]])["loss/policy"]
  # (-1 - 1 + 6) / 5 = 0.8; a mean of the two means would give 0.5
  assert float((one + other).mean()) == pytest.approx(0.8)
  assert float(losses.Ratio(sum=jnp.zeros(()), count=jnp.zeros(())).mean()) == 0
