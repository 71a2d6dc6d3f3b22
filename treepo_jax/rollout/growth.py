"""The state of growing trees, and the vectorised step that takes in what was decoded.

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
from treepo_jax.rollout import branching, fallback, pruning, schedule
from treepo_jax.rollout import tree as tree_lib

LONG = 16  # tokens of a call that siblings are taken not to have in common before any was seen


@dataclasses.dataclass(frozen=True)
class Settings:
  """What of a rollout is fixed at compilation; keys of config.rollout."""

  width: int
  depth: int
  branch: branching.Policy
  fallback: fallback.Policy
  prune: pruning.Policy
  prompt_length: int
  response_length: int
  repetition_window: int
  repetition_count: int
  repetition_first: bool
  min_length: int
  page: int
  groups: int  # rows / group
  group: int
  pages: int
  unroll: bool  # decode with the layers unrolled
  attention: str  # config.model.attention
  merge: bool  # nodes that draw the tokens of another are not decoded again
  decoder: segment_lib.Settings

  @property
  def pages_of_segment(self) -> int:
    return self.decoder.segment // self.page

  @property
  def pages_of_call(self) -> int:
    return self.decoder.stride // self.page

  @property
  def pages_of_prompt(self) -> int:
    return max(-(-(self.prompt_length - 1) // self.page), 1)

  @property
  def pages_of_tree(self) -> int:
    """Pages that the largest tree can hold at once."""
    nodes = tree_lib.capacity(self.width, self.depth, self.spare) - 1
    return self.pages_of_prompt + nodes * self.pages_of_segment

  @property
  def spare(self) -> bool:
    """Whether paths can end without becoming a trajectory."""
    return self.min_length > 0 or self.prune.value != "none"

  @property
  def judged(self) -> bool:
    """Whether a policy goes by the rewards of the trajectories that have ended."""
    return self.prune.value == "reward" or self.fallback.place == "disagree"

  @property
  def shared(self) -> int:
    """Nodes that a group can read at most: every row a path of its own, and itself."""
    return self.group * self.depth


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
    spent: pages that each prompt held when it was done.
    saved, missed: tokens that nodes which waited for another had in common with it, and those that
      they could have decoded meanwhile and had not.
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
  spent: Int[Array, "b"]
  saved: Int[Array, ""]
  missed: Int[Array, ""]
  counters: Counters


def create(tokens, length, identity, real, *, shape: Settings, pool: pages_lib.Pool) -> Growth:
  """Returns the state of one shard: prompts without branches, all pages free."""
  size = shape.width, shape.depth, shape.decoder.segment
  tree = tree_lib.create(
    tokens, length, identity, width=size[0], depth=size[1], segment=size[2], spare=shape.spare
  )
  b, n = tree.parent.shape
  missing = lambda *axes: jnp.full(axes, pages_lib.NO_PAGE, jnp.int32)
  blank = jnp.zeros((b, n, size[2]))
  paths = schedule.Paths(
    prompt=missing(b, shape.pages_of_prompt),
    pages=missing(b, n, shape.pages_of_segment),
    given=jnp.zeros((b, n), jnp.int32),
    waits=jnp.zeros((b, n), bool),
    twin=jnp.full((b, n), tree_lib.NO_ROW, jnp.int32),
    states=blank.astype(jnp.int8),
    low=blank,
    high=blank,
    entropy=blank,
  )
  never, zero = jnp.zeros(b, bool), jnp.zeros((), jnp.int32)
  empty = jnp.zeros((shape.groups, shape.group), jnp.int32)
  slots = schedule.Slots(live=empty > 0, tree=empty, node=empty)
  own = missing(*empty.shape, shape.pages_of_call)
  size = {"shared": shape.shared, "depth": shape.depth, "stride": shape.decoder.stride}
  fill = functools.partial(schedule.rows, **size)
  rows = jax.eval_shape(fill, tree, paths, slots, own)[0]  # none is in use: only their shape counts
  return Growth(
    tree=tree,
    paths=paths,
    pool=pool,
    slots=slots,
    rows=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rows),
    real=real,
    admitted=never,
    fresh=never,
    done=never,
    before=jnp.zeros(b, jnp.int32),
    wave=jnp.zeros(b, jnp.int32),
    spent=jnp.zeros(b, jnp.int32),
    saved=zero,
    missed=jnp.asarray(shape.decoder.stride > LONG, jnp.int32),
    counters=Counters(
      row_steps=zero, decoded=zero, read_shared=jnp.zeros(()), read_flat=jnp.zeros(())
    ),
  )


def targets(slots: schedule.Slots, tree: tree_lib.Tree):
  """Returns (tree, node) to scatter the rows to; rows not live fall outside and are dropped."""
  return jnp.where(slots.live, slots.tree, tree.parent.shape[0]), slots.node


def store(growth: Growth, segment: segment_lib.Segment, *, shape: Settings) -> Growth:
  """Writes what was decoded to its nodes, ends those that stop and frees the pages of the ended."""
  tree, paths, slots, s = growth.tree, growth.paths, growth.slots, shape.decoder.segment
  b, n = tree.parent.shape
  base, at = growth.rows.base, targets(slots, tree)
  allowed = shape.response_length - (tree.depth[slots.tree, slots.node] - 1) * s
  length = jnp.minimum(base + segment.length, allowed)

  # Which row each node takes its tokens from, and up to which; what it holds already stays.
  own = jnp.arange(slots.live.size, dtype=jnp.int32).reshape(slots.live.shape)
  note = lambda old, new: old.at[at].set(new, mode="drop")
  row = note(jnp.full((b, n), -1, jnp.int32), own)
  count, start, most = (
    note(jnp.zeros((b, n), jnp.int32), x)[..., None] for x in (length, base, allowed)
  )
  step = jnp.arange(s)[None, None]
  fresh = (row != -1)[..., None] & (step >= jnp.minimum(paths.given[..., None], most))
  place = jnp.clip(step - start, 0, shape.decoder.stride - 1)

  def tokens(old, new):
    new = jnp.take_along_axis(new.reshape(-1, new.shape[-1])[row], place, -1)
    return jnp.where(fresh, jnp.where(step < count, new, 0).astype(old.dtype), old)

  def write(old, *names: str):
    new = {x: tokens(getattr(old, x), getattr(segment, x)) for x in names}
    return dataclasses.replace(old, **new)

  tree = write(tree, "tokens", "log_probs", "sampled_log_probs")
  paths = write(paths, "low", "high", "states", *(("entropy",) if shape.decoder.entropy else ()))
  over = (segment.stop != segment_lib.CONTINUES) | (length >= jnp.minimum(allowed, s))
  status = jnp.where(over, _status(tree, slots, segment, base, allowed, shape), tree_lib.OPEN)
  tree = dataclasses.replace(
    tree,
    length=note(tree.length, jnp.where(over, length, 0)),
    status=note(tree.status, status),
  )
  known = jnp.maximum(paths.given[slots.tree, slots.node], length)
  paths = dataclasses.replace(paths, given=note(paths.given, known))

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


def ready(growth: Growth) -> Bool[Array, "b"]:
  """Returns which prompts are to be planned: those whose wave is complete."""
  return growth.admitted & ~growth.done & ~(growth.tree.status == tree_lib.OPEN).any(1)


def _status(tree, slots, segment, base, allowed, shape: Settings) -> Int[Array, "g m"]:
  """Returns ACTIVE or why the trajectory of each row ended; the first reason that holds."""
  total = base + segment.length
  s, h = shape.decoder.segment, shape.repetition_window * shape.repetition_count
  depth = tree.depth[slots.tree, slots.node]
  node, recent = slots.node, []
  for _ in range(-(-h // s) + 1):  # the last h tokens of the path, newest segment last
    recent.insert(0, tree.tokens[slots.tree, node])
    node = jnp.maximum(tree.parent[slots.tree, node], 0)
  recent = jnp.concatenate(recent, -1)
  last = recent.shape[-1] - s + jnp.minimum(total, allowed)  # one past the newest token
  place = last[..., None] - max(h, 1) + jnp.arange(max(h, 1))[None, None]
  recent = jnp.take_along_axis(recent, jnp.maximum(place, 0), -1)
  length = (depth - 1) * s + jnp.minimum(total, allowed)
  repeats = functools.partial(
    stopping.repeats, window=shape.repetition_window, count=shape.repetition_count
  )
  looping = jax.vmap(jax.vmap(repeats))(recent, jnp.minimum(length, h))
  whole = total <= allowed  # a stop beyond the longest answer is cut off with it
  eos = whole & (segment.stop == segment_lib.AT_EOS)
  last = jnp.maximum(segment.length - 1, 0)[..., None]
  boxed = jnp.take_along_axis(segment.states, last, -1)[..., 0] == shape.decoder.closed
  answered = {
    "box": segment.stop == segment_lib.AT_ANSWER,
    "segment": boxed,
    "eos": boxed & (segment.stop == segment_lib.AT_EOS),
  }[shape.decoder.stop_at]
  reasons = (
    (looping & shape.repetition_first, tree_lib.REPETITION),
    (whole & answered, tree_lib.ANSWER),
    (eos, tree_lib.EOS),
    (total >= allowed, tree_lib.LENGTH),
    (depth >= shape.depth, tree_lib.DEPTH),
    (looping, tree_lib.REPETITION),
  )
  status = jnp.full(depth.shape, tree_lib.ACTIVE, jnp.int32)
  for holds, reason in reversed(reasons):
    status = jnp.where(holds, reason, status)
  dropped = (status >= tree_lib.EOS) & (length < shape.min_length)
  return jnp.where(dropped, tree_lib.SHORT, status)


def append(
  leaves: Int[Array, "w"], status: Int[Array, "n"], ready: Bool[Array, ""]
) -> Int[Array, "w"]:
  """Adds the rows that ended in the wave just completed to a tree's leaves, in row order."""
  n = status.shape[0]
  listed = (
    jnp.zeros(n, bool).at[jnp.where(leaves == tree_lib.NO_ROW, n, leaves)].set(True, mode="drop")
  )
  ended = ready & (status >= tree_lib.EOS) & (status <= tree_lib.REPETITION) & ~listed
  spot = jnp.where(
    ended, (leaves != tree_lib.NO_ROW).sum() + jnp.cumsum(ended) - 1, leaves.shape[0]
  )
  return leaves.at[spot].set(jnp.arange(ended.shape[0], dtype=jnp.int32), mode="drop")
