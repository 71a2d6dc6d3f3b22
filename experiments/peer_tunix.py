"""Tunix as a peer of bench_peers.py, run by it in its own interpreter, and what both sides share.

PYTHON_OF_TUNIX experiments/peer_tunix.py sample                  (google-tunix 0.1.7)
PYTHON_OF_TUNIX experiments/peer_tunix.py step [--micro=1]

`sample` is its vanilla sampler; `step` its GRPO learner: generation, log-probs of the reference,
reward and update, all prompts in one micro-batch or --micro of them. A line on stdin asks for a
run. The model is a random Qwen2 of 3.9M parameters in float32; no token ends an answer. It is one
device, of all cores: with JAX_NUM_CPU_DEVICES=2 it is no faster (a step takes 1.2 times as long).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

PROMPTS, SAMPLES, PROMPT, NEW = 4, 8, 256, 256
TOKENS = PROMPTS * SAMPLES * NEW  # of the answers of one run
LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 256, 1024, 8, 2, 32, 512
BETA, CLIP, RATE = 0.04, 0.2, 1e-4


def requests(wait: Callable[[], Any] = lambda: None) -> Iterator[None]:
  """Yields to have a run made: one that compiles, then one for every line of stdin.

  Says {} after the first, the seconds of each of the others, and at the end of stdin the process's
  peak of resident memory. What libraries print goes to stderr.

  Args:
    wait: returns when a run is done that may still be under way.
  """
  out, sys.stdout = sys.stdout, sys.stderr
  say = lambda **figures: print(json.dumps(figures), file=out, flush=True)
  yield
  wait()
  say()
  for _ in sys.stdin:
    begun = time.perf_counter()
    yield
    wait()
    say(seconds=time.perf_counter() - begun)
  status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
  peak = next(line for line in status if line.startswith("VmHWM"))
  say(peak_mb=int(peak.split()[1]) / 1024)


class Bytes:
  """A tokenizer of bytes: the methods that Tunix asks for."""

  def encode(self, text: str, **_) -> list[int]:
    return [3 + b for b in text.encode()]

  def decode(self, ids, **_) -> str:
    return "".join(chr(max(int(i) - 3, 0)) for i in ids)

  def bos_id(self) -> int:
    return 1

  def eos_id(self) -> int:
    return VOCABULARY  # is never drawn

  def pad_id(self) -> int:
    return 0


def model() -> Any:
  """Returns the random policy."""
  from tunix.models.qwen2 import model as qwen2  # pyright: ignore[reportMissingImports]

  shape = qwen2.ModelConfig(
    num_layers=LAYERS,
    vocab_size=VOCABULARY,
    embed_dim=WIDTH,
    hidden_dim=HIDDEN,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    num_kv_heads=KV_HEADS,
    rope_theta=1_000_000,
    norm_eps=1e-6,
    use_tied_embedding=True,
  )
  return qwen2.Qwen2(shape, rngs=nnx.Rngs(0))


def texts() -> list[str]:
  """Returns prompts of PROMPT tokens with the one that begins a sequence."""
  return [f"question {i} ".ljust(PROMPT - 1, "x") for i in range(PROMPTS)]


def sampling() -> None:
  """Samples SAMPLES answers to each prompt at every request."""
  from tunix.generate import sampler  # pyright: ignore[reportMissingImports]

  cache = sampler.CacheConfig(
    cache_size=PROMPT + NEW, num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM
  )
  sample = sampler.Sampler(model(), Bytes(), cache)
  rows = [text for text in texts() for _ in range(SAMPLES)]
  for seed, _ in enumerate(requests()):
    made = sample(
      rows,
      max_generation_steps=NEW,
      max_prompt_length=PROMPT,
      temperature=1.0,
      top_p=1.0,  # without one it would be greedy
      seed=seed,
      eos_tokens=[VOCABULARY],
      return_logprobs=True,
    )
    assert sum(map(len, made.tokens)) == TOKENS


def cluster(mesh: jax.sharding.Mesh, micro: int) -> Any:
  """Returns policy, reference, sampler and optimizer; `micro` prompts a micro-batch."""
  from tunix.rl import rl_cluster  # pyright: ignore[reportMissingImports]
  from tunix.rl.rollout import base_rollout  # pyright: ignore[reportMissingImports]

  roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
  return rl_cluster.RLCluster(
    actor=model(),
    reference=model(),
    tokenizer=Bytes(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(roles, mesh),
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(RATE),
        eval_every_n_steps=1_000_000,
        max_steps=1_000_000,
        mini_batch_size=PROMPTS,
        train_micro_batch_size=micro,
        rollout_micro_batch_size=PROMPTS,
        compute_logps_micro_batch_size=micro,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=NEW,
        max_prompt_length=PROMPT,
        kv_cache_size=PROMPT + NEW,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[VOCABULARY],
      ),
    ),
  )


def reward(prompts, completions, **_) -> list[float]:
  assert sum(map(len, completions)) == TOKENS
  return [sum(map(ord, text)) % 97 / 97 for text in completions]


def training(micro: int) -> None:
  """Trains a step at every request; the learner asks for a batch when it is done with the last."""
  from tunix.rl.grpo import grpo_learner  # pyright: ignore[reportMissingImports]

  axes = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((jax.device_count(), 1), ("fsdp", "tp"), axis_types=axes)
  with jax.set_mesh(mesh):
    made = cluster(mesh, micro)
    learn = grpo_learner.GRPOLearner(
      rl_cluster=made,
      reward_fns=reward,
      algo_config=grpo_learner.GRPOConfig(
        num_generations=SAMPLES, num_iterations=1, beta=BETA, epsilon=CLIP
      ),
    )
    wait = lambda: jax.block_until_ready(nnx.state(made.actor_trainer.model))
    batch = {"prompts": np.array(texts())}
    learn.train(dict(batch) for _ in requests(wait))


def main() -> None:
  parser = argparse.ArgumentParser(description="Tunix's side of bench_peers.py.")
  parser.add_argument("work", choices=("sample", "step"))
  parser.add_argument("--micro", type=int, default=PROMPTS, help="prompts a micro-batch of a step")
  args = parser.parse_args()
  if args.work == "sample":
    sampling()
  else:
    training(args.micro)


if __name__ == "__main__":
  main()
