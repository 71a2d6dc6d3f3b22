"""What a training run ends with: summary.json, its plots and a table."""

from pathlib import Path

from treepo_jax.run import metrics as metrics_lib
from treepo_jax.run import plots, setup


def conclude(workdir: Path, prompts: int, config) -> dict:
  """Writes summary.json and the plots from metrics.jsonl, and prints the end table."""
  metrics = metrics_lib.read(workdir / metrics_lib.NAME)
  total = lambda name: sum(m[name] for m in metrics if name in m)
  path, trained = total("rollout/tokens_path"), total("update/tokens_trained")
  figures = {
    "accuracy_before": metrics[0]["eval/accuracy"],
    "accuracy_after": metrics[-1]["eval/accuracy"],
    "heldout_prompts": prompts,
    "steps": config.train.steps,
    "seconds": total("time/step") + metrics[-1]["time/evaluate"],
    "tokens_decoded": total("rollout/tokens_decoded"),
    "tokens_path": path,
    "decode_saving": 1 - total("rollout/tokens_decoded") / max(path, 1),
    "tokens_trained": trained,
    "token_saving": 1 - trained / max(total("update/tokens_path"), 1),
    "logprob_gap": max(
      (m["loss/logprob_gap"] for m in metrics if "loss/logprob_gap" in m), default=0.0
    ),
  }
  plots.plot_learning(metrics, workdir / "plots" / "learning.png")
  plots.plot_saving(metrics, workdir / "plots" / "saving.png")
  figures = setup.summarise(workdir, figures, config)
  share, count = "{:.1%}".format, "{:,.0f}".format
  rows = [
    (f"accuracy on {prompts} held-out prompts, before", share(figures["accuracy_before"])),
    ("after", share(figures["accuracy_after"])),
    ("steps", count(figures["steps"])),
    ("seconds", count(figures["seconds"])),
    ("tokens decoded, shared ones once", count(figures["tokens_decoded"])),
    ("tokens of all paths, as sequential sampling decodes", count(path)),
    ("decoding saved", share(figures["decode_saving"])),
    ("training saved", share(figures["token_saving"])),
    ("largest gap of rollout and trainer log-probs", f"{figures['logprob_gap']:.1e}"),
  ]
  metrics_lib.table("TreePO", rows)
  last = f"trees/step_{config.train.steps - 1}.html"
  print(f"Pictures: {workdir}/plots/learning.png, saving.png; the last trees: {workdir}/{last}")
  return figures
