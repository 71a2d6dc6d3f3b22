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
  tree = tree_lib.create(
    tokens, length, identity, width=size[0], depth=size[1], segment=size[2], spare=shape.spare
  )
  b, n = tree.parent.shape
  missing = lambda *axes: jnp.full(axes, pages_lib.NO_PAGE, jnp.int32)
  paths = schedule.Paths(
    prompt=missing(b, shape.pages_of_prompt),
    pages=missing(b, n, shape.pages_of_segment),
    state=jnp.zeros((b, n), jnp.int32),
    twin=jnp.full((b, n), tree_lib.NO_ROW, jnp.int32),
    guide=jnp.zeros((b, n), jnp.int32),
    given=jnp.zeros((b, n), jnp.int32),
    low=jnp.zeros((b, n, size[2])),
    high=jnp.zeros((b, n, size[2])),
    entropy=jnp.zeros((b, n)),
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


def targets(slots: schedule.Slots, tree: tree_lib.Tree):
  """Returns (tree, node) to scatter the rows to; rows not live fall outside and are dropped."""
  return jnp.where(slots.live, slots.tree, tree.parent.shape[0]), slots.node


def store(growth: Growth, segment: segment_lib.Segment, *, shape: Settings) -> Growth:
  """Attaches the decoded segments to their nodes and followers; frees the pages of the ended.

  Trajectories of prompts whose wave is complete become leaves.
  """
  tree, paths, slots, s = growth.tree, growth.paths, growth.slots, shape.decoder.segment
  b, n = tree.parent.shape
  allowed = shape.response_length - (tree.depth[slots.tree, slots.node] - 1) * s
  length = jnp.minimum(segment.length, allowed)
  twin = segment.agreed == segment.length[..., None]
  at = targets(slots, tree)
  follows = slots.followers != tree_lib.NO_ROW
  behind = jnp.where(follows, at[0][..., None], b), slots.followers

  def note(old, leads, trails):
    """Writes a value a row to its node, and one a follower to the follower's."""
    return old.at[at].set(leads, mode="drop").at[behind].set(trails, mode="drop")

  # Which row each node takes its tokens from, and how many; what it holds already of these stays.
  own = jnp.arange(slots.live.size, dtype=jnp.int32).reshape(slots.live.shape)
  none = jnp.full((b, n), -1, jnp.int32)
  row = note(none, own, own[..., None])
  common = jnp.where(twin, length[..., None], segment.agreed)
  count = note(jnp.zeros((b, n), jnp.int32), length, common)
  step = jnp.arange(s)[None, None]
  fresh = (row != -1)[..., None] & (step >= jnp.minimum(paths.given, count)[..., None])

  def tokens(old, new):
    new = jnp.where(step < count[..., None], new.reshape(-1, s)[row], 0)
    return jnp.where(fresh, new, old)

  def ends(old, new, left: Array | int = 0):
    """Writes what holds at the end of a segment: of twins too, `left` of those who left."""
    return note(old, new, jnp.where(twin, new[..., None], left))

  node = slots.node[..., None]
  trails = lambda old, new: old.at[behind].set(new, mode="drop")
  paths = dataclasses.replace(
    paths,
    low=tokens(paths.low, segment.low),
    high=tokens(paths.high, segment.high),
    state=ends(paths.state, segment.state),
    entropy=ends(paths.entropy, segment.entropy / jnp.maximum(segment.length, 1)),
    twin=trails(paths.twin, jnp.where(twin, node, tree_lib.NO_ROW)),
    guide=trails(paths.guide, node),
    given=trails(paths.given, segment.agreed),
  )
  tree = dataclasses.replace(
    tree,
    tokens=tokens(tree.tokens, segment.tokens),
    log_probs=tokens(tree.log_probs, segment.log_probs),
    sampled_log_probs=tokens(tree.sampled_log_probs, segment.sampled_log_probs),
    length=ends(tree.length, length),
  )
  status = _status(tree, slots, segment, allowed, shape)
  tree = dataclasses.replace(tree, status=ends(tree.status, status, tree_lib.OPEN))

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
  growth = dataclasses.replace(growth, tree=tree, paths=paths, pool=pool, counters=counters)
  leaves = jax.vmap(_append)(tree.leaves, tree.status, ready(growth))
  return dataclasses.replace(growth, tree=dataclasses.replace(tree, leaves=leaves))


def ready(growth: Growth) -> Bool[Array, "b"]:
  """Returns which prompts are to be planned: those whose wave is complete."""
  return growth.admitted & ~growth.done & ~(growth.tree.status == tree_lib.OPEN).any(1)


def _status(tree, slots, segment, allowed, shape: Settings) -> Int[Array, "g m"]:
  """Returns ACTIVE or why the trajectory of each row ended; the first reason that holds."""
  s, h = shape.decoder.segment, shape.repetition_window * shape.repetition_count
  depth = tree.depth[slots.tree, slots.node]
  node, recent = slots.node, []
  for _ in range(-(-h // s) + 1):  # the last h tokens of the path, newest segment last
    recent.insert(0, tree.tokens[slots.tree, node])
    node = jnp.maximum(tree.parent[slots.tree, node], 0)
  recent = jnp.concatenate(recent, -1)
  last = recent.shape[-1] - s + jnp.minimum(segment.length, allowed)  # one past the newest token
  place = last[..., None] - max(h, 1) + jnp.arange(max(h, 1))[None, None]
  recent = jnp.take_along_axis(recent, jnp.maximum(place, 0), -1)
  length = (depth - 1) * s + jnp.minimum(segment.length, allowed)
  repeats = functools.partial(
    stopping.repeats, window=shape.repetition_window, count=shape.repetition_count
  )
  looping = jax.vmap(jax.vmap(repeats))(recent, jnp.minimum(length, h))
  whole = segment.length <= allowed  # a stop beyond the longest answer is cut off with it
  eos = whole & (segment.stop == segment_lib.AT_EOS)
  boxed = segment.state == shape.decoder.closed
  answered = {
    "box": segment.stop == segment_lib.AT_ANSWER,
    "segment": boxed,
    "eos": boxed & (segment.stop == segment_lib.AT_EOS),
  }[shape.decoder.stop_at]
  reasons = (
    (looping & shape.repetition_first, tree_lib.REPETITION),
    (whole & answered, tree_lib.ANSWER),
    (eos, tree_lib.EOS),
    (segment.length >= allowed, tree_lib.LENGTH),
    (depth >= shape.depth, tree_lib.DEPTH),
    (looping, tree_lib.REPETITION),
  )
  status = jnp.full(depth.shape, tree_lib.ACTIVE, jnp.int32)
  for holds, reason in reversed(reasons):
    status = jnp.where(holds, reason, status)
  dropped = (status >= tree_lib.EOS) & (length < shape.min_length)
  return jnp.where(dropped, tree_lib.SHORT, status)


def _append(
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
