"""What is decoded reaches its node, call by call and token by token, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treepo_jax import config as config_lib
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.rollout import grow, planning
from treepo_jax.rollout import growth as growth_lib
from treepo_jax.rollout import tree as tree_lib

SEGMENT, PAGE, WIDTH, ROWS = 8, 2, 5, 3  # fewer rows than nodes: they take turns
LOGS, SHARES = ("log_probs", "sampled_log_probs"), ("low", "high", "states", "entropy")
NAMES = ("tokens", *LOGS, *SHARES)


@functools.cache
def shape(stride: int, response_length: int, prune: str) -> grow.Settings:
  config = config_lib.default()
  config.rollout.update(width=WIDTH, depth=2, segment=SEGMENT, page=PAGE, rows=ROWS, group=ROWS)
  config.rollout.update(repetition_count=0, prompt_length=4, response_length=response_length)
  config.rollout.update(stride=stride, prune=prune)
  settings = grow.settings(config_lib.validate(config), vocabulary=99, eos_ids=(), closed=2)
  return dataclasses.replace(settings, pages=settings.pages_of_tree)


@functools.cache
def programs(settings: grow.Settings):
  """Returns (start, fill, store) of one prompt that has WIDTH open nodes below it."""

  def start():
    pool = pages_lib.create(1, settings.pages, 1, settings.page, 1, jnp.float32)
    one = jnp.ones(1, jnp.int32)
    prompt = jnp.ones((1, settings.prompt_length), jnp.int32)
    growth = growth_lib.create(
      prompt, one, one.astype(jnp.uint32), one > 0, shape=settings, pool=pool
    )
    below, none = jnp.zeros((1, WIDTH), jnp.int32), jnp.full((1, WIDTH), tree_lib.NO_ROW)
    tree = jax.vmap(tree_lib.attach)(growth.tree, below, none)
    return dataclasses.replace(growth, tree=tree, admitted=one > 0)

  def fill(growth):
    reward = jnp.zeros((1, WIDTH))
    return planning.advance(growth, jax.random.key(0), jnp.ones(()), reward, shape=settings)[0]

  return jax.jit(start), jax.jit(fill), jax.jit(functools.partial(growth_lib.store, shape=settings))


def held(growth, row: int) -> dict[str, list[float]]:
  """Returns what is held of each token of a node."""
  tree, paths = growth.tree, growth.paths
  return {name: (tree if name in tree else paths)[name][0, row].tolist() for name in NAMES}


def blank() -> dict[str, list[float]]:
  return {name: [0] * SEGMENT for name in NAMES}


def value(random: np.random.Generator, name: str) -> float:
  whole = name in ("tokens", "states")
  return int(random.integers(3, 99)) if whole else float(np.float32(random.random() + 0.1))


def given_to(
  growth, known: dict[int, int], random, entropy: bool
) -> tuple[growth_lib.Growth, dict[int, dict]]:
  """Gives nodes their first tokens, as a cut inside a segment does."""
  growth = jax.tree.map(np.array, jax.device_get(growth))
  nodes = {row: blank() for row in range(1, 1 + WIDTH)}
  for row, n in known.items():
    growth.paths.given[0, row] = n
    for name in NAMES:
      told = entropy or name != "entropy"
      nodes[row][name][:n] = [value(random, name) * told for _ in range(n)]
      (growth.tree if name in growth.tree else growth.paths)[name][0, row] = nodes[row][name]
  return growth, nodes


@pytest.mark.parametrize(
  ("stride", "longest", "prune"),
  [(2, 0, "entropy"), (2, 5, "none"), (6, 5, "entropy"), (6, 0, "none"), (8, 0, "entropy")],
)
def test_nodes_take_what_is_decoded_stride_by_stride(stride, longest, prune):
  settings = shape(stride, longest, prune)
  start, fill, store = programs(settings)
  allowed, statuses = longest or SEGMENT, set()
  most = min(allowed, SEGMENT)
  for seed in range(5):
    random = np.random.default_rng(seed)
    known = {row: int(random.integers(0, most)) for row in (1, 3, 4)}
    if seed == 3:  # more than the longest answer holds
      known[2] = SEGMENT - 1
    growth, nodes = given_to(start(), known, random, settings.decoder.entropy)
    knows, over, decoded = dict.fromkeys(nodes, 0) | known, {}, 0
    while len(over) < WIDTH:
      growth = jax.tree.map(np.array, jax.device_get(fill(growth)))
      slots, rows = growth.slots, growth.rows
      out = jax.tree.map(np.array, segment_lib.nothing(slots.live.shape, stride))
      opened = [row for row in nodes if row not in over]
      assert slots.node[slots.live].tolist() == opened[:ROWS]
      for at in zip(*np.nonzero(slots.live), strict=True):
        row, base = int(slots.node[at]), int(rows.base[at])
        node, room = nodes[row], min(stride, SEGMENT - base)
        first = max(knows[row] - base, 0)  # tokens of the call that are known
        ends = first < room and random.random() < 0.5
        n = int(random.integers(first, room)) + 1 if ends else room
        for i in range(n):
          for name in NAMES:
            out[name][at][i] = value(random, name)
          out.entropy[at][i] *= settings.decoder.entropy
          if i < first:  # as the decoder does
            out.tokens[at][i], out.low[at][i], out.high[at][i] = node["tokens"][base + i], 0, 0
        out.length[at], out.stop[at] = n, segment_lib.AT_EOS if ends else segment_lib.CONTINUES
        until = min(base + n, allowed)
        for name in NAMES:
          kept = node[name][: min(knows[row], allowed)]
          said = [*kept[:base], *out[name][at][:n].tolist()]
          node[name] = [*kept, *said[len(kept) : until]]
          node[name] += [0] * (SEGMENT - len(node[name]))
        knows[row] = max(knows[row], until)
        if ends or until >= most:
          ended = tree_lib.EOS if ends and base + n <= allowed else tree_lib.ACTIVE
          over[row] = tree_lib.LENGTH if ended == tree_lib.ACTIVE and longest else ended
          knows[row] = until
      growth, decoded = jax.device_get(store(growth, out)), decoded + out.length.sum()
      assert growth.counters.decoded == decoded
      for row, node in nodes.items():
        assert held(growth, row) == node, (seed, row)
        assert growth.tree.status[0, row] == over.get(row, tree_lib.OPEN)
        assert growth.tree.length[0, row] == (knows[row] if row in over else 0)
        pages = growth.paths.pages[0, row]
        if row not in over:
          assert growth.paths.given[0, row] == knows[row]
          assert (pages != pages_lib.NO_PAGE).sum() * PAGE <= -(-knows[row] // stride) * stride
        else:
          kept = over[row] == tree_lib.ACTIVE
          assert ((pages != pages_lib.NO_PAGE) == kept).all()
      statuses |= set(over.values())
      mine = growth.paths.pages[growth.paths.pages != pages_lib.NO_PAGE]
      np.testing.assert_array_equal(growth.pool.count[mine], 1)
      assert growth.pool.count.sum() == mine.size == settings.pages - growth.pool.size
    assert growth_lib.ready(jax.tree.map(jnp.asarray, growth)).tolist() == [True]
  assert statuses == {tree_lib.EOS, tree_lib.LENGTH if longest else tree_lib.ACTIVE}
