"""Prompts to trees: admit, decode, attach, stop, branch, fall back, until every width is met.

The state of all trees stays on the device (growth.py); the host only dispatches. After each segment
it reads four numbers, to pick the compiled size of the next.

Axes: B prompts of a shard. Every array of the state carries the number of shards in front, one for
each device of data x fsdp.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from treepo_jax.config import UserError
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer
from treepo_jax.rollout import branching, fallback, programs, pruning
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.rollout.growth import Growth, Settings

# (prompt's place, its answer's tokens) of trajectories to their rewards.
Judge = Callable[[Sequence[tuple[int, list[int]]]], np.ndarray]

STRIDE = 32  # tokens of a call where config.rollout.stride does not say


def settings(config, *, vocabulary: int, eos_ids: tuple[int, ...], closed: int) -> Settings:
  """Returns the static part of a rollout from a validated config and what the text layer knows."""
  r = config.rollout
  paths = r.step_tokens // (r.prompts * r.segment)
  least = r.initial or r.width
  return Settings(
    width=r.width,
    depth=r.depth,
    branch=branching.Policy(
      branching=r.branching,
      branching_max=max(r.branching_max, r.branching),
      initial=least,
      initial_max=max(r.initial_max, least),
      initial_draw=r.initial_draw,
      step_paths=max(paths, 1) if r.step_tokens else 0,
      response_tokens=r.response_tokens,
      min_width=r.min_width,
      allocation=r.allocation,
      remainder=r.remainder,
      favour=r.favour,
    ),
    fallback=fallback.Policy(
      place=r.fallback,
      source=r.fallback_from,
      window=r.fallback_window,
      windows=r.fallback_windows,
      block=r.fallback_block,
      least=r.fallback_least,
    ),
    prune=pruning.Policy(value=r.prune, share=r.prune_share, keep=r.prune_keep),
    prompt_length=r.prompt_length,
    response_length=r.response_length or r.depth * r.segment,
    repetition_window=r.repetition_window,
    repetition_count=r.repetition_count,
    repetition_first=r.repetition_first,
    min_length=r.min_length,
    page=r.page,
    groups=r.rows // r.group,
    group=r.group,
    pages=r.pages,
    unroll=config.model.unroll,
    attention=config.model.attention,
    merge=r.merge,
    decoder=segment_lib.Settings(
      segment=r.segment,
      stride=min(r.stride or max(STRIDE // r.page, 1) * r.page, r.segment),
      temperature=r.temperature,
      vocabulary=vocabulary,
      eos_ids=eos_ids,
      closed=closed,
      top_k=r.top_k,
      top_p=r.top_p,
      min_p=r.min_p,
      stop_at=r.stop_at,
      blind_eos=r.blind_eos,
      entropy=r.prune == "entropy",
    ),
  )


def sequential(shape: Settings, samples: int, temperature: float) -> Settings:
  """Returns the settings of plain sampling: `samples` independent answers a prompt, same engine."""
  return dataclasses.replace(
    with_width(shape, samples, temperature),
    branch=dataclasses.replace(
      shape.branch,
      branching=1,
      branching_max=1,
      initial=samples,
      initial_max=samples,
      step_paths=0,
      response_tokens=0,
    ),
    fallback=dataclasses.replace(shape.fallback, place="none"),
    prune=dataclasses.replace(shape.prune, value="none"),
    min_length=0,
    group=min(shape.group, samples),
    groups=shape.groups * shape.group // min(shape.group, samples),
  )


def with_width(shape: Settings, samples: int, temperature: float) -> Settings:
  """Returns the settings of a tree of `samples` answers, otherwise shaped like `shape`.

  Where all of `shape` leave the prompt, all of `samples` do. Tokens are drawn from the whole policy
  at `temperature`: filters are the rollout's alone. A pool of pages that is given stays, or is that
  of one tree if it is less.
  """
  apart = shape.branch.initial >= shape.width
  wide = dataclasses.replace(
    shape,
    width=samples,
    branch=dataclasses.replace(
      shape.branch,
      initial=samples if apart else min(shape.branch.initial, samples),
      initial_max=samples if apart else min(shape.branch.initial_max, samples),
    ),
    decoder=dataclasses.replace(
      shape.decoder, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0
    ),
  )
  return dataclasses.replace(wide, pages=shape.pages and max(shape.pages, wide.pages_of_tree))


def grow(
  params: dict,
  key: jax.Array,
  prompts: Sequence,
  *,
  graph: nnx.GraphDef,
  table: np.ndarray,
  shape: Settings,
  mesh: Mesh,
  heat: float = 1.0,
  judge: Judge | None = None,
  room: int = 0,
  check: Callable[[], None] = lambda: None,
) -> tuple[tree_lib.Tree, dict[str, float]]:
  """Grows one tree a prompt and returns them, in the prompts' order on the host, with the cost.

  prompts: items with `.id` (identity, u32) and `.tokens`. key: folded from seed and step. table:
  the box automaton over token ids. heat: temperature of the allocation by log-prob. judge: rewards
  trajectories; needed, and asked after each segment, where a policy goes by reward. room: prompts
  that programs are compiled for at least, so that fewer run those of more. check: called between
  segments; what it raises ends the rollout. Raises UserError where the page pool cannot hold one
  tree, ValueError where a judge is missing.
  """
  if shape.judged and judge is None:
    raise ValueError("rollout.prune = 'reward' and rollout.fallback = 'disagree' need a judge")
  own = -(-len(prompts) // mesh_lib.shards(mesh))  # prompts a shard; its others are padding
  count = max(own, -(-room // mesh_lib.shards(mesh)))
  shape = fit(shape, count, mesh)
  calls = programs.build(graph, params["embed"].dtype, shape, count, mesh)
  params = jax.device_put(params, mesh_lib.shardings(params, mesh, over=("tensor",)))
  table = jax.device_put(table, mesh_lib.replicated(mesh))
  layers = calls.unstack(params) if shape.unroll else None  # once a rollout, not once a segment
  growth, segment = calls.start(*_arrays(prompts, mesh_lib.shards(mesh), shape, count))
  reward = np.zeros((mesh_lib.shards(mesh), count, shape.width), np.float32)
  seen = np.zeros(reward.shape[0] * count, int)
  split = NamedSharding(mesh, PartitionSpec(mesh_lib.BATCH_AXES))
  unjudged, warmth = jax.device_put(reward, split), np.float32(heat)
  while True:
    check()
    if shape.judged and judge is not None:
      growth = calls.take(growth, segment, key)
      reward = _judged(growth.tree, reward, seen, judge, own)
      growth, need = calls.plan(growth, reward, key, warmth)
    else:
      growth, need = calls.advance(growth, segment, unjudged, key, warmth)
    groups, shared, fresh, unfinished = np.asarray(need).max(0)  # the only wait of a segment
    if not unfinished:
      break
    for part in range(-(-int(fresh) // min(programs.PREFILL, count))):
      growth = calls.prefill(growth, params, jnp.asarray(part))
    growth, segment = calls.decode(growth, params, layers, table, key, int(groups), int(shared))
  tree = calls.merge(growth.tree, growth.paths.twin) if shape.merge else growth.tree
  return _finish(growth, tree, len(prompts), graph, params, shape)


def _judged(
  tree: tree_lib.Tree, reward: np.ndarray, seen: np.ndarray, judge: Judge, own: int
) -> np.ndarray:
  """Returns the rewards [shards, B, W] with those of the trajectories that have ended since.

  seen: trajectories of each tree that were judged before; counted up. own: prompts a shard.
  """
  count = reward.shape[1]
  tree = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(tree))
  slots = np.arange(tree.leaves.shape[1])[None]
  owner, slot = np.nonzero((tree.leaves != tree_lib.NO_ROW) & (slots >= seen[:, None]))
  if not owner.size:
    return reward
  rows = tree.leaves[owner, slot]
  ended = [
    (b // count * own + b % count, tree_lib.response(tree, b, w))
    for b, w in zip(owner.tolist(), rows.tolist(), strict=True)
  ]
  flat = np.array(reward).reshape(tree.leaves.shape)
  flat[owner, slot] = judge(ended)
  seen += np.bincount(owner, minlength=seen.size)
  return flat.reshape(reward.shape)


def fit(shape: Settings, prompts: int, mesh: Mesh) -> Settings:
  """Returns the settings with no more groups and pages than `prompts` of a shard can use."""
  groups = min(shape.groups, prompts * -(-shape.width // shape.group))
  pages = min(shape.pages or shape.pages_of_tree * prompts, shape.pages_of_tree * prompts)
  if pages < shape.pages_of_tree:
    raise UserError(
      f"config.rollout.pages = {pages} cannot hold one tree of width {shape.width} and depth "
      f"{shape.depth}: it needs at least {shape.pages_of_tree}; 0 takes what all prompts need"
    )
  together = mesh_lib.BATCH_AXES if mesh.shape["tensor"] > 1 else ()
  decoder = dataclasses.replace(shape.decoder, together=together)
  return dataclasses.replace(shape, groups=groups, pages=pages, decoder=decoder)


def _arrays(prompts: Sequence, shards: int, shape: Settings, count: int) -> tuple[np.ndarray, ...]:
  """Returns tokens, length, identity of the prompts and which are real, [shards, count, ...]."""
  own = -(-len(prompts) // shards)
  tokens = np.zeros((shards, count, shape.prompt_length), np.int32)
  length = np.ones((shards, count), np.int32)
  identity = np.zeros((shards, count), np.uint32)
  real = np.zeros((shards, count), bool)
  for i, prompt in enumerate(prompts):
    if not 0 < len(prompt.tokens) <= shape.prompt_length:
      raise UserError(
        f"prompt {prompt.id} has {len(prompt.tokens)} tokens; config.rollout.prompt_length = "
        f"{shape.prompt_length} allows 1 to {shape.prompt_length}: raise it or drop the prompt"
      )
    at = divmod(i, own)
    tokens[at][: len(prompt.tokens)] = prompt.tokens
    length[at], identity[at], real[at] = len(prompt.tokens), prompt.id, True
  return tokens, length, identity, real


def _finish(growth: Growth, tree, count: int, graph: nnx.GraphDef, params: dict, shape: Settings):
  """Returns the trees on the host, without padding, and what they cost."""
  own = -(-count // growth.real.shape[0])
  whole = lambda x: x[:, :own].reshape(-1, *x.shape[2:])[:count]
  tree = jax.tree.map(whole, jax.device_get(tree))
  counters = jax.tree.map(lambda x: float(np.sum(x)), jax.device_get(growth.counters))
  arch = transformer.architecture(graph)
  per_token = 2 * arch.layers * arch.kv_heads * arch.head_dim * params["embed"].dtype.itemsize
  decoded = max(counters.decoded, 1.0)
  held = growth.pool.free.shape[1] - np.asarray(growth.pool.size)
  cost = {
    "rollout/tokens_decoded": counters.decoded,
    "rollout/tokens_prefilled": float(tree.prompt_length.sum()),
    "rollout/row_steps": counters.row_steps,
    "rollout/row_occupancy": counters.decoded / max(counters.row_steps, 1.0),
    "rollout/kv_bytes_read_per_token": counters.read_shared * per_token / decoded,
    "rollout/kv_bytes_flat_per_token": counters.read_flat * per_token / decoded,
    "rollout/pages_held": float(held.sum()),
  }
  return tree, cost
