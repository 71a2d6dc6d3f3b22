"""Walking a known node is drawing anew: the joint law is that of independent samples.

Nodes are drawn here with sampling.draw from a table of distributions, so that every joint
probability is known; wrong ways to share are put to the same test, and fail it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from treepo_jax.decoding import sampling
from treepo_jax.rollout import sharing
from treepo_jax.rollout import tree as tree_lib

TOKENS, SEGMENT, PAIRS = 3, 3, 20_000
FALSE_ALARM = 1e-4  # of a right walk so many seeds fail


# After every text of fewer than SEGMENT tokens, by its number.
LOGITS = 1.5 * np.random.default_rng(0).normal(size=(2 * TOKENS**SEGMENT, TOKENS))


def number(tokens) -> jax.Array:
  """Returns a text as a number; that of another length is another one."""
  place = jnp.ones((), jnp.int32)
  for token in tokens:
    place = place * TOKENS + token
  return place


def law() -> np.ndarray:
  """Returns the probability of each whole text."""
  chance = special.softmax(LOGITS, -1)
  out = np.zeros((TOKENS,) * SEGMENT)
  for text in np.ndindex(out.shape):
    out[text] = np.prod([chance[int(number(text[:i])), t] for i, t in enumerate(text)])
  return out.reshape(-1) / out.sum()


def drawn(uniform, tokens=None, given=0):
  """Returns a node's tokens and their shares; the first `given` of `tokens` are taken over."""
  said, low, high = [], [], []
  for step in range(SEGMENT):
    row = jnp.asarray(LOGITS, jnp.float32)[number(said)]
    draw = sampling.draw(
      row[None], uniform[step][None], jnp.zeros((1, 0)), 1.0, TOKENS, 0, 1.0, 0.0
    )
    token = draw.token[0]
    if tokens is not None:
      token = jnp.where(step < given, tokens[step], token)
    said.append(token)
    low.append(draw.low[0])
    high.append(draw.high[0])
  return jnp.stack(said), jnp.stack(low), jnp.stack(high)


def known(tokens, low, high):
  """Returns a tree that holds one whole node, a new one beside it, and the shares."""
  tree = tree_lib.create(
    jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32),
    width=2, depth=1, segment=SEGMENT,
  )  # fmt: skip
  tree = jax.tree.map(lambda x: x[0], tree)
  tree = tree_lib.attach(tree, jnp.zeros(2, jnp.int32), jnp.full(2, -1))
  tree = dataclasses.replace(
    tree,
    tokens=tree.tokens.at[1].set(tokens),
    length=tree.length.at[1].set(SEGMENT),
    status=tree.status.at[1].set(tree_lib.DEPTH),
  )
  spread = lambda x: jnp.zeros((3, SEGMENT)).at[1].set(x)
  return tree, spread(low), spread(high)


def walked(first, second):
  """Returns (tokens of a node, tokens of one that walks it, tokens walked)."""
  tokens, low, high = drawn(first)
  tree, low, high = known(tokens, low, high)
  new, none = jnp.array([2, 3]), jnp.zeros(2, jnp.int32)
  shared = sharing.walk(
    tree,
    jnp.zeros(3, jnp.int32),
    sharing.candidates(tree, jnp.full(3, -1)),
    low,
    high,
    new,
    none,
    none,
    jnp.stack([second, second]),
  )
  assert shared.given.shape == (2,)
  return tokens, drawn(second, tokens, shared.given[0])[0], shared.given[0], shared.whole[0]


def keeping_the_first_number(first, second):
  """Wrong: where the walk is left, the token is drawn with the other's number."""
  tokens, other, given, _ = walked(first, second)
  mixed = jnp.where(jnp.arange(SEGMENT) == given, first, second)
  return tokens, drawn(mixed, tokens, given)[0]


def drawing_twice(first, second):
  """Wrong: a token is kept with its probability, and else drawn from all, itself among them."""
  tokens, other, given, _ = walked(first, second)
  return tokens, drawn((second * 7919) % 1, tokens, given)[0]


def wider(first, second):
  """Wrong: tokens are kept more readily than they are likely (lenience)."""
  tokens, low, high = drawn(first)
  kept = (second >= low - 0.1) & (second < high + 0.1)
  given = jnp.cumprod(kept).sum()
  return tokens, drawn(second, tokens, given)[0]


@functools.cache
def joint(way) -> np.ndarray:
  """Returns how often each pair of texts was drawn."""
  uniform = jax.random.uniform(jax.random.key(5), (PAIRS, 2, SEGMENT))
  first, second, *_ = jax.jit(jax.vmap(lambda u: way(u[0], u[1])))(uniform)
  code = lambda x: np.asarray(x) @ TOKENS ** np.arange(SEGMENT)[::-1]
  cells = np.bincount(
    code(first) * TOKENS**SEGMENT + code(second), minlength=TOKENS ** (2 * SEGMENT)
  )
  return cells.reshape(TOKENS**SEGMENT, -1)


def pvalue(count: np.ndarray) -> float:
  """Returns how likely independent samples are so far off; rare pairs are put together."""
  expected = PAIRS * np.outer(law(), law()).reshape(-1)
  rare = expected < 5
  put = lambda x: np.append(x[~rare], x[rare].sum())
  return float(stats.chisquare(put(count.reshape(-1)), put(expected)).pvalue)


def information(count: np.ndarray) -> float:
  """Returns the mutual information of the pairs in nats, less what chance alone gives."""
  share = count / count.sum()
  sides = np.outer(share.sum(1), share.sum(0))
  some = share > 0
  cells = [(count.sum(axis) > 0).sum() - 1 for axis in (0, 1)]
  chance = cells[0] * cells[1] / (2 * count.sum())
  return float((share[some] * np.log(share[some] / sides[some])).sum() - chance)


def test_one_that_walks_is_an_independent_sample():
  count = joint(walked)
  assert pvalue(count) > FALSE_ALARM
  assert abs(information(count)) < 3e-3
  for side in (0, 1):
    assert stats.chisquare(count.sum(side), PAIRS * law()).pvalue > FALSE_ALARM


@pytest.mark.parametrize("way", [keeping_the_first_number, drawing_twice, wider])
def test_wrong_ways_to_walk_are_seen(way):
  assert pvalue(joint(way)) < 1e-12


def test_a_walk_goes_as_far_as_decoding_would_and_changes_nothing():
  uniform = jax.random.uniform(jax.random.key(1), (2000, 2, SEGMENT))
  first, second, given, whole = jax.jit(jax.vmap(lambda u: walked(u[0], u[1])))(uniform)
  alone = jax.jit(jax.vmap(lambda u: drawn(u[1])[0]))(uniform)
  np.testing.assert_array_equal(second, alone)
  common = np.cumprod(np.asarray(first) == np.asarray(alone), 1).sum(1)
  assert (np.asarray(given) <= common).all()
  assert (np.asarray(given) == common).mean() > 0.999  # but for numbers within rounding of a bound
  np.testing.assert_array_equal(np.asarray(whole), np.asarray(given) == SEGMENT)
  assert 0.02 < np.asarray(whole).mean() < 0.9
