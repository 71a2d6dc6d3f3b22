"""Data flows one way: a file of the package imports only from files that stand above it here."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "treepo_jax"

# Folders in the order of the data, and within a folder its files in theirs.
ORDER = (
  "config",
  "struct",
  "model.mesh",
  "model.kernels.tpu",
  "model.kernels.packed",
  "model.kernels.shared",
  "model.attention",
  "model.transformer",
  "model.known",
  "model.hf_config",
  "model.shards",
  "model.weights",
  "model.hub",
  "tasks.arithmetic",
  "tasks.closed_form",
  "tasks.answers",
  "tasks.expression",
  "tasks.verify",
  "tasks.text",
  "tasks.readers",
  "tasks.sources",
  "tasks.mixing",
  "tasks.tfds_builder",
  "tasks.data",
  "tasks.worker",
  "tasks.pool",
  "tasks.rewards",
  "decoding.pages",
  "decoding.sampling",
  "decoding.stopping",
  "decoding.segment",
  "rollout.tree",
  "rollout.branching",
  "rollout.pruning",
  "rollout.fallback",
  "rollout.schedule",
  "rollout.growth",
  "rollout.sharing",
  "rollout.planning",
  "rollout.programs",
  "rollout.grow",
  "learn.estimators",
  "learn.advantages",
  "learn.credit",
  "learn.packing",
  "learn.losses",
  "learn.optimizer",
  "learn.lora",
  "learn.update",
  "run.scores",
  "run.metrics",
  "run.plots",
  "run.layout",
  "run.view",
  "run.checkpoint",
  "run.grade",
  "run.hosts",
  "run.preemption",
  "run.setup",
  "run.summary",
  "run.collect",
  "run.records",
  "run.results",
  "run.evaluate",
  "run.train",
  "run.topology",
  "run.hlo",
  "run.cost",
  "run.plan",
  "main",
)

# What a folder or file knows nothing of, although it stands above.
APART = {
  "tasks": ("model",),  # text only
  "decoding": ("tasks",),  # rows and tokens, not text
  "learn.estimators": ("model",),
  "learn.advantages": ("model",),  # only learn.update sees both a model and a loss
  "learn.credit": ("model",),
  "learn.packing": ("model",),
  "learn.losses": ("model",),
  "learn.optimizer": ("model",),
  "learn.lora": ("model",),
}

# Heavy or foreign, for tests and peers' comparisons alone.
NEVER = ("torch", "tensorflow")


def _modules() -> dict[str, Path]:
  """Returns the files of the package by their dotted names below it."""
  names = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    names[".".join(parts)] = path
  return names


def _imports(name: str, source: str, modules: set[str]) -> set[str]:
  """Returns what `source` imports: modules of the package below its name, others in full.

  Imports inside functions count. `from treepo_jax.model import mesh` is model.mesh; a name that is
  not a module, as in `from treepo_jax.config import UserError`, is the module it comes from.
  """
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name}, line {node.lineno}: write the import from treepo_jax"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        found.add(full if full.removeprefix("treepo_jax.") in modules else str(node.module))
  return {found_name.removeprefix("treepo_jax.") for found_name in found}


MODULES = _modules()
PLACED = [name for name in MODULES if not name.endswith("__init__")]


def test_every_file_has_its_place():
  unplaced = sorted(set(PLACED) - set(ORDER))
  assert not unplaced, f"new files {unplaced}: place each in ORDER, below all that it imports"
  gone = sorted(set(ORDER) - set(PLACED))
  assert not gone, f"ORDER names {gone}, which do not exist: take them out"


@pytest.mark.parametrize("name", PLACED)
def test_imports_only_from_above(name):
  imported = _imports(name, MODULES[name].read_text(encoding="utf-8"), set(MODULES))
  place = {module: i for i, module in enumerate(ORDER)}
  assert name in place, f"{name} is a new file: place it in ORDER, below all that it imports"
  ours = imported & set(MODULES)
  below = sorted(module for module in ours & set(place) if place[module] >= place[name])
  assert not below, f"{name} imports {below}, which stand below it in ORDER"
  apart = APART.get(name, ()) + APART.get(name.split(".")[0], ())
  wrong = sorted(module for module in ours if module.split(".")[0] in apart)
  assert not wrong, f"{name} imports {wrong}: it knows nothing of {apart}"
  never = sorted(module for module in imported if module.split(".")[0] in NEVER)
  assert not never, f"{name} imports {never}: the package runs without them"


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(PLACED)))
def test_packages_are_empty(name):
  tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
  assert all(isinstance(node, ast.Expr | ast.Assign) for node in tree.body), (
    f"{name} has code: it would run before, and so stand above, every module beside it"
  )


def test_the_reader_sees_every_kind_of_import():
  source = """
import jax.numpy as jnp
import treepo_jax.model.mesh
from treepo_jax.config import UserError
from treepo_jax.rollout import tree, branching
def late():
  from treepo_jax.learn.update import step
"""
  seen = _imports(
    "x", source, {"config", "model.mesh", "rollout.tree", "rollout.branching", "learn.update"}
  )
  assert seen == {
    "jax.numpy",
    "model.mesh",
    "config",
    "rollout.tree",
    "rollout.branching",
    "learn.update",
  }
