"""What a save in the background costs a step, against waiting until it is written.

python experiments/bench_checkpoint.py --json=checkpoint.json

A state of random float32 weights is saved in turn both ways by run/checkpoint.py. blocked: seconds
until `save` returns, when the state is copied to the host and the next step may overwrite it;
written: seconds until the checkpoint stands on the disk. Medians; the ratio is what matters.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from treepo_jax.run import checkpoint

LEAVES = 16


def state(megabytes: int, seed: int) -> dict[str, jax.Array]:
  """Returns LEAVES square arrays of float32, `megabytes` (2^20 bytes) together."""
  size = int((megabytes * 2**20 / 4 / LEAVES) ** 0.5)
  keys = jax.random.split(jax.random.key(seed), LEAVES)
  made = {f"w{i}": jax.random.normal(key, (size, size), jnp.float32) for i, key in enumerate(keys)}
  return jax.block_until_ready(made)


def measure(megabytes: int, runs: int) -> dict:
  """Returns the medians of `runs` saves."""
  folder = Path(tempfile.mkdtemp(prefix="bench_checkpoint"))
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  blocked, written = [], []
  for run in range(runs + 1):
    saved = state(megabytes, run)
    begun = time.perf_counter()
    checkpoints.save(run, saved, 0)
    blocked.append(time.perf_counter() - begun)
    checkpoints.wait()
    written.append(time.perf_counter() - begun)
  checkpoints.close()
  shutil.rmtree(folder)
  blocked, written = statistics.median(blocked[1:]), statistics.median(written[1:])  # without first
  return {
    "megabytes": megabytes,
    "blocked_seconds": blocked,
    "written_seconds": written,
    "ratio": blocked / written,
    "runs": runs,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description="Saving in the background.")
  parser.add_argument("--quick", action="store_true", help="fewer runs")
  parser.add_argument("--json", type=Path, help="file for the figures")
  args = parser.parse_args()
  rows = [measure(megabytes, 3 if args.quick else 9) for megabytes in (32, 128, 192)]
  for row in rows:
    print(
      f"{row['megabytes']} MiB: a step waits {row['blocked_seconds']:.3f} s, all is written after "
      f"{row['written_seconds']:.3f} s: {row['ratio']:.0%}"
    )
  if args.json:
    args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
  main()
