"""One update of the same trees, each token once against each trajectory by itself.

python experiments/bench_update.py --json=update.json

Made-up trees whose answers share 17 to 70 % of their tokens are packed "tree" and "path"
(config.learn.packing) and trained on with a random Qwen2 of 4.9M parameters in float32: the whole
compiled step with forward, backward and AdamW, each core a device. Both sides' rows have 1344
tokens and hold nothing but trees or trajectories: a tree's prompt and 20 segments fill a row as
three trajectories of a prompt and 6 segments do, so that no padding is compared (`fill`).

tokens_ratio: tokens placed, prompts included, path over tree; time_ratio: seconds of the step,
medians of runs taken in turn. Bytes: arguments and temporary memory of the compiled step on one
device. max_rel_error: of all weights the largest difference of the two gradients, over the weight's
largest gradient.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treepo_jax import config as config_lib
from treepo_jax.learn import advantages, packing, update
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer
from treepo_jax.rollout import tree as tree_lib

TREES, DEPTH, SEGMENT = 6, 6, 64
NODES = 20  # of a tree, without the prompt, which is as long as one of them
ROW_LENGTH = (1 + NODES) * SEGMENT
WIDTHS = (4, 5, 7, 11)  # answers of a tree: 17, 33, 52, 70 % shared
PACKINGS = ("tree", "path")

ARCHITECTURE = transformer.Architecture(
  family="qwen2",
  vocab_size=4096,
  width=256,
  layers=4,
  heads=8,
  kv_heads=2,
  head_dim=32,
  hidden=1024,
  norm_eps=1e-6,
  rope_theta=1e6,
  rope_scaling=None,
  max_positions=4096,
  tied=True,
  qkv_bias=True,
  output_bias=False,
  qk_norm=False,
)


def widths(rng: np.random.Generator, width: int) -> np.ndarray:
  """Returns how many nodes a random tree has at each depth: from 1 up to `width`, NODES in all."""
  while True:
    inner = np.sort(rng.integers(1, width + 1, DEPTH - 1))
    if inner.sum() + width == NODES:
      return np.append(inner, width)


def parents(rng: np.random.Generator, width: int) -> np.ndarray:
  """Returns the parents of a random tree's rows: every node above the last depth has a child."""
  parent, above = [tree_lib.NO_PARENT], np.zeros(1, int)
  for count in widths(rng, width):
    chosen = np.concatenate([above, rng.choice(above, count - above.size)])
    above = len(parent) + np.arange(count)
    parent.extend(np.sort(chosen))
  return np.array(parent)


def trees(width: int) -> tree_lib.Tree:
  """Returns random trees of `width` answers whose segments are all full, and random tokens."""
  rng = np.random.default_rng(width)
  shape = (TREES, 1 + NODES)
  parent = np.stack([parents(rng, width) for _ in range(TREES)]).astype(np.int32)
  depth = np.zeros(shape, np.int32)
  for row in range(1, 1 + NODES):
    depth[:, row] = depth[np.arange(TREES), parent[:, row]] + 1
  tokens = rng.integers(0, ARCHITECTURE.vocab_size, (*shape, SEGMENT)).astype(np.int32)
  length = np.full(shape, SEGMENT, np.int32)
  tokens[:, 0] = length[:, 0] = 0
  # About what the random policy gives its tokens, so that some ratios are clipped and most are not.
  log_probs = -np.log(ARCHITECTURE.vocab_size) + 0.1 * rng.standard_normal(tokens.shape)
  log_probs = np.where(length[..., None] > 0, log_probs, 0).astype(np.float32)
  arrays = {
    "prompt": rng.integers(0, ARCHITECTURE.vocab_size, (TREES, SEGMENT)).astype(np.int32),
    "prompt_length": np.full(TREES, SEGMENT, np.int32),
    "prompt_id": np.arange(TREES, dtype=np.uint32),
    "tokens": tokens,
    "log_probs": log_probs,
    "sampled_log_probs": log_probs,
    "length": length,
    "parent": parent,
    "depth": depth,
    "status": np.where(depth == DEPTH, tree_lib.DEPTH, tree_lib.INNER).astype(np.int32),
    "source": np.full(shape, tree_lib.NO_ROW, np.int32),
    "size": np.full(TREES, 1 + NODES, np.int32),
    "leaves": np.tile(np.arange(1 + NODES - width, 1 + NODES, dtype=np.int32), (TREES, 1)),
  }
  return tree_lib.Tree(**{name: jnp.asarray(array) for name, array in arrays.items()})


def configure(packed: str):
  """Returns the config of one side."""
  config = config_lib.default()
  config.rollout.update(prompts=TREES, depth=DEPTH, segment=SEGMENT, prompt_length=SEGMENT)
  config.learn.update(packing=packed, row_length=ROW_LENGTH, micro_rows=2)
  return config_lib.validate(config)


class Side:
  """The update of the trees in one packing, compiled."""

  def __init__(self, packed: str, tree: tree_lib.Tree, reward: np.ndarray):
    self.config = configure(packed)
    self.mesh = mesh_lib.create(self.config)
    self.graph, params = transformer.create(ARCHITECTURE, jax.random.key(0))
    self.state = update.create(params, self.config, self.mesh)
    credit = jax.device_get(advantages.estimate(tree, reward, config=self.config))
    (self.rows,) = packing.pack(tree, credit, config=self.config)
    self.batch = update.place(self.rows, self.config, self.mesh)
    program = update.program(self.state, graph=self.graph, config=self.config, mesh=self.mesh)
    self.step = program.lower(self.state, self.batch).compile()

  def gradient(self) -> Any:
    """Returns the gradient at the first weights, on the host."""

    @jax.jit
    def gradient(state, batch):
      graph, config, mesh = self.graph, self.config, self.mesh
      return update.accumulate(state, batch, graph=graph, config=config, mesh=mesh)[0]

    return jax.device_get(gradient(self.state, self.batch))

  def __call__(self) -> float:
    """Takes a step and returns its seconds."""
    begun = time.perf_counter()
    self.state, measured = self.step(self.state, self.batch)
    jax.block_until_ready((self.state, measured))
    return time.perf_counter() - begun

  @property
  def tokens(self) -> int:
    """Tokens placed in rows: prompts, answers and repeated context."""
    return int((self.rows.end > 0).sum())

  @property
  def fill(self) -> float:
    """Tokens over those of the micro-batches that are not all padding."""
    micro = (self.rows.end > 0).reshape(-1, self.config.learn.micro_rows * ROW_LENGTH)
    return float(micro[micro.any(1)].mean())

  @property
  def bytes(self) -> int:
    """Memory that the compiled step asks for."""
    needed = self.step.memory_analysis()
    assert needed is not None
    return needed.temp_size_in_bytes + needed.argument_size_in_bytes


def measure(width: int, runs: int) -> dict:
  """Returns the figures of trees of `width` answers."""
  tree = trees(width)
  reward = np.random.default_rng(0).choice([1.0, -1.0], tree.parent.shape).astype(np.float32)
  tree_side, path_side = sides = [Side(packed, tree, reward) for packed in PACKINGS]
  ours, theirs = (jax.tree.leaves(side.gradient()) for side in sides)
  error = max(
    float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True)
  )
  seconds = [[side() for side in sides] for _ in range(runs + 1)][1:]
  tree_seconds, path_seconds = (statistics.median(x) for x in zip(*seconds, strict=True))
  return {
    "token_saving": 1 - NODES / (width * DEPTH),
    "tokens_ratio": path_side.tokens / tree_side.tokens,
    "time_ratio": path_seconds / tree_seconds,
    "tree_bytes": tree_side.bytes,
    "path_bytes": path_side.bytes,
    "max_rel_error": error,
    "width": width,
    "tree_seconds": tree_seconds,
    "path_seconds": path_seconds,
    "tree_fill": tree_side.fill,
    "path_fill": path_side.fill,
    "runs": runs,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description="The update, tree against path.")
  parser.add_argument("--quick", action="store_true", help="fewer runs")
  parser.add_argument("--json", type=Path, help="file for the figures")
  args = parser.parse_args()
  mesh_lib.split_host(configure("tree"))
  rows = []
  for width in WIDTHS:
    row = measure(width, 2 if args.quick else 5)
    rows.append(row)
    print(
      f"{row['token_saving']:.0%} shared: tokens {row['tokens_ratio']:.2f}x, time"
      f" {row['time_ratio']:.2f}x ({row['path_seconds']:.2f} s over {row['tree_seconds']:.2f} s);"
      f" memory {row['tree_bytes'] / 2**20:,.0f} MiB against {row['path_bytes'] / 2**20:,.0f};"
      f" gradients differ by {row['max_rel_error']:.1e}; rows are {row['tree_fill']:.0%} and"
      f" {row['path_fill']:.0%} full",
      flush=True,
    )
  if args.json:
    args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
  main()
