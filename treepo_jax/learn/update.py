"""From packed rows to new weights: one sharded, compiled optimizer step a batch.

Axes: K micro-batches, R rows of a micro-batch (split over the mesh's data x fsdp), L tokens of a
row, D model width.
"""

import dataclasses
import functools
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
from treepo_jax.learn import losses, optimizer
from treepo_jax.learn.losses import Ratio
from treepo_jax.learn.packing import Batch
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer

HEAD_TOKENS = 1024  # tokens of a row whose logits are held at once: 0.6 GB at a vocabulary of 150k

SUMS = ("update/tokens_trained", "update/tokens_path", "update/skipped")  # the rest are means

Metrics = dict[str, Any]


@struct.dataclass
class State:
  """What training changes.

  Attributes:
    step: rollout batches trained on.
    params: weights in float32 whatever config.model.dtype: in bfloat16 a weight would lose every
      update below about 1/256 of itself, which is nearly all of them.
    opt_state: of optimizer.create.
  """

  step: Int[Array, ""]
  params: Any
  opt_state: Any


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

  def init(params):
    params = cast(params, jnp.float32)
    opt_state = optimizer.create(config).init(params)
    return State(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)

  layout = mesh_lib.shardings(jax.eval_shape(init, params), mesh)
  return jax.jit(init, out_shardings=layout)(params)


def cast(params: Any, dtype) -> Any:
  """Returns the weights in `dtype`: what the rollout and the update compute with."""
  return jax.tree.map(lambda x: x.astype(dtype), params)


def step(
  state: State, batches: Sequence[Batch], *, graph: nnx.GraphDef, config, mesh: Mesh
) -> tuple[State, Metrics]:
  """Takes one optimizer step for each batch of a rollout; `state` is donated.

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
  measured = []
  for batch in batches:
    state, measurement = optimize(state, place(batch, config, mesh))
    measured.append(measurement)
  return dataclasses.replace(state, step=_next(state.step)), _summary(measured)


def place(batch: Batch, config, mesh: Mesh) -> Batch:
  """Returns the batch as micro-batches [K, R, ...] on the devices; each host sends its own rows."""
  sharding = NamedSharding(mesh, PartitionSpec(None, mesh_lib.BATCH_AXES))

  def put(x):
    x = x.reshape(-1, config.learn.micro_rows, *x.shape[1:])
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  with jax.transfer_guard_host_to_device("allow"):  # make_array_from_callback counts as implicit
    return jax.tree.map(put, batch)


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
  gradient, ratios = accumulate(state.params, batch, graph=graph, config=config, mesh=mesh)
  norm = optax.tree.norm(gradient)
  finite = jnp.isfinite(norm)

  rate = optimizer.learning_rate(state.opt_state, config)
  updates, opt_state = optimizer.create(config).update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  new = State(step=state.step, params=params, opt_state=opt_state)
  new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)

  one = jnp.ones(())
  ratios["update/grad_norm"] = Ratio(sum=norm, count=one)
  ratios["update/learning_rate"] = Ratio(sum=rate, count=one)
  ratios = jax.tree.map(lambda x: jnp.where(finite, x, 0), ratios)
  trained, path = batch.tokens_trained.sum(), batch.tokens_path.sum()
  saved, of = (path - trained).astype(jnp.float32), path.astype(jnp.float32)
  return new, ratios | {
    "update/token_saving": Ratio(sum=saved, count=of),
    "update/tokens_trained": trained,
    "update/tokens_path": path,
    "update/skipped": 1 - finite.astype(jnp.int32),
  }


def accumulate(
  params: Any, batch: Batch, *, graph: nnx.GraphDef, config, mesh: Mesh
) -> tuple[Any, dict[str, Ratio]]:
  """Returns the gradient of the batch's token mean, in float32, and its Ratios.

  Micro-batches and devices add sums, which are divided once: it is the mean over the tokens of
  all trajectories of the batch, however they were packed and split.
  """
  weights = cast(params, config.model.dtype)
  layout = mesh_lib.shardings(weights, mesh)
  gradient_fn = jax.grad(functools.partial(_loss, graph=graph, config=config), has_aux=True)

  def add(total, rows):
    gradient, ratios = gradient_fn(weights, rows)
    # Pinned, or the compiler may gather the sum on every device.
    gradient = jax.lax.with_sharding_constraint(cast(gradient, jnp.float32), layout)
    return jax.tree.map(jnp.add, total, (gradient, ratios))

  def body(total, rows):
    # Rows are padded to few shapes; a micro-batch of padding alone costs nothing.
    return jax.lax.cond(rows.count.any(), add, lambda total, _: total, total, rows), None

  first = jax.tree.map(lambda x: x[0], batch)
  _, ratios = jax.eval_shape(gradient_fn, weights, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (weights, ratios))
  zeros = jax.lax.with_sharding_constraint(zeros[0], layout), zeros[1]
  (gradient, ratios), _ = jax.lax.scan(body, zeros, batch)
  count = jnp.maximum(ratios["loss/policy"].count, 1)
  return jax.tree.map(lambda x: x / count, gradient), ratios


def _loss(params: Any, batch: Batch, *, graph: nnx.GraphDef, config):
  """Returns the summed policy loss of a micro-batch [R, L], and its Ratios."""
  loss_fn: losses.LossFn = functools.partial(losses.policy, config=config)
  hidden = transformer.hidden(
    graph, params, batch.tokens, batch.positions, batch.end, remat=config.model.remat
  )
  hidden = jnp.take_along_axis(hidden, batch.previous[..., None], axis=1)
  log_probs, entropy = head(graph, params, hidden, batch.tokens)
  ratios = loss_fn(log_probs, batch)
  ratios["loss/entropy"] = Ratio(sum=(batch.count * entropy).sum(), count=batch.count.sum())
  return ratios["loss/policy"].sum, ratios


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
  total["loss/logprob_gap"] = measured[0]["loss/logprob_gap"]
  return {name: x.mean() if isinstance(x, Ratio) else x for name, x in total.items()}
