"""Drives the state of growing trees without a model: every segment is written by hand."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tests import rollout_oracle as oracle
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.rollout import growth as growth_lib
from treepo_jax.rollout import tree as tree_lib

# (prompt_id, row, depth) -> (length, None | "eos" | "answer" | "repetition")
Script = Callable[[int, int, int], tuple[int, str | None]]

STATUS = {
  "open": tree_lib.OPEN,
  "inner": tree_lib.INNER,
  "eos": tree_lib.EOS,
  "answer": tree_lib.ANSWER,
  "length": tree_lib.LENGTH,
  "depth": tree_lib.DEPTH,
  "repetition": tree_lib.REPETITION,
}
STOP = {"eos": segment_lib.AT_EOS, "answer": segment_lib.AT_ANSWER}


def settings(*, prompts: int = 1, **changes) -> growth_lib.Settings:
  """Returns small settings; `pages` counts trees here, by default one for every prompt."""
  trees = changes.pop("pages", prompts)
  segment = changes.pop("segment", 4)
  decoder = segment_lib.Settings(
    segment=segment, temperature=1.0, vocabulary=2**31 - 1, eos_ids=(), closed=-1
  )
  values = {
    "width": 8,
    "depth": 4,
    "branching": 2,
    "initial": 2,
    "remainder": "last",
    "fallback": "random",
    "prompt_length": 6,
    "repetition_window": 2,
    "repetition_count": 2,
    "page": 2,
    "group": 4,
    "merge": False,
  } | changes
  values = {
    "initial_max": values["initial"],
    "response_length": values["depth"] * segment,
    "groups": prompts * -(-values["width"] // values["group"]),
  } | values
  shape = growth_lib.Settings(decoder=decoder, pages=0, unroll=False, **values)
  return growth_lib.Settings(**(vars(shape) | {"pages": trees * shape.pages_of_tree}))


def token(prompt_id: int, row: int, step: int) -> int:
  """Returns a number that no other (prompt, row, step) of a test has."""
  x = (prompt_id * 0x9E3779B1 ^ row * 0x85EBCA77 ^ step * 0xC2B2AE3D) & 0xFFFFFFFF
  x = (x ^ x >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
  x = (x ^ x >> 12) * 0x297A2D39 & 0xFFFFFFFF
  return (x ^ x >> 15) >> 1


def written(
  prompt_id: int, row: int, length: int, why: str | None, merged: bool = False
) -> list[int]:
  """Returns the tokens of a segment; one that repeats itself is one token again and again.

  merged: rows say the same in pairs, and two pairs begin alike.
  """
  who = lambda i: row // (4 if i < 2 else 2) if merged else row
  steps = [0 if why == "repetition" else i for i in range(length)]
  return [token(prompt_id, who(i), i) for i in steps]


def merges(growth: growth_lib.Growth) -> bool:
  return growth.slots.followers.shape[-1] > 0


def in_pairs(script: Script) -> Script:
  """Returns a script that says the same of rows 2 k and 2 k + 1."""
  return lambda name, row, depth: script(name, row // 2, depth)


def state(prompt_id: int, row: int) -> int:
  """Returns where the automaton stands after a node."""
  return token(prompt_id, row, 99) % 100 if row else 0


def hazards(segment: int) -> Script:
  """Returns a script that ends paths at random, most of them in the same wave or none at all."""

  def script(name: int, row: int, depth: int) -> tuple[int, str | None]:
    draw = lambda purpose, n: token(name, row, 1000 + purpose) % n
    last = 1 + name // 5 % 4  # of prompts 4, 9, .. every path ends there, of 0, 5, .. none does
    if draw(0, 100) >= (0, 20, 50, 85, 100 * (depth >= last))[name % 5]:
      return segment, None
    why = ("eos", "answer", "eos", "repetition")[draw(1, 4)]
    return (segment if why == "repetition" else 1 + draw(2, segment)), why

  return script


@functools.cache
def programs(shape: growth_lib.Settings, layers: int = 1):
  """Returns create and advance, compiled."""

  def create(tokens, length, identity, real):
    pool = pages_lib.create(layers, shape.pages, 1, shape.page, 1, jnp.float32)
    return growth_lib.create(tokens, length, identity, real, shape=shape, pool=pool)

  return jax.jit(create), jax.jit(functools.partial(growth_lib.advance, shape=shape))


def run(
  shape: growth_lib.Settings,
  ids: list[int],
  script: Script,
  *,
  lengths: list[int] | None = None,
  real: list[bool] | None = None,
  seed: int = 0,
) -> Iterator[tuple[growth_lib.Growth, np.ndarray]]:
  """Yields the state on the host after each planning, with what the host is told; last: the end."""
  create, advance = programs(shape)
  tokens = np.zeros((len(ids), shape.prompt_length), np.int32)
  lengths = lengths or [3] * len(ids)
  for b, n in enumerate(lengths):
    tokens[b, :n] = [token(ids[b], 0, i) for i in range(n)]
  growth = create(
    tokens,
    np.array(lengths, np.int32),
    np.array(ids, np.uint32),
    np.array(real or [True] * len(ids)),
  )
  segment = segment_lib.nothing((shape.groups, shape.group), shape.decoder.segment, shape.followers)
  while True:
    growth, need = jax.device_get(advance(growth, segment, jax.random.key(seed)))
    yield growth, need
    if not need[3]:
      return
    segment = write(growth, script)


def write(growth: growth_lib.Growth, script: Script) -> segment_lib.Segment:
  """Returns what the script says of the rows in use."""
  slots, tree = growth.slots, growth.tree
  groups, members = slots.live.shape
  followers = slots.followers.shape[2]
  empty = segment_lib.nothing((groups, members), tree.tokens.shape[2], followers)
  out = jax.tree.map(lambda x: np.array(x), empty)
  for at in zip(*np.nonzero(slots.live), strict=True):
    b, row = int(slots.tree[at]), int(slots.node[at])
    name = int(tree.prompt_id[b])
    depth = int(tree.depth[b, row])
    length, why = script(name, row, depth)
    said = written(name, row, length, why, merges(growth))
    out.tokens[at][:length] = said
    for f, other in enumerate(slots.followers[at].tolist()):
      if other != tree_lib.NO_ROW:
        twin = row // 2 == other // 2
        also = written(name, other, *script(name, other, depth), merged=True)
        common = [a == b for a, b in zip(said, also, strict=False)] + [False]
        out.agreed[at][f] = length if twin else min(common.index(False), length - 1)
    out.log_probs[at][:length] = -np.arange(1, length + 1) - row
    out.length[at] = length
    out.state[at] = state(name, row)
    out.stop[at] = STOP[why] if why in STOP else segment_lib.CONTINUES
  return out


def check_shape(growth: growth_lib.Growth, b: int, expected: dict) -> None:
  """Asserts that tree b has the nodes and leaves that the oracle says."""
  tree = jax.tree.map(lambda x: x[b], growth.tree)
  size = len(expected["parent"])
  assert tree.size == size
  expected = expected | {"status": [STATUS[s] for s in expected["status"]]}
  empty = {"parent": -1, "source": -1, "depth": 0, "length": 0, "status": tree_lib.UNUSED}
  for field, rest in empty.items():
    found = tree[field].tolist()
    assert found[:size] == expected[field], field
    assert set(found[size:]) <= {rest}, field
  leaves = tree.leaves.tolist()
  assert leaves == (expected["leaves"] + [-1] * len(leaves))[: len(leaves)]


def check_texts(growth: growth_lib.Growth, b: int, script: Script) -> None:
  """Asserts that every node of tree b holds what was written for it and nothing beyond."""
  tree = jax.tree.map(lambda x: x[b], growth.tree)
  name = int(tree.prompt_id)
  for row in range(tree.parent.shape[0]):
    n = int(tree.length[row])
    _, why = script(name, row, int(tree.depth[row])) if n else (0, None)
    assert tree.tokens[row, :n].tolist() == written(name, row, n, why, merges(growth))
    assert not tree.tokens[row, n:].any() and not tree.log_probs[row, n:].any()
    twin = int(growth.paths.twin[b, row])
    teller = row if twin == tree_lib.NO_ROW else twin
    assert tree.log_probs[row, :n].tolist() == [-i - teller for i in range(1, n + 1)]
    assert twin == tree_lib.NO_ROW or (twin < row and twin // 2 == row // 2)


def observed(growth: growth_lib.Growth, b: int, branching: int):
  """Returns shuffle and cut as they were drawn for tree b, each checked to be possible."""
  tree = jax.tree.map(lambda x: x[b], growth.tree)

  def shuffle(row: int, leaves: list[int]) -> list[int]:
    drawn = tree.source[row : tree.size : branching].tolist()
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(leaves)
    return drawn + [leaf for leaf in leaves if leaf not in drawn]

  def cut(row: int, leaf: int, rows: list[int]) -> int:
    if row >= tree.size:  # no room is left
      return 0
    kept = int(tree.parent[row])
    assert kept in [0, *rows[:-1]]
    return [0, *rows].index(kept)

  return shuffle, cut


def against_oracle(
  shape: growth_lib.Settings, ids: list[int], script: Script, **options
) -> tuple[growth_lib.Growth, dict[int, dict]]:
  """Grows trees beside the oracle, compares after every wave and returns (growth, oracle trees)."""
  names = ("width", "branching", "depth", "response_length", "remainder", "fallback")
  rules = {name: getattr(shape, name) for name in names}
  grown, plants, waves = {}, {}, [0] * len(ids)
  now: list[growth_lib.Growth] = []  # the state that draws are read from

  def plant(b: int, first: int):
    draws = lambda i: lambda *args: observed(now[0], b, shape.branching)[i](*args)
    write = lambda row, depth: script(ids[b], row, depth)
    return oracle.grow(
      write,
      **rules,
      initial=first,
      shuffle=draws(0),
      cut=draws(1),
    )

  for growth, _ in run(shape, ids, script, **options):
    now[:] = [growth]
    for b, wave in enumerate(growth.wave.tolist()):
      if wave == waves[b]:
        continue  # not admitted, between two parts of a wave, or done
      assert wave == waves[b] + 1
      waves[b] = wave
      if wave == 1:
        first = int((growth.tree.depth[b] == 1).sum())
        assert shape.initial <= first <= shape.initial_max
        plants[b] = plant(b, first)
      grown[b] = next(plants[b])
      check_shape(growth, b, grown[b])
  for b, more in plants.items():
    check_texts(growth, b, script)
    assert next(more, None) is None, f"tree {b} is not complete"
  return now[0], grown


def held(growth: growth_lib.Growth) -> list[int]:
  """Returns the pages in use."""
  pages = np.concatenate([growth.paths.prompt.ravel(), growth.paths.pages.ravel()])
  return pages[pages != pages_lib.NO_PAGE].tolist()
