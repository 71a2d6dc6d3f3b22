"""Decoded tokens to the same accuracy: TreePO's trees against sequential sampling, over seeds.

python experiments/tree_vs_sequential.py --workdir=runs/compare --seeds=0,1,2

Trains configs/tiny.py and configs/sequential.py (same policy, problems, returned trajectories,
learning rate and steps) with each seed, in turn; a run that is finished is not repeated.
Then, per seed: how many tokens the tree run had decoded when its held-out accuracy first reached
the sequential run's final one, as a share of all that the sequential run decoded; and the same for
fixed levels of accuracy, both curves interpolated linearly between evaluations, which says more:
the final accuracies lie on a plateau where one run crosses the other's by chance. Writes
compare.json and compare.png into the workdir.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from treepo_jax.run import metrics as metrics_lib

LEVELS = (0.6, 0.7, 0.8, 0.9, 0.95)
ROOT = Path(__file__).parents[1]
RUNS = {"tree": "configs/tiny.py", "sequential": "configs/sequential.py"}


def train(name: str, seed: int, workdir: Path, more: list[str]) -> Path:
  """Runs one training, or finds it finished; returns its folder."""
  folder = workdir / f"{name}-{seed}"
  if not (folder / "summary.json").exists():
    print(f"{name}, seed {seed}", flush=True)
    command = [sys.executable, "-m", "treepo_jax.main", f"--config={RUNS[name]}"]
    command += [f"--workdir={folder}", f"--config.seed={seed}", *more]
    subprocess.run(command, cwd=ROOT, check=True)
  return folder


def curve(folder: Path) -> list[tuple[float, float]]:
  """Returns (tokens decoded before, held-out accuracy) at each evaluation of a run."""
  points, spent = [], 0.0
  for record in metrics_lib.read(folder / "metrics.jsonl"):
    if "eval/accuracy" in record:
      points.append((spent, record["eval/accuracy"]))
    if "rollout/tokens_decoded" in record:
      spent += record["rollout/tokens_decoded"]
  return points


def tokens_at(points: list[tuple[float, float]], level: float) -> float | None:
  """Returns the tokens decoded when a curve first reached `level`, interpolated; None if never."""
  for (before, low), (after, high) in zip(points, points[1:], strict=False):
    if low < level <= high:
      return before + (after - before) * (level - low) / (high - low)
  return None


def compare(tree: Path, sequential: Path) -> dict:
  """Returns the figures of one seed."""
  ours, theirs = curve(tree), curve(sequential)
  spent, target = theirs[-1]
  reached = [tokens for tokens, accuracy in ours if accuracy >= target]
  at = {level: (tokens_at(ours, level), tokens_at(theirs, level)) for level in LEVELS}
  summary = {p: json.loads((p / "summary.json").read_text()) for p in (tree, sequential)}
  return {
    "before": ours[0][1],
    "tree_after": ours[-1][1],
    "sequential_after": target,
    "tree_tokens": ours[-1][0],
    "sequential_tokens": spent,
    "tokens_to_reach": reached[0] if reached else None,
    "share": reached[0] / spent if reached else None,
    "share_at": {str(level): a / b if a and b else None for level, (a, b) in at.items()},
    "decode_saving": summary[tree]["decode_saving"],
    "token_saving": summary[tree]["token_saving"],
    "tree_seconds": summary[tree]["seconds"],
    "sequential_seconds": summary[sequential]["seconds"],
  }


def draw(folders: dict[str, list[Path]], path: Path) -> None:
  """Draws held-out accuracy against decoded tokens, a line a run."""
  figure = Figure(figsize=(6, 4), layout="constrained")
  axes = figure.subplots()
  for color, (name, runs) in zip(("#0072B2", "#D55E00"), folders.items(), strict=True):
    for i, run in enumerate(runs):
      tokens, accuracy = zip(*curve(run), strict=True)
      millions = [t / 1e6 for t in tokens]
      axes.plot(millions, accuracy, "o-", ms=3, color=color, label=None if i else name)
  axes.set(xlabel="tokens decoded, millions", ylabel="held-out accuracy")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=160)


def main() -> None:
  parser = argparse.ArgumentParser(description="Trees against sequential sampling, over seeds.")
  parser.add_argument("--workdir", type=Path, default=Path("runs/compare"))
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("more", nargs="*", help="flags for both, such as -- --config.train.steps=20")
  args = parser.parse_args()
  seeds = [int(seed) for seed in args.seeds.split(",")]
  folders = {name: [train(name, s, args.workdir, args.more) for s in seeds] for name in RUNS}
  rows = [compare(*pair) for pair in zip(folders["tree"], folders["sequential"], strict=True)]
  for seed, row in zip(seeds, rows, strict=True):
    share = "never" if row["share"] is None else f"{row['share']:.0%} of its tokens"
    print(
      f"seed {seed}: {row['before']:.1%} -> tree {row['tree_after']:.1%}, sequential "
      f"{row['sequential_after']:.1%}; the tree reached that with {share}"
    )
  for level in map(str, LEVELS):
    shares = [row["share_at"][level] for row in rows if row["share_at"][level]]
    if shares:
      print(f"to {float(level):.0%}: " + ", ".join(f"{share:.0%}" for share in shares))
  shares = [row["share"] for row in rows if row["share"] is not None]
  if shares:
    print(f"median share {statistics.median(shares):.0%}, largest {max(shares):.0%}")
  (args.workdir / "compare.json").write_text(
    json.dumps(dict(zip(map(str, seeds), rows, strict=True)), indent=2) + "\n"
  )
  draw(folders, args.workdir / "compare.png")


if __name__ == "__main__":
  main()
