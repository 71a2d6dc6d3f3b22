"""What grows next: every prompt whose wave is complete is pruned, branched or falls back.

A wave of a prompt is all its open nodes; once they are decoded the prompt is planned anew, by
itself, so a tree depends on its prompt's identity and the key alone: not on the other prompts, the
number of rows, the pages or the devices.

Axes: B prompts of a shard, N nodes, W width, S tokens of a segment.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import sampling
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.rollout import branching, fallback, growth, pruning, schedule, sharing
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.rollout.fallback import Cuts, Draws
from treepo_jax.rollout.growth import Growth, Settings
from treepo_jax.rollout.tree import OPEN

INSIDE = ("log_prob", "block", "inverse_block")  # fallbacks that may cut inside a segment
PATIENCE = 8  # tokens missed for one that is saved, up to which waiting pays
TOKENS, POLICY, BATCH = 0, 1, 2  # what a draw is for: a token, a prompt's plan, one for all prompts


def take(state: Growth, segment: segment_lib.Segment, key: jax.Array, *, shape: Settings) -> Growth:
  """Takes in what was decoded, and what others draw alike; complete waves give their leaves."""
  state = growth.store(state, segment, shape=shape)
  if shape.merge:
    waits, opened = state.paths.waits, state.tree.status == OPEN
    idle, known = waits & opened & ~_decoded(state), state.paths.given
    state = _share(state, opened | waits, waits.any(1), key, shape)
    # Tokens that a node was saved, and those that it would have decoded meanwhile and was not.
    call = jnp.minimum(shape.decoder.stride, shape.decoder.segment - known)
    same = state.paths.twin != tree_lib.NO_ROW
    saved = jnp.where(idle, jnp.where(same, call, state.paths.given - known), 0)
    state = dataclasses.replace(
      state,
      saved=state.saved + saved.sum(dtype=jnp.int32),
      missed=state.missed + jnp.where(idle, jnp.maximum(call - saved, 0), 0).sum(dtype=jnp.int32),
    )
  leaves = jax.vmap(growth.append)(state.tree.leaves, state.tree.status, growth.ready(state))
  return dataclasses.replace(state, tree=dataclasses.replace(state.tree, leaves=leaves))


def _decoded(state: Growth) -> Bool[Array, "b n"]:
  """Returns which nodes the last call decoded."""
  none = jnp.zeros(state.tree.parent.shape, bool)
  return none.at[growth.targets(state.slots, state.tree)].set(True, mode="drop")


def advance(
  state: Growth,
  key: jax.Array,
  heat: Float[Array, ""],
  reward: Float[Array, "b w"],
  *,
  shape: Settings,
) -> tuple[Growth, Int[Array, "4"]]:
  """Plans what is next and fills the rows with it.

  Returns the numbers the host needs: groups in use, nodes that the fullest reads, prompts to
  prefill, prompts not done.

  key: folded from seed and step. heat: temperature of allocation. reward: of each leaf, read where
  a policy goes by reward.
  """
  state = _plan(state, key, heat, reward, shape)
  state = _admit(state, key, shape)
  stride = shape.pages_of_call
  slots, groups, wanted = schedule.fill(
    state.tree,
    state.paths,
    state.pool,
    state.admitted & ~state.done,
    state.missed > PATIENCE * state.saved,
    groups=shape.groups,
    members=shape.group,
    stride=stride,
    largest=shape.pages_of_tree,
  )
  pool, own = pages_lib.take(state.pool, jnp.arange(stride)[None, None] < wanted[..., None])
  rows, shared = schedule.rows(
    state.tree,
    state.paths,
    slots,
    own,
    shared=shape.shared,
    depth=shape.depth,
    stride=shape.decoder.stride,
  )
  tree, node = (x[..., None] for x in growth.targets(slots, state.tree))
  place = (rows.base // shape.page)[..., None] + jnp.arange(stride)[None, None]
  place = jnp.where(own == pages_lib.NO_PAGE, shape.pages_of_segment, place)
  paths = dataclasses.replace(
    state.paths, pages=state.paths.pages.at[tree, node, place].set(own, mode="drop")
  )
  state = dataclasses.replace(state, slots=slots, rows=rows, pool=pool, paths=paths)
  unfinished = (state.real & ~state.done).sum()
  return state, jnp.stack([groups, shared, state.fresh.sum(), unfinished])


@functools.partial(jax.vmap, in_axes=(None, 0, 0, None))
def draws(key: jax.Array, identity: UInt32[Array, ""], wave: Int[Array, ""], width: int) -> Draws:
  """Returns the numbers that a wave of each prompt is planned with."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, POLICY), identity), wave)
  return fallback.draw(key, width)


def first_draws(key: jax.Array, identity: UInt32[Array, "b"], *, shape: Settings) -> Draws:
  """Returns the numbers of the initial divergence: of each prompt, or the same for all."""
  if shape.branch.initial_draw == "batch":
    key, identity = jax.random.fold_in(key, BATCH), jnp.zeros_like(identity)
  return draws(key, identity, jnp.zeros(identity.shape, jnp.int32), shape.width)


def _plan(state: Growth, key: jax.Array, heat, reward, shape: Settings) -> Growth:
  """Prunes, branches or cuts every prompt whose wave is complete; frees the pages of those done."""
  ready = growth.ready(state)
  chance = draws(key, state.tree.prompt_id, state.wave, shape.width)
  step = functools.partial(_next, shape=shape)
  cuts, status, room, ended = jax.vmap(step, in_axes=(0, 0, 0, 0, 0, None))(
    state.tree, state.paths.entropy.mean(-1), chance, reward, state.before, heat
  )
  if shape.fallback.place != "none":
    regrow = functools.partial(
      fallback.regrow, most=shape.depth, policy=shape.fallback, branch=shape.branch
    )

    def cut(cuts: Cuts) -> Cuts:
      anew = jax.vmap(regrow)(state.tree, chance, reward, room)
      return jax.tree.map(lambda a, b: jnp.where(ended[:, None], b, a), cuts, anew)

    some = (ready & ended & (room > 0)).any()  # of most waves none falls back
    cuts = jax.lax.cond(some, cut, lambda cuts: cuts, cuts)
  parent = jnp.where(ready[:, None], cuts.parent, tree_lib.NO_PARENT)
  cuts = dataclasses.replace(cuts, parent=parent)
  finished = tree_lib.finished(state.tree)
  tree = dataclasses.replace(
    state.tree, status=jnp.where(ready[:, None], status, state.tree.status)
  )
  state = dataclasses.replace(state, tree=tree)
  state = _open(state, cuts, key, shape)

  done = state.done | (ready & (cuts.parent == tree_lib.NO_PARENT).all(1))
  over = done & ~state.done
  pool, paths = state.pool, state.paths
  held = (paths.pages != pages_lib.NO_PAGE).sum((1, 2)) + (paths.prompt != pages_lib.NO_PAGE).sum(1)
  free = lambda held: jnp.where(over.reshape(-1, *[1] * (held.ndim - 1)), held, pages_lib.NO_PAGE)
  drop = lambda held: jnp.where(over.reshape(-1, *[1] * (held.ndim - 1)), pages_lib.NO_PAGE, held)
  given_back = jnp.concatenate([free(paths.prompt).reshape(-1), free(paths.pages).reshape(-1)])
  pool = pages_lib.release(pool, given_back)
  return dataclasses.replace(
    state,
    pool=pool,
    paths=dataclasses.replace(paths, prompt=drop(paths.prompt), pages=drop(paths.pages)),
    done=done,
    before=jnp.where(ready, finished, state.before),
    wave=state.wave + ready,
    spent=jnp.where(over, held.astype(jnp.int32), state.spent),
  )


def _next(
  tree: tree_lib.Tree, entropy, chance: Draws, reward, before, heat, *, shape: Settings
) -> tuple[Cuts, Int[Array, "n"], Int[Array, ""], Bool[Array, ""]]:
  """Returns the next wave of one tree by branching, and what is needed to plan the rest.

  That is every node's status, how many trajectories more there may be, and whether no path goes on.
  """
  n, w, s = tree.parent.shape[0], shape.width, shape.decoder.segment
  rows = jnp.nonzero(tree.status == tree_lib.ACTIVE, size=w, fill_value=n)[0].astype(jnp.int32)
  finished = tree_lib.finished(tree)
  wave = finished - before + (rows < n).sum()
  lost = pruning.pruned(tree, rows, entropy, reward, shape.depth, policy=shape.prune)
  status = tree.status.at[jnp.where(lost, rows, n)].set(tree_lib.PRUNED, mode="drop")
  rows = jnp.sort(jnp.where(lost, n, rows))
  count = (rows < n).sum()

  leaf = jnp.maximum(tree.leaves, 0)
  answer = (tree.depth[leaf] - 1) * s + tree.length[leaf]
  used = jnp.where(tree.leaves != tree_lib.NO_ROW, answer, 0).sum()
  growing = tree.depth.at[rows].get(mode="fill", fill_value=0).sum() * s
  reach = branching.reachable(finished, used, count, growing, w, s, policy=shape.branch)
  room = reach - finished
  if shape.spare:  # paths without a trajectory take rows too
    room = jnp.minimum(room, (n - tree.size) // shape.depth)

  total = branching.budget(room, wave, count, chance.branching[0], policy=shape.branch)
  total = jnp.where(count > 0, total, 0)
  parent = branching.allocate(tree, rows, total, heat, policy=shape.branch)
  none = jnp.zeros(w, jnp.int32)
  grown = Cuts(parent=parent, source=none + tree_lib.NO_ROW, guide=none, given=none)
  return grown, status, room, count == 0


def _open(state: Growth, cuts: Cuts, key: jax.Array, shape: Settings) -> Growth:
  """Attaches new nodes, with the tokens that they are given or draw like known ones."""
  b, n = state.tree.parent.shape
  live = cuts.parent != tree_lib.NO_PARENT
  new = jnp.where(live, state.tree.size[:, None] + jnp.cumsum(live, 1) - 1, n).astype(jnp.int32)
  tree = jax.vmap(tree_lib.attach)(state.tree, cuts.parent, cuts.source)
  state = dataclasses.replace(state, tree=tree)
  if shape.fallback.place in INSIDE or shape.fallback.window:
    state = _give(state, new, cuts)
  if not shape.merge:
    return state
  above = schedule.ancestry(tree, state.paths)
  fresh = jnp.zeros((b, n), bool).at[jnp.arange(b)[:, None], new].set(True, mode="drop")
  known = (tree.status != tree_lib.UNUSED) & (state.paths.twin == tree_lib.NO_ROW)
  known &= (tree.depth > 0) & ~fresh
  parents = jnp.zeros((b, n), bool).at[jnp.arange(b)[:, None], above].max(known)
  some = fresh & (jnp.take_along_axis(parents, above, 1) | (state.paths.given > 0))
  # The first of new nodes that know nothing is decoded, the others see what it draws.
  first = (
    jnp.full((b, n), n)
    .at[jnp.arange(b)[:, None], above]
    .min(jnp.where(fresh, jnp.arange(n)[None], n))
  )
  behind = fresh & (jnp.arange(n)[None] > jnp.take_along_axis(first, above, 1))
  paths = dataclasses.replace(state.paths, waits=state.paths.waits | behind)
  state = dataclasses.replace(state, paths=paths)
  return _share(state, fresh, some.any(1), key, shape)


def _give(state: Growth, new: Int[Array, "b w"], cuts: Cuts) -> Growth:
  """Gives new nodes the first tokens of the trajectory that was cut inside a segment."""
  every, s = jnp.arange(new.shape[0])[:, None], state.tree.tokens.shape[2]
  kept = jnp.arange(s)[None, None] < cuts.given[..., None]

  def put(x):
    own = jnp.where(kept, jnp.take_along_axis(x, cuts.guide[..., None], 1), 0)
    return x.at[every, new].set(own.astype(x.dtype), mode="drop")

  names = ("tokens", "log_probs", "sampled_log_probs")
  tree = dataclasses.replace(state.tree, **{x: put(getattr(state.tree, x)) for x in names})
  names = ("states", "low", "high", "entropy")
  paths = dataclasses.replace(
    state.paths,
    given=state.paths.given.at[every, new].set(cuts.given, mode="drop"),
    **{x: put(getattr(state.paths, x)) for x in names},
  )
  return dataclasses.replace(state, tree=tree, paths=paths)


def _share(
  state: Growth, asked: Bool[Array, "b n"], some: Bool[Array, "b"], key: jax.Array, shape: Settings
) -> Growth:
  """Lets the nodes asked draw what others hold, in the trees where there is some to be shared."""
  (b, n), w = asked.shape, shape.width
  key = jax.random.fold_in(key, TOKENS)

  def common(tree, paths, above, asked):
    rows = jnp.nonzero(asked, size=w, fill_value=n)[0].astype(jnp.int32)
    keys = sampling.row_keys(key, jnp.broadcast_to(tree.prompt_id, (w,)), rows)
    uniform = sampling.uniform(keys, jnp.zeros(w, jnp.int32), shape.decoder.segment).T
    match = sharing.walk(tree, paths, above, rows, uniform)
    return sharing.apply(tree, paths, rows, match)

  above = schedule.ancestry(state.tree, state.paths)
  order = jnp.argsort(~some, stable=True)

  def one(i, carry):
    tree, paths, *pages = carry
    at = order[i]
    own = jax.tree.map(lambda x: x[at], (tree, paths, above, asked))
    return jax.tree.map(lambda x, new: x.at[at].set(new), (tree, paths, *pages), common(*own))

  # Those trees alone, one after another and in place: a step of large trees would be all copies.
  missing = jnp.full((b, w, shape.pages_of_segment), pages_lib.NO_PAGE, jnp.int32)
  start = (state.tree, state.paths, missing, missing)
  tree, paths, more, less = jax.lax.fori_loop(0, some.sum(), one, start)
  pool = pages_lib.release(pages_lib.hold(state.pool, more), less)
  return dataclasses.replace(state, tree=tree, paths=paths, pool=pool)


def _admit(state: Growth, key: jax.Array, shape: Settings) -> Growth:
  """Admits prompts, with their first branches, while the pool can be expected to hold their trees.

  A tree is expected to come to what those that are done came to; before any is, to a quarter of
  the largest, for what branches early shares its pages, and what ends gives its own back.
  """
  tree, pool, largest = state.tree, state.pool, shape.pages_of_tree
  running = state.admitted & ~state.done
  expected = (largest // 4 + state.spent.sum()) // (1 + state.done.sum())
  held = (state.paths.pages != pages_lib.NO_PAGE).sum((1, 2))
  taken = jnp.where(running, jnp.maximum(held, expected), 0).sum()
  waiting = state.real & ~state.admitted
  rank = jnp.cumsum(waiting)
  own = -(-(tree.prompt_length - 1) // shape.page)
  left = schedule.left_over(pool, state.paths, running, largest)[0]
  prompts = jnp.cumsum(waiting * own)
  # Where none is under way, the first that waits may become the largest tree.
  alone = ~running.any()
  left, prompts = (
    jnp.where(alone, left - largest, left),
    jnp.where(alone, prompts - own[jnp.argmax(waiting)], prompts),
  )
  fits = (taken + rank * expected <= pool.count.shape[0]) & (prompts <= left)
  fits |= alone & (rank == 1)
  fresh = waiting & (jnp.cumsum(waiting & ~fits) == 0)

  size = {"width": shape.width, "segment": shape.decoder.segment}
  first = functools.partial(branching.initial, **size, policy=shape.branch)
  chance = first_draws(key, tree.prompt_id, shape=shape)
  count = jnp.where(fresh, jax.vmap(first)(chance.branching[:, 0]), 0)
  parent = jnp.where(jnp.arange(shape.width)[None] < count[:, None], 0, tree_lib.NO_PARENT)
  none = jnp.zeros(parent.shape, jnp.int32)
  cuts = Cuts(parent=parent, source=none + tree_lib.NO_ROW, guide=none, given=none)
  state = _open(state, cuts, key, shape)

  x = shape.pages_of_prompt
  wanted = fresh[:, None] & (jnp.arange(x)[None] >= x - own[:, None])
  pool, pages = pages_lib.take(state.pool, wanted)
  prompt = jnp.where(fresh[:, None], pages, state.paths.prompt)
  return dataclasses.replace(
    state,
    pool=pool,
    paths=dataclasses.replace(state.paths, prompt=prompt),
    admitted=state.admitted | fresh,
    fresh=fresh,
    wave=state.wave + fresh,  # wave 0 drew the first branches
  )
