"""Every credit estimator on the same task at equal decoded tokens, over seeds.

python experiments/compare_estimators.py --workdir=runs/estimators --seeds=0,1,2

Trains one config (default configs/branching.py: forced branching and fallback, so that trees split
where the method says) with each estimator and seed: same policy, problems, tree shape, learning
rate and steps, each estimator with the normalisation it was published with. A run that is finished
is not repeated. Runs decode different numbers of tokens, for a policy that is surer shares more:
they are compared at the budget that all of them reached, accuracy interpolated between
evaluations, and by the area under the curve up to it. Writes estimators.json and estimators.png
into the workdir: a panel an estimator with its mean and the band of one standard error over seeds,
TreePO's beside it in grey.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from treepo_jax import config as config_lib
from treepo_jax.run import metrics as metrics_lib

ROOT = Path(__file__).parents[1]
GRID = 60  # points of a curve


def train(estimator: str, seed: int, args: argparse.Namespace) -> Path:
  """Runs one training, or finds it finished; returns its folder."""
  folder = args.workdir / f"{estimator}-{seed}"
  if not (folder / "summary.json").exists():
    print(f"{estimator}, seed {seed}", flush=True)
    command = [sys.executable, "-m", "treepo_jax.main", f"--config={args.config}"]
    command += [f"--workdir={folder}", f"--config.seed={seed}"]
    command += [f"--config.advantage.estimator={estimator}", *args.more]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  return folder


def curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens decoded before, and held-out accuracy at, each evaluation of a run."""
  tokens, accuracy, spent = [], [], 0.0
  for record in metrics_lib.read(folder / "metrics.jsonl"):
    if "eval/accuracy" in record:
      tokens.append(spent)
      accuracy.append(record["eval/accuracy"])
    if "rollout/tokens_decoded" in record:
      spent += record["rollout/tokens_decoded"]
  return np.array(tokens), np.array(accuracy)


def compare(curves: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> tuple[np.ndarray, dict]:
  """Returns token counts up to the common budget, and each estimator's figures and curves."""
  budget = min(tokens[-1] for runs in curves.values() for tokens, _ in runs)
  grid = np.linspace(0, budget, GRID)
  figures = {}
  for name, runs in curves.items():
    lines = np.stack([np.interp(grid, *run) for run in runs])
    error = lines.std(0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else np.zeros(GRID)
    area = lines.mean(1)
    figures[name] = {
      "accuracy": float(lines[:, -1].mean()),
      "accuracy_error": float(error[-1]),
      "area": float(area.mean()),
      "area_error": float(area.std(ddof=1) / len(runs) ** 0.5) if len(runs) > 1 else 0.0,
      "by_seed": lines[:, -1].tolist(),
      "final": [float(accuracy[-1]) for _, accuracy in runs],
      "mean": lines.mean(0).tolist(),
      "error": error.tolist(),
    }
  return grid, figures


def draw(grid: np.ndarray, figures: dict, path: Path) -> None:
  """Draws a panel an estimator: mean and one standard error, TreePO's in grey."""
  columns = 4
  rows = -(-len(figures) // columns)
  figure = Figure(figsize=(2.6 * columns, 2.1 * rows), layout="constrained")
  panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
  thousands = grid / 1000
  for axes, (name, each) in zip(panels, figures.items(), strict=False):
    if "treepo" in figures and name != "treepo":
      axes.plot(thousands, figures["treepo"]["mean"], color="#8A8F98", lw=1.2, label="treepo")
    mean, error = np.array(each["mean"]), np.array(each["error"])
    axes.fill_between(thousands, mean - error, mean + error, color="#0072B2", alpha=0.25, lw=0)
    axes.plot(thousands, mean, color="#0072B2", lw=1.6, label=name)
    axes.set_title(f"{name}  {each['accuracy']:.1%}", loc="left", fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E8EC", lw=0.8)
  for axes in panels[len(figures) :]:
    axes.set_visible(False)
  figure.supxlabel("tokens decoded, thousands")
  figure.supylabel("held-out accuracy")
  figure.savefig(path, dpi=160)


def main() -> None:
  parser = argparse.ArgumentParser(description="Credit estimators at equal decoded tokens.")
  parser.add_argument("--workdir", type=Path, default=Path("runs/estimators"))
  parser.add_argument("--config", default="configs/branching.py")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--estimators", default=",".join(config_lib.ESTIMATORS))
  parser.add_argument("more", nargs="*", help="flags for all, such as -- --config.train.steps=20")
  args = parser.parse_args()
  names, seeds = args.estimators.split(","), [int(seed) for seed in args.seeds.split(",")]
  curves = {name: [] for name in names}
  for seed in seeds:
    for name in names:
      curves[name].append(curve(train(name, seed, args)))
  grid, figures = compare(curves)
  print(f"at {grid[-1]:,.0f} decoded tokens, mean and standard error over {len(seeds)} seeds")
  for name, each in sorted(figures.items(), key=lambda item: -item[1]["accuracy"]):
    print(
      f"{name:22} {each['accuracy']:6.1%} +- {each['accuracy_error']:.1%}   area {each['area']:.1%}"
      f" +- {each['area_error']:.1%}   seeds " + " ".join(f"{x:.1%}" for x in each["by_seed"])
    )
  result = {"budget": float(grid[-1]), "seeds": seeds, "estimators": figures}
  (args.workdir / "estimators.json").write_text(json.dumps(result, indent=2) + "\n")
  draw(grid, figures, args.workdir / "estimators.png")


if __name__ == "__main__":
  main()
