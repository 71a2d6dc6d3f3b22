"""How often answers to held-out prompts are right: mean, pass@k and maj@k."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from treepo_jax.rollout import grow
from treepo_jax.run import collect, hosts, setup
from treepo_jax.run import metrics as metrics_lib
from treepo_jax.tasks import data, rewards

STREAM = 1_000_000  # draws of an evaluation, apart from those of training rounds
CHUNK = 512  # prompts evaluated at a time


def sampler(config, shape: grow.Settings) -> grow.Settings:
  """Returns the settings of evaluation: config.eval.samples answers, one by one or as a tree."""
  if config.eval.sampling == "sequential":
    return grow.sequential(shape, config.eval.samples, config.eval.temperature)
  return grow.with_width(shape, config.eval.samples, config.eval.temperature)


def accuracy(params: dict, prompts: Sequence[data.Prompt], *, policy: setup.Setup, config) -> float:
  """Returns the share of right answers, with the same draws at every call.

  params: of hosts.local_copy.
  """
  rollouts = _rollouts(params, prompts, policy, config)
  return float(np.mean([right for r in rollouts for tree in r.correct for right in tree]))


def _rollouts(params, prompts, policy: setup.Setup, config) -> Iterator[collect.Rollout]:
  """Yields the answers to CHUNK prompts after the other."""
  shape, key = sampler(config, policy.shape), setup.key(config, 0, STREAM)
  for i in range(0, len(prompts), CHUNK):
    chunk = prompts[i : i + CHUNK]
    yield collect.collect(params, key, chunk, setup=policy, shape=shape, config=config)


def pass_at(right: int, count: int, k: int) -> float:
  """Returns the chance that k of `count` answers, drawn without replacement, hold a right one.

  1 - C(count - right, k) / C(count, k), unbiased (Chen et al. 2021, Evaluating LLMs on Code, Eq 1).
  """
  return 1 - math.comb(count - right, k) / math.comb(count, k)


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
  """Returns the chance that the most frequent answer is right, ties broken evenly.

  Equal numbers are one answer; an answer without a box has no vote.
  """
  votes = [
    (rewards.normalise(a), c) for a, c in zip(answers, correct, strict=True) if a is not None
  ]
  count = Counter(answer for answer, _ in votes)
  right = {answer for answer, is_right in votes if is_right}
  best = [answer for answer, n in count.items() if n == max(count.values())]
  return sum(answer in right for answer in best) / max(len(best), 1)


def run(config, workdir: Path) -> dict:
  """Evaluates config.model.path on the held-out prompts; writes answers.jsonl and summary.json."""
  setup.claim(workdir, config)
  policy = setup.load(config)
  prompts = data.heldout(config, policy.text).prompts
  begun = time.perf_counter()
  answers, decoded, path = [], 0.0, 0.0
  chunks = -(-len(prompts) // CHUNK)
  params = hosts.local_copy(policy.params, policy.mesh)
  with metrics_lib.Progress(chunks, 0, "evaluate", enabled=hosts.first()) as progress:
    for rollout in _rollouts(params, prompts, policy, config):
      answers += _answers(rollout)
      decoded += rollout.metrics["rollout/tokens_decoded"]
      path += rollout.metrics["rollout/tokens_path"]
      progress.advance(rollout.metrics)
  if hosts.first():
    with metrics_lib.replacing(workdir / "answers.jsonl") as temporary:
      temporary.write_text("".join(json.dumps(a) + "\n" for a in answers), encoding="utf-8")

  right = [sum(a["correct"]) for a in answers]
  count = [len(a["correct"]) for a in answers]
  ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= min(count)]
  mean = np.array(right) / np.array(count)
  summary = {
    "accuracy": float(mean.mean()),
    "standard_error": float(mean.std(ddof=1) / len(mean) ** 0.5) if len(mean) > 1 else None,
    "prompts": len(prompts),
    "samples": config.eval.samples,
    "majority": float(np.mean([majority(a["extracted"], a["correct"]) for a in answers])),
    "tokens_decoded": decoded,
    "tokens_path": path,
    "decode_saving": 1 - decoded / max(path, 1),
    "seconds": time.perf_counter() - begun,
  } | {
    f"pass@{k}": float(np.mean([pass_at(r, c, k) for r, c in zip(right, count, strict=True)]))
    for k in ks
  }
  shown = [
    (name, f"{value:.4f}" if isinstance(value, float) else str(value))
    for name, value in summary.items()
  ]
  if hosts.first():
    metrics_lib.table(f"Evaluation, {config.eval.sampling} sampling", shown)
  return setup.summarise(workdir, summary, config)


def _answers(rollout: collect.Rollout) -> list[dict]:
  return [
    {
      "prompt_id": str(prompt.id),
      "prompt": prompt.text,
      "gold": prompt.gold,
      "answers": rollout.texts[b],
      "extracted": rollout.answers[b],
      "correct": rollout.correct[b],
    }
    for b, prompt in enumerate(rollout.prompts)
  ]
