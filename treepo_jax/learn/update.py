"""From packed rows to new weights: one sharded, compiled optimizer step a batch.

Axes: K micro-batches, R rows of a micro-batch (split over the mesh's data x fsdp), L tokens of a
row, D model width.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from treepo_jax import struct
from treepo_jax.config import UserError
from treepo_jax.learn import lora, losses, optimizer
from treepo_jax.learn.losses import Ratio
from treepo_jax.learn.packing import Batch
from treepo_jax.model import attention, transformer
from treepo_jax.model import mesh as mesh_lib

HEAD_TOKENS = 1024  # tokens of a row whose logits are held at once: 0.6 GB at a vocabulary of 150k

SUMS = ("update/tokens_trained", "update/tokens_path", "update/skipped")  # the rest are means

Metrics = dict[str, Any]


@struct.dataclass
class State:
  """What training changes.

  Attributes:
    step: rollout batches trained on.
    params: what is trained: the weights, or with config.lora.rank their adapters; in float32
      whatever config.model.dtype: in bfloat16 a weight would lose every update below about 1/256 of
      itself, which is nearly all of them.
    opt_state: of optimizer.create.
    kl_weight: weight of the KL to the reference, moved by config.learn.kl_target.
    base: the weights beneath adapters, in config.model.dtype.
    reference: weights of the reference policy, where one is asked for and it is not `base`.
  """

  step: Int[Array, ""]
  params: Any
  opt_state: Any
  kl_weight: Float[Array, ""]
  base: Any = None
  reference: Any = None


def create(params: Any, config, mesh: Mesh) -> State:
  """Returns the state before the first step, laid out over the mesh; `params` stay the caller's.

  Raises:
    UserError: if the rows of a micro-batch cannot be split over the mesh.
  """
  shards, rows = mesh_lib.shards(mesh), config.learn.micro_rows
  if rows % shards:
    raise UserError(
      f"config.learn.micro_rows = {rows} cannot be split over {shards} devices "
      f"(mesh.data x mesh.fsdp): set it to a multiple, for example {-(-rows // shards) * shards}"
    )

  init = functools.partial(_init, config=config)
  layout = mesh_lib.shardings(jax.eval_shape(init, params), mesh)
  return jax.jit(init, out_shardings=layout)(params)


def abstract(params: Any, config, mesh: Mesh) -> State:
  """Returns the shapes and the layout of what `create` makes of such params."""
  state = jax.eval_shape(functools.partial(_init, config=config), params)
  layout = mesh_lib.shardings(state, mesh)
  put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(put, state, layout)


def _init(params: Any, *, config) -> State:
  settings, kept = config.learn, config.learn.kl != "none"
  whole, base, reference = cast(params, jnp.float32), None, None
  trained = whole
  if config.lora.rank:
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b"lora"))
    base = cast(params, config.model.dtype)
    trained = lora.create(whole, key, rank=config.lora.rank, targets=config.lora.targets)
  if kept and settings.reference == "average":
    reference = whole
  elif kept and base is None:
    reference = cast(params, config.model.dtype)
  return State(
    step=jnp.zeros((), jnp.int32),
    params=trained,
    opt_state=optimizer.create(config).init(trained),
    kl_weight=jnp.float32(settings.kl_weight),
    base=base,
    reference=reference,
  )


def cast(params: Any, dtype) -> Any:
  """Returns the weights in `dtype`: what the rollout and the update compute with."""
  return jax.tree.map(lambda x: x.astype(dtype), params)


def weights(state: State, config, mesh: Mesh) -> Any:
  """Returns the policy's whole weights in config.model.dtype, adapters added, laid out to roll out.

  One program casts and sends them: no device holds more than its own part at any time.
  """
  return transfer(config, mesh)(state.params, state.base)


@functools.lru_cache
def transfer(config, mesh: Mesh) -> jax.stages.Wrapped:
  """Returns the jitted (State.params, State.base) -> weights split over "tensor" alone."""

  def move(params: Any, base: Any) -> Any:
    whole = _whole(params, base, config)
    layout = mesh_lib.shardings(whole, mesh, over=("tensor",))
    return jax.lax.with_sharding_constraint(whole, layout)

  return jax.jit(move)


def step(
  state: State, batches: Sequence[Batch], *, graph: nnx.GraphDef, config, mesh: Mesh
) -> tuple[State, Metrics]:
  """Takes one optimizer step for each batch of a rollout; `state` is donated.

  All batches are scored before the first step, where the loss asks for the log-probs of the
  trainer (learn.correction) or of the reference (learn.kl).

  Args:
    state: of `create`, or of an earlier step.
    batches: of packing.pack, the same on every host; with none only `step` is counted.
    graph: of the model.
    config: frozen; hashable, for it is static.
    mesh: that the state was created with.

  Returns:
    The new state, and scalars on the device: means over all batches, and sums of tokens and of
    skipped steps. loss/logprob_gap is of the first batch, before any weight has changed. A step
    whose gradient is not finite changes no weight, counts in update/skipped and in no mean.
  """
  optimize = program(state, graph=graph, config=config, mesh=mesh)
  placed = (place(batch, config, mesh) for batch in batches)
  if config.learn.kl != "none" or config.learn.correction != "none":
    placed = [scorer(graph, config, mesh)(state, batch) for batch in placed]
  measured = []
  for batch in placed:
    state, measurement = optimize(state, batch)
    measured.append(measurement)
  return dataclasses.replace(state, step=_next(state.step)), _summary(measured)


def abstract_batch(batch: Batch, config, mesh: Mesh) -> Batch:
  """Returns the shapes and the layout of what `place` makes of such a batch."""
  rows, sharding = config.learn.micro_rows, _split(mesh)
  cut = lambda x: (x.shape[0] // rows, rows, *x.shape[1:])
  put = lambda x: jax.ShapeDtypeStruct(cut(x), x.dtype, sharding=sharding)
  return jax.tree.map(put, batch)


def _split(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(None, mesh_lib.BATCH_AXES))


def place(batch: Batch, config, mesh: Mesh) -> Batch:
  """Returns the batch as micro-batches [K, R, ...] on the devices; each host sends its own rows."""
  sharding = _split(mesh)

  def put(x):
    x = x.reshape(-1, config.learn.micro_rows, *x.shape[1:])
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  with jax.transfer_guard_host_to_device("allow"):  # make_array_from_callback counts as implicit
    return jax.tree.map(put, batch)


def divergence(
  state: State, batches: Sequence[Batch], nodes: int, *, graph: nnx.GraphDef, config, mesh: Mesh
) -> Float[Array, "m"]:
  """Returns the sum of log(policy / reference) over each node's tokens: k1, for rewards.

  nodes: M, more than the largest Batch.node.
  """
  total = jnp.zeros(nodes)
  for batch in batches:
    placed = scorer(graph, config, mesh)(state, place(batch, config, mesh))
    total = _add_divergence(total, placed, mesh)
  return total


@functools.partial(jax.jit, static_argnames="mesh")
def _add_divergence(total: Float[Array, "m"], batch: Batch, mesh: Mesh) -> Float[Array, "m"]:
  difference = batch.old_log_probs - batch.reference_log_probs
  total = total.at[batch.node].add(jnp.where(batch.count > 0, difference, 0))
  return jax.lax.with_sharding_constraint(total, mesh_lib.replicated(mesh))  # every host reads it


@functools.lru_cache
def scorer(graph: nnx.GraphDef, config, mesh: Mesh) -> jax.stages.Wrapped:
  """Returns the jitted (state, placed batch) -> batch with the log-probs that the loss asks for."""
  return jax.jit(functools.partial(_scored, graph=graph, config=config, mesh=mesh))


def _scored(state: State, batch: Batch, *, graph: nnx.GraphDef, config, mesh: Mesh) -> Batch:
  """Returns the batch with the log-probs that the loss compares with."""

  def score(graph: nnx.GraphDef, params: Any) -> Float[Array, "k r l"]:
    log_probs = lambda rows: _log_probs(params, rows, graph, config, mesh)[0]
    nothing = lambda rows: jnp.zeros_like(rows.gain)
    one = lambda rows: jax.lax.cond(rows.count.any(), log_probs, nothing, rows)
    return jax.lax.map(one, batch)

  if config.learn.kl != "none":
    reference = state.base if state.reference is None else state.reference
    reference = score(graph, cast(reference, config.model.dtype))
    batch = dataclasses.replace(batch, reference_log_probs=reference)
  if config.learn.correction != "none":
    old = jnp.where(batch.count > 0, score(*_policy(state.params, state.base, graph, config)), 0)
    batch = dataclasses.replace(batch, old_log_probs=old, rollout_log_probs=batch.old_log_probs)
  return batch


def program(state: State, *, graph: nnx.GraphDef, config, mesh: Mesh) -> jax.stages.Wrapped:
  """Returns the jitted step (state, placed batch) -> (state, Ratios and sums by name).

  Equal arguments give the same function. `state` may hold shapes alone, to lower the step without
  arrays. The state is donated, and the new one laid out as mesh.shardings says: left to the
  compiler, its layout comes back under another name, and the next step compiles again.
  """
  layout, structure = jax.tree.flatten(mesh_lib.shardings(state, mesh))
  return _program(tuple(layout), structure, graph, config, mesh)


@functools.lru_cache
def _program(layout: tuple, structure, graph: nnx.GraphDef, config, mesh: Mesh):
  return jax.jit(
    functools.partial(_optimize, graph=graph, config=config, mesh=mesh),
    donate_argnums=0,
    out_shardings=(jax.tree.unflatten(structure, layout), None),
  )


def _optimize(
  state: State, batch: Batch, *, graph: nnx.GraphDef, config, mesh: Mesh
) -> tuple[State, Metrics]:
  gradient, ratios = accumulate(state, batch, graph=graph, config=config, mesh=mesh)
  norm = optax.tree.norm(gradient)
  finite = jnp.isfinite(norm)

  rate = optimizer.learning_rate(state.opt_state, config)
  updates, opt_state = optimizer.create(config).update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  new = dataclasses.replace(state, params=params, opt_state=opt_state)
  new = _follow(new, ratios, config)
  new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)

  one = jnp.ones(())
  ratios["update/grad_norm"] = Ratio(sum=norm, count=one)
  ratios["update/learning_rate"] = Ratio(sum=rate, count=one)
  ratios = jax.tree.map(lambda x: jnp.where(finite, x, 0), ratios)
  trained, path = batch.tokens_trained.sum(), batch.tokens_path.sum()
  saved, of = (path - trained).astype(jnp.float32), path.astype(jnp.float32)
  if config.learn.kl != "none":
    ratios["update/kl_weight"] = Ratio(sum=state.kl_weight, count=one)
  return new, ratios | {
    "update/token_saving": Ratio(sum=saved, count=of),
    "update/tokens_trained": trained,
    "update/tokens_path": path,
    "update/skipped": 1 - finite.astype(jnp.int32),
  }


def _follow(state: State, ratios: dict[str, Ratio], config) -> State:
  """Moves what follows the policy: an averaged reference, and the weight of the KL to it."""
  settings = config.learn
  if settings.kl == "none":
    return state
  reference, kl_weight = state.reference, state.kl_weight
  if settings.reference == "average":
    part = 1 - settings.average
    now = cast(_whole(state.params, state.base, config), jnp.float32)
    reference = jax.tree.map(lambda old, new: old + part * (new - old), reference, now)
  if settings.kl_target:  # Ziegler et al. 2019 (arXiv 1909.08593), section 2.2
    error = ratios["loss/kl_reference"].mean() / settings.kl_target - 1
    kl_weight = kl_weight * (1 + 0.1 * jnp.clip(error, -0.2, 0.2))
  return dataclasses.replace(state, reference=reference, kl_weight=kl_weight)


def accumulate(
  state: State, batch: Batch, *, graph: nnx.GraphDef, config, mesh: Mesh
) -> tuple[Any, dict[str, Ratio]]:
  """Returns the loss's gradient over the batch, of state.params in float32, and its Ratios.

  Micro-batches and devices add sums, which are divided once: it is the mean over the tokens of
  all trajectories of the batch (or what learn.aggregate says), however they were packed and split.
  """
  dtype = config.model.dtype if state.base is None else jnp.float32
  trained = cast(state.params, dtype)
  layout = mesh_lib.shardings(trained, mesh)
  loss = functools.partial(
    _loss, base=state.base, kl_weight=state.kl_weight, graph=graph, config=config, mesh=mesh
  )
  gradient_fn = jax.grad(loss, has_aux=True)

  def add(total, rows):
    gradient, ratios = gradient_fn(trained, rows)
    # Pinned, or the compiler may gather the sum on every device.
    gradient = jax.lax.with_sharding_constraint(cast(gradient, jnp.float32), layout)
    return jax.tree.map(jnp.add, total, (gradient, ratios))

  def body(total, rows):
    # Rows are padded to few shapes; a micro-batch of padding alone costs nothing.
    return jax.lax.cond(rows.count.any(), add, lambda total, _: total, total, rows), None

  first = jax.tree.map(lambda x: x[0], batch)
  _, ratios = jax.eval_shape(gradient_fn, trained, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (trained, ratios))
  zeros = jax.lax.with_sharding_constraint(zeros[0], layout), zeros[1]
  (gradient, ratios), _ = jax.lax.scan(body, zeros, batch)
  divisor = ratios["loss/total"].count
  divisor = jnp.where(divisor > 0, divisor, 1)
  return jax.tree.map(lambda x: x / divisor, gradient), ratios


def _loss(
  trained: Any, batch: Batch, *, base: Any, kl_weight, graph: nnx.GraphDef, config, mesh: Mesh
):
  """Returns the summed loss of a micro-batch [R, L], and its Ratios."""
  graph, params = _policy(trained, base, graph, config)
  log_probs, entropy = _log_probs(params, batch, graph, config, mesh)
  ratios = losses.policy(log_probs, entropy, batch, kl_weight, config=config)
  return ratios["loss/total"].sum, ratios


def _policy(trained: Any, base: Any, graph: nnx.GraphDef, config) -> tuple[nnx.GraphDef, Any]:
  """Returns the model as the update computes it, adapters beside the weights."""
  if base is None:
    return graph, cast(trained, config.model.dtype)
  scale = config.lora.alpha / config.lora.rank
  return transformer.adapted(graph, base, trained, scale=scale)


def _whole(trained: Any, base: Any, config) -> Any:
  """Returns the model's weights in config.model.dtype."""
  if base is None:
    return cast(trained, config.model.dtype)
  return lora.merge(base, trained, scale=config.lora.alpha / config.lora.rank)


def _log_probs(
  params: Any, batch: Batch, graph: nnx.GraphDef, config, mesh: Mesh
) -> tuple[Float[Array, "r l"], Float[Array, "r l"]]:
  """Returns log-probs and entropies of a micro-batch's tokens [R, L]; junk where count is 0."""
  choice = attention.choose(config.model.attention, mesh, local=False)
  ends = {name: params[name] for name in ("embed", "head") if name in params}
  params = params | mesh_lib.gathered(ends, mesh)  # once, and not for each chunk of logits
  rows = batch.tokens, batch.positions, batch.end
  hidden = transformer.hidden(graph, params, *rows, remat=config.model.remat, choice=choice)
  hidden = jnp.take_along_axis(hidden, batch.previous[..., None], axis=1)
  return head(graph, params, hidden, batch.tokens)


def head(
  graph: nnx.GraphDef, params: Any, hidden: Float[Array, "r l d"], targets: Int[Array, "r l"]
) -> tuple[Float[Array, "r l"], Float[Array, "r l"]]:
  """Returns log-probs of the targets and entropies, holding the logits of HEAD_TOKENS at a time."""
  rows, length = targets.shape
  if length <= HEAD_TOKENS:
    return transformer.log_probs(graph, params, hidden, targets)

  def chunks(x):
    x = jnp.pad(x, ((0, 0), (0, -length % HEAD_TOKENS)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, -1, HEAD_TOKENS, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(chunk):
    return transformer.log_probs(graph, params, *chunk)

  out = jax.lax.map(one, (chunks(hidden), chunks(targets)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length], out)


@jax.jit
def _next(step: Int[Array, ""]) -> Int[Array, ""]:
  return step + 1


@jax.jit
def _summary(measured: list[Metrics]) -> Metrics:
  """Adds the measurements of all batches and takes the means."""
  if not measured:
    return {name: jnp.zeros((), jnp.int32) for name in SUMS}
  total = jax.tree.map(lambda *x: sum(x[1:], x[0]), *measured)
  for name in total:
    if name.startswith("loss/logprob_gap"):
      total[name] = measured[0][name]
  means = {name: x.mean() if isinstance(x, Ratio) else x for name, x in total.items()}
  squared = means.pop("loss/ratio_squared")
  sample = means["loss/ratio"] ** 2 / jnp.where(squared > 0, squared, 1)
  return means | {"loss/effective_sample": sample}
