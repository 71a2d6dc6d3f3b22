"""The device mesh and, in one table, which axis each kind of weight is split over.

Axes: "data" holds whole copies, "fsdp" splits weights and optimizer state, "tensor" splits heads
and hidden units. Rows of a batch and trees of a rollout are split over data x fsdp; the weights of
a rollout, which every step reads whole, over tensor alone.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from treepo_jax.config import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
WEIGHT_AXES = ("fsdp", "tensor")

# Last two names of a weight's path -> the axis of each dimension. Weights of the layers carry a
# leading layer dimension, which is never split.
ROLES = {
  "embed": ("tensor", "fsdp"),  # [vocabulary, width]
  "head": ("fsdp", "tensor"),  # [width, vocabulary]
  "query": ("fsdp", "tensor"),  # [width, heads * head_dim]
  "key": ("fsdp", "tensor"),  # [width, kv_heads * head_dim]
  "value": ("fsdp", "tensor"),
  "output": ("tensor", "fsdp"),  # [heads * head_dim, width]
  "gate": ("fsdp", "tensor"),  # [width, hidden]
  "up": ("fsdp", "tensor"),
  "down": ("tensor", "fsdp"),  # [hidden, width]
}


def split_host(config, processes: int = 1) -> None:
  """Lets a CPU count as config.mesh.cpu_devices devices; 0: about one a core. Before jax starts.

  Small programs use cores far better side by side than inside one operation: the embedded policy
  decodes and trains about 1.6 times as fast on two cores taken as two devices. 0 takes the largest
  number up to the cores that mesh and learn.micro_rows divide into; the environment goes first.
  processes: of the run, each of which takes as many.
  """
  count = config.mesh.cpu_devices
  if not count:
    if "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", ""):
      return

    def fits(n: int) -> bool:
      data, fsdp, tensor = _sizes(config, n * processes)
      whole = data * fsdp * tensor == n * processes
      return whole and config.learn.micro_rows % (data * fsdp) == 0

    count = next((n for n in range(len(os.sched_getaffinity(0)), 1, -1) if fits(n)), 1)
  jax.config.update("jax_num_cpu_devices", count)


def create(config, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh of config.mesh over the devices of all hosts.

  Raises UserError where they do not divide, or where a tensor group cannot lie within a host.

  devices: others than those that are there, to compile for.
  """
  devices = jax.devices() if devices is None else devices
  shape = data, fsdp, tensor = _sizes(config, len(devices))
  if data * fsdp * tensor != len(devices):
    raise UserError(
      f"config.mesh: data {data} x fsdp {fsdp} x tensor {tensor} = {data * fsdp * tensor}, but "
      f"there are {len(devices)} devices; set mesh.data to -1 or let the product be {len(devices)}"
    )
  # Axes may share an axis of the wires: 4 x 2 of a TPU's 8 in a row.
  ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  if not _within_hosts(ordered):  # it follows the wires, but a rollout stays on its host
    by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
    ordered = np.array(by_host).reshape(shape)
  if not _within_hosts(ordered):
    own = sum(device.process_index == devices[0].process_index for device in devices)
    raise UserError(
      f"config.mesh.tensor = {tensor} must divide the {own} devices of a host: heads are not split "
      "over hosts"
    )
  return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def resolve(
  config: ml_collections.FrozenConfigDict, count: int | None = None
) -> ml_collections.FrozenConfigDict:
  """Returns the config with what it leaves to the number of devices: the mesh, rows of an update.

  count: of devices, if not of those that are there.
  """
  data, fsdp, _ = _sizes(config, jax.device_count() if count is None else count)
  resolved = ml_collections.ConfigDict(config)
  resolved.mesh.data, resolved.mesh.fsdp = data, fsdp
  resolved.learn.micro_rows = config.learn.micro_rows or data * fsdp
  return ml_collections.FrozenConfigDict(resolved)


def _sizes(config, count: int) -> tuple[int, int, int]:
  """Returns data, fsdp and tensor of config.mesh over so many devices, whether they fit or not."""
  data, fsdp, tensor = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
  left = max(count // (tensor * max(data, 1) * max(fsdp, 1)), 1)
  return left if data == -1 else data, left if fsdp == -1 else fsdp, tensor


def along_data(devices: Sequence[Any], tensor: int) -> Mesh:
  """Returns the mesh of a rollout on one host's devices: all shards along "data"."""
  shape = (len(devices) // tensor, 1, tensor)
  ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def _within_hosts(devices: np.ndarray) -> bool:
  """Returns whether each tensor group of devices [data, fsdp, tensor] is on one host."""
  hosts = np.vectorize(lambda device: device.process_index)(devices)
  return bool((hosts == hosts[..., :1]).all())


def local(mesh: Mesh) -> Mesh:
  """Returns the part of the mesh on this host, its shards along "data"; the mesh, if it is all."""
  groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
  own = [group for group in groups if group[0].process_index == jax.process_index()]
  if len(own) == len(groups):
    return mesh
  return Mesh(np.array(own)[:, None], AXES, axis_types=(AxisType.Auto,) * 3)


def single() -> Mesh:
  """Returns a mesh of the first device alone."""
  device = np.asarray(jax.devices()[:1]).reshape(1, 1, 1)
  return Mesh(device, AXES, axis_types=(AxisType.Auto,) * 3)


def shards(mesh: Mesh) -> int:
  """Returns over how many parts rows and trees are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def spec(
  path: tuple, shape: tuple[int, ...], mesh: Mesh, over: tuple[str, ...] = WEIGHT_AXES
) -> PartitionSpec:
  """Returns how the weight at `path` is split `over` the axes; what does not divide stays whole."""
  names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
  role = next((ROLES[name] for name in reversed(names) if name in ROLES), None)
  if role is None or names[-1] not in ("kernel", "embed"):
    return PartitionSpec()  # norms and biases are small: whole on every device
  axes = (None,) * (len(shape) - 2) + role
  fits = [
    axis in over and size % mesh.shape[axis] == 0 for axis, size in zip(axes, shape, strict=True)
  ]
  return PartitionSpec(*(axis if fit else None for axis, fit in zip(axes, fits, strict=True)))


def shardings(tree, mesh: Mesh, over: tuple[str, ...] = WEIGHT_AXES):
  """Returns a NamedSharding for every array of a pytree of weights (or of optimizer state).

  over: axes that split. A rollout, whose trees are split over data x fsdp, takes ("tensor",).
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec(path, x.shape, mesh, over)), tree
  )


def gathered(tree, mesh: Mesh):
  """Returns the weights split over "tensor" alone: brought together over fsdp where they are used.

  Inside a scan over layers that is one layer at a time; their gradients are summed back into parts.
  """

  def one(path: tuple, x):
    path = tuple(key for key in path if getattr(key, "name", None) != "value")
    sharding = NamedSharding(mesh, spec(path, x.shape, mesh, over=("tensor",)))
    return jax.lax.with_sharding_constraint(x, sharding)

  return jax.tree_util.tree_map_with_path(one, tree)


def look_up(embed: jax.Array, tokens: jax.Array, mesh: Mesh) -> jax.Array:
  """Returns embed[tokens], [R, L, W], both split by width: else each would gather the embedding."""
  split = "tensor" if embed.shape[1] % mesh.shape["tensor"] == 0 else None
  lie = lambda x, *axes: jax.lax.with_sharding_constraint(
    x, NamedSharding(mesh, PartitionSpec(*axes, None, split))
  )
  return lie(lie(embed)[tokens], BATCH_AXES)


def split_rows(x: jax.Array, mesh: Mesh, tokens: bool) -> jax.Array:
  """Returns [R, L, W] with rows split over data x fsdp, and with `tokens` these over "tensor".

  So a layer's input waits for the backward pass: no device keeps more than its part.
  """
  split = "tensor" if tokens and x.shape[1] % mesh.shape["tensor"] == 0 else None
  sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, split))
  return jax.lax.with_sharding_constraint(x, sharding)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())
