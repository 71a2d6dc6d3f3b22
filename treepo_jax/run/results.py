"""The end of an evaluation: scores by set and over all, as summary, tables and pictures."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from treepo_jax.run import metrics as metrics_lib
from treepo_jax.run import plots, scores

UNNAMED = "heldout"  # the set of prompts that name none
OVERALL = "Overall"
NO_BREAK = "\u00a0"  # a space at which no line of a table breaks
COSTS = {
  "tokens_decoded": "rollout/tokens_decoded",
  "tokens_path": "rollout/tokens_path",
  "tokens_prefilled": "rollout/tokens_prefilled",
  "grader_errors": "reward/grader_errors",
}

Scores = dict[str, list[float]]  # metric to its value of each prompt


@dataclasses.dataclass(frozen=True)
class Kind:
  """How answers are sampled.

  Attributes:
    sampling: "sequential" or "tree".
    width: answers a prompt.
    branching: of a tree, at the prompt and at each node; 0: as config.rollout says.
  """

  sampling: str
  width: int
  branching: int = 0

  def figures(self) -> dict[str, Any]:
    """Returns what metrics.jsonl says of it."""
    return {f"eval/{name}": value for name, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class Answers:
  """What counts of a prompt's answers: their classes (rewards.groups) and verdicts."""

  prompt_id: int
  group: list[int]
  correct: list[bool]


def score(sets: dict[str, list[Answers]], *, bootstrap: int, seed: int) -> dict[str, Scores]:
  """Returns the scores of every prompt by set.

  accuracy, and pass@k and maj@k for the k of scores.ladder, up to the fewest answers of any prompt:
  a tree may return fewer than its width. bootstrap@n, where `bootstrap` resamples are asked for, is
  the paper's maj@n of all n. A prompt that was returned no answer has a wrong one without a vote.
  """
  filled = {
    name: [a if a.correct else Answers(a.prompt_id, [scores.NO_GROUP], [False]) for a in found]
    for name, found in sets.items()
  }
  fewest = min(len(a.correct) for found in filled.values() for a in found)
  ks = scores.ladder(fewest)

  def one(a: Answers) -> dict[str, float]:
    right, count = sum(a.correct), len(a.correct)
    values = {"accuracy": right / count}
    values |= {f"pass@{k}": scores.pass_at(right, count, k) for k in ks}
    votes = scores.majority_at(a.group, a.correct, ks)
    values |= {f"maj@{k}": vote for k, vote in zip(ks, votes, strict=True)}
    if bootstrap:
      values[f"bootstrap@{fewest}"] = scores.bootstrap_majority(
        a.group, a.correct, fewest, draws=bootstrap, seed=(seed, a.prompt_id)
      )
    return values

  return {
    name: {metric: [v[metric] for v in values] for metric in values[0]}
    for name, found in filled.items()
    for values in [[one(a) for a in found]]
  }


def summarise(
  scored: dict[Kind, dict[str, Scores]], entries: Sequence[dict], kinds: Sequence[Kind]
) -> dict[str, Any]:
  """Returns the figures of the first kind, over all prompts and by set, and a row for every kind.

  entries: of metrics.jsonl, one a unit. Over all prompts a set weighs as much as it has prompts,
  the paper's Overall; in `unweighted` all weigh alike. Intervals are of 95 %.
  """
  estimates = {
    kind: {
      name: {metric: scores.estimate(values) for metric, values in found.items()}
      for name, found in sets.items()
    }
    for kind, sets in scored.items()
  }
  main = kinds[0]
  whole = _over(estimates[main], scores.overall)
  summary = dataclasses.asdict(main) | {"samples": main.width}
  summary |= _figures(whole) | _cost(entries, main, None)
  summary["sets"] = {
    name: _figures(found) | _cost(entries, main, name) for name, found in estimates[main].items()
  }
  summary["unweighted"] = _figures(_over(estimates[main], scores.unweighted))
  summary["curve"] = [
    dataclasses.asdict(kind)
    | _figures(_over(estimates[kind], scores.overall))
    | _cost(entries, kind, None)
    for kind in (kinds if len(kinds) > 1 else ())
  ]
  return summary


def _over(
  sets: dict[str, dict[str, scores.Estimate]],
  mean: Callable[[Sequence[scores.Estimate]], scores.Estimate],
) -> dict[str, scores.Estimate]:
  """Returns each metric's mean over sets."""
  metrics = next(iter(sets.values()))
  return {metric: mean([found[metric] for found in sets.values()]) for metric in metrics}


def _figures(found: dict[str, scores.Estimate]) -> dict[str, Any]:
  first = found["accuracy"]
  values = {metric: e.mean for metric, e in found.items()}
  spread = {"standard_error": first.standard_error, "interval": first.interval}
  errors = {metric: e.standard_error for metric, e in found.items()}
  return {"prompts": first.prompts} | values | spread | {"standard_errors": errors}


def _cost(entries: Sequence[dict], kind: Kind, dataset: str | None) -> dict[str, float]:
  """Returns what the answers of a kind, to one set or all, have cost: tokens and seconds."""
  own = [
    e
    for e in entries
    if kind.figures().items() <= e.items() and dataset in (None, e["eval/dataset"])
  ]
  total = {name: float(sum(e[key] for e in own)) for name, key in COSTS.items()}
  total["decode_saving"] = 1 - total["tokens_decoded"] / max(total["tokens_path"], 1)
  total["seconds"] = float(sum(e["time/rollout"] + e["time/reward"] for e in own))
  return total


def show(summary: dict[str, Any], workdir: Path) -> None:
  """Prints the tables, and writes them as table.md and the figures as plots/*.png."""
  title = (
    f"Evaluation, answers {_label(summary)}: percent of prompts ± 95 % interval, tokens, seconds"
  )
  head, rows = _table(summary)
  metrics_lib.table(title, [head, *rows])
  text = [title, "", f"Weights: {summary['weights']}", "", *_markdown(head, rows), ""]
  ks = plots.ks(summary)
  if len(ks) > 1:
    by_k = [[str(k), _percent(summary, f"pass@{k}"), _percent(summary, f"maj@{k}")] for k in ks]
    text += ["Over all prompts:", "", *_markdown(["k", "pass@k", "maj@k"], by_k), ""]
  plots.plot_evaluation(summary, workdir / "plots" / "evaluation.png")
  pictures = ["evaluation.png"]
  if summary["curve"]:
    head, rows = _curve(summary["curve"])
    metrics_lib.table("Over all prompts, by what was sampled", [head, *rows])
    text += ["By what was sampled, over all prompts:", "", *_markdown(head, rows), ""]
    plots.plot_budget(summary["curve"], workdir / "plots" / "budget.png")
    pictures.append("budget.png")
  with metrics_lib.replacing(workdir / "table.md") as temporary:
    temporary.write_text("\n".join(text), encoding="utf-8")
  print(f"Tables: {workdir}/table.md; pictures: {workdir}/plots/{', '.join(pictures)}")


def _table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Returns head and rows: a set each, where there are several their means, and the costs."""
  most = plots.ks(summary)[-1]
  metrics = ["accuracy", f"pass@{most}", f"maj@{most}", f"bootstrap@{most}"]
  metrics = [m for m in metrics if m in summary]
  head = ["set", "prompts", *(f"mean@{most}" if m == "accuracy" else m for m in metrics)]
  head += ["decoded", "seconds"]

  def row(name: str, found: dict[str, Any]) -> list[str]:
    spent = [f"{found[x]:,.0f}" if x in found else "" for x in ("tokens_decoded", "seconds")]
    return [name, str(found["prompts"]), *(_percent(found, m) for m in metrics), *spent]

  rows = [row(name, found) for name, found in summary["sets"].items()]
  if len(rows) > 1:
    rows += [row(OVERALL, summary), row("unweighted", summary["unweighted"])]
  return head, rows


def _curve(curve: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
  head = ["answers", "mean", "pass", "maj", "decoded", "of all paths", "seconds"]
  rows = []
  for point in curve:
    most = plots.ks(point)[-1]
    names = ["accuracy", f"pass@{most}", f"maj@{most}"]
    spent = [f"{point[x]:,.0f}" for x in ("tokens_decoded", "tokens_path", "seconds")]
    rows.append([_label(point), *(_percent(point, m) for m in names), *spent])
  return head, rows


def _label(found: dict[str, Any]) -> str:
  shape = f" b={found['branching']}" if found["branching"] else ""
  return f"{found['width']} {found['sampling']}{shape}"


def _percent(found: dict[str, Any], metric: str) -> str:
  error = found["standard_errors"][metric]
  spread = "" if error is None else f"{NO_BREAK}± {100 * scores.NORMAL_95 * error:.1f}"
  spread = spread.replace(" ", NO_BREAK)
  return f"{100 * found[metric]:.1f}{spread}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  line = lambda cells: "| " + " | ".join(c.replace("|", r"\|") for c in cells) + " |"
  return [line(head), line(["---"] * len(head)), *map(line, rows)]
