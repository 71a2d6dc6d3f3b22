"""The state of growing trees, and the vectorised step that stops, branches and falls back.

A wave of a prompt is all its open nodes; once they are decoded the prompt is planned anew, by
itself, so a tree depends on its prompt's identity and the key alone: not on the other prompts, the
number of rows, the pages or the devices.

Axes: B prompts of a shard, N nodes, W width, G groups, M rows of a group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from treepo_jax import struct
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.decoding import stopping
from treepo_jax.rollout import branching, fallback, schedule
from treepo_jax.rollout import tree as tree_lib


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
  unroll: bool  # decode with the layers unrolled
  merge: bool  # siblings that draw the same tokens are decoded once
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
  def followers(self) -> int:
    """Nodes that a row can decode for besides its own."""
    return self.width - 1 if self.merge else 0

  @property
  def shared(self) -> int:
    """Nodes that a group can share at most: every row a path of its own."""
    return max(self.group * (self.depth - 1), 1)


@struct.dataclass
class Counters:
  """What the rollout of a shard has cost so far."""

  row_steps: Int[Array, ""]  # rows x steps run, in use or not
  decoded: Int[Array, ""]  # tokens sampled
  read_shared: Float[Array, ""]  # tokens whose keys and values were read: once a group and step
  read_flat: Float[Array, ""]  # and if each row read its own path


@struct.dataclass
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


def create(tokens, length, identity, real, *, shape: Settings, pool: pages_lib.Pool) -> Growth:
  """Returns the state of one shard: prompts without branches, all pages free."""
  size = shape.width, shape.depth, shape.decoder.segment
  tree = tree_lib.create(tokens, length, identity, width=size[0], depth=size[1], segment=size[2])
  b, n = tree.parent.shape
  missing = lambda *axes: jnp.full(axes, pages_lib.NO_PAGE, jnp.int32)
  paths = schedule.Paths(
    prompt=missing(b, shape.pages_of_prompt),
    pages=missing(b, n, shape.pages_of_segment),
    state=jnp.zeros((b, n), jnp.int32),
    twin=jnp.full((b, n), tree_lib.NO_ROW, jnp.int32),
    guide=jnp.zeros((b, n), jnp.int32),
    given=jnp.zeros((b, n), jnp.int32),
  )
  slots, _ = schedule.fill(tree, paths, shape.groups, shape.group, shape.followers)
  own = missing(*slots.live.shape, shape.pages_of_segment)
  never = jnp.zeros(b, bool)
  zero = jnp.zeros((), jnp.int32)
  return Growth(
    tree=tree,
    paths=paths,
    pool=pool,
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


def advance(
  growth: Growth, segment: segment_lib.Segment, key: jax.Array, *, shape: Settings
) -> tuple[Growth, Int[Array, "4"]]:
  """Takes in what was decoded (nothing, to begin with), plans what is next, and fills the rows.

  Returns the numbers the host needs: groups in use, shared nodes of the fullest, prompts to
  prefill, prompts not done.
  """
  key = jax.random.fold_in(key, 1)  # tokens are drawn from fold 0
  growth = _store(growth, segment, shape)
  growth = _plan(growth, key, shape)
  growth = _admit(growth, key, shape)

  slots, groups = schedule.fill(
    growth.tree, growth.paths, shape.groups, shape.group, shape.followers
  )
  wanted = jnp.repeat(slots.live[..., None], shape.pages_of_segment, -1)
  pool, own = pages_lib.take(growth.pool, wanted.astype(jnp.int32))
  rows, shared = schedule.rows(
    growth.tree, growth.paths, slots, own, shared=shape.shared, depth=shape.depth, page=shape.page
  )
  tree, node = _targets(slots, growth.tree)
  paths = dataclasses.replace(
    growth.paths, pages=growth.paths.pages.at[tree, node].set(own, mode="drop")
  )
  growth = dataclasses.replace(growth, slots=slots, rows=rows, pool=pool, paths=paths)
  unfinished = (growth.real & ~growth.done).sum()
  return growth, jnp.stack([groups, shared, growth.fresh.sum(), unfinished])


def _targets(slots: schedule.Slots, tree: tree_lib.Tree):
  """Returns (tree, node) to scatter the rows to; rows not live fall outside and are dropped."""
  return jnp.where(slots.live, slots.tree, tree.parent.shape[0]), slots.node


def _store(growth: Growth, segment: segment_lib.Segment, shape: Settings) -> Growth:
  """Attaches the decoded segments to their nodes and followers; frees the pages of the ended."""
  tree, paths, slots, s = growth.tree, growth.paths, growth.slots, shape.decoder.segment
  b, n = tree.parent.shape
  allowed = shape.response_length - (tree.depth[slots.tree, slots.node] - 1) * s
  length = jnp.minimum(segment.length, allowed)
  kept = jnp.arange(s)[None, None] < length[..., None]
  at = _targets(slots, tree)
  follows = slots.followers != tree_lib.NO_ROW
  behind = jnp.where(follows, at[0][..., None], b), slots.followers
  twin = segment.agreed == segment.length[..., None]

  def put(old, new, other: Array | int = 0):
    """Writes a value a row to its node, and to its followers: to twins the same, else `other`."""
    is_twin = twin.reshape(*twin.shape, *[1] * (new.ndim - 2))
    values = jnp.where(is_twin, new[:, :, None], other)
    return old.at[at].set(new, mode="drop").at[behind].set(values, mode="drop")

  tokens = jnp.where(kept, segment.tokens, 0)
  common = jnp.arange(s)[None, None, None] < segment.agreed[..., None]
  tree = dataclasses.replace(
    tree,
    tokens=put(tree.tokens, tokens, jnp.where(common, tokens[:, :, None], 0)),
    log_probs=put(tree.log_probs, jnp.where(kept, segment.log_probs, 0)),
    length=put(tree.length, length),
  )
  status = _status(tree, slots, segment, allowed, shape)
  tree = dataclasses.replace(tree, status=put(tree.status, status, tree_lib.OPEN))
  guide = jnp.broadcast_to(slots.node[..., None], twin.shape)
  note = lambda old, new: old.at[behind].set(new, mode="drop")
  paths = dataclasses.replace(
    paths,
    state=put(paths.state, segment.state),
    twin=note(paths.twin, jnp.where(twin, guide, tree_lib.NO_ROW)),
    guide=note(paths.guide, guide),
    given=note(paths.given, segment.agreed),
  )

  ended = tree.status >= tree_lib.EOS
  pool = pages_lib.release(growth.pool, jnp.where(ended[..., None], paths.pages, pages_lib.NO_PAGE))
  paths = dataclasses.replace(
    paths, pages=jnp.where(ended[..., None], pages_lib.NO_PAGE, paths.pages)
  )
  old = growth.counters
  counters = Counters(
    row_steps=old.row_steps + segment.steps,
    decoded=old.decoded + segment.length.sum(dtype=jnp.int32),
    read_shared=old.read_shared + segment.read_shared,
    read_flat=old.read_flat + segment.read_flat,
  )
  return dataclasses.replace(growth, tree=tree, paths=paths, pool=pool, counters=counters)


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


def _append(
  leaves: Int[Array, "w"], status: Int[Array, "n"], ready: Bool[Array, ""]
) -> Int[Array, "w"]:
  """Adds the rows that ended in the wave just completed to a tree's leaves, in row order."""
  n = status.shape[0]
  listed = (
    jnp.zeros(n, bool).at[jnp.where(leaves == tree_lib.NO_ROW, n, leaves)].set(True, mode="drop")
  )
  ended = ready & (status >= tree_lib.EOS) & ~listed
  spot = jnp.where(
    ended, (leaves != tree_lib.NO_ROW).sum() + jnp.cumsum(ended) - 1, leaves.shape[0]
  )
  return leaves.at[spot].set(jnp.arange(ended.shape[0], dtype=jnp.int32), mode="drop")


def _plan(growth: Growth, key: jax.Array, shape: Settings) -> Growth:
  """Branches, or falls back, every prompt whose wave is complete; frees the pages of those done."""
  tree = growth.tree
  ready = growth.admitted & ~growth.done & ~(tree.status == tree_lib.OPEN).any(1)
  tree = dataclasses.replace(tree, leaves=jax.vmap(_append)(tree.leaves, tree.status, ready))
  finished = tree_lib.finished(tree)
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
  return dataclasses.replace(
    growth,
    tree=tree,
    pool=pool,
    paths=dataclasses.replace(paths, prompt=drop(paths.prompt), pages=drop(paths.pages)),
    done=done,
    before=jnp.where(ready, finished, growth.before),
    wave=growth.wave + ready,
  )


def _next(tree: tree_lib.Tree, key: jax.Array, before, *, shape: Settings):
  """Returns (parents, sources) of one tree's next wave; all NO_PARENT where none is left."""
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
  """Admits prompts, with their first branches, while the pool can hold their largest trees."""
  tree, room = growth.tree, growth.pool.free.shape[0] // shape.pages_of_tree
  waiting = growth.real & ~growth.done
  admitted = waiting & (jnp.cumsum(waiting) <= room)
  fresh = admitted & ~growth.admitted
  draw = functools.partial(branching.initial, least=shape.initial, most=shape.initial_max)
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), 0))(tree.prompt_id)
  first = jnp.where(fresh, jax.vmap(draw)(keys), 0)
  parent = jnp.where(jnp.arange(shape.width)[None] < first[:, None], 0, tree_lib.NO_PARENT)
  tree = jax.vmap(tree_lib.attach)(tree, parent, jnp.full(parent.shape, tree_lib.NO_ROW, jnp.int32))

  held = -(-(tree.prompt_length - 1) // shape.page)
  x = shape.pages_of_prompt
  wanted = fresh[:, None] & (jnp.arange(x)[None] >= x - held[:, None])
  pool, pages = pages_lib.take(growth.pool, wanted.astype(jnp.int32))
  prompt = jnp.where(fresh[:, None], pages, growth.paths.prompt)
  return dataclasses.replace(
    growth,
    tree=tree,
    pool=pool,
    paths=dataclasses.replace(growth.paths, prompt=prompt),
    admitted=growth.admitted | admitted,
    fresh=fresh,
    wave=growth.wave + fresh,  # wave 0 drew the first branches
  )
