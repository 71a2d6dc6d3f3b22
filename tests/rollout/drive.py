"""Drives the state of growing trees without a model: every segment is written by hand."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tests import rollout_oracle as oracle
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.rollout import branching, fallback, planning, pruning
from treepo_jax.rollout import growth as growth_lib
from treepo_jax.rollout import tree as tree_lib

# (prompt_id, row, depth) -> (length, None | "eos" | "answer" | "repetition"), and where the text
# loops besides a third entry, True
Script = Callable[[int, int, int], tuple]

STATUS = {
  "open": tree_lib.OPEN,
  "inner": tree_lib.INNER,
  "eos": tree_lib.EOS,
  "answer": tree_lib.ANSWER,
  "length": tree_lib.LENGTH,
  "depth": tree_lib.DEPTH,
  "repetition": tree_lib.REPETITION,
  "short": tree_lib.SHORT,
  "pruned": tree_lib.PRUNED,
}
STOP = {"eos": segment_lib.AT_EOS, "answer": segment_lib.AT_ANSWER}


CLOSED = 100  # state of the box automaton

DEFAULTS = {"width": 8, "depth": 4, "segment": 4, "initial": 2, "remainder": "last"}
FLAT = {
  "prompt_length": 6,
  "repetition_window": 2,
  "repetition_count": 2,
  "page": 2,
  "group": 4,
}
FALLBACK = {"place": "fallback", "source": "fallback_from"}
FALLBACK |= {name: f"fallback_{name}" for name in ("window", "windows", "block", "least")}


def rules(**changes) -> oracle.Rules:
  """Returns small rules of a rollout."""
  return oracle.Rules(**(DEFAULTS | changes))


def settings(*, prompts: int = 1, **changes) -> growth_lib.Settings:
  """Returns small settings of `rules` and others; `pages` counts trees, as many as prompts."""
  trees = changes.pop("pages", prompts)
  draw = changes.pop("initial_draw", "prompt")
  stride = changes.pop("stride", 0)
  names = {field.name for field in dataclasses.fields(oracle.Rules)}
  r = rules(**{name: changes.pop(name) for name in names & set(changes)})
  same = lambda policy, **others: policy(
    **{f.name: getattr(r, f.name) for f in dataclasses.fields(policy) if f.name not in others},
    **others,
  )
  group = (FLAT | changes)["group"]
  values = {"groups": prompts * -(-r.width // group), "merge": False} | FLAT | changes
  shape = growth_lib.Settings(
    width=r.width,
    depth=r.depth,
    branch=same(
      branching.Policy,
      branching_max=max(r.branching, r.branching_max),
      initial_max=max(r.initial, r.initial_max),
      initial_draw=draw,
    ),
    fallback=fallback.Policy(**{own: getattr(r, name) for own, name in FALLBACK.items()}),
    prune=pruning.Policy(value=r.prune, share=r.prune_share, keep=r.prune_keep),
    response_length=r.longest,
    repetition_first=r.repetition_first,
    min_length=r.min_length,
    decoder=segment_lib.Settings(
      segment=r.segment,
      stride=stride or r.segment,
      temperature=1.0,
      vocabulary=2**31 - 1,
      eos_ids=(),
      closed=CLOSED,
      stop_at=r.stop_at,
      entropy=r.prune == "entropy",
    ),
    pages=0,
    attention="xla",
    unroll=False,
    merge=bool(values.pop("merge")),
    **values,
  )
  return dataclasses.replace(shape, pages=trees * shape.pages_of_tree)


def token(prompt_id: int, row: int, step: int) -> int:
  """Returns a number that no other (prompt, row, step) of a test has."""
  x = (prompt_id * 0x9E3779B1 ^ row * 0x85EBCA77 ^ step * 0xC2B2AE3D) & 0xFFFFFFFF
  x = (x ^ x >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
  x = (x ^ x >> 12) * 0x297A2D39 & 0xFFFFFFFF
  return (x ^ x >> 15) >> 1


def written(prompt_id: int, row: int, length: int, why: str | None) -> list[int]:
  """Returns the tokens of a segment; one that repeats itself is one token again and again."""
  return [token(prompt_id, row, 0 if why == "repetition" else i) for i in range(length)]


def boxed(prompt_id: int, row: int) -> bool:
  """Returns whether a box has closed where a node ends; nearly half of the nodes say so."""
  return token(prompt_id, row, 98) % 5 < 2


def state(prompt_id: int, row: int) -> int:
  """Returns where the automaton stands after a node."""
  return CLOSED if boxed(prompt_id, row) else token(prompt_id, row, 99) % 100


def log_probs(prompt_id: int, row: int, length: int) -> list[float]:
  """Returns the log-prob of each token; sums of them are exact in float32."""
  return [-(token(prompt_id, row, 200 + i) % 192 + 1) / 64 for i in range(length)]


def entropy(prompt_id: int, row: int) -> float:
  """Returns the mean entropy of a node's tokens."""
  return token(prompt_id, row, 97) % 256 / 64


def reward(prompt_id: int, row: int) -> float:
  return 1.0 if token(prompt_id, row, 96) % 3 == 0 else -1.0


def hazards(segment: int, shape: growth_lib.Settings | None = None) -> Script:
  """Returns a script that ends paths at random, most of them in the same wave or none at all."""
  boxes = shape is None or shape.decoder.stop_at == "box"  # rows stop where one closes
  # Where a cut may lie inside a loop, what is left of it may loop still.
  cuts = shape.fallback if shape else None
  loops = cuts is None or (cuts.place not in ("log_prob", "block", "inverse_block")) & (
    cuts.window % segment == 0
  )

  def script(name: int, row: int, depth: int) -> tuple[int, str | None]:
    draw = lambda purpose, n: token(name, row, 1000 + purpose) % n
    last = 1 + name // 5 % 4  # of prompts 4, 9, .. every path ends there, of 0, 5, .. none does
    if draw(0, 100) >= (0, 20, 50, 85, 100 * (depth >= last))[name % 5]:
      return segment, None
    why = ("eos", "answer" if boxes else "eos", "eos", "repetition" if loops else "eos")[draw(1, 4)]
    return (segment if why == "repetition" else 1 + draw(2, segment)), why

  return script


@functools.cache
def programs(shape: growth_lib.Settings, layers: int = 1):
  """Returns create, take and plan, compiled."""

  def create(tokens, length, identity, real):
    pool = pages_lib.create(layers, shape.pages, 1, shape.page, 1, jnp.float32)
    return growth_lib.create(tokens, length, identity, real, shape=shape, pool=pool)

  take = jax.jit(functools.partial(planning.take, shape=shape))
  return jax.jit(create), take, jax.jit(functools.partial(planning.advance, shape=shape))


def run(
  shape: growth_lib.Settings,
  ids: list[int],
  script: Script,
  *,
  lengths: list[int] | None = None,
  real: list[bool] | None = None,
  seed: int = 0,
  heat: float = 1.0,
) -> Iterator[tuple[growth_lib.Growth, np.ndarray]]:
  """Yields the state on the host after each planning, with what the host is told; last: the end."""
  create, take, plan = programs(shape)
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
  segment = segment_lib.nothing((shape.groups, shape.group), shape.decoder.stride)
  first: dict[tuple[int, int], int] = {}  # tokens that a node was given to begin with
  while True:
    key = jax.random.key(seed)
    growth = jax.device_get(take(growth, segment, key))
    leaves = growth.tree.leaves
    earned = [
      [reward(i, row) if row > 0 else 0.0 for row in own]
      for i, own in zip(ids, leaves.tolist(), strict=True)
    ]
    earned = np.array(earned, np.float32)
    growth, need = jax.device_get(plan(growth, key, np.float32(heat), earned))
    yield growth, need
    if not need[3]:
      return
    segment = write(growth, script, first)


def began(script: Script, name: int, row: int, depth: int, given: int) -> tuple:
  """Returns what the script says of a node whose first tokens are given: more than those."""
  length, why, *loops = script(name, row, depth)
  if given and why == "repetition":
    why = None  # no room to loop in
  if given >= length:
    length = given + 1
  return length, why, *(loops if not given else [])


def write(
  growth: growth_lib.Growth, script: Script, first: dict[tuple[int, int], int]
) -> segment_lib.Segment:
  """Returns what the script says of the rows in use, a stride of it.

  first: tokens that each node was given to begin with; filled.
  """
  slots, tree = growth.slots, growth.tree
  groups, members, stride = growth.rows.tokens.shape
  out = jax.tree.map(lambda x: np.array(x), segment_lib.nothing((groups, members), stride))
  for at in zip(*np.nonzero(slots.live), strict=True):
    b, row = int(slots.tree[at]), int(slots.node[at])
    name, base = int(tree.prompt_id[b]), int(growth.rows.base[at])
    given = first.setdefault((b, row), int(growth.paths.given[b, row]))
    length, why, *_ = began(script, name, row, int(tree.depth[b, row]), given)
    said = tree.tokens[b, row, :given].tolist() + written(name, row, length, why)[given:]
    stop = min(length, base + stride)
    here = slice(0, stop - base)
    out.tokens[at][here] = said[base:stop]
    out.log_probs[at][here] = log_probs(name, row, length)[base:stop]
    out.sampled_log_probs[at][here] = log_probs(name, row, length)[base:stop]
    out.entropy[at][here] = entropy(name, row)
    out.states[at][here] = state(name, row)
    out.length[at] = stop - base
    out.stop[at] = STOP[why] if why in STOP and stop == length else segment_lib.CONTINUES
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


def check_texts(growth: growth_lib.Growth, b: int, script: Script, expected: dict) -> None:
  """Asserts that every node of tree b holds what was written for it and nothing beyond."""
  tree = jax.tree.map(lambda x: x[b], growth.tree)
  name, texts, logs = int(tree.prompt_id), {}, {}
  for row in range(tree.parent.shape[0]):
    n = int(tree.length[row])
    given = expected["given"][row] if row < tree.size else 0
    why = began(script, name, row, int(tree.depth[row]), given)[1] if n else None
    guide = expected["guide"][row] if given else 0
    texts[row], logs[row] = written(name, row, n, why), log_probs(name, row, n)
    if given:
      texts[row][:given], logs[row][:given] = texts[guide][:given], logs[guide][:given]
    assert tree.tokens[row, :n].tolist() == texts[row]
    assert tree.log_probs[row, :n].tolist() == logs[row]
    assert not tree.tokens[row, n:].any() and not tree.log_probs[row, n:].any()


def rules_of(shape: growth_lib.Settings, heat: float) -> oracle.Rules:
  """Returns the rules that settings were made of."""
  names = {field.name for field in dataclasses.fields(oracle.Rules)}
  return oracle.Rules(
    **{name: value for name, value in vars(shape.branch).items() if name in names},
    width=shape.width,
    **{name: getattr(shape.fallback, own) for own, name in FALLBACK.items()},
    prune=shape.prune.value,
    prune_share=shape.prune.share,
    prune_keep=shape.prune.keep,
    segment=shape.decoder.segment,
    stop_at=shape.decoder.stop_at,
    depth=shape.depth,
    response_length=shape.response_length,
    repetition_first=shape.repetition_first,
    min_length=shape.min_length,
    allocation_temperature=heat,
  )


def draws(shape: growth_lib.Settings, name: int, seed: int):
  """Returns the oracle's `draw`: the numbers that a tree is planned with."""
  first, others = jax.device_get(_numbers(shape, np.uint32(name), seed))

  def draw(purpose: str, wave: int) -> list[float]:
    return (others[purpose][wave] if wave else first[purpose][0]).tolist()

  return draw


@functools.partial(jax.jit, static_argnums=0)
def _numbers(shape: growth_lib.Settings, name: jax.Array, seed: int):
  key, waves = jax.random.key(seed), jnp.arange(200)
  others = planning.draws(key, jnp.full(200, name), waves, shape.width)
  return planning.first_draws(key, name[None], shape=shape), others


def plant(shape: growth_lib.Settings, name: int, script: Script, *, seed=0, heat=1.0):
  """Returns the oracle's tree of a prompt, wave by wave."""

  def write(row: int, depth: int, given: int) -> dict:
    length, why, *loops = began(script, name, row, depth, given)
    said = {"length": length, "why": why, "boxed": boxed(name, row), "loops": any(loops)}
    return said | {"log_probs": log_probs(name, row, length), "entropy": entropy(name, row)}

  options = vars(rules_of(shape, heat))
  judge = functools.partial(reward, name)
  return oracle.grow(write, draw=draws(shape, name, seed), judge=judge, **options)


def against_oracle(
  shape: growth_lib.Settings, ids: list[int], script: Script, seed: int = 0, heat=1.0, **options
) -> tuple[growth_lib.Growth, dict[int, dict]]:
  """Grows trees beside the oracle, compares after every wave and returns (growth, oracle trees)."""
  plants = [plant(shape, name, script, seed=seed, heat=heat) for name in ids]
  growth, grown, waves = None, {}, [0] * len(ids)
  for growth, _ in run(shape, ids, script, seed=seed, heat=heat, **options):
    for b, wave in enumerate(growth.wave.tolist()):
      if wave == waves[b]:
        continue  # not admitted, between two parts of a wave, or done
      assert wave == waves[b] + 1
      waves[b] = wave
      grown[b] = next(plants[b])
      check_shape(growth, b, grown[b])
  assert growth is not None
  for b, tree in grown.items():
    check_texts(growth, b, script, tree)
    assert next(plants[b], None) is None, f"tree {b} is not complete"
  return growth, grown


def held(growth: growth_lib.Growth) -> list[int]:
  """Returns the pages in use."""
  pages = np.concatenate([growth.paths.prompt.ravel(), growth.paths.pages.ravel()])
  return pages[pages != pages_lib.NO_PAGE].tolist()
