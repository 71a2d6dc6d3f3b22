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
from treepo_jax.rollout import branching, fallback, growth, pruning, schedule, sharing
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.rollout.fallback import Cuts, Draws
from treepo_jax.rollout.growth import Growth, Settings

TOKENS, POLICY, BATCH = 0, 1, 2  # what a draw is for: a token, a prompt's plan, one for all prompts


def advance(
  state: Growth,
  key: jax.Array,
  heat: Float[Array, ""],
  reward: Float[Array, "b w"],
  *,
  shape: Settings,
) -> tuple[Growth, Int[Array, "4"]]:
  """Plans what is next and fills the rows with it.

  Returns the numbers the host needs: groups in use, shared nodes of the fullest, prompts to
  prefill, prompts not done.

  key: folded from seed and step. heat: temperature of allocation. reward: of each leaf, read where
  a policy goes by reward.
  """
  state = _plan(state, key, heat, reward, shape)
  state = _admit(state, key, shape)
  slots, groups = schedule.fill(state.tree, state.paths, shape.groups, shape.group, shape.followers)
  wanted = jnp.repeat(slots.live[..., None], shape.pages_of_segment, -1)
  pool, own = pages_lib.take(state.pool, wanted.astype(jnp.int32))
  rows, shared = schedule.rows(
    state.tree, state.paths, slots, own, shared=shape.shared, depth=shape.depth, page=shape.page
  )
  tree, node = growth.targets(slots, state.tree)
  paths = dataclasses.replace(
    state.paths, pages=state.paths.pages.at[tree, node].set(own, mode="drop")
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
  cuts, status = jax.vmap(step, in_axes=(0, 0, 0, 0, 0, None))(
    state.tree, state.paths.entropy, chance, reward, state.before, heat
  )
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
  free = lambda held: jnp.where(over.reshape(-1, *[1] * (held.ndim - 1)), held, pages_lib.NO_PAGE)
  drop = lambda held: jnp.where(over.reshape(-1, *[1] * (held.ndim - 1)), pages_lib.NO_PAGE, held)
  pool = pages_lib.release(pages_lib.release(pool, free(paths.prompt)), free(paths.pages))
  return dataclasses.replace(
    state,
    pool=pool,
    paths=dataclasses.replace(paths, prompt=drop(paths.prompt), pages=drop(paths.pages)),
    done=done,
    before=jnp.where(ready, finished, state.before),
    wave=state.wave + ready,
  )


def _next(
  tree: tree_lib.Tree, entropy, chance: Draws, reward, before, heat, *, shape: Settings
) -> tuple[Cuts, Int[Array, "n"]]:
  """Returns the nodes of one tree's next wave, none where it is done, and every node's status."""
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
  if shape.fallback.place == "none":
    return grown, status
  cuts = fallback.regrow(
    tree, chance, reward, room, shape.depth, policy=shape.fallback, branch=shape.branch
  )
  return jax.tree.map(lambda a, b: jnp.where(count > 0, a, b), grown, cuts), status


def _open(state: Growth, cuts: Cuts, key: jax.Array, shape: Settings) -> Growth:
  """Attaches new nodes, with the tokens that they are given or have in common with others."""
  n = state.tree.parent.shape[1]
  live = cuts.parent != tree_lib.NO_PARENT
  new = jnp.where(live, state.tree.size[:, None] + jnp.cumsum(live, 1) - 1, n).astype(jnp.int32)
  tree = jax.vmap(tree_lib.attach)(state.tree, cuts.parent, cuts.source)
  paths = state.paths
  above = schedule.ancestry(tree, paths)
  walkable = jax.vmap(sharing.candidates)(tree, paths.twin) & shape.merge
  parents = jax.vmap(lambda above, known: jnp.zeros(n, bool).at[above].max(known))(above, walkable)
  holder = jnp.take_along_axis(above, jnp.minimum(new, n - 1), 1)
  known = jnp.take_along_axis(parents, holder, 1) & live
  common = functools.partial(_common, key=jax.random.fold_in(key, TOKENS), shape=shape)

  def one(args):
    """Of one tree: nothing is compared where no new node has a known one beside it."""
    some = (args[-1] | (args[-2].given > 0)).any()
    same = lambda tree, paths, *_: (tree, paths)
    return jax.lax.cond(some, common, same, *args[:-1])

  tree, paths = jax.lax.map(one, (tree, paths, above, walkable, new, cuts, known))
  return dataclasses.replace(state, tree=tree, paths=paths)


def _common(
  tree: tree_lib.Tree, paths: schedule.Paths, above, walkable: Bool[Array, "n"], new, cuts: Cuts,
  *, key: jax.Array, shape: Settings,
):  # fmt: skip
  """Gives new nodes of one tree what their guides hold, or what others hold that they draw too."""
  shared = sharing.Shared(guide=cuts.guide, given=cuts.given, whole=jnp.zeros(new.shape, bool))
  if shape.merge:
    keys = sampling.row_keys(key, jnp.broadcast_to(tree.prompt_id, new.shape), new)
    uniform = sampling.uniform(keys, shape.decoder.segment).T
    shared = sharing.walk(
      tree, above, walkable, paths.low, paths.high, new, cuts.guide, cuts.given, uniform
    )
  whole, guide = shared.whole, shared.guide
  put = functools.partial(sharing.put, new=new, guide=guide, given=shared.given)
  note = lambda x, value: x.at[new].set(value, mode="drop")
  twin = lambda x: note(x, jnp.where(whole, x[guide], 0))
  tree = dataclasses.replace(
    tree,
    tokens=put(tree.tokens),
    log_probs=put(tree.log_probs),
    sampled_log_probs=put(tree.sampled_log_probs),
    length=twin(tree.length),
    status=note(tree.status, jnp.where(whole, sharing.status_of(tree, guide), tree_lib.OPEN)),
  )
  paths = dataclasses.replace(
    paths,
    low=put(paths.low),
    high=put(paths.high),
    entropy=twin(paths.entropy),
    state=twin(paths.state),
    twin=note(paths.twin, jnp.where(whole, guide, tree_lib.NO_ROW)),
    guide=note(paths.guide, guide),
    given=note(paths.given, shared.given),
  )
  return tree, paths


def _admit(state: Growth, key: jax.Array, shape: Settings) -> Growth:
  """Admits prompts, with their first branches, while the pool can hold their largest trees."""
  tree, room = state.tree, state.pool.free.shape[0] // shape.pages_of_tree
  waiting = state.real & ~state.done
  admitted = waiting & (jnp.cumsum(waiting) <= room)
  fresh = admitted & ~state.admitted
  size = {"width": shape.width, "segment": shape.decoder.segment}
  first = functools.partial(branching.initial, **size, policy=shape.branch)
  chance = first_draws(key, tree.prompt_id, shape=shape)
  count = jnp.where(fresh, jax.vmap(first)(chance.branching[:, 0]), 0)
  parent = jnp.where(jnp.arange(shape.width)[None] < count[:, None], 0, tree_lib.NO_PARENT)
  tree = jax.vmap(tree_lib.attach)(tree, parent, jnp.full(parent.shape, tree_lib.NO_ROW, jnp.int32))

  held = -(-(tree.prompt_length - 1) // shape.page)
  x = shape.pages_of_prompt
  wanted = fresh[:, None] & (jnp.arange(x)[None] >= x - held[:, None])
  pool, pages = pages_lib.take(state.pool, wanted.astype(jnp.int32))
  prompt = jnp.where(fresh[:, None], pages, state.paths.prompt)
  return dataclasses.replace(
    state,
    tree=tree,
    pool=pool,
    paths=dataclasses.replace(state.paths, prompt=prompt),
    admitted=state.admitted | admitted,
    fresh=fresh,
    wave=state.wave + fresh,  # wave 0 drew the first branches
  )
