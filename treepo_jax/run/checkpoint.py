"""Everything a run needs to go on as if it had not stopped, saved with Orbax.

A checkpoint holds weights, optimizer state, steps done and the position in the data. Draws are
folded from config.seed and the step, so no generator state is needed. A checkpoint appears under
its final name only when it is complete: a run killed while saving finds the one before.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from treepo_jax.config import UserError

NAME = "checkpoints"


class Checkpoints:
  """The checkpoints of a workdir; the newest `keep` stay."""

  def __init__(self, workdir: str | Path, keep: int):
    """Raises UserError where the folder cannot be made."""
    self.path = Path(workdir).absolute() / NAME
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
        self.path, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
      )
    except OSError as error:
      raise UserError(
        f"cannot write checkpoints to {self.path}: {error}; give another --workdir"
      ) from error

  def latest(self) -> int | None:
    """Returns the steps done at the newest checkpoint, None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, position: int) -> None:
    """Saves after `step` steps: returns when the state is copied to the host, then it is written.

    With several hosts all call, and each writes its own shards. A save waits for the one before,
    and raises what that one met; `close` waits for the last. Raises UserError where it could not
    be written.
    """
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"position": position})
    )
    with _writing(self.path):
      self._manager.wait_until_finished()  # an error of the save before belongs to it
      if step not in self._manager.all_steps():
        self._manager.save(step, args=args)

  def restore(self, like: Any, step: int | None = None) -> tuple[Any, int]:
    """Returns (state, data position) after `step` steps, or the newest, laid out like `like`.

    Raises UserError naming the checkpoint where it is damaged or of another model.
    """
    step = self._manager.latest_step() if step is None else step
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
    try:
      found = self._manager.restore(step, args=args)
      state, position = found["state"], found["data"]["position"]
    except Exception as error:  # Orbax raises many kinds; each means that this folder is of no use
      reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
      raise UserError(
        f"{self.path / str(step)} cannot be restored: {reason[:300]}. It is damaged or of another "
        "model or optimizer: remove that folder to go on from the checkpoint before it, or give a "
        "new --workdir"
      ) from error
    return state, int(position)

  def wait(self) -> None:
    """Waits until everything is on the disk."""
    with _writing(self.path):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until everything is on the disk; nothing can be saved after."""
    self.wait()
    with _writing(self.path):
      self._manager.close()


def find(path: str | Path) -> tuple[Path, int]:
  """Returns workdir and step of the checkpoint in folder `path`, or of the newest of a workdir.

  Raises UserError where there is none.
  """
  path = Path(path)
  workdir = path.parents[1] if path.parent.name == NAME else path
  steps = [int(p.name) for p in (workdir / NAME).glob("*") if p.name.isdecimal()]
  if not steps:
    raise UserError(
      f"{path}: no checkpoints there; name the workdir of a training run, or one of the folders in "
      f"its {NAME}/"
    )
  if workdir == path:
    return workdir, max(steps)
  if path.name not in map(str, steps):
    held = ", ".join(map(str, sorted(steps)))
    raise UserError(f"{path}: no such checkpoint; {workdir / NAME} holds {held}")
  return workdir, int(path.name)


class _writing:
  """Turns a failed write, of now or of the background, into what the user can do about it."""

  def __init__(self, path: Path):
    self.path = path

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    full = isinstance(error, OSError) or (
      isinstance(error, ValueError | RuntimeError)
      and any(
        word in str(error)
        for word in ("No space", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "NOT_FOUND")
      )
    )
    if full:
      raise UserError(
        f"cannot write a checkpoint to {self.path}: {error}. Free space and run the same command "
        "again: it continues from the last complete checkpoint"
      ) from error
    return False
