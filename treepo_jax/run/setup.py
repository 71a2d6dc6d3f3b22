"""From a config to what every mode starts with: text, weights, mesh, sampler; and the workdir."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from treepo_jax.config import UserError
from treepo_jax.model import attention, hub, transformer, weights
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.rollout import grow
from treepo_jax.run import hosts, preemption
from treepo_jax.run import metrics as metrics_lib
from treepo_jax.tasks import text as text_lib

# Keys that may differ when a run is continued in its workdir: none changes a step already taken.
CONTINUES = (
  "train.steps",
  "train.checkpoint_every",
  "train.keep",
  "train.trees_every",
  "eval.",
  "mesh.",
  "learn.micro_rows",
  "plan.",
)


@dataclasses.dataclass(frozen=True)
class Setup:
  """The policy and how it samples.

  Attributes:
    graph, params, arch: of the model.
    text: tokenizer.
    table: box automaton over the model's token ids.
    shape: settings of the rollout.
    mesh: over the devices of all hosts.
    folder: where the model's files are.
    stop: looked at between segments.
  """

  graph: nnx.GraphDef
  params: dict[str, Any]
  arch: transformer.Architecture
  text: text_lib.Text
  table: np.ndarray
  shape: grow.Settings
  mesh: Mesh
  folder: Path
  stop: preemption.Stop = dataclasses.field(default_factory=preemption.Stop)


def load(config: ml_collections.FrozenConfigDict) -> Setup:
  """Loads the policy of config.model.path onto the mesh of config.mesh."""
  mesh = mesh_lib.create(config)
  folder = hub.find(config.model.path, config.model.revision)
  text = text_lib.load(folder, thinking=config.data.thinking)
  graph, params, arch = weights.load(folder, config.model.dtype, mesh)
  attention.check(config, arch.head_dim)
  shape = grow.settings(
    config,
    vocabulary=min(len(text.tokenizer), arch.vocab_size),
    eos_ids=text.eos_ids,
    closed=text_lib.CLOSED,
  )
  longest = config.rollout.prompt_length + config.rollout.depth * config.rollout.segment
  if longest > arch.max_positions:
    raise UserError(
      f"rollout.prompt_length + rollout.depth * rollout.segment = {longest} tokens, but "
      f"{config.model.path} has {arch.max_positions} positions: lower one of the three"
    )
  return Setup(graph, params, arch, text, text.automaton(arch.vocab_size), shape, mesh, folder)


def key(config: ml_collections.FrozenConfigDict, step: int, stream: int) -> jax.Array:
  """Returns the key of a step's draws; `stream` parts training rounds and evaluation."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), stream)


def claim(
  workdir: Path,
  config: ml_collections.FrozenConfigDict,
  continues: tuple[str, ...] = CONTINUES,
) -> None:
  """Makes the workdir and writes config.json, every key resolved.

  Raises UserError where the workdir holds a run whose steps were taken under other values of keys
  that do not begin with one of `continues`.
  """
  hosts.on_first(lambda: _claim(workdir, config, continues))


def _claim(
  workdir: Path, config: ml_collections.FrozenConfigDict, continues: tuple[str, ...]
) -> None:
  path = workdir / "config.json"
  now = flat(config)
  if path.exists():
    old = stored(path)
    changed = [k for k in now if k not in old or old[k] != now[k]]
    changed = [k for k in changed if not k.startswith(continues)]
    if changed and (workdir / metrics_lib.NAME).exists():
      k = changed[0]
      raise UserError(
        f"{workdir} holds a run with config.{k} = {old.get(k)!r}, now {now[k]!r}: give the old "
        "value to continue that run, or another --workdir to begin a new one"
      )
  with metrics_lib.replacing(path) as temporary:
    temporary.write_text(config.to_json_best_effort(indent=2) + "\n", encoding="utf-8")


def stored(path: Path) -> dict[str, Any]:
  """Returns {"rollout.depth": 7, ...} of a config.json; raises UserError if it cannot be read."""
  try:
    return _flat(json.loads(path.read_text(encoding="utf-8")))
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}; each workdir of a run has that file") from error
  except ValueError as error:
    raise UserError(f"{path} is not JSON: move it away or give another --workdir") from error


def flat(config: ml_collections.FrozenConfigDict) -> dict[str, Any]:
  """Returns {"rollout.depth": 7, ...}, values as JSON has them."""
  return _flat(json.loads(config.to_json_best_effort()))


def summarise(
  workdir: Path, summary: dict[str, Any], config: ml_collections.FrozenConfigDict
) -> dict:
  """Writes summary.json with the config and the commit, in the first process; returns it."""
  summary = summary | {"config": json.loads(config.to_json_best_effort()), "commit": commit()}
  if not hosts.first():
    return summary
  with metrics_lib.replacing(workdir / "summary.json") as temporary:
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
  return summary


def commit() -> str:
  """Returns the commit of the source tree, "-dirty" where it has changes, "unknown" without git."""
  root = Path(__file__).parent
  command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match=")
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
  """Returns {"rollout.depth": 7, ...}."""
  out = {}
  for name, value in tree.items():
    out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return out
