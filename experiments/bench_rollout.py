"""Trees against sequential sampling: as many answers, one engine, the same rows and pages, one run.

python experiments/bench_rollout.py --json=rollout.json

TreePO's sweep (section 3.2), scaled to TOTAL tokens of an answer: 7 to 56 segments, 8 to 64 answers
a prompt, and forced branching with b = 2, 4, 8: b branches of the prompt, b of a node, random
fallback until the width is met, siblings that draw the same tokens decoded once. Sequential is what
evaluation and GRPO run, grow.sequential without merging: independent answers in the same segments.

The policy is a random Qwen2 of 0.7M parameters in float32, each core a device. Its logits are
scaled by SHARPNESS, to an entropy of about 0.34 nats a token (the paper's runs have 0.1 to 0.3), so
siblings go together for some tokens, as a trained policy's do; of 16 answers that are nowhere
forced to share, 2 % of the tokens are common. An answer ends, as at a box, when the stop automaton
has seen MARKS tokens of a set that one in MEAN / MARKS of those it draws belongs to: the answers to
one prompt are about MEAN tokens long with a coefficient of variation of 0.2 or more, the prompts
differ too, some are cut at TOTAL. CASTILLO's (arXiv 2505.16881: 13 models, 7 corpora, 671,270
answers of prompts that all ended) vary by 0.15 for one prompt in the median, by 0.76 in all.

The page pool holds the largest trees of a quarter of the prompts, for both sides, and a device
decodes ROWS rows: prompts are admitted as others end, which row_occupancy (tokens decoded over rows
x steps run) needs to mean anything.

Seconds are of whole grow.grow calls, the prompts' prefill and the trees' way to the host included;
the sides of a depth and width take turns, each run of a side has a key of its own, and the median
counts. A run that compiled anything is made again and not counted. Columns:

ratio: answers a second, tree over sequential with the same segments. ratio_best: over sequential
with the segments that suit that width best in this run. tokens_ratio: as `ratio`, but tokens of the
answers a second: forced branching returns longer answers, for those that end early branch less
(tree_length, sequential_length: their means). steps_ratio: rows x steps run for an answer,
sequential over tree: what the schedule makes of the saving, whatever a step costs; it does not
depend on the machine. decode_saving: 1 - decoded tokens / the answers'.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from treepo_jax import config as config_lib
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer
from treepo_jax.rollout import grow
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.tasks.data import Prompt

TOTAL, MEAN, MARKS = (
  448,
  260,
  24,
)  # tokens of an answer at most; and in the mean, were it not cut there
SHARPNESS = 16.0
DEPTHS, WIDTHS, BRANCHINGS = (7, 14, 28, 56), (8, 16, 32, 64), (2, 4, 8)
BLOCKS = tuple((depth, width, BRANCHINGS) for width in WIDTHS for depth in DEPTHS)
QUICK = ((7, 8, (8,)), (56, 8, (2,)), (7, 64, (2,)), (56, 64, (8,)))  # the corners
PROMPT, VOCABULARY = 32, 512
ROWS = 32  # a device
ANSWERS = 256  # of a run, or more: at least eight prompts a device
ADMITTED = 4  # one in so many prompts holds pages at once
COMPILED = "/jax/core/compile/backend_compile_duration"

ARCHITECTURE = transformer.Architecture(
  family="qwen2",
  vocab_size=VOCABULARY,
  width=128,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=32,
  hidden=512,
  norm_eps=1e-6,
  rope_theta=1e6,
  rope_scaling=None,
  max_positions=4096,
  tied=False,
  qkv_bias=True,
  output_bias=False,
  qk_norm=False,
)


@dataclasses.dataclass(frozen=True)
class Run:
  """What one call of grow.grow gave."""

  seconds: float
  lengths: list[int]  # of the answers returned, in tokens
  decoded: float  # tokens
  occupancy: float


class Sides:
  """Both sides of one depth and width, and what they share."""

  def __init__(self, depth: int, width: int, branchings: tuple[int, ...]):
    devices = jax.device_count()
    count = devices * max(2 * ADMITTED, ANSWERS // width // devices)
    configs = {b: _config(count, depth, width, b) for b in branchings}
    self.mesh = mesh_lib.create(configs[branchings[0]])
    self.graph, self.params, self.table = policy()
    shape = lambda c: grow.settings(c, vocabulary=VOCABULARY, eos_ids=(), closed=MARKS)
    shapes = {b: shape(c) for b, c in configs.items()}
    plain = grow.sequential(shapes[branchings[0]], width, temperature=1.0)
    shapes[0] = dataclasses.replace(plain, merge=False)
    pages = count // devices // ADMITTED * max(s.pages_of_tree for s in shapes.values())
    self.shapes = {b: dataclasses.replace(s, pages=pages) for b, s in sorted(shapes.items())}
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count, PROMPT))
    self.prompts = [
      Prompt(id=i, text="", tokens=list(map(int, t)), gold="") for i, t in enumerate(tokens)
    ]

  def run(self, branching: int, seed: int) -> Run:
    """Grows all trees of a branching; 0: sequential."""
    begun = time.perf_counter()
    tree, cost = grow.grow(
      self.params,
      jax.random.key(seed),
      self.prompts,
      graph=self.graph,
      table=self.table,
      shape=self.shapes[branching],
      mesh=self.mesh,
    )
    seconds = time.perf_counter() - begun
    lengths = [
      int(tree.length[b, tree_lib.path(tree, b, row)].sum())
      for b, leaves in enumerate(tree.leaves)
      for row in leaves
    ]
    assert len(lengths) == len(self.prompts) * self.shapes[branching].width
    return Run(seconds, lengths, cost["rollout/tokens_decoded"], cost["rollout/row_occupancy"])


@functools.cache
def policy() -> tuple[nnx.GraphDef, dict, np.ndarray]:
  """Returns (graph, params, table of the stop automaton that counts marks)."""
  graph, params = transformer.create(ARCHITECTURE, jax.random.key(0))
  params["head"]["kernel"] = params["head"]["kernel"] * SHARPNESS
  config = _config(16, 14, 16, 2)
  shape = grow.settings(config, vocabulary=VOCABULARY, eos_ids=(), closed=-1)
  random = np.random.default_rng(1)
  prompts = [
    Prompt(id=i, text="", tokens=row, gold="")
    for i, row in enumerate(random.integers(0, VOCABULARY, (16, PROMPT)).tolist())
  ]
  tree, _ = grow.grow(
    params,
    jax.random.key(1),
    prompts,
    graph=graph,
    table=np.zeros((1, VOCABULARY), np.int8),
    shape=grow.sequential(shape, 16, temperature=1.0),
    mesh=mesh_lib.create(config),
  )
  drawn = [
    t for b, leaves in enumerate(tree.leaves) for r in leaves for t in tree_lib.response(tree, b, r)
  ]
  share = np.bincount(drawn, minlength=VOCABULARY) / len(drawn)
  order = random.permutation(VOCABULARY)
  marks = order[np.cumsum(share[order]) <= MARKS / MEAN]
  table = np.repeat(np.arange(MARKS + 1, dtype=np.int8)[:, None], VOCABULARY, 1)
  table[:-1, marks] += 1
  return graph, params, table


def _config(prompts: int, depth: int, width: int, branching: int):
  """Returns the config of TreePO's forced branching, validated."""
  config = config_lib.default()
  with config.unlocked():
    config.rollout.update(
      prompts=prompts,
      width=width,
      depth=depth,
      segment=TOTAL // depth,
      initial=min(branching, width),
      branching=branching,
      fallback="random",
      merge=True,
      prompt_length=PROMPT,
      rows=ROWS,
      repetition_count=0,
    )
    config.learn.row_length = PROMPT + TOTAL
  return config_lib.validate(config)


def measure(
  depth: int, width: int, branchings: tuple[int, ...], runs: int, compiled: Callable[[], int]
) -> tuple[list[dict], list[int]]:
  """Returns the rows of one depth and width, and the lengths of the sequential answers."""
  sides = Sides(depth, width, branchings)
  found: dict[int, list[Run]] = {b: [] for b in sides.shapes}
  for seed in range(runs):
    for branching, kept in found.items():
      before = -1
      while before != compiled():
        before, run = compiled(), sides.run(branching, seed)
      kept.append(run)
  answers = len(sides.prompts) * width
  middle = lambda b, name: statistics.median(getattr(run, name) for run in found[b])
  total = lambda b: sum(sum(run.lengths) for run in found[b])
  steps = lambda b: sum(run.decoded / run.occupancy for run in found[b])
  rate = {b: answers / middle(b, "seconds") for b in found}
  rows = [
    {
      "depth": depth,
      "segment": TOTAL // depth,
      "width": width,
      "branching": b,
      "prompts": len(sides.prompts),
      "tree_traj_per_s": rate[b],
      "sequential_traj_per_s": rate[0],
      "ratio": rate[b] / rate[0],
      "tokens_ratio": rate[b] * total(b) / (rate[0] * total(0)),
      "steps_ratio": steps(0) / steps(b),
      "decode_saving": 1 - sum(run.decoded for run in found[b]) / total(b),
      "row_occupancy": middle(b, "occupancy"),
      "sequential_row_occupancy": middle(0, "occupancy"),
      "tree_length": total(b) / runs / answers,
      "sequential_length": total(0) / runs / answers,
      "runs": runs,
    }
    for b in branchings
  ]
  return rows, [length for run in found[0] for length in run.lengths]


def against_best(rows: list[dict]) -> None:
  """Adds the ratio to sequential sampling with the best segment of each width."""
  for row in rows:
    same = [other for other in rows if other["width"] == row["width"]]
    best = max(same, key=lambda other: other["sequential_traj_per_s"])
    row["sequential_best_segment"] = best["segment"]
    row["sequential_best_traj_per_s"] = best["sequential_traj_per_s"]
    row["ratio_best"] = row["tree_traj_per_s"] / best["sequential_traj_per_s"]


def spread(lengths: list[int]) -> dict:
  """Returns how the lengths of answers are spread."""
  mean = statistics.mean(lengths)
  low, middle, high = np.percentile(lengths, (10, 50, 90)).tolist()
  return {
    "mean": mean,
    "p10": low,
    "p50": middle,
    "p90": high,
    "variation": statistics.pstdev(lengths) / mean,
    "at_most": float(np.mean(np.asarray(lengths) == TOTAL)),
  }


def table(rows: list[dict]) -> str:
  """Returns the rows as a Markdown table."""
  lines = [
    "| segments x tokens | answers | b | tree, answers/s | sequential | its best | ratio "
    "| to the best | in tokens | in steps | saved | rows in use | sequential's |",
    "|---" * 13 + "|",
  ]
  for r in rows:
    lines.append(
      f"| {r['depth']} x {r['segment']} | {r['width']} | {r['branching']} "
      f"| {r['tree_traj_per_s']:.1f} | {r['sequential_traj_per_s']:.1f} "
      f"| {r['sequential_best_traj_per_s']:.1f} ({r['sequential_best_segment']}) "
      f"| {r['ratio']:.2f} | {r['ratio_best']:.2f} | {r['tokens_ratio']:.2f} "
      f"| {r['steps_ratio']:.2f} "
      f"| {r['decode_saving']:.0%} | {r['row_occupancy']:.0%} "
      f"| {r['sequential_row_occupancy']:.0%} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description="Answers a second, trees against sequential.")
  parser.add_argument("--quick", action="store_true", help="four points of the 48, a run each")
  parser.add_argument("--json", type=Path, help="file for the figures")
  args = parser.parse_args()
  mesh_lib.split_host(config_lib.default())
  compilations = []

  def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == COMPILED:
      compilations.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(note)
  rows, lengths = [], []
  with tempfile.TemporaryDirectory() as cache:
    if not jax.config.values["jax_compilation_cache_dir"]:  # trees of one shape share most programs
      jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for depth, width, branchings in QUICK if args.quick else BLOCKS:
      begun = time.perf_counter()
      new, drawn = measure(
        depth, width, branchings, 1 if args.quick else 3, lambda: len(compilations)
      )
      rows += new
      lengths += drawn
      for row in new:
        print(
          f"{depth} x {row['segment']} tokens, {width} answers, b = {row['branching']}: "
          f"{row['tree_traj_per_s']:.1f} answers/s against {row['sequential_traj_per_s']:.1f}, "
          f"{row['ratio']:.2f}x ({time.perf_counter() - begun:.0f} s in all)",
          flush=True,
        )
  against_best(rows)
  found = spread(lengths)
  share = {name: found[name] / found["mean"] for name in ("p10", "p50", "p90")}
  geomean = lambda name: statistics.geometric_mean(row[name] for row in rows)
  print(f"\n{table(rows)}\n")
  print(
    f"sequential answers: {found['mean']:.0f} tokens in the mean, p10 {share['p10']:.2f}, p50 "
    f"{share['p50']:.2f}, p90 {share['p90']:.2f} of it, variation {found['variation']:.2f}, "
    f"{found['at_most']:.0%} cut at {TOTAL} (CASTILLO: 0.19, 0.91, 1.77, 0.76)"
  )
  ahead = sum(row["ratio"] > 1 for row in rows)
  print(
    f"geometric means: {geomean('ratio'):.2f}x at equal segments, {geomean('ratio_best'):.2f}x "
    f"against the best segment, {geomean('tokens_ratio'):.2f}x in tokens, "
    f"{geomean('steps_ratio'):.2f}x in steps; ahead at {ahead} of "
    f"{len(rows)} points"
  )
  if args.json:
    result = {
      "rows": rows,
      "geomean_ratio": geomean("ratio"),
      "geomean_ratio_best": geomean("ratio_best"),
      "geomean_tokens_ratio": geomean("tokens_ratio"),
      "geomean_steps_ratio": geomean("steps_ratio"),
      "sequential_lengths": found,
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
