"""The training run: trees, credit, update; evaluated, saved and drawn as it goes."""

import dataclasses
import functools
import signal
import time
from pathlib import Path

import jax
import numpy as np

from treepo_jax.config import UserError
from treepo_jax.learn import advantages, packing, update
from treepo_jax.model import weights
from treepo_jax.rollout import grow
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.run import checkpoint, collect, evaluate, plots, records, setup, view
from treepo_jax.run import metrics as metrics_lib
from treepo_jax.tasks import data

SUMMED = (
  "rollout/tokens_decoded",
  "rollout/tokens_path",
  "rollout/tokens_prefilled",
  "rollout/trajectories",
  "rollout/fallbacks",
  "rollout/pruned",
  "rollout/dropped",
  "reward/grader_errors",
  "data/overlong",
  "time/rollout",
  "time/reward",
)  # the other figures of a step's rounds are averaged


def run(config, workdir: Path) -> dict | None:
  """Trains, or continues the run in workdir; returns the summary, None if it was told to stop."""
  setup.claim(workdir, config)
  source = data.source(config)  # first: a bad row is found sooner than weights are read
  policy = setup.load(config)
  heldout = data.heldout(config, policy.text).prompts
  state = update.create(policy.params, config, policy.mesh)
  policy = dataclasses.replace(policy, params={})  # the state holds them
  checkpoints = checkpoint.Checkpoints(workdir, config.train.keep)
  position = 0
  if checkpoints.latest() is not None:
    state, position = checkpoints.restore(state)
  start = int(state.step)
  if start > config.train.steps:
    raise UserError(
      f"{workdir} holds {start} steps, more than config.train.steps = {config.train.steps}: raise "
      "it or give another --workdir"
    )

  stop = _Stop()
  with (
    metrics_lib.Writer(workdir, start) as writer,
    metrics_lib.Progress(config.train.steps, start, "train", enabled=True) as progress,
  ):
    progress.note(f"continues at step {start}" if start else "compiling the first step")
    for step in range(start, config.train.steps):
      begun = time.perf_counter()
      metrics = {}
      params = update.weights(state, config, policy.mesh)
      if step == 0 or (config.eval.every and step % config.eval.every == 0):
        metrics |= evaluate.accuracy(params, heldout, policy=policy, config=config)
      evaluated = time.perf_counter()
      state, position, figures = _step(
        state, params, position, step, source, policy, config, workdir
      )
      metrics |= figures | {"time/evaluate": evaluated - begun}
      last = step + 1 == config.train.steps
      if last or stop.asked or (step + 1) % config.train.checkpoint_every == 0:
        checkpoints.save(step + 1, state, position)
      metrics["time/step"] = time.perf_counter() - begun
      writer.write(step, metrics)
      progress.advance(metrics)
      if stop.asked and not last:
        progress.note(f"stopped: saved after step {step}; the same command continues there")
        checkpoints.close()
        raise SystemExit(128 + stop.asked)
    begun = time.perf_counter()
    params = update.weights(state, config, policy.mesh)
    after = evaluate.accuracy(params, heldout, policy=policy, config=config)
    writer.write(config.train.steps, after | {"time/evaluate": time.perf_counter() - begun})
  checkpoints.close()
  return _conclude(workdir, len(heldout), config)


def _step(
  state, params, position: int, step: int, source, policy: setup.Setup, config, workdir: Path
):
  """Takes one step of the loop; returns the new state, data position and the step's figures."""
  rollouts, position = _rollouts(params, position, step, source, policy, config)
  begun = time.perf_counter()
  trees, reward, greedy = _join(rollouts, config.train.sampling_rounds * config.rollout.prompts)
  chosen = _chosen(rollouts, trees.size.shape[0], config)
  # A tree that is left out has no leaves for credit and packing; shapes stay what they were.
  trained = dataclasses.replace(
    trees, leaves=np.where(chosen[:, None], trees.leaves, tree_lib.NO_ROW)
  )
  credit = jax.device_get(advantages.estimate(trained, reward, greedy, config=config))
  batches = packing.pack(trained, credit, config=config)
  if config.learn.kl != "none" and config.learn.kl_in == "reward":
    cost = _divergence(state, trained, batches, policy, config)
    credit = jax.device_get(advantages.estimate(trained, reward - cost, greedy, config=config))
    batches = packing.pack(trained, credit, config=config)
  state, measured = update.step(state, batches, graph=policy.graph, config=config, mesh=policy.mesh)
  measured = {name: float(x) for name, x in jax.device_get(measured).items()}
  updated = time.perf_counter()
  if step % config.train.trees_every == 0 or step + 1 == config.train.steps:
    prompts = [prompt for rollout in rollouts for prompt in rollout.prompts]
    written = records.records(trees, reward, credit, prompts, step, config=config)
    write_trees(workdir, step, written, policy)
  figures = _merge([rollout.metrics for rollout in rollouts]) | measured
  figures |= advantages.statistics(trained, credit, config=config)
  figures |= {
    "rollout/rounds": float(len(rollouts)),
    "update/prompts": float(chosen.sum()),
    "time/update": updated - begun,
  }
  return state, position, figures


def write_trees(workdir: Path, step: int, trees: list[dict], policy: setup.Setup) -> None:
  """Writes the trees of a step as JSON lines and as a page."""
  path = workdir / "trees" / f"step_{step}.jsonl"
  records.write(path, trees)
  view.page(trees, path.with_suffix(".html"), policy.text.decode, f"Trees of step {step}")


def _rollouts(params, position: int, step: int, source, policy: setup.Setup, config):
  """Rolls out until enough prompts have mixed rewards (DAPO's dynamic sampling), or rounds end."""
  rollouts, mixed = [], 0
  for turn in range(config.train.sampling_rounds):
    batch = data.take(
      source, policy.text, start=position, count=config.rollout.prompts, config=config
    )
    position = batch.position
    key = setup.key(config, step, turn)
    rollouts.append(_rollout(params, key, batch.prompts, policy, config, step))
    rollouts[-1].metrics["data/overlong"] = float(batch.dropped)
    mixed += sum(map(_mixed, rollouts[-1].correct))
    if not config.train.dynamic_sampling or mixed >= config.rollout.prompts:
      break
  return rollouts, position


def _rollout(params, key, prompts, policy: setup.Setup, config, step: int = 0) -> collect.Rollout:
  """Returns the prompts' scored trees; for ReMax with what greedy answers earn, and cost."""
  sample = functools.partial(collect.collect, params, key, prompts, setup=policy, config=config)
  rollout = sample(shape=policy.shape, step=step)
  if config.advantage.estimator != "remax":
    return rollout
  greedy = sample(shape=grow.sequential(policy.shape, 1, temperature=0.0))
  first = greedy.tree.leaves[:, 0]
  reward = greedy.reward[np.arange(len(first)), first]
  added = {
    name: rollout.metrics[name] + greedy.metrics[name]
    for name in ("rollout/tokens_decoded", "time/rollout", "time/reward")
  }
  return dataclasses.replace(rollout, greedy=reward, metrics=rollout.metrics | added)


def _divergence(state, trees: tree_lib.Tree, batches, policy: setup.Setup, config) -> np.ndarray:
  """Returns what the KL to the reference takes off each reward, f32[B, N] at leaf rows."""
  shape, parent = trees.parent.shape, np.maximum(trees.parent, 0)
  nodes = update.divergence(
    state, batches, trees.parent.size, graph=policy.graph, config=config, mesh=policy.mesh
  )
  total = np.array(jax.device_get(nodes)).reshape(shape)
  for row in range(1, shape[1]):  # a parent's row is less than its child's
    total[:, row] += total[np.arange(shape[0]), parent[:, row]]
  return float(state.kl_weight) * total


def _mixed(correct: list[bool]) -> bool:
  """Returns whether a prompt has both right and wrong answers: 0 < right < all (Eq 1)."""
  return any(correct) and not all(correct)


def _chosen(rollouts: list[collect.Rollout], count: int, config) -> np.ndarray:
  """Returns which trees are trained on: with dynamic sampling the first that have mixed rewards."""
  correct = [c for rollout in rollouts for c in rollout.correct]
  fits = np.array([_mixed(c) or not config.train.dynamic_sampling for c in correct])
  fits &= np.cumsum(fits) <= config.rollout.prompts
  return np.pad(fits, (0, count - len(fits)))


def _join(rollouts: list[collect.Rollout], count: int):
  """Returns all trees, rewards and greedy rewards (or None) as one batch of `count`.

  It is filled up with trees without leaves.
  """
  empty = {"prompt_length": 1, "size": 1, "parent": tree_lib.NO_PARENT}
  empty |= {"leaves": tree_lib.NO_ROW, "source": tree_lib.NO_ROW}

  def join(path: tuple, *parts: np.ndarray) -> np.ndarray:
    whole = np.concatenate(parts)
    missing = [(0, count - len(whole))] + [(0, 0)] * (whole.ndim - 1)
    name = str(path[-1].name) if path else "reward"
    return np.pad(whole, missing, constant_values=empty[name] if name in empty else 0)

  trees = jax.tree_util.tree_map_with_path(join, *(rollout.tree for rollout in rollouts))
  greedy = [rollout.greedy for rollout in rollouts if rollout.greedy is not None]
  reward = join((), *(rollout.reward for rollout in rollouts))
  return trees, reward, join((), *greedy) if greedy else None


def _merge(figures: list[dict[str, float]]) -> dict[str, float]:
  """Returns a step's figures from those of its rounds: counts and times add, shares average."""
  merged = {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
  for name in SUMMED:
    merged[name] = float(sum(f[name] for f in figures))
  saved = 1 - merged["rollout/tokens_decoded"] / max(merged["rollout/tokens_path"], 1)
  return merged | {"rollout/decode_saving": saved}


def _conclude(workdir: Path, prompts: int, config) -> dict:
  """Writes summary.json and the plots from metrics.jsonl, and prints the end table."""
  metrics = metrics_lib.read(workdir / metrics_lib.NAME)
  total = lambda name: sum(m[name] for m in metrics if name in m)
  path, trained = total("rollout/tokens_path"), total("update/tokens_trained")
  summary = {
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
  summary = setup.summarise(workdir, summary, config)
  share, count = "{:.1%}".format, "{:,.0f}".format
  rows = [
    (f"accuracy on {prompts} held-out prompts, before", share(summary["accuracy_before"])),
    ("after", share(summary["accuracy_after"])),
    ("steps", count(summary["steps"])),
    ("seconds", count(summary["seconds"])),
    ("tokens decoded, shared ones once", count(summary["tokens_decoded"])),
    ("tokens of all paths, as sequential sampling decodes", count(path)),
    ("decoding saved", share(summary["decode_saving"])),
    ("training saved", share(summary["token_saving"])),
    ("largest gap of rollout and trainer log-probs", f"{summary['logprob_gap']:.1e}"),
  ]
  metrics_lib.table("TreePO", rows)
  last = f"trees/step_{config.train.steps - 1}.html"
  print(f"Pictures: {workdir}/plots/learning.png, saving.png; the last trees: {workdir}/{last}")
  return summary


def export(config, workdir: Path, output: Path) -> None:
  """Writes the newest weights of the run in workdir as a Hugging Face directory."""
  policy = setup.load(config)
  checkpoints = checkpoint.Checkpoints(workdir, config.train.keep)
  if checkpoints.latest() is None:
    raise UserError(f"{checkpoints.path} holds no checkpoint: train with this --workdir first")
  state, _ = checkpoints.restore(update.create(policy.params, config, policy.mesh))
  checkpoints.close()
  params = update.weights(state, config, policy.mesh)
  weights.save(output, policy.arch, params, source=policy.folder)
  print(f"weights after {int(state.step)} steps: {output}")


def rollout(config, workdir: Path) -> dict:
  """Grows one batch of trees with the weights of config.model.path, scores and writes them."""
  setup.claim(workdir, config)
  policy = setup.load(config)
  source = data.source(config)
  batch = data.take(source, policy.text, start=0, count=config.rollout.prompts, config=config)
  key = setup.key(config, 0, 0)
  made = _rollout(policy.params, key, batch.prompts, policy, config)
  credit = jax.device_get(advantages.estimate(made.tree, made.reward, made.greedy, config=config))
  written = records.records(made.tree, made.reward, credit, made.prompts, 0, config=config)
  write_trees(workdir, 0, written, policy)
  with metrics_lib.Writer(workdir, 0) as writer:
    writer.write(0, made.metrics)
  shown = [(name, f"{value:,.4g}") for name, value in sorted(made.metrics.items())]
  metrics_lib.table("Rollout", shown)
  print(f"Trees: {workdir}/trees/step_0.jsonl, step_0.html")
  return setup.summarise(workdir, made.metrics, config)


class _Stop:
  """Remembers that the run was told to stop, so that the step in hand is finished and saved.

  A second signal ends the program at once.
  """

  def __init__(self):
    self.asked = 0
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._ask)

  def _ask(self, number: int, _):
    signal.signal(number, signal.SIG_DFL)
    self.asked = number
