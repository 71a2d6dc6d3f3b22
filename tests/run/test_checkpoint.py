"""Saves in the background: what a kill, a full disk and another mesh do to them."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from treepo_jax.config import UserError
from treepo_jax.run import checkpoint

ROOT = Path(__file__).parents[2]
ROWS, COLUMNS = 4096, 8192  # 128 MiB in float32: writing takes far longer than copying


def state(fill: float, mesh=None, rows: int = 64):
  x = np.full((rows, 64), fill, np.float32)
  if mesh is None:
    return {"weights": jax.device_put(x)}
  return {"weights": jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))}


KILLED = f"""
import os, signal, sys
from pathlib import Path
import jax.numpy as jnp
from treepo_jax.run import checkpoint
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=2)
state = lambda x: {{"weights": jnp.full(({ROWS}, {COLUMNS}), x, jnp.float32)}}
checkpoints.save(1, state(1.0), 10)
checkpoints.wait()
checkpoints.save(2, state(2.0), 20)
path = Path(sys.argv[1]) / "checkpoints"
assert not (path / "2").exists(), "saved before it could be killed"
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_saving_the_checkpoint_before_is_used(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  half = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name != "1"]
  assert half and "2" not in half  # the save had begun
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  assert checkpoints.latest() == 1
  like = {"weights": jax.ShapeDtypeStruct((ROWS, COLUMNS), np.float32)}
  like = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like))
  found, position = checkpoints.restore(like)
  assert position == 10 and float(found["weights"].min()) == float(found["weights"].max()) == 1
  checkpoints.save(2, jax.tree.map(lambda x: x + 1, found), 20)
  checkpoints.close()
  found, position = checkpoint.Checkpoints(tmp_path, keep=2).restore(like)
  assert position == 20 and float(found["weights"].min()) == 2


def test_close_waits_until_all_is_written(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, state(step), 10 * step)
  checkpoints.save(3, state(7.0), 70)  # is there already
  checkpoints.close()
  kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
  assert kept == ["2", "3"]
  found, position = checkpoint.Checkpoints(tmp_path, keep=2).restore(state(0.0))
  assert position == 30 and float(found["weights"][0, 0]) == 3


def test_what_was_donated_after_a_save_was_saved_before(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  now = state(1.0, rows=2**15)
  step = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
  checkpoints.save(1, now, 0)
  for _ in range(5):
    now = step(now)
  checkpoints.close()
  found, _ = checkpoint.Checkpoints(tmp_path, keep=2).restore(now)
  assert float(found["weights"].min()) == float(found["weights"].max()) == 1


def test_an_error_in_the_background_is_named(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  checkpoints.save(1, state(1.0, rows=2**18), 0)  # 64 MiB are being written
  shutil.rmtree(tmp_path / "checkpoints")
  with pytest.raises(UserError, match="checkpoint"):
    checkpoints.save(2, state(2.0), 0)
    checkpoints.close()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_a_checkpoint_is_restored_on_another_mesh(shape, tmp_path):
  axes = ("data", "fsdp", "tensor")
  one = jax.make_mesh((4, 2, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)
  other = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  checkpoints.save(1, state(3.0, one), 0)
  checkpoints.close()
  like = state(0.0, other)
  found, _ = checkpoint.Checkpoints(tmp_path, keep=2).restore(like)
  assert found["weights"].sharding == like["weights"].sharding
  assert float(found["weights"].min()) == 3
