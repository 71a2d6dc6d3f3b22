"""The pictures of a run: of training from its metrics.jsonl, of an evaluation from its summary.

Drawn without a display and without matplotlib's global state, so that they can be made anywhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from treepo_jax.run import metrics as metrics_lib
from treepo_jax.run import scores

# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#8A8F98"
_MORE = ("#CC79A7", "#E69F00", "#56B4E9")

_STYLE: dict[Any, Any] = {
  "font.family": "sans-serif",
  "font.size": 9.5,
  "axes.titlesize": 10,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": "#555B66",
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#E6E8EC",
  "grid.linewidth": 0.8,
  "xtick.color": "#555B66",
  "ytick.color": "#555B66",
  "legend.frameon": False,
  "lines.solid_capstyle": "round",
}


def plot_learning(metrics: Sequence[dict], path: str | Path) -> None:
  """Draws mean reward and held-out accuracy against steps and against tokens decoded, as PNG.

  `metrics`: records of metrics.read; `eval/accuracy` stands only where a step was evaluated, before
  it was taken. Tokens are `rollout/tokens_decoded` added up over the steps before: what the policy
  that is measured has cost in sampling.
  Raises UserError where `path` cannot be written.
  """
  spent, total = {}, 0.0
  for record in metrics:
    spent[record["step"]] = total
    if "rollout/tokens_decoded" in record:
      total += record["rollout/tokens_decoded"]
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _learning(left, metrics, {r["step"]: r["step"] for r in metrics})
    left.set(title="By step", xlabel="step", ylabel="mean reward, share right")
    left.xaxis.set_major_locator(_whole())
    left.legend(loc="best")
    _learning(right, metrics, spent)
    right.set(title="By tokens decoded", xlabel="tokens decoded before")
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    _save(figure, path)


def _learning(axes: Axes, metrics: Sequence[dict], place: dict) -> None:
  """Draws both curves, each step at its `place` on the horizontal axis."""
  step, reward = _series(metrics, "reward/mean")
  _smooth(axes, np.array([place[s] for s in step]), reward, "mean reward", _BLUE)
  step, accuracy = _series(metrics, "eval/accuracy")
  x = [place[s] for s in step]
  axes.plot(x, accuracy, "o-", color=_ORANGE, ms=5, mec="white", label="held-out accuracy")
  if x:
    axes.annotate(
      f"{accuracy[-1]:.1%}",
      (x[-1], accuracy[-1]),
      xytext=(0, 7),
      textcoords="offset points",
      ha="center",
      color=_ORANGE,
      weight="bold",
    )


def plot_saving(metrics: Sequence[dict], path: str | Path) -> None:
  """Draws what the tree saves: tokens decoded against the sum over paths, and both savings, as PNG.

  Left: `rollout/tokens_decoded` under `rollout/tokens_path` a step, the band between them saved.
  Right: `rollout/decode_saving` and `update/token_saving`. Raises UserError where `path` cannot be
  written.
  """
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    step, decoded = _series(metrics, "rollout/tokens_decoded")
    path_step, path_tokens = _series(metrics, "rollout/tokens_path")
    left.plot(path_step, path_tokens, color=_GREY, label="each path by itself")
    left.plot(step, decoded, color=_BLUE, label="decoded, shared tokens once")
    if np.array_equal(step, path_step):
      left.fill_between(step, decoded, path_tokens, color=_BLUE, alpha=0.12, linewidth=0)
    left.set_title("Tokens a rollout")
    left.yaxis.set_major_formatter(EngFormatter(sep=""))
    left.set_ylim(bottom=0)
    _smooth(right, *_series(metrics, "rollout/decode_saving"), "of tokens decoded", _BLUE)
    _smooth(right, *_series(metrics, "update/token_saving"), "of tokens trained", _GREEN)
    right.set_title("Saved by sharing")
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    for axes in (left, right):
      axes.set_xlabel("step")
      axes.xaxis.set_major_locator(_whole())
      axes.legend(loc="best")
    _save(figure, path)


def plot_evaluation(summary: dict[str, Any], path: str | Path) -> None:
  """Draws accuracy by set with 95 % intervals, and pass@k and maj@k against k, as PNG.

  `summary`: of results.summarise. Raises UserError where `path` cannot be written.
  """
  k = ks(summary)
  rows = list(summary["sets"].items())
  rows += [("Overall", summary)] if len(rows) > 1 else []
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(9, max(3.6, 1.4 + 0.5 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2)
    y = np.arange(len(rows))[::-1]
    kinds = [("accuracy", f"mean of {k[-1]}", _BLUE, "o")]
    if k[-1] > 1:
      kinds += [(f"maj@{k[-1]}", f"maj@{k[-1]}", _ORANGE, "s")]
      kinds += [(f"pass@{k[-1]}", f"pass@{k[-1]}", _GREEN, "D")]
    for i, (metric, label, color, marker) in enumerate(kinds):
      low, mean, high = _bounds([found for _, found in rows], metric)
      place = y + 0.16 * ((len(kinds) - 1) / 2 - i)
      spread = [mean - low, high - mean]
      left.errorbar(mean, place, xerr=spread, fmt=marker, color=color, ms=5, capsize=2, label=label)
    left.set(title="By set, 95 % intervals", xlabel="share right", xlim=(-0.02, 1.02))
    left.set_yticks(y, [f"{name} ({found['prompts']})" for name, found in rows])
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=len(kinds))
    for name, color in (("pass", _GREEN), ("maj", _ORANGE)):
      low, mean, high = np.array([_bounds([summary], f"{name}@{x}") for x in k])[..., 0].T
      right.plot(k, mean, "o-", color=color, ms=4, label=f"{name}@k")
      right.fill_between(k, low, high, color=color, alpha=0.15, linewidth=0)
    right.set(title="All prompts, by answers counted", xlabel="k", ylabel="share right")
    right.set_xscale("log", base=2)
    right.set_xticks(k, [str(x) for x in k])
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    right.legend(loc="best")
    _save(figure, path)


def plot_budget(curve: Sequence[dict], path: str | Path) -> None:
  """Draws maj@n and pass@n against tokens decoded a prompt, a line for each way to sample, as PNG.

  `curve`: rows of results.summarise; the n of a point stands beside it. Answers that are drawn one
  by one have a second line, at what they cost where each decodes its shared tokens by itself.
  Raises UserError where `path` cannot be written.
  """
  lines: dict[tuple[str, str, str], list[dict]] = {}
  colors = [_ORANGE, _GREEN, *_MORE]
  for branching in sorted({p["branching"] for p in curve if p["sampling"] == "tree"}):
    label = f"tree, b = {branching}" if branching else "tree"
    key = (label, "tokens_decoded", colors[len(lines) % len(colors)])
    lines[key] = [p for p in curve if (p["sampling"], p["branching"]) == ("tree", branching)]
  alone = [p for p in curve if p["sampling"] == "sequential"]
  lines[("independent, shared once", "tokens_decoded", _BLUE)] = alone
  lines[("independent, each by itself", "tokens_path", _GREY)] = alone
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, title in zip(panels, ("maj", "pass"), ("maj@n", "pass@n"), strict=True):
      for (label, cost, color), found in lines.items():
        if not found:
          continue
        points = sorted(found, key=lambda p: p["width"])
        bounds = [_bounds([p], f"{name}@{ks(p)[-1]}") for p in points]
        low, mean, high = np.array(bounds)[..., 0].T
        x = [p[cost] / p["prompts"] for p in points]
        axes.errorbar(
          x, mean, yerr=[mean - low, high - mean], fmt="o-", color=color, ms=4, capsize=2,
          elinewidth=0.8, label=label,
        )  # fmt: skip
        for p, at in zip(points, zip(x, mean, strict=True), strict=True):
          axes.annotate(str(p["width"]), at, xytext=(4, 4), textcoords="offset points", fontsize=7)
      axes.set(title=title, xlabel="tokens decoded a prompt")
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
      axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    _save(figure, path)


def ks(found: dict[str, Any]) -> list[int]:
  """Returns the k of all maj@k that a summary has."""
  return sorted(int(metric.removeprefix("maj@")) for metric in found if metric.startswith("maj@"))


def _bounds(found: Sequence[dict], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns lower ends, means and upper ends of the 95 % intervals; of one prompt they are one."""
  mean = np.array([f[metric] for f in found])
  error = np.array([f["standard_errors"][metric] or 0.0 for f in found])
  width = scores.NORMAL_95 * error
  return np.clip(mean - width, 0, 1), mean, np.clip(mean + width, 0, 1)


def _whole() -> MaxNLocator:
  return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _series(metrics: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps that have a finite value under `key`, and the values."""
  pairs = [(r["step"], r[key]) for r in metrics if key in r and r[key] is not None]
  return np.array([s for s, _ in pairs], int), np.array([v for _, v in pairs], float)


def _smooth(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, color: str) -> None:
  """Draws noisy values faintly under their running mean over a tenth of the run."""
  half = len(y) // 20
  if half == 0:
    axes.plot(x, y, color=color, marker="o" if len(y) == 1 else "", label=label)
    return
  means = [np.mean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
  axes.plot(x, y, color=color, alpha=0.25, linewidth=1)
  axes.plot(x, means, color=color, linewidth=2, label=label)


def _save(figure: Figure, path: str | Path) -> None:
  with metrics_lib.replacing(path) as temporary:
    figure.savefig(temporary, format="png", dpi=160)
