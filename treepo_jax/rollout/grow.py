"""Prompts to trees: admit, decode, attach, stop, branch, fall back, until every width is met.

The state of all trees stays on the device. A wave of a prompt is all its open nodes; once they are
decoded the prompt is planned anew, by itself, so a tree depends on its prompt's identity and the
key alone: not on the other prompts, the number of rows, the pages or the devices. The host only
dispatches: after each segment it reads four numbers to pick the compiled size of the next.

Axes: B prompts of a shard, N nodes, W width, S tokens of a segment, G groups, M rows of a group.
Every array of the state carries the number of shards in front, one for each device of data x fsdp.
"""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from treepo_jax.config import UserError
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.decoding import stopping
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.rollout import branching, fallback, schedule
from treepo_jax.rollout import tree as tree_lib

PREFILL = 16  # prompts a prefill call and shard


@dataclasses.dataclass(frozen=True)
class Settings:
  """What of a rollout is fixed at compilation; keys of config.rollout."""

  width: int
  depth: int
  branching: int
  initial: int
  initial_max: int
  remainder: str
  fallback: str
  prompt_length: int
  response_length: int
  repetition_window: int
  repetition_count: int
  page: int
  groups: int  # rows / group
  group: int
  pages: int
  decoder: segment_lib.Settings

  @property
  def pages_of_segment(self) -> int:
    return self.decoder.segment // self.page

  @property
  def pages_of_prompt(self) -> int:
    return max(-(-(self.prompt_length - 1) // self.page), 1)

  @property
  def pages_of_tree(self) -> int:
    """Pages that the largest tree can hold at once."""
    return self.pages_of_prompt + self.width * self.depth * self.pages_of_segment

  @property
  def shared(self) -> int:
    """Nodes that a group can share at most: every row a path of its own."""
    return max(self.group * (self.depth - 1), 1)


@chex.dataclass(frozen=True)
class Counters:
  """What the rollout of a shard has cost so far."""

  row_steps: Int[Array, ""]  # rows x steps run, in use or not
  decoded: Int[Array, ""]  # tokens sampled
  read_shared: Float[Array, ""]  # tokens whose keys and values were read: once a group and step
  read_flat: Float[Array, ""]  # and if each row read its own path


@chex.dataclass(frozen=True)
class Growth:
  """A shard's trees while they grow.

  Attributes:
    tree, paths, pool: the trees, their pages, and the pages' contents.
    slots, rows: what is decoded next.
    real: prompts that are no padding.
    admitted: prompts that hold pages or have held them.
    fresh: prompts admitted just now, to be prefilled.
    done: prompts whose trajectories have all ended.
    before: trajectories of each prompt that had ended when its wave began.
    wave: waves of each prompt so far.
  """

  tree: tree_lib.Tree
  paths: schedule.Paths
  pool: pages_lib.Pool
  slots: schedule.Slots
  rows: segment_lib.Rows
  real: Bool[Array, "b"]
  admitted: Bool[Array, "b"]
  fresh: Bool[Array, "b"]
  done: Bool[Array, "b"]
  before: Int[Array, "b"]
  wave: Int[Array, "b"]
  counters: Counters


def settings(config, *, vocabulary: int, eos_ids: tuple[int, ...], closed: int) -> Settings:
  """Returns the static part of a rollout from a validated config and what the text layer knows."""
  r = config.rollout
  most = r.depth * r.segment
  return Settings(
    width=r.width,
    depth=r.depth,
    branching=r.branching,
    initial=r.initial,
    initial_max=r.initial_max,
    remainder=r.remainder,
    fallback=r.fallback,
    prompt_length=r.prompt_length,
    response_length=min(r.response_length or most, most),
    repetition_window=r.repetition_window,
    repetition_count=r.repetition_count,
    page=r.page,
    groups=r.rows // r.group,
    group=r.group,
    pages=r.pages,
    decoder=segment_lib.Settings(
      segment=r.segment,
      temperature=r.temperature,
      vocabulary=vocabulary,
      eos_ids=eos_ids,
      closed=closed if r.stop_at_box else -1,
      unroll=config.model.unroll,
    ),
  )


def sequential(shape: Settings, samples: int, temperature: float) -> Settings:
  """Returns the settings of plain sampling: `samples` independent answers a prompt, same engine."""
  return dataclasses.replace(
    shape,
    width=samples,
    branching=1,
    initial=samples,
    initial_max=samples,
    fallback="none",
    group=min(shape.group, samples),
    groups=shape.groups * shape.group // min(shape.group, samples),
    pages=0,
    decoder=dataclasses.replace(shape.decoder, temperature=temperature),
  )


def with_width(shape: Settings, samples: int, temperature: float) -> Settings:
  """Returns the settings of a tree of `samples` answers, otherwise shaped like `shape`."""
  return dataclasses.replace(
    shape,
    width=samples,
    initial=min(shape.initial, samples),
    initial_max=min(shape.initial_max, samples),
    pages=0,
    decoder=dataclasses.replace(shape.decoder, temperature=temperature),
  )


def grow(
  params: dict,
  key: jax.Array,
  prompts: list,
  *,
  graph: nnx.GraphDef,
  table: np.ndarray,
  shape: Settings,
  mesh: Mesh,
) -> tuple[tree_lib.Tree, dict[str, float]]:
  """Grows one tree a prompt and returns them, in the prompts' order on the host, with the cost.

  prompts: items with `.id` (identity, u32) and `.tokens`. key: folded from seed and step. table:
  the box automaton over token ids. Raises UserError where the page pool cannot hold one tree.
  """
  shape = _fit(shape, -(-len(prompts) // mesh_lib.shards(mesh)))
  calls = _compiled(graph, shape, mesh)
  params = jax.device_put(params, mesh_lib.replicated(mesh))
  growth, segment = calls.start(params, *_arrays(prompts, mesh_lib.shards(mesh), shape))
  while True:
    growth, need = calls.advance(growth, segment, key)
    groups, shared, fresh, unfinished = np.asarray(need).max(0)  # the only wait of a segment
    if not unfinished:
      break
    for part in range(-(-int(fresh) // PREFILL)):
      growth = calls.prefill(growth, params, jnp.asarray(part))
    bucket = _bucket(int(groups), shape.groups), _bucket(int(shared), shape.shared)
    growth, segment = calls.decode(growth, params, table, key, *bucket)
  return _finish(growth, len(prompts), graph, params, shape)


@dataclasses.dataclass(frozen=True)
class _Calls:
  start: Callable
  advance: Callable
  prefill: Callable
  decode: Callable


@functools.cache
def _compiled(graph: nnx.GraphDef, shape: Settings, mesh: Mesh) -> _Calls:
  """Returns the three programs of the loop, each jitted over the shards with its state donated."""

  def sharded(run, *, whole: tuple[int, ...], count: int):
    """Lifts a one-shard function: arguments in `whole` are on every device, others are split."""
    split = PartitionSpec(mesh_lib.BATCH_AXES)
    specs = tuple(PartitionSpec() if i in whole else split for i in range(count))

    def local(*args):
      own = [a if i in whole else jax.tree.map(lambda x: x[0], a) for i, a in enumerate(args)]
      return jax.tree.map(lambda x: x[None], run(*own))

    lifted = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return jax.jit(lifted, donate_argnums=0)

  advance = functools.partial(_advance, shape=shape)
  start = functools.partial(_start, graph=graph, shape=shape)
  return _Calls(
    start=jax.jit(start, out_shardings=NamedSharding(mesh, PartitionSpec(mesh_lib.BATCH_AXES))),
    advance=sharded(advance, whole=(2,), count=3),
    prefill=sharded(functools.partial(_prefill, graph=graph), whole=(1, 2), count=3),
    decode=_Decode(sharded, graph, shape),
  )


class _Decode:
  """The segment decoder, compiled once for every size of (groups, shared nodes) that is used."""

  def __init__(self, sharded, graph: nnx.GraphDef, shape: Settings):
    self.sharded, self.graph, self.shape = sharded, graph, shape
    self.sizes = {}

  def __call__(self, growth: Growth, params: dict, table, key, groups: int, shared: int):
    if (groups, shared) not in self.sizes:
      run = functools.partial(
        _decode, graph=self.graph, shape=self.shape, groups=groups, shared=shared
      )
      self.sizes[groups, shared] = self.sharded(run, whole=(1, 2, 3), count=4)
    return self.sizes[groups, shared](growth, params, table, key)


def _bucket(needed: int, most: int) -> int:
  """Returns the size to compile for: most, or a quarter of it, and so on down."""
  size = most
  while size // 4 >= max(needed, 1):
    size //= 4
  return size


def _fit(shape: Settings, prompts: int) -> Settings:
  """Returns the settings with no more groups and pages than `prompts` of a shard can use."""
  groups = min(shape.groups, prompts * -(-shape.width // shape.group))
  pages = min(shape.pages or shape.pages_of_tree * prompts, shape.pages_of_tree * prompts)
  if pages < shape.pages_of_tree:
    raise UserError(
      f"config.rollout.pages = {pages} cannot hold one tree of width {shape.width} and depth "
      f"{shape.depth}: it needs at least {shape.pages_of_tree} (0 takes as many as all prompts need)"
    )
  return dataclasses.replace(shape, groups=groups, pages=pages)


def _arrays(prompts: list, shards: int, shape: Settings) -> tuple[np.ndarray, ...]:
  """Returns tokens, length, identity of the prompts and which are real, [shards, B, ...]."""
  count = -(-len(prompts) // shards)  # prompts a shard; the last are padding
  tokens = np.zeros((shards * count, shape.prompt_length), np.int32)
  length = np.ones(shards * count, np.int32)
  identity = np.zeros(shards * count, np.uint32)
  for i, prompt in enumerate(prompts):
    if not 0 < len(prompt.tokens) <= shape.prompt_length:
      raise UserError(
        f"prompt {prompt.id} has {len(prompt.tokens)} tokens; config.rollout.prompt_length = "
        f"{shape.prompt_length} allows 1 to {shape.prompt_length}: raise it or drop the prompt"
      )
    tokens[i, : len(prompt.tokens)] = prompt.tokens
    length[i], identity[i] = len(prompt.tokens), prompt.id
  real = np.arange(shards * count) < len(prompts)
  return tuple(x.reshape(shards, count, *x.shape[1:]) for x in (tokens, length, identity, real))


def _start(
  params: dict, tokens, length, identity, real, *, graph: nnx.GraphDef, shape: Settings
) -> tuple[Growth, segment_lib.Segment]:
  """Returns the state of all shards with their prompts, and a first segment that holds nothing."""
  arch = nnx.merge(graph, params).arch
  pool = functools.partial(
    pages_lib.create,
    arch.layers,
    shape.pages,
    arch.kv_heads,
    shape.page,
    arch.head_dim,
    params["embed"].dtype,
  )
  growth = jax.vmap(functools.partial(_create, shape=shape, pool=pool))(
    tokens, length, identity, real
  )
  empty = segment_lib.nothing((shape.groups, shape.group), shape.decoder.segment)
  return growth, jax.tree.map(lambda x: jnp.broadcast_to(x, (tokens.shape[0], *x.shape)), empty)


def _create(
  tokens, length, identity, real, *, shape: Settings, pool: Callable[[], pages_lib.Pool]
) -> Growth:
  """Returns the state of one shard: prompts without branches, all pages free."""
  size = shape.width, shape.depth, shape.decoder.segment
  tree = tree_lib.create(tokens, length, identity, width=size[0], depth=size[1], segment=size[2])
  b, n = tree.parent.shape
  missing = lambda *axes: jnp.full(axes, pages_lib.NO_PAGE, jnp.int32)
  paths = schedule.Paths(
    prompt=missing(b, shape.pages_of_prompt),
    pages=missing(b, n, shape.pages_of_segment),
    state=jnp.zeros((b, n), jnp.int32),
  )
  slots, _ = schedule.fill(tree, shape.groups, shape.group)
  own = missing(*slots.live.shape, shape.pages_of_segment)
  never = jnp.zeros(b, bool)
  zero = jnp.zeros((), jnp.int32)
  return Growth(
    tree=tree,
    paths=paths,
    pool=pool(),
    slots=slots,
    rows=schedule.rows(
      tree, paths, slots, own, shared=shape.shared, depth=shape.depth, page=shape.page
    )[0],
    real=real,
    admitted=never,
    fresh=never,
    done=never,
    before=jnp.zeros(b, jnp.int32),
    wave=jnp.zeros(b, jnp.int32),
    counters=Counters(
      row_steps=zero, decoded=zero, read_shared=jnp.zeros(()), read_flat=jnp.zeros(())
    ),
  )


def _advance(
  growth: Growth, segment: segment_lib.Segment, key: jax.Array, *, shape: Settings
) -> tuple[Growth, Int[Array, "4"]]:
  """Takes in what was decoded, plans every prompt whose wave is complete, and fills the rows anew.

  Returns the numbers the host needs: groups in use, shared nodes of the fullest, prompts to
  prefill, prompts not done.
  """
  key = jax.random.fold_in(key, 1)  # tokens are drawn from fold 0
  growth = _store(growth, segment, shape)
  growth = _plan(growth, key, shape)
  growth = _admit(growth, key, shape)

  slots, groups = schedule.fill(growth.tree, shape.groups, shape.group)
  wanted = jnp.repeat(slots.live[..., None], shape.pages_of_segment, -1)
  pool, own = pages_lib.take(growth.pool, wanted.astype(jnp.int32))
  rows, shared = schedule.rows(
    growth.tree, growth.paths, slots, own, shared=shape.shared, depth=shape.depth, page=shape.page
  )
  tree, node = _targets(slots, growth.tree)
  paths = growth.paths.replace(pages=growth.paths.pages.at[tree, node].set(own, mode="drop"))
  growth = growth.replace(slots=slots, rows=rows, pool=pool, paths=paths)
  unfinished = (growth.real & ~growth.done).sum()
  return growth, jnp.stack([groups, shared, growth.fresh.sum(), unfinished])


def _targets(slots: schedule.Slots, tree: tree_lib.Tree):
  """Returns (tree, node) to scatter the rows to; rows not live fall outside and are dropped."""
  return jnp.where(slots.live, slots.tree, tree.parent.shape[0]), slots.node


def _store(growth: Growth, segment: segment_lib.Segment, shape: Settings) -> Growth:
  """Attaches the decoded segments, decides which trajectories end, and frees the ended ones' pages."""
  tree, slots, s = growth.tree, growth.slots, shape.decoder.segment
  b, n = tree.parent.shape
  allowed = shape.response_length - (tree.depth[slots.tree, slots.node] - 1) * s
  length = jnp.minimum(segment.length, allowed)
  kept = jnp.arange(s) < length[..., None]
  at = _targets(slots, tree)
  put = lambda old, new: old.at[at].set(new, mode="drop")
  tree = tree.replace(
    tokens=put(tree.tokens, jnp.where(kept, segment.tokens, 0)),
    log_probs=put(tree.log_probs, jnp.where(kept, segment.log_probs, 0)),
    length=put(tree.length, length),
  )
  status = _status(tree, slots, segment, allowed, shape)
  tree = tree.replace(status=put(tree.status, status))
  paths = growth.paths.replace(state=put(growth.paths.state, segment.state))

  ended = jnp.zeros((b, n), bool).at[at].set(status >= tree_lib.EOS, mode="drop")
  tree = tree.replace(leaves=jax.vmap(_append)(tree.leaves, ended))
  pool = pages_lib.release(growth.pool, jnp.where(ended[..., None], paths.pages, pages_lib.NO_PAGE))
  paths = paths.replace(pages=jnp.where(ended[..., None], pages_lib.NO_PAGE, paths.pages))
  old = growth.counters
  counters = Counters(
    row_steps=old.row_steps + segment.steps,
    decoded=old.decoded + segment.length.sum(dtype=jnp.int32),
    read_shared=old.read_shared + segment.read_shared,
    read_flat=old.read_flat + segment.read_flat,
  )
  return growth.replace(tree=tree, paths=paths, pool=pool, counters=counters)


def _status(tree, slots, segment, allowed, shape: Settings) -> Int[Array, "g m"]:
  """Returns ACTIVE or why the trajectory of each row ended; the first reason that holds."""
  s, h = shape.decoder.segment, shape.repetition_window * shape.repetition_count
  depth = tree.depth[slots.tree, slots.node]
  node, recent = slots.node, []
  for _ in range(max(-(-h // s), 1)):  # the last h tokens of the path, newest segment last
    recent.insert(0, tree.tokens[slots.tree, node])
    node = jnp.maximum(tree.parent[slots.tree, node], 0)
  recent = jnp.concatenate(recent, -1)[..., -max(h, 1) :]
  repeats = functools.partial(
    stopping.repeats, window=shape.repetition_window, count=shape.repetition_count
  )
  looping = jax.vmap(jax.vmap(repeats))(recent, jnp.minimum(depth * s, h))
  whole = segment.length <= allowed  # a stop beyond the longest answer is cut off with it
  reasons = (
    (whole & (segment.stop == segment_lib.AT_EOS), tree_lib.EOS),
    (whole & (segment.stop == segment_lib.AT_ANSWER), tree_lib.ANSWER),
    (segment.length >= allowed, tree_lib.LENGTH),
    (depth >= shape.depth, tree_lib.DEPTH),
    (looping, tree_lib.REPETITION),
  )
  status = jnp.full(depth.shape, tree_lib.ACTIVE, jnp.int32)
  for holds, reason in reversed(reasons):
    status = jnp.where(holds, reason, status)
  return status


def _append(leaves: Int[Array, "w"], ended: Bool[Array, "n"]) -> Int[Array, "w"]:
  """Adds the rows that ended to a tree's leaves, in row order."""
  spot = jnp.where(
    ended, (leaves != tree_lib.NO_ROW).sum() + jnp.cumsum(ended) - 1, leaves.shape[0]
  )
  return leaves.at[spot].set(jnp.arange(ended.shape[0], dtype=jnp.int32), mode="drop")


def _plan(growth: Growth, key: jax.Array, shape: Settings) -> Growth:
  """Branches, or falls back, every prompt whose wave is complete; frees the pages of those done."""
  tree, finished = growth.tree, tree_lib.finished(growth.tree)
  ready = growth.admitted & ~growth.done & ~(tree.status == tree_lib.OPEN).any(1)
  keys = jax.vmap(lambda i, w: jax.random.fold_in(jax.random.fold_in(key, i), w))(
    tree.prompt_id, growth.wave
  )
  parent, source = jax.vmap(functools.partial(_next, shape=shape))(tree, keys, growth.before)
  parent = jnp.where(ready[:, None], parent, tree_lib.NO_PARENT)
  tree = jax.vmap(tree_lib.attach)(tree, parent, source)

  done = growth.done | (ready & (parent == tree_lib.NO_PARENT).all(1))
  over = done & ~growth.done
  pool, paths = growth.pool, growth.paths
  free = lambda held: jnp.where(over.reshape(-1, *[1] * (held.ndim - 1)), held, pages_lib.NO_PAGE)
  drop = lambda held: jnp.where(over.reshape(-1, *[1] * (held.ndim - 1)), pages_lib.NO_PAGE, held)
  pool = pages_lib.release(pages_lib.release(pool, free(paths.prompt)), free(paths.pages))
  return growth.replace(
    tree=tree,
    pool=pool,
    paths=paths.replace(prompt=drop(paths.prompt), pages=drop(paths.pages)),
    done=done,
    before=jnp.where(ready, finished, growth.before),
    wave=growth.wave + ready,
  )


def _next(tree: tree_lib.Tree, key: jax.Array, before, *, shape: Settings):
  """Returns (parents, sources) of one tree's next wave; all NO_PARENT where nothing is left to do."""
  active = tree.status == tree_lib.ACTIVE
  finished, count = tree_lib.finished(tree), active.sum()
  total = branching.budget(
    finished, finished - before + count, count, width=shape.width, branching=shape.branching
  )
  total = jnp.where(count > 0, total, 0)
  parent = branching.parents(branching.even(active, total, shape.remainder), shape.width)
  source = jnp.full(shape.width, tree_lib.NO_ROW, jnp.int32)
  if shape.fallback == "none":
    return parent, source
  cut, origin = fallback.random(tree, key, branching=shape.branching, most=shape.depth)
  return jnp.where(count > 0, parent, cut), jnp.where(count > 0, source, origin)


def _admit(growth: Growth, key: jax.Array, shape: Settings) -> Growth:
  """Admits prompts in order while the pool can hold their largest trees, with their first branches."""
  tree, room = growth.tree, growth.pool.free.shape[0] // shape.pages_of_tree
  waiting = growth.real & ~growth.done
  admitted = waiting & (jnp.cumsum(waiting) <= room)
  fresh = admitted & ~growth.admitted
  draw = functools.partial(branching.initial, least=shape.initial, most=shape.initial_max)
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), 0))(tree.prompt_id)
  first = jnp.where(fresh, jax.vmap(draw)(keys), 0)
  parent = jnp.where(jnp.arange(shape.width) < first[:, None], 0, tree_lib.NO_PARENT)
  tree = jax.vmap(tree_lib.attach)(tree, parent, jnp.full(parent.shape, tree_lib.NO_ROW, jnp.int32))

  held = -(-(tree.prompt_length - 1) // shape.page)
  x = shape.pages_of_prompt
  wanted = fresh[:, None] & (jnp.arange(x) >= x - held[:, None])
  pool, pages = pages_lib.take(growth.pool, wanted.astype(jnp.int32))
  prompt = jnp.where(fresh[:, None], pages, growth.paths.prompt)
  return growth.replace(
    tree=tree,
    pool=pool,
    paths=growth.paths.replace(prompt=prompt),
    admitted=growth.admitted | admitted,
    fresh=fresh,
    wave=growth.wave + fresh,  # wave 0 drew the first branches
  )


def _prefill(growth: Growth, params: dict, part: Int[Array, ""], *, graph: nnx.GraphDef) -> Growth:
  """Writes the pages of the part-th PREFILL of the prompts just admitted."""
  rank = jnp.cumsum(growth.fresh) - 1 - part * PREFILL
  b = growth.fresh.shape[0]
  spot = jnp.where(growth.fresh & (rank >= 0), rank, PREFILL)
  index = jnp.full(PREFILL, b, jnp.int32).at[spot].set(jnp.arange(b, dtype=jnp.int32), mode="drop")
  get = lambda x, fill: x.at[index].get(mode="fill", fill_value=fill)
  pool = segment_lib.prefill(
    growth.pool,
    get(growth.tree.prompt, 0),
    get(growth.tree.prompt_length, 1),
    get(growth.paths.prompt, pages_lib.NO_PAGE),
    params,
    graph=graph,
  )
  return growth.replace(pool=pool)


def _decode(
  growth: Growth,
  params: dict,
  table,
  key: jax.Array,
  *,
  graph,
  shape: Settings,
  groups: int,
  shared: int,
) -> tuple[Growth, segment_lib.Segment]:
  """Decodes the first `groups` groups with room for `shared` nodes; pads the result to all groups."""
  context = shape.pages_of_prompt + shared * shape.pages_of_segment
  rows = jax.tree.map(lambda x: x[:groups], growth.rows)
  rows = rows.replace(
    context=rows.context[:, :context], start=rows.start[:, :context], sees=rows.sees[..., :context]
  )
  pool, segment = segment_lib.decode(
    growth.pool,
    rows,
    params,
    table,
    jax.random.fold_in(key, 0),
    graph=graph,
    settings=shape.decoder,
  )
  pad = lambda x: (
    jnp.pad(x, [(0, shape.groups - groups)] + [(0, 0)] * (x.ndim - 1)) if x.ndim else x
  )
  segment = jax.tree.map(pad, segment)
  return growth.replace(pool=pool), segment.replace(steps=segment.steps * rows.live.size)


def _finish(growth: Growth, count: int, graph: nnx.GraphDef, params: dict, shape: Settings):
  """Returns the trees on the host, without padding, and what they cost."""
  tree = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], jax.device_get(growth.tree))
  counters = jax.tree.map(lambda x: float(np.sum(x)), jax.device_get(growth.counters))
  arch = nnx.merge(graph, params).arch
  per_token = 2 * arch.layers * arch.kv_heads * arch.head_dim * params["embed"].dtype.itemsize
  decoded = max(counters.decoded, 1.0)
  held = growth.pool.free.shape[1] - np.asarray(growth.pool.size)
  cost = {
    "rollout/tokens_decoded": counters.decoded,
    "rollout/tokens_prefilled": float(tree.prompt_length.sum()),
    "rollout/row_occupancy": counters.decoded / max(counters.row_steps, 1.0),
    "rollout/kv_bytes_read_per_token": counters.read_shared * per_token / decoded,
    "rollout/kv_bytes_flat_per_token": counters.read_flat * per_token / decoded,
    "rollout/pages_held": float(held.sum()),
  }
  return tree, cost
