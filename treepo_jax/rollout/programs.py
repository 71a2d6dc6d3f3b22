"""The compiled programs of a rollout: what starts, prefills, plans and decodes a shard's trees.

Each runs on every shard of data x fsdp by itself, without a word to the others. Heads are split
over "tensor" by the compiler, after how the weights and the page pool lie.

Axes: B prompts of a shard. Every array of the state carries the number of shards in front.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.model import attention, transformer
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.rollout import growth as growth_lib
from treepo_jax.rollout import planning, schedule
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.rollout.growth import Growth, Settings

PREFILL = 16  # prompts a prefill call and shard at most
LEAST_ROWS, LEAST_SHARED = 32, 2  # smaller programs would save less than their compilation costs


@dataclasses.dataclass(frozen=True)
class Programs:
  """The jitted functions of a rollout; those that take the growth donate it.

  Attributes:
    asked, growth, segment: what they work on, shapes with their layout.
    start: (tokens, length, identity, real) = asked -> (growth, a segment that holds nothing).
    unstack: params -> weights by layer.
    merge: (tree, twin) -> tree without twins.
    take, plan: advance in two halves, for what must be rewarded between them.
    advance: (growth, segment, reward, key, heat) -> (growth, the four numbers that the host needs).
    prefill: (growth, params, part) -> growth.
    decode: (growth, params, layers, table, key, groups, shared) -> (growth, segment).
  """

  asked: tuple
  growth: Growth
  segment: segment_lib.Segment
  start: Callable
  unstack: Callable
  merge: Callable
  take: Callable
  plan: Callable
  advance: Callable
  prefill: Callable
  decode: "Decode"


@functools.cache
def build(
  graph: nnx.GraphDef, dtype: jnp.dtype, shape: Settings, prompts: int, mesh: Mesh
) -> Programs:
  """Returns the programs for `prompts` a shard and a policy of `dtype`; cached.

  Nothing is computed and no device is asked for, so the mesh may be of devices that are only
  described.
  """
  start = functools.partial(_start, graph=graph, dtype=dtype, shape=shape)
  shards = mesh_lib.shards(mesh)
  sizes = [((shards, prompts, shape.prompt_length), jnp.int32)]
  sizes += [((shards, prompts), x) for x in (jnp.int32, jnp.uint32, jnp.bool)]
  asked = _lie(tuple(jax.ShapeDtypeStruct(*size) for size in sizes), mesh)
  growth, segment = _lie(jax.eval_shape(start, *asked), mesh)
  place = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  numbers = NamedSharding(mesh, PartitionSpec(mesh_lib.BATCH_AXES))

  def sharded(run, *, whole: tuple[int, ...], count: int, out):
    """Lifts a one-shard function: arguments in `whole` are on every shard, others are split."""
    split = PartitionSpec(mesh_lib.BATCH_AXES)
    specs = tuple(PartitionSpec() if i in whole else split for i in range(count))

    def local(*args):
      own = [a if i in whole else jax.tree.map(lambda x: x[0], a) for i, a in enumerate(args)]
      return jax.tree.map(lambda x: x[None], run(*own))

    lifted = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=specs,
      out_specs=split,
      axis_names=set(mesh_lib.BATCH_AXES),
      check_vma=False,
    )
    return jax.jit(lifted, donate_argnums=0, out_shardings=out)

  take = functools.partial(planning.take, shape=shape)

  def plan(growth, reward, key, heat):
    return planning.advance(growth, key, heat, reward, shape=shape)

  def advance(growth, segment, reward, key, heat):
    return plan(take(growth, segment, key), reward, key, heat)

  planned = place(growth), numbers
  choice = attention.choose(shape.attention, mesh, local=True)
  prefill = functools.partial(_prefill, graph=graph, choice=choice)
  return Programs(
    asked=asked,
    growth=growth,
    segment=segment,
    start=jax.jit(start, out_shardings=place((growth, segment))),
    unstack=jax.jit(transformer.unstack),
    merge=jax.jit(jax.vmap(jax.vmap(tree_lib.merge))),
    take=sharded(take, whole=(2,), count=3, out=place(growth)),
    plan=sharded(plan, whole=(2, 3), count=4, out=planned),
    advance=sharded(advance, whole=(3, 4), count=5, out=planned),
    prefill=sharded(prefill, whole=(1, 2), count=3, out=place(growth)),
    decode=Decode(sharded, graph, shape, choice, place((growth, segment))),
  )


class Decode:
  """The segment decoder, compiled once for every size of (groups, shared nodes) that is used."""

  def __init__(self, sharded, graph: nnx.GraphDef, shape: Settings, choice, out):
    self.sharded, self.shape, self.out = sharded, shape, out
    self.run = functools.partial(_decode, graph=graph, shape=shape, choice=choice)
    self.used = {}

  def size(self, groups: int, shared: int) -> tuple[int, int]:
    """Returns the smallest size compiled for that holds so many groups, reading so many nodes."""
    least = -(-LEAST_ROWS // self.shape.group)
    return (
      min(x for x in schedule.sizes(self.shape.groups, least, 4) if x >= groups),
      min(x for x in schedule.sizes(self.shape.shared, LEAST_SHARED, 2) if x >= shared),
    )

  def program(self, groups: int, shared: int) -> jax.stages.Wrapped:
    """Returns the jitted decoder of a size: (growth, params, layers, table, key)."""
    if (groups, shared) not in self.used:
      run = functools.partial(self.run, groups=groups, shared=shared)
      run = self.sharded(run, whole=(1, 2, 3, 4), count=5, out=self.out)
      self.used[groups, shared] = run
    return self.used[groups, shared]

  def __call__(self, growth: Growth, params: dict, layers, table, key, groups: int, shared: int):
    return self.program(*self.size(groups, shared))(growth, params, layers, table, key)


def _lie(tree, mesh: Mesh):
  """Returns the shapes with their layout: shards apart, heads of the page pool over "tensor"."""

  def one(path: tuple, x):
    spec = [mesh_lib.BATCH_AXES]
    names = [getattr(key, "name", None) for key in path]
    if "pool" in names and x.ndim == 6 and x.shape[3] % mesh.shape["tensor"] == 0:
      spec += [None, None, "tensor"]  # [shards, N, pages, K, T, D]
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(one, tree)


def _start(
  tokens, length, identity, real, *, graph: nnx.GraphDef, dtype: jnp.dtype, shape: Settings
) -> tuple[Growth, segment_lib.Segment]:
  """Returns the state of all shards with their prompts, and a first segment that holds nothing."""
  arch = transformer.architecture(graph)
  pool = pages_lib.create(arch.layers, shape.pages, arch.kv_heads, shape.page, arch.head_dim, dtype)
  create = functools.partial(growth_lib.create, shape=shape, pool=pool)
  growth = jax.vmap(create)(tokens, length, identity, real)
  empty = segment_lib.nothing((shape.groups, shape.group), shape.decoder.stride)
  return growth, jax.tree.map(lambda x: jnp.broadcast_to(x, (tokens.shape[0], *x.shape)), empty)


def _prefill(
  growth: Growth,
  params: dict,
  part: Int[Array, ""],
  *,
  graph: nnx.GraphDef,
  choice: attention.Choice,
) -> Growth:
  """Writes the pages of the part-th PREFILL of the prompts just admitted."""
  b = growth.fresh.shape[0]
  chunk = min(PREFILL, b)
  rank = jnp.cumsum(growth.fresh) - 1 - part * chunk
  spot = jnp.where(growth.fresh & (rank >= 0), rank, chunk)
  index = jnp.full(chunk, b, jnp.int32).at[spot].set(jnp.arange(b, dtype=jnp.int32), mode="drop")
  get = lambda x, fill: x.at[index].get(mode="fill", fill_value=fill)
  pool = segment_lib.prefill(
    growth.pool,
    get(growth.tree.prompt, 0),
    get(growth.tree.prompt_length, 1),
    get(growth.paths.prompt, pages_lib.NO_PAGE),
    params,
    graph=graph,
    choice=choice,
  )
  return dataclasses.replace(growth, pool=pool)


def _decode(
  growth: Growth,
  params: dict,
  layers,
  table,
  key: jax.Array,
  *,
  graph,
  shape: Settings,
  choice: attention.Choice,
  groups: int,
  shared: int,
) -> tuple[Growth, segment_lib.Segment]:
  """Decodes the first `groups` groups with room for `shared` nodes; pads to all groups."""
  context = shape.pages_of_prompt + shared * shape.pages_of_segment
  rows = jax.tree.map(lambda x: x[:groups], growth.rows)
  rows = dataclasses.replace(
    rows,
    context=rows.context[:, :context],
    start=rows.start[:, :context],
    sees=rows.sees[..., :context],
  )
  pool, segment = segment_lib.decode(
    growth.pool,
    rows,
    params,
    layers,
    table,
    jax.random.fold_in(key, planning.TOKENS),
    graph=graph,
    settings=shape.decoder,
    choice=choice,
  )
  pad = lambda x: (
    jnp.pad(x, [(0, shape.groups - groups)] + [(0, 0)] * (x.ndim - 1)) if x.ndim else x
  )
  segment = jax.tree.map(pad, segment)
  return dataclasses.replace(growth, pool=pool), dataclasses.replace(
    segment, steps=segment.steps * rows.live.size
  )
