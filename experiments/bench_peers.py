"""Ours against peers on the same work in one run: Tunix's GRPO, transformers' generate.

python experiments/bench_peers.py --tunix=PYTHON_OF_ITS_ENVIRONMENT --json=peers.json

Tunix 0.1.7 wants Python 3.12 and an environment of its own: `pip install google-tunix==0.1.7`
there, and give its interpreter. transformers comes with the extra `test`. What is not installed is
named as skipped.

Against Tunix (peer_tunix.py has its side): a random Qwen2 of 3.9M parameters in float32, 4 prompts
of 256 tokens, 8 answers of 256 tokens to each, none of which ends early. Sampling: nothing is
shared but the prompt. Trees: as many answers of the same length from each of SHAPES,
against the same sampling. A step: generation, log-probs of a reference policy, advantages, an AdamW
update with the KL to the reference in its loss; flat with GRPO's advantages, trees with TreePO's.
A micro-batch of Tunix holds all 32 rows, its default, or 8, for less memory; one of ours two rows,
each a prompt with all its answers. Every kind of work is a process of its own, ours with a core a
device; they run in turn, and peaks of resident memory are each process's own.

Against transformers: whole generations of bench_decode.py's 28M policy.

Medians; ratio is ours over theirs, for memory theirs over ours: higher is better.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import peer_tunix as peer

from treepo_jax import config as config_lib
from treepo_jax.learn import advantages, packing, update
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer
from treepo_jax.rollout import grow
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.tasks.data import Prompt

# How answers grow: segments of an answer, branches of the prompt and of a node, and how many nodes
# a prompt's answers come to.
SHAPES = {
  "flat": (8, 0, 1, 8 * 8),
  "trees of 8 segments, 2 branches doubled to 8 (16 % shared)": (8, 2, 2, 2 + 4 + 6 * 8),
  "trees of 4 segments, 1 branch doubled to 8 (53 % shared)": (4, 1, 2, 1 + 2 + 4 + 8),
}

ARCHITECTURE = transformer.Architecture(
  family="qwen2",
  vocab_size=peer.VOCABULARY,
  width=peer.WIDTH,
  layers=peer.LAYERS,
  heads=peer.HEADS,
  kv_heads=peer.KV_HEADS,
  head_dim=peer.HEAD_DIM,
  hidden=peer.HIDDEN,
  norm_eps=1e-6,
  rope_theta=1e6,
  rope_scaling=None,
  max_positions=4096,
  tied=True,
  qkv_bias=True,
  output_bias=False,
  qk_norm=False,
)


def configure(shape: str):
  """Returns the config of a worker and lets each core be a device; before jax starts."""
  depth, initial, branching, nodes = SHAPES[shape]
  tree, segment = branching > 1, peer.NEW // depth
  config = config_lib.default()
  mesh_lib.split_host(config)
  with config.unlocked():
    config.rollout.update(
      prompts=peer.PROMPTS,
      width=peer.SAMPLES,
      depth=depth,
      segment=segment,
      page=segment,
      initial=initial,
      branching=branching,
      fallback="random" if tree else "none",
      prompt_length=peer.PROMPT,
      rows=-(-peer.PROMPTS * peer.SAMPLES // jax.device_count()),
      group=peer.SAMPLES // 2,
      merge=False,
      repetition_count=0,
    )
    config.advantage.estimator = "treepo" if tree else "grpo"
    config.learn.update(
      row_length=peer.PROMPT + nodes * segment,  # a prompt with all its answers
      micro_rows=2,
      aggregate="sequence",
      clip_low=peer.CLIP,
      clip_high=peer.CLIP,
      kl="k1",
      kl_weight=peer.BETA,
    )
    config.train.learning_rate = peer.RATE
  return config_lib.validate(config)


class Worker:
  """Our side: the verbs of a training step, on a random policy."""

  def __init__(self, shape: str):
    self.depth, _, _, self.nodes = SHAPES[shape]
    self.config = configure(shape)
    self.mesh = mesh_lib.create(self.config)
    self.graph, params = transformer.create(ARCHITECTURE, jax.random.key(0))
    self.state = update.create(params, self.config, self.mesh)
    self.shape = grow.settings(self.config, vocabulary=peer.VOCABULARY, eos_ids=(), closed=-1)
    self.table = np.zeros((1, peer.VOCABULARY), np.int8)
    tokens = [[peer.Bytes().bos_id(), *peer.Bytes().encode(text)] for text in peer.texts()]
    self.prompts = [Prompt(id=i, text="", tokens=t, gold="") for i, t in enumerate(tokens)]
    self.key = jax.random.key(0)

  def sample(self) -> tree_lib.Tree:
    """Grows the trees, all of whose answers are whole."""
    self.key, key = jax.random.split(self.key)
    tree, cost = grow.grow(
      update.weights(self.state, self.config, self.mesh),
      key,
      self.prompts,
      graph=self.graph,
      table=self.table,
      shape=self.shape,
      mesh=self.mesh,
    )
    segment = peer.NEW // self.depth
    assert cost["rollout/tokens_decoded"] == peer.PROMPTS * self.nodes * segment
    leaf = np.arange(peer.PROMPTS)[:, None], tree.leaves
    assert (tree.depth[leaf] == self.depth).all() and (tree.length[leaf] == segment).all()
    return tree

  def step(self) -> None:
    """Takes a whole step; `config` says how."""
    tree = self.sample()
    reward = np.zeros(tree.parent.shape, np.float32)
    for b, rows in enumerate(tree.leaves):
      reward[b, rows] = [sum(tree_lib.response(tree, b, row)) % 97 / 97 for row in rows]
    credit = jax.device_get(advantages.estimate(tree, reward, config=self.config))
    batches = packing.pack(tree, credit, config=self.config)
    self.state, measured = update.step(
      self.state, batches, graph=self.graph, config=self.config, mesh=self.mesh
    )
    jax.device_get(measured)


class Process:
  """A worker in a process of its own; see peer_tunix.requests."""

  def __init__(self, *command: str):
    self.errors = tempfile.TemporaryFile("w+")
    pipe = subprocess.PIPE
    self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
    self.read()

  def read(self) -> dict:
    """Returns what the worker says next."""
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      self.errors.seek(0)
      raise RuntimeError(f"{self.process.args} ended:\n{self.errors.read()[-4000:]}")
    return json.loads(line)

  def run(self) -> float:
    """Has a run made and returns its seconds."""
    assert self.process.stdin is not None
    self.process.stdin.write("\n")
    self.process.stdin.flush()
    return self.read()["seconds"]

  def close(self) -> float:
    """Ends the worker and returns its peak memory in MB."""
    assert self.process.stdin is not None
    self.process.stdin.close()
    peak = self.read()["peak_mb"]
    self.process.wait()
    return peak


def in_turn(commands: dict[str, tuple[str, ...]], runs: int) -> dict[str, tuple[float, float]]:
  """Returns each worker's median seconds of `runs` runs taken in turn, and its peak memory."""
  workers = {name: Process(*command) for name, command in commands.items()}
  seconds = [{name: worker.run() for name, worker in workers.items()} for _ in range(runs)]
  return {
    name: (statistics.median(s[name] for s in seconds), worker.close())
    for name, worker in workers.items()
  }


def row(name: str, version: str, work: str, ours: float, theirs: float, unit: str) -> dict:
  """Returns and prints a row of the result."""
  ratio = theirs / ours if unit == "MB" else ours / theirs
  print(
    f"{name} {version}, {work}: {ours:,.1f} against {theirs:,.1f} {unit}, {ratio:.1f}x", flush=True
  )
  figures = {"ours": ours, "theirs": theirs, "unit": unit, "ratio": ratio}
  return {"peer": name, "version": version, "work": work} | figures


def against_tunix(python: str, version: str, quick: bool) -> list[dict]:
  """Returns the rows against Tunix: sampling, trees and steps, with their memory."""
  folder = Path(__file__).parent
  mine = (sys.executable, str(folder / "bench_peers.py"), "--work")
  its = (python, str(folder / "peer_tunix.py"))
  rows = []

  def compare(work: str, unit: str, amount: float, ours: tuple, theirs: tuple) -> None:
    rows.append(row("tunix", version, work, amount / ours[0], amount / theirs[0], unit))
    rows.append(row("tunix", version, f"{work}: peak memory", ours[1], theirs[1], "MB"))

  runs = 2 if quick else 5
  flat, *trees = list(SHAPES)
  trees = trees[-1:] if quick else trees
  ours = lambda kind: {shape: (*mine, kind, f"--shape={shape}") for shape in (flat, *trees)}
  sampled = in_turn({"theirs": (*its, "sample"), **ours("sample")}, runs)
  compare("sampling", "tokens/s", peer.TOKENS, sampled[flat], sampled["theirs"])
  for shape in trees:
    answers = peer.PROMPTS * peer.SAMPLES
    compare(f"answers from {shape}", "answers/s", answers, sampled[shape], sampled["theirs"])

  micros = (peer.PROMPTS,) if quick else (peer.PROMPTS, 1)
  steps = {f"{m}": (*its, "step", f"--micro={m}") for m in micros}
  stepped = in_turn(ours("step") | steps, runs)
  for micro in micros:
    for kind in (flat, *trees):
      work = f"GRPO step, {kind}; theirs {micro * peer.SAMPLES} rows a micro-batch"
      compare(work, "steps/min", 60, stepped[kind], stepped[f"{micro}"])
  return rows


def against_transformers(quick: bool) -> list[dict]:
  """Returns the rows against transformers' generate; ImportError where it is not installed."""
  import bench_decode as decode
  import torch
  import transformers

  cores = len(os.sched_getaffinity(0))
  jax.config.update("jax_num_cpu_devices", cores)
  torch.set_num_threads(cores)
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    path = decode.random_qwen2(folder)
    for prompts, samples in ((4, 16),) if quick else ((64, 1), (4, 16)):
      found = decode.measure(decode.Case("28M", path, prompts, samples, 256, 64), 2 if quick else 5)
      work = f"generation, {prompts} prompts x {samples}, 256 + 64 tokens"
      ours, theirs = found["ours_tokens_per_s"], found["theirs_tokens_per_s"]
      rows.append(row("transformers", transformers.__version__, work, ours, theirs, "tokens/s"))
  return rows


def installed(python: str | None) -> tuple[str, str]:
  """Returns Tunix's version in the environment of `python`, or "" and why there is none."""
  if python is None:
    return "", "--tunix does not say where its environment is"
  ask = "from importlib.metadata import version; print(version('google-tunix'))"
  try:
    done = subprocess.run((python, "-c", ask), capture_output=True, text=True, check=True)
  except OSError as error:
    return "", f"{python}: {error.strerror}"
  except subprocess.CalledProcessError:
    return "", f"google-tunix is not installed for {python}"
  return done.stdout.strip(), ""


def work(name: str, shape: str) -> None:
  """Does our side's runs as they are asked for."""
  worker = Worker(shape)
  for _ in peer.requests():
    worker.sample() if name == "sample" else worker.step()


def main() -> None:
  parser = argparse.ArgumentParser(description="Ours against Tunix and transformers.")
  parser.add_argument("--quick", action="store_true", help="fewer runs and rows")
  parser.add_argument("--json", type=Path, help="file for the figures")
  parser.add_argument("--tunix", help="Python of the environment that google-tunix is in")
  parser.add_argument("--work", choices=("sample", "step"), help=argparse.SUPPRESS)
  parser.add_argument("--shape", default="flat", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    work(args.work, args.shape)
    return
  rows, skipped = [], []
  version, reason = installed(args.tunix)
  if version:
    rows += against_tunix(args.tunix, version, args.quick)
  else:
    skipped.append({"peer": "tunix", "reason": reason})
  try:
    rows += against_transformers(args.quick)
  except ImportError as error:
    skipped.append({"peer": "transformers", "reason": str(error)})
  for peer_skipped in skipped:
    print(f"skipped {peer_skipped['peer']}: {peer_skipped['reason']}")
  if args.json:
    args.json.write_text(json.dumps({"rows": rows, "skipped": skipped}, indent=2) + "\n")


if __name__ == "__main__":
  main()
