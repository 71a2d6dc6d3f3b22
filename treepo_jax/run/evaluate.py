"""Answers to held-out prompts, graded and scored: by set, over all, and against what they cost.

The work is cut into units: answers of one kind to some prompts of one set. Each is appended to
answers.jsonl and then entered in metrics.jsonl; an evaluation that was killed goes on with the
first unit that is not in both, and its summary is made from the files alone.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from treepo_jax.config import UserError
from treepo_jax.learn import update
from treepo_jax.rollout import grow
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.run import checkpoint, collect, hosts, preemption, results, setup
from treepo_jax.run import metrics as metrics_lib
from treepo_jax.run.results import Kind
from treepo_jax.tasks import data, rewards

STREAM = 1_000_000  # draws of an evaluation, apart from those of training rounds
ANSWERS = "answers.jsonl"
CONTINUES = ("mesh.", "plan.", "train.", "eval.every")  # keys that change no answer
# What a checkpoint's state is made of.
TRAINED = ("model.path", "lora.rank", "lora.alpha", "lora.targets", "learn.kl", "learn.reference")


@dataclasses.dataclass(frozen=True)
class Unit:
  """What is answered, saved and resumed as one: prompts of one set, sampled in one way."""

  kind: Kind
  dataset: str
  prompts: list[data.Prompt]


def kinds(config) -> list[Kind]:
  """Returns how answers are sampled: first what is reported, then the budget curve's others.

  With as many branches as answers a tree's answers would be those that are drawn one by one.
  """
  e, found = config.eval, [Kind(config.eval.sampling, config.eval.samples)]
  for width in e.widths:
    found += [Kind("sequential", width), *([] if e.branchings else [Kind(e.sampling, width)])]
    found += [Kind("tree", width, b) for b in e.branchings if b < width]
  return list(dict.fromkeys(found))


def sampler(kind: Kind, config, shape: grow.Settings) -> grow.Settings:
  """Returns the settings that sample so many answers: one by one, or as a tree.

  A tree has the shape of config.rollout, or where the kind says how many branches, as many at the
  prompt as at each node (the paper's N-ary trees).
  """
  if kind.sampling == "sequential":
    return grow.sequential(shape, kind.width, config.eval.temperature)
  wide = grow.with_width(shape, kind.width, config.eval.temperature)
  b = kind.branching
  if not b:
    return wide
  branch = dataclasses.replace(
    wide.branch,
    branching=b,
    branching_max=b,
    initial=b,
    initial_max=b,
    step_paths=0,
    response_tokens=0,
  )
  return dataclasses.replace(wide, branch=branch)


def accuracy(
  params: dict, prompts: Sequence[data.Prompt], *, policy: setup.Setup, config
) -> dict[str, float]:
  """Returns `eval/accuracy`, the mean over prompts, and `eval/accuracy/NAME` of each named set.

  The draws are the same at every call.
  """
  shares: dict[str, list[float]] = {}
  room = min(config.eval.chunk, len(prompts))
  for i in range(0, len(prompts), room):
    rollout = _sample(params, prompts[i : i + room], kinds(config)[0], room, policy, config)
    for prompt, correct in zip(rollout.prompts, rollout.correct, strict=True):
      shares.setdefault(prompt.dataset, []).append(float(np.mean(correct)) if correct else 0.0)
  whole = {"eval/accuracy": float(np.mean([x for part in shares.values() for x in part]))}
  return whole | {f"eval/accuracy/{s}": float(np.mean(x)) for s, x in shares.items() if s}


def run(config, workdir: Path) -> dict | None:
  """Evaluates the policy on the held-out prompts, or goes on; writes answers, tables and plots.

  Returns the summary, in the first process. Raises UserError where the workdir holds another run,
  SystemExit(128 + signal) where it was told to stop.
  """
  stop = preemption.Stop()
  stop.listen()
  setup.claim(workdir, config, CONTINUES)
  policy = dataclasses.replace(setup.load(config), stop=stop)
  prompts = data.heldout(config, policy.text).prompts
  units = list(_units(prompts, config))
  params, name = _weights(config, policy)
  params = hosts.local_copy(params, policy.mesh)
  recovered = []
  hosts.on_first(lambda: recovered.append(_recover(workdir, units, name)))
  done = sum(sum(hosts.gather(recovered), []))
  room = max(len(unit.prompts) for unit in units)
  with (
    metrics_lib.Writer(workdir, done, enabled=hosts.first()) as writer,
    metrics_lib.Progress(len(units), done, "evaluate", enabled=hosts.first()) as progress,
  ):
    progress.note(f"weights: {name}; {done} of {len(units)} parts are answered already")
    try:
      for i, unit in enumerate(units[done:], start=done):
        rollout = _sample(params, unit.prompts, unit.kind, room, policy, config)
        if hosts.first():
          _append(workdir / ANSWERS, _rows(rollout, unit, config))
        writer.write(i, _entry(unit, name, rollout))
        progress.advance(rollout.metrics)
    except preemption.Stopped as stopped:
      progress.note("stopped: the parts that are answered are saved; the same command continues")
      raise SystemExit(128 + stopped.number) from None
  if not hosts.first():
    return None
  summary = results.summarise(
    _scored(workdir, units, config), metrics_lib.read(workdir / metrics_lib.NAME), kinds(config)
  )
  summary = setup.summarise(workdir, {"weights": name} | summary, config)
  results.show(summary, workdir)
  return summary


def _append(path: Path, rows: Iterator[dict]) -> None:
  with metrics_lib.naming(path), path.open("a", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def _units(prompts: Sequence[data.Prompt], config) -> Iterator[Unit]:
  """Yields the work: kind by kind, set by set, so many prompts at a time."""
  sets: dict[str, list[data.Prompt]] = {}
  for prompt in prompts:
    sets.setdefault(prompt.dataset or results.UNNAMED, []).append(prompt)
  for kind in kinds(config):
    for dataset, own in sets.items():
      for i in range(0, len(own), config.eval.chunk):
        yield Unit(kind, dataset, own[i : i + config.eval.chunk])


def _sample(params, prompts, kind: Kind, room: int, policy: setup.Setup, config) -> collect.Rollout:
  """Returns the answers to some prompts; room: the most that are answered at a time."""
  shape, key = sampler(kind, config, policy.shape), setup.key(config, 0, STREAM)
  return collect.collect(params, key, prompts, setup=policy, shape=shape, config=config, room=room)


def _weights(config, policy: setup.Setup) -> tuple[dict, str]:
  """Returns the weights to evaluate and their name: config.model.path or a checkpoint's folder."""
  if not config.eval.checkpoint:
    return policy.params, config.model.path
  trained, step = checkpoint.find(config.eval.checkpoint)
  theirs, ours = setup.stored(trained / "config.json"), setup.flat(config)
  for key in TRAINED:
    if theirs.get(key) != ours[key]:
      raise UserError(
        f"{trained} was trained with config.{key} = {theirs.get(key)!r}, now {ours[key]!r}: give "
        f"--config.{key} the value that it was trained with"
      )
  checkpoints = checkpoint.Checkpoints(trained, config.train.keep)
  like = update.create(policy.params, config, policy.mesh)
  state, _ = checkpoints.restore(like, step)
  checkpoints.close()
  return update.weights(state, config, policy.mesh), str(checkpoints.path / str(step))


def _recover(workdir: Path, units: Sequence[Unit], name: str) -> int:
  """Returns how many units are answered and entered, and cuts off what follows their answers.

  Raises UserError where the workdir holds a run of another kind, or answers to other prompts or by
  other weights.
  """
  log, path = workdir / metrics_lib.NAME, workdir / ANSWERS
  entries = metrics_lib.read(log) if log.exists() else []
  if any("eval/weights" not in entry for entry in entries):
    raise UserError(f"{workdir} holds a run of another mode: give another --workdir to evaluate in")
  others = [e["eval/weights"] for e in entries if e["eval/weights"] != name]
  if others:
    raise UserError(
      f"{workdir} holds answers of {others[0]}, now it is {name}: give another --workdir, or name "
      "the old one in config.eval.checkpoint"
    )
  done, end = 0, 0
  with metrics_lib.naming(path):
    path.touch()
    with path.open("r+b") as file:
      for unit, _ in zip(units, entries, strict=False):
        lines = [file.readline() for _ in unit.prompts]
        if not lines[-1].endswith(b"\n"):
          break
        _check(path, lines, unit)
        done, end = done + 1, file.tell()
      file.truncate(end)
  return done


def _check(path: Path, lines: Sequence[bytes], unit: Unit) -> None:
  """Raises UserError where saved answers are not those of the unit."""
  for line, prompt in zip(lines, unit.prompts, strict=True):
    try:
      row = json.loads(line)
      known = row["prompt_id"], row["dataset"]
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"{path}: a line is damaged ({line[:60]!r}): take it out with all that follow"
      ) from error
    if known != (str(prompt.id), unit.dataset):
      raise UserError(
        f"{path} holds an answer to prompt {known[0]} of {known[1]} where {prompt.id} of "
        f"{unit.dataset} stands now: the data has changed; give another --workdir"
      )


def _rows(rollout: collect.Rollout, unit: Unit, config) -> Iterator[dict]:
  """Yields what answers.jsonl says of each prompt; lists are by answer."""
  tree = rollout.tree
  for b, prompt in enumerate(rollout.prompts):
    leaves = np.asarray(tree.leaves[b])
    leaves = leaves[leaves != tree_lib.NO_ROW]
    tokens = (tree.depth[b][leaves] - 1) * tree.tokens.shape[2] + tree.length[b][leaves]
    yield {
      "dataset": unit.dataset,
      **dataclasses.asdict(unit.kind),
      "prompt_id": str(prompt.id),
      "prompt": prompt.text,
      "gold": prompt.gold,
      "answers": rollout.texts[b],
      "extracted": rollout.answers[b],
      "correct": rollout.correct[b],
      "tokens": tokens.tolist(),
      "group": rewards.groups(rollout.answers[b], prompt.grader, config=config),
    }


def _entry(unit: Unit, name: str, rollout: collect.Rollout) -> dict:
  """Returns what metrics.jsonl says of a unit: whose answers to what, and the rollout's figures."""
  made = {"eval/weights": name, "eval/dataset": unit.dataset, "eval/prompts": len(unit.prompts)}
  return made | unit.kind.figures() | rollout.metrics


def _scored(workdir: Path, units: Sequence[Unit], config) -> dict[Kind, dict[str, results.Scores]]:
  """Returns the scores of every prompt by kind and set, read from answers.jsonl."""
  answers: dict[Kind, dict[str, list[results.Answers]]] = {}
  with (workdir / ANSWERS).open(encoding="utf-8") as file:
    for unit in units:
      found = answers.setdefault(unit.kind, {}).setdefault(unit.dataset, [])
      for prompt in unit.prompts:
        row = json.loads(file.readline())
        found.append(results.Answers(prompt.id, row["group"], row["correct"]))
  return {
    kind: results.score(sets, bootstrap=config.eval.bootstrap, seed=config.seed)
    for kind, sets in answers.items()
  }
