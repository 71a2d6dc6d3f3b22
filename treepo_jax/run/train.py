"""The training run: trees, credit, update; evaluated, saved and drawn as it goes."""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path

import jax
import numpy as np

from treepo_jax.config import UserError
from treepo_jax.learn import advantages, packing, update
from treepo_jax.model import weights
from treepo_jax.rollout import grow
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.run import (
  checkpoint,
  collect,
  evaluate,
  hosts,
  preemption,
  records,
  setup,
  summary,
  view,
)
from treepo_jax.run import metrics as metrics_lib
from treepo_jax.tasks import data

SUMMED = (
  "rollout/tokens_decoded",
  "rollout/tokens_path",
  "rollout/tokens_prefilled",
  "rollout/row_steps",
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
  """Trains, or continues the run in workdir; returns the summary, in the first process.

  Raises SystemExit(128 + signal) where it was told to stop and what was finished is saved.
  """
  stop = preemption.Stop()
  stop.listen()
  setup.claim(workdir, config)
  source = data.source(config)  # first: a bad row is found sooner than weights are read
  policy = dataclasses.replace(setup.load(config), stop=stop)
  heldout = data.heldout(config, policy.text).prompts
  state = update.create(policy.params, config, policy.mesh)
  policy = dataclasses.replace(policy, params={})  # the state holds them
  checkpoints = checkpoint.Checkpoints(workdir, config.train.keep)
  state, position = _restored(checkpoints, state, workdir, config)
  start = done = int(state.step)
  steps = config.train.steps
  with (
    contextlib.closing(checkpoints),  # what was saved is also written where an error ends the run
    metrics_lib.Writer(workdir, start, enabled=hosts.first()) as writer,
    metrics_lib.Progress(steps, start, "train", enabled=hosts.first()) as progress,
  ):
    progress.note(f"continues at step {start}" if start else "compiling the first step")
    try:
      for step in range(start, steps):
        begun, metrics = time.perf_counter(), {}
        if step == 0 or (config.eval.every and step % config.eval.every == 0):
          params = _sampled(state, policy, config)
          metrics = evaluate.accuracy(params, heldout, policy=policy, config=config)
          del params  # no second copy of the weights waits while the update runs
        evaluated = time.perf_counter()
        state, position, figures = _step(state, position, step, source, policy, config, workdir)
        done = step + 1
        metrics |= figures | {"time/evaluate": evaluated - begun}
        if done == steps or done % config.train.checkpoint_every == 0:
          checkpoints.save(done, state, position)
        metrics["time/step"] = time.perf_counter() - begun
        writer.write(step, metrics)
        progress.advance(metrics)
      begun = time.perf_counter()
      params = _sampled(state, policy, config)
      after = evaluate.accuracy(params, heldout, policy=policy, config=config)
      writer.write(steps, after | {"time/evaluate": time.perf_counter() - begun})
    except preemption.Stopped as stopped:
      if done:
        checkpoints.save(done, state, position)
        checkpoints.wait()
      saved = f"{done} steps are saved in {checkpoints.path}" if done else "no step was finished"
      progress.note(f"stopped: {saved}; the same command continues there")
      raise SystemExit(128 + stopped.number) from None
  return summary.conclude(workdir, len(heldout), config) if hosts.first() else None


def _restored(checkpoints: checkpoint.Checkpoints, state, workdir: Path, config):
  """Returns the newest checkpoint's state and data position, those given where there is none."""
  if checkpoints.latest() is None:
    return state, 0
  state, position = checkpoints.restore(state)
  if int(state.step) > config.train.steps:
    raise UserError(
      f"{workdir} holds {int(state.step)} steps, more than config.train.steps = "
      f"{config.train.steps}: raise it or give another --workdir"
    )
  return state, position


def _sampled(state, policy: setup.Setup, config):
  """Returns the policy's weights as a rollout takes them."""
  return hosts.local_copy(update.weights(state, config, policy.mesh), policy.mesh)


def _step(state, position: int, step: int, source, policy: setup.Setup, config, workdir: Path):
  """Takes one step of the loop; returns the new state, data position and the step's figures."""
  sampled = _sampled(state, policy, config)
  rollouts, position = _rollouts(sampled, position, step, source, policy, config)
  del sampled
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
  if jax.process_count() > 1:
    optimize = update.program(state, graph=policy.graph, config=config, mesh=policy.mesh)
    for batch in batches:  # compiled before hosts meet: none waits on its devices for another
      optimize.lower(state, update.place(batch, config, policy.mesh)).compile()
    hosts.meet()
  state, measured = update.step(state, batches, graph=policy.graph, config=config, mesh=policy.mesh)
  measured = {name: float(x) for name, x in jax.device_get(measured).items()}
  updated = time.perf_counter()
  due = step % config.train.trees_every == 0 or step + 1 == config.train.steps
  if due and hosts.first():
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
  if hosts.first():
    print(f"weights after {int(state.step)} steps: {output}")


def rollout(config, workdir: Path) -> dict:
  """Grows one batch of trees with the weights of config.model.path, scores and writes them."""
  setup.claim(workdir, config)
  policy = setup.load(config)
  source = data.source(config)
  batch = data.take(source, policy.text, start=0, count=config.rollout.prompts, config=config)
  key = setup.key(config, 0, 0)
  params = hosts.local_copy(policy.params, policy.mesh)
  made = _rollout(params, key, batch.prompts, policy, config)
  if not hosts.first():
    return made.metrics
  credit = jax.device_get(advantages.estimate(made.tree, made.reward, made.greedy, config=config))
  written = records.records(made.tree, made.reward, credit, made.prompts, 0, config=config)
  write_trees(workdir, 0, written, policy)
  with metrics_lib.Writer(workdir, 0) as writer:
    writer.write(0, made.metrics)
  shown = [(name, f"{value:,.4g}") for name, value in sorted(made.metrics.items())]
  metrics_lib.table("Rollout", shown)
  print(f"Trees: {workdir}/trees/step_0.jsonl, step_0.html")
  return setup.summarise(workdir, made.metrics, config)
