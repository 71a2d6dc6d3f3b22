"""Several hosts, one run: each samples and grades its part of a batch, all train on the whole.

Every process runs the same program. A rollout stays on the devices of its host, whose prompts are a
part of the batch that every host reads. What was grown and graded is then given to all, so that
credit, packing and which prompts are trained on are those of one process, whatever the number of
hosts; each sends its devices only their own rows. With one process nothing here does anything.
"""

import itertools
import pickle
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from treepo_jax.config import UserError
from treepo_jax.model import mesh as mesh_lib

AUTO = "auto"  # --coordinator: what the machine says of itself (TPU pods, SLURM, Open MPI)
CHUNK = 2**22  # bytes a host sends at a time: bounds what gathering holds on a device
PATIENCE = 86_400  # seconds that hosts wait for each other; one that died is noticed far earlier

_meetings = itertools.count()  # a barrier needs a new name each time


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
  """Joins the processes of a run, before jax starts; without a coordinator there is one alone.

  Args:
    coordinator: host:port of process 0, or AUTO; None: one process.
    processes: of the run; not with AUTO.
    process: number of this one, from 0; not with AUTO.

  Raises:
    UserError: if the three do not go together, or AUTO finds nothing.
  """
  numbers = f"--processes={processes} --process={process}"
  if coordinator is None and processes is None and process is None:
    return
  if coordinator is None or (coordinator == AUTO and (processes, process) != (None, None)):
    raise UserError(
      f"{numbers} go with --coordinator=HOST:PORT of process 0: without a coordinator there is one "
      f"process, and --coordinator={AUTO} finds all three"
    )
  if coordinator != AUTO and not 0 <= (-1 if process is None else process) < (processes or 0):
    raise UserError(
      f"--coordinator={coordinator} needs --processes=N and --process=0 to N - 1, not {numbers}"
    )
  try:
    jax.distributed.initialize(None if coordinator == AUTO else coordinator, processes, process)
  except ValueError as error:
    raise UserError(
      f"--coordinator={coordinator}: {error}; give --coordinator=HOST:PORT --processes=N "
      "--process=I to each process"
    ) from error


def first() -> bool:
  """Returns whether this is the process that writes files and prints."""
  return jax.process_index() == 0


def part(count: int) -> slice:
  """Returns which of `count` prompts this host rolls out: stretches of one length but the last."""
  own = -(-count // jax.process_count())
  return slice(jax.process_index() * own, (jax.process_index() + 1) * own)


def local_copy(params: Any, mesh: Mesh) -> Any:
  """Returns weights that lie on `mesh` as a rollout on this host takes them: split over tensor.

  What other hosts hold comes in one transfer between devices. In one process they stay as they are.
  """
  local = mesh_lib.local(mesh)
  if local is mesh:
    return params
  params = jax.device_put(params, mesh_lib.shardings(params, mesh, over=("tensor",)))

  def own(x: jax.Array, layout: NamedSharding) -> jax.Array:
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, layout, parts)

  return jax.tree.map(own, params, mesh_lib.shardings(params, local, over=("tensor",)))


def meet() -> None:
  """Waits until all processes are here, before they work together on the devices.

  Rollouts and compilations end at different times, and what runs on all devices may not wait for
  long: gloo, the collectives of CPUs, may give up after 30 seconds.
  """
  if jax.process_count() > 1:
    everyone = set(range(jax.process_count()))
    name = f"treepo_jax-{next(_meetings)}"
    ocp.multihost.sync_global_processes(name, timeout=PATIENCE, processes=everyone)


def gather(own: Any) -> list[Any]:
  """Returns what each process gave, in their order; all must call, with what can be pickled."""
  if jax.process_count() == 1:
    return [own]
  meet()
  sent = np.frombuffer(zlib.compress(pickle.dumps(own), level=1), np.uint8)  # padding is cheap
  sizes = multihost_utils.process_allgather(np.int32(sent.size))
  longest = int(sizes.max())
  chunk = min(1 << (longest - 1).bit_length(), CHUNK)  # few shapes are compiled
  sent = np.pad(sent, (0, -(-longest // chunk) * chunk - sent.size))
  parts = [multihost_utils.process_allgather(x) for x in sent.reshape(-1, chunk)]
  rows = np.concatenate(parts, axis=1)
  return [
    pickle.loads(zlib.decompress(row[:size].tobytes()))
    for row, size in zip(rows, sizes.tolist(), strict=True)
  ]


def on_first(act: Callable[[], None]) -> None:
  """Runs `act` in the first process; a UserError there is raised in all of them."""
  error = None
  if first():
    try:
      act()
    except UserError as mistake:
      error = mistake
  for found in gather(error):
    if found is not None:
      raise found
