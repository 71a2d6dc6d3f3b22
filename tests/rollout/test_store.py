"""What is decoded reaches its node, its twins and those that leave it, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treepo_jax import config as config_lib
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.rollout import grow, schedule
from treepo_jax.rollout import growth as growth_lib
from treepo_jax.rollout import tree as tree_lib

SEGMENT, WIDTH = 4, 5
VALUES = ("log_probs", "sampled_log_probs", "low", "high")


@functools.cache
def shape(response_length: int = 0) -> grow.Settings:
  config = config_lib.default()
  config.rollout.update(width=WIDTH, depth=2, segment=SEGMENT, page=4, rows=8, group=8)
  config.rollout.update(repetition_count=0, prompt_length=4, response_length=response_length)
  settings = grow.settings(config_lib.validate(config), vocabulary=99, eos_ids=(), closed=2)
  return dataclasses.replace(settings, pages=settings.pages_of_tree)


@functools.cache
def programs(settings: grow.Settings):
  """Returns (start, fill, store) of one prompt that has WIDTH open nodes below it."""

  def fill(growth):
    tree, paths = growth.tree, growth.paths
    slots, _ = schedule.fill(tree, paths, settings.groups, settings.group, settings.followers)
    return dataclasses.replace(growth, slots=slots)

  def start():
    pool = pages_lib.create(1, settings.pages, 1, settings.page, 1, jnp.float32)
    one = jnp.ones(1, jnp.int32)
    prompt = jnp.ones((1, settings.prompt_length), jnp.int32)
    growth = growth_lib.create(
      prompt, one, one.astype(jnp.uint32), one > 0, shape=settings, pool=pool
    )
    below, none = jnp.zeros((1, WIDTH), jnp.int32), jnp.full((1, WIDTH), tree_lib.NO_ROW)
    tree = jax.vmap(tree_lib.attach)(growth.tree, below, none)
    return fill(dataclasses.replace(growth, tree=tree, admitted=one > 0))

  return jax.jit(start), jax.jit(fill), jax.jit(functools.partial(growth_lib.store, shape=settings))


def decoded(growth, agreed: list[int], length: int = SEGMENT, seed: int = 0):
  """Returns a segment of the one live row, whose followers go along for `agreed` tokens."""
  rng, slots = np.random.default_rng(seed), growth.slots
  empty = segment_lib.nothing(slots.live.shape, SEGMENT, slots.followers.shape[-1])
  out = jax.tree.map(np.array, empty)
  assert slots.live.sum() == 1 and slots.live[0, 0]
  out.length[0, 0] = length
  out.tokens[0, 0, :length] = rng.integers(1, 99, length)
  for name in VALUES:
    out[name][0, 0, :length] = rng.random(length) + 0.1
  given = int(growth.paths.given[0, slots.node[0, 0]])
  out.tokens[0, 0, :given] = growth.tree.tokens[0, slots.node[0, 0], :given]
  out.low[0, 0, :given] = out.high[0, 0, :given] = 0  # as the decoder does
  out.entropy[0, 0] = 2.5 * length
  out.agreed[0, 0, : len(agreed)] = agreed
  return out


def held(growth, row: int) -> dict[str, list[float]]:
  """Returns what is held of each token of a node."""
  tree = {name: growth.tree[name][0, row] for name in ("tokens", "log_probs", "sampled_log_probs")}
  return {
    k: v.tolist() for k, v in (tree | {n: growth.paths[n][0, row] for n in VALUES[2:]}).items()
  }


def said(segment, until: int) -> dict[str, list[float]]:
  """Returns the same of the first tokens that were decoded, 0 beyond."""
  names = ("tokens", *VALUES)
  return {n: np.where(np.arange(SEGMENT) < until, segment[n][0, 0], 0).tolist() for n in names}


def test_followers_take_what_they_have_in_common_and_keep_it():
  start, fill, store = programs(shape())
  growth = jax.device_get(start())
  assert growth.slots.followers[0, 0].tolist() == [2, 3, 4, 5]
  first = decoded(growth, [4, 2, 2, 0])
  growth = jax.tree.map(np.array, jax.device_get(fill(store(growth, first))))
  for row, until in ((1, 4), (2, 4), (3, 2), (4, 2), (5, 0)):
    assert held(growth, row) == said(first, until)
  assert growth.tree.status[0, :6].tolist() == [tree_lib.INNER, *[tree_lib.ACTIVE] * 2, 1, 1, 1]
  assert growth.paths.twin[0, 2] == 1
  assert growth.paths.entropy[0, :6].tolist() == [0, 2.5, 2.5, 0, 0, 0]

  # Nodes 3 and 4 are a bundle now, 5 is another, left out here.
  assert growth.slots.node[0, :2].tolist() == [3, 5] and growth.slots.live.sum() == 2
  growth.slots.live[0, 1] = False
  assert growth.slots.followers[0, 0].tolist() == [4, *[tree_lib.NO_ROW] * 3]
  second = decoded(growth, [3], seed=1)
  growth = jax.device_get(store(growth, second))
  old, new = said(first, 2), said(second, SEGMENT)
  mixed = {name: old[name][:2] + new[name][2:] for name in old}
  assert held(growth, 3) == mixed
  assert held(growth, 4) == {name: [*values[:3], 0] for name, values in mixed.items()}
  assert growth.paths.given[0, 4] == 3 and growth.tree.status[0, 4] == tree_lib.OPEN
  assert (held(growth, 1), held(growth, 5)) == (said(first, 4), said(first, 0))  # untouched


@pytest.mark.parametrize("agreed", [1, 3])
def test_what_lies_beyond_the_longest_answer_is_not_kept(agreed):
  start, fill, store = programs(shape(response_length=2))
  growth = jax.device_get(start())
  segment = decoded(growth, [SEGMENT, agreed, SEGMENT, SEGMENT])
  growth = jax.device_get(fill(store(growth, segment)))
  assert held(growth, 1) == held(growth, 2) == said(segment, 2)
  assert growth.tree.status[0, 1:4].tolist() == [tree_lib.LENGTH, tree_lib.LENGTH, tree_lib.OPEN]
  assert held(growth, 3) == said(segment, agreed)  # it is decoded from there
  again = decoded(growth, [], seed=1)
  growth = jax.device_get(store(growth, again))
  mixed = {k: [*v[:agreed], *said(again, 2)[k][agreed:]] for k, v in said(segment, 2).items()}
  assert held(growth, 3) == mixed  # nor what was known of it


def test_merged_trees_hold_the_log_probs_of_both_laws():
  start, _, store = programs(shape())
  growth = jax.device_get(start())
  segment = decoded(growth, [SEGMENT] * 4)
  growth = store(growth, segment)
  tree = jax.device_get(jax.vmap(tree_lib.merge)(growth.tree, growth.paths.twin))
  assert tree.size[0] == 2
  for name in ("log_probs", "sampled_log_probs"):
    assert tree[name][0, 1].tolist() == segment[name][0, 0].tolist()
    assert not tree[name][0, 2:].any()
