"""Every wrong value is named with its key; every config of configs/ is right."""

import importlib.util
from pathlib import Path

import pytest

from treepo_jax import config as config_lib

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path: Path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_validates_and_says_how_to_run_it(path):
  module = load(path)
  c = module.get_config()
  if not c.model.path:  # the user's to give
    with pytest.raises(config_lib.UserError, match=r"--config\.model\.path=DIR"):
      config_lib.validate(c)
    c.model.path = config_lib.EMBEDDED_POLICY
  config_lib.validate(c)
  assert f"--config=configs/{path.name}" in str(module.__doc__)


def test_every_run_of_the_paper_validates():
  module = load(next(path for path in CONFIGS if path.stem == "math_qwen2p5_7b"))
  for variant, changes in module.VARIANTS.items():
    c = config_lib.validate(module.get_config(variant))
    assert c.rollout.depth * c.rollout.segment == 7168
    for key, value in changes.items():
      assert config_lib._value(c, key) == value
  with pytest.raises(ValueError, match="'tree' is none of the runs: treepo, more_init"):
    module.get_config("tree")


def test_a_misspelt_key_is_refused():
  c = config_lib.default()
  with pytest.raises(AttributeError, match="widht"):
    c.rollout.widht = 3


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("model.dtype", "float16", ("'float32'", "'bfloat16'")),
    ("model.remat", "all", ("'none'", "'dots'", "'layer'")),
    ("rollout.segment", 12, ("12", "rollout.page", "16")),
    ("rollout.rows", 255, ("255", "rollout.group")),
    ("rollout.width", 0, ("above 0",)),
    ("rollout.initial", 17, ("17", "rollout.width = 16")),
    ("rollout.initial_max", 1, ("rollout.initial = 16",)),
    ("rollout.initial", -1, ("at least 0",)),
    ("rollout.fallback", "ranom", ("'random'", "'none'")),
    ("rollout.fallback_from", "all", ("'answered'", "'strict'")),
    ("rollout.fallback_window", -1, ("at least 0",)),  # published: a crash at the first fallback
    ("rollout.allocation", "low", ("'even'", "'segment'")),
    ("rollout.allocation_low", 9.0, ("allocation_high", "'descending'")),
    ("rollout.branching_max", 1, ("rollout.branching = 2",)),
    ("rollout.step_tokens", 100, ("256",)),
    ("rollout.min_length", 81, ("80 tokens",)),
    ("rollout.min_width", 17, ("rollout.width = 16",)),
    ("rollout.prune", "loss", ("'log_prob'", "'reward'")),
    ("rollout.prune_keep", 0, ("above 0",)),
    ("rollout.top_p", 1.5, ("at most 1",)),
    ("rollout.stop_at", "end", ("'box'", "'eos'")),
    ("advantage.estimator", "ppo", ("'treepo'", "'grpo'")),
    ("learn.row_length", 100, ("144", "rollout.prompt_length")),
    ("eval.chunk", 0, ("above 0",)),
    ("eval.bootstrap", -1, ("at least 0",)),
    ("eval.samples", 1001, ("1001", "at most 1000")),
    ("eval.widths", (4, 2000), ("eval.widths", "2000", "at most 1000")),
    ("eval.widths", (4, 4), ("different whole numbers",)),
    ("eval.widths", (4, 0), ("above 0",)),
    ("eval.branchings", (2,), ("eval.widths",)),
    ("learn.minibatches", 99, ("rollout.prompts = 16",)),
    ("train.b1", 1.0, ("[0, 1)",)),
    ("train.learning_rate", -1.0, ("at least 0",)),
    ("data.levels", (0,), ("1 to 8",)),
    ("data.path", "x.jsonl", ("data.eval_path",)),
    ("data.leakage", "ignore", ("'report'", "'drop'", "'error'")),
    ("data.template", "qwen", ("'plain'", "'treepo'")),
    ("data.weights", (1.0, 0.0), ("above 0",)),
    ("eval.sampling", "beam", ("'sequential'", "'tree'")),
  ],
)
def test_a_wrong_value_is_named_with_its_key(key, value, words):
  c = config_lib.default()
  section, name = key.split(".")
  with c.unlocked():
    c[section][name] = value
  with pytest.raises(config_lib.UserError) as error:
    config_lib.validate(c)
  assert key in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_windows_are_of_random_cuts():
  c = config_lib.default()
  c.rollout.fallback_windows = 2
  config_lib.validate(c)
  c.rollout.fallback = "block"  # published: a crash when it falls back
  with pytest.raises(config_lib.UserError, match="fallback_windows = 2 needs.*'random'"):
    config_lib.validate(c)
