"""The run as a user has it: a process that is started, killed, started again, read from disk."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from treepo_jax.run import metrics as metrics_lib

ROOT = Path(__file__).parents[2]
STEPS = 5
SMALL = (
  f"--config.train.steps={STEPS}",
  "--config.train.checkpoint_every=2",
  "--config.train.trees_every=100",
  "--config.rollout.prompts=3",
  "--config.rollout.width=6",
  "--config.rollout.initial=3",
  "--config.rollout.branching=1",
  "--config.rollout.depth=8",
  "--config.rollout.rows=32",
  "--config.eval.prompts=8",
  "--config.eval.every=2",
)


def command(workdir: Path, *more: str, config: str = "tiny") -> list[str]:
  base = [sys.executable, "-m", "treepo_jax.main", f"--config=configs/{config}.py"]
  return [*base, f"--workdir={workdir}", *SMALL, *more]


def environment(devices: int = 1) -> dict[str, str]:
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    # What one run compiles the next ones find.
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "treepo_jax_test_programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


def run(workdir: Path, *more: str, config: str = "tiny", devices: int = 1, status: int = 0) -> str:
  done = subprocess.run(
    command(workdir, *more, config=config),
    cwd=ROOT,
    env=environment(devices),
    capture_output=True,
    text=True,
  )
  assert done.returncode == status, done.stdout + done.stderr
  return done.stdout + done.stderr


def figures(workdir: Path) -> list[dict]:
  """Returns the metrics of a run, without what a clock decides."""
  found = metrics_lib.read(workdir / "metrics.jsonl")
  return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in found]


def trees(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("run") / "whole"
  run(workdir)
  return workdir


@pytest.mark.slow
def test_writes_what_the_contract_names(finished):
  summary = json.loads((finished / "summary.json").read_text())
  assert {
    "accuracy_before", "accuracy_after", "steps", "seconds", "tokens_decoded", "tokens_path",
    "decode_saving", "token_saving", "config", "commit",
  } <= summary.keys()  # fmt: skip
  assert summary["config"] == json.loads((finished / "config.json").read_text())
  for name in ("plots/learning.png", "plots/saving.png", "trees/step_0.html", "trees/step_4.jsonl"):
    assert (finished / name).stat().st_size > 1000, name
  steps = [m for m in metrics_lib.read(finished / "metrics.jsonl") if "loss/policy" in m]
  assert [m["step"] for m in steps] == list(range(STEPS))
  for m in steps:
    assert sum(v for k, v in m.items() if k.startswith("stop/")) == pytest.approx(1)
    assert m["rollout/decode_saving"] == pytest.approx(
      1 - m["rollout/tokens_decoded"] / m["rollout/tokens_path"]
    )
    assert m["rollout/trajectories"] == 18
    assert m["rollout/pages_held"] == 0
    assert m["loss/logprob_gap"] <= 1e-4
    assert m["rollout/kv_bytes_read_per_token"] <= m["rollout/kv_bytes_flat_per_token"]
  decoded = sum(m["rollout/tokens_decoded"] for m in steps)
  assert summary["tokens_decoded"] == decoded


@pytest.mark.slow
def test_every_path_of_the_written_trees_has_the_log_probs_of_transformers(finished, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from treepo_jax import config

  text = run(tmp_path / "unused", "--mode=export", "--output=x", status=2)
  assert "no checkpoint" in text
  run(finished, "--mode=export", f"--output={tmp_path / 'weights'}")
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
  base = transformers.AutoModelForCausalLM.from_pretrained(config.EMBEDDED_POLICY)
  assert not torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)

  paths, regrown, merged = 0, 0, 0
  for tree in trees(finished / "trees" / "step_0.jsonl"):  # grown before any update
    nodes = tree["nodes"]
    regrown += len(tree["fallback_of"])
    merged += len(tree["leaves"]) - len(set(tree["leaves"]))
    assert {n["row"] for n in nodes if n["stop"]} == set(tree["leaves"])
    assert len(tree["leaves"]) == 6  # a leaf stands as often as its answer was drawn
    assert [n["row"] for n in nodes] == [*range(len(nodes))]
    for leaf in tree["leaves"]:
      path, row = [], leaf
      while row > 0:
        path.insert(0, nodes[row])
        row = nodes[row]["parent"]
      tokens = tree["prompt_tokens"] + [t for n in path for t in n["tokens"]]
      stored = [x for n in path for x in n["log_probs"]]
      with torch.no_grad():
        logits = base(torch.tensor([tokens])).logits[0].log_softmax(-1)
      first = len(tree["prompt_tokens"])
      again = [float(logits[i - 1, tokens[i]]) for i in range(first, len(tokens))]
      np.testing.assert_allclose(stored, again, atol=1e-3)
      paths += 1
  assert paths == 18 and regrown > 0 and merged > 0


@pytest.mark.slow
def test_killed_and_started_again_the_run_is_the_same(finished, tmp_path):
  workdir = tmp_path / "killed"
  process = subprocess.Popen(
    command(workdir), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
  )
  metrics = workdir / "metrics.jsonl"
  while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
    assert process.poll() is None, "ended before it could be killed"
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  with metrics.open("a") as file:
    file.write('{"step": 99, "rew')  # what a kill in the middle of a line leaves
  assert "continues at step" in run(workdir)
  assert figures(workdir) == figures(finished)
  for name in ("step_0.jsonl", "step_4.jsonl"):
    assert trees(workdir / "trees" / name) == trees(finished / "trees" / name)


@pytest.mark.slow
def test_a_stop_signal_saves_and_the_same_command_continues(finished, tmp_path):
  workdir = tmp_path / "stopped"
  process = subprocess.Popen(
    command(workdir), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
  )
  metrics = workdir / "metrics.jsonl"
  while not (metrics.exists() and metrics.read_text()):
    assert process.poll() is None, "ended before it could be stopped"
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate()
  assert process.returncode == 128 + signal.SIGTERM
  done = len(figures(workdir))
  assert 1 <= done < STEPS  # the rollout in hand was given up
  assert f"{done} steps are saved in {workdir / 'checkpoints'}; the same command continues" in said
  assert f"continues at step {done}" in run(workdir)
  assert figures(workdir) == figures(finished)


@pytest.mark.slow
def test_a_stop_signal_before_the_first_step_is_done_leaves_nothing(finished, tmp_path):
  process = subprocess.Popen(
    command(tmp_path, "--config.eval.prompts=512"),
    cwd=ROOT,
    env=environment() | {"PYTHONUNBUFFERED": "1"},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout and "compiling the first step" in process.stdout.readline()
  process.send_signal(signal.SIGTERM)  # while it compiles or evaluates
  said, _ = process.communicate()
  assert process.returncode == 128 + signal.SIGTERM
  assert "no step was finished" in said
  assert not figures(tmp_path) and not list((tmp_path / "checkpoints").iterdir())


# What rows are filled with, and so what is decoded twice, depends on how prompts lie on devices.
COST = {f"rollout/{x}" for x in ("row_steps", "row_occupancy", "tokens_decoded", "decode_saving")}
COST |= {"rollout/kv_bytes_read_per_token", "rollout/kv_bytes_flat_per_token"}


@pytest.mark.slow
def test_eight_devices_give_the_run_of_one(finished, tmp_path):
  workdir = tmp_path / "eight"
  more = ("--config.learn.micro_rows=8", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
  run(workdir, *more, devices=8)
  one, eight = figures(finished), figures(workdir)
  for a, b in zip(one, eight, strict=True):
    assert a.keys() == b.keys()
    for key in a.keys() - COST:
      assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key
  first = [trees(w / "trees" / "step_0.jsonl") for w in (finished, workdir)]
  for a, b in zip(*first, strict=True):
    assert [n["tokens"] for n in a["nodes"]] == [n["tokens"] for n in b["nodes"]]
    assert [n["parent"] for n in a["nodes"]] == [n["parent"] for n in b["nodes"]]


@pytest.mark.slow
def test_adapters_a_reference_and_greedy_baselines_survive_a_restart(tmp_path):
  """Two steps at once and in two goes: the state with all its options is saved and continued."""
  options = (
    "--config.advantage.estimator=remax",
    "--config.lora.rank=2",
    "--config.learn.kl=k1",
    "--config.learn.kl_in=reward",
    "--config.learn.kl_weight=0.1",
    "--config.learn.kl_target=0.01",
    "--config.learn.reference=average",
    "--config.learn.correction=token",
    "--config.train.final_rate=1.0",
    "--config.train.checkpoint_every=1",
    "--config.eval.every=0",
  )
  whole, twice = tmp_path / "whole", tmp_path / "twice"
  run(whole, *options, "--config.train.steps=2")
  run(twice, *options, "--config.train.steps=1")
  run(twice, *options, "--config.train.steps=2")
  one, two = figures(whole), figures(twice)
  assert [m for m in two if m["step"] == 1][-1] == [m for m in one if m["step"] == 1][-1]
  second = next(m for m in one if m["step"] == 1)
  assert second["update/kl_weight"] != pytest.approx(0.1)  # steered
  assert second["loss/kl_reference"] != 0 and second["loss/correction"] > 0
  run(whole, *options, "--config.train.steps=2", "--mode=export", f"--output={tmp_path / 'out'}")
  base = load_file(ROOT / "treepo_jax" / "embedded" / "model.safetensors")
  trained = load_file(tmp_path / "out" / "model.safetensors")
  moved = {name for name, value in trained.items() if not np.array_equal(value, base[name])}
  assert moved and all("proj" in name for name in moved)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(finished, tmp_path):
  workdir = tmp_path / "damaged"
  subprocess.run(["cp", "-r", finished, workdir], check=True)
  newest = workdir / "checkpoints" / str(STEPS)
  for file in newest.rglob("*"):
    if file.is_file() and file.stat().st_size > 1000:
      file.write_bytes(b"damaged")
  before = (workdir / "metrics.jsonl").read_bytes()
  said = run(workdir, status=2)
  assert str(newest) in said and "remove that folder" in said
  assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_another_config_is_refused(finished):
  before = figures(finished)
  run(finished)
  assert figures(finished) == before
  said = run(finished, "--config.train.learning_rate=0.5", status=2)
  assert "train.learning_rate" in said and "--workdir" in said


@pytest.mark.slow
def test_rollout_and_evaluate_write_their_files(tmp_path):
  run(tmp_path / "rollout", "--mode=rollout")
  assert len(trees(tmp_path / "rollout" / "trees" / "step_0.jsonl")) == 3
  run(tmp_path / "evaluate", "--mode=evaluate", "--config.eval.samples=4")
  summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
  assert summary["pass@4"] >= summary["pass@1"] == pytest.approx(summary["accuracy"])
  answers = trees(tmp_path / "evaluate" / "answers.jsonl")
  assert len(answers) == 8 and all(len(a["answers"]) == 4 for a in answers)


@pytest.mark.slow
def test_a_run_is_evaluated_at_any_checkpoint_by_trees_and_one_by_one(finished, tmp_path):
  """As drawn while training: the accuracy of the final weights is the last of the run."""
  curve = ("--config.eval.widths=(1,4)", "--config.eval.branchings=(2,)")
  newest = (f"--config.eval.checkpoint={finished}", "--mode=evaluate", *curve)
  run(tmp_path / "newest", *newest)
  summary = json.loads((tmp_path / "newest" / "summary.json").read_text())
  trained = json.loads((finished / "summary.json").read_text())
  assert summary["accuracy"] == pytest.approx(trained["accuracy_after"])
  assert summary["weights"].endswith(f"checkpoints/{STEPS}")
  alone, four, tree = summary["curve"]
  assert (alone["width"], four["width"], tree["width"]) == (1, 4, 4) and tree["branching"] == 2
  assert alone["tokens_decoded"] <= tree["tokens_decoded"] <= tree["tokens_path"]
  assert alone["accuracy"] == summary["accuracy"] and 0 < tree["maj@4"] <= tree["pass@4"]

  answers = tmp_path / "newest" / "answers.jsonl"
  whole = answers.read_bytes()
  answers.write_bytes(whole[: len(whole) // 2])  # as after a kill
  assert "1 of 3 parts" in run(tmp_path / "newest", *newest)
  again = json.loads((tmp_path / "newest" / "summary.json").read_text())
  clock = lambda found: {k: v for k, v in found.items() if k not in ("seconds", "curve", "sets")}
  assert answers.read_bytes() == whole and clock(again) == clock(summary)

  named = f"--config.eval.checkpoint={finished}/checkpoints"
  said = run(tmp_path / "newest", f"{named}/2", "--mode=evaluate", *curve, status=2)
  assert "eval.checkpoint" in said
  assert "holds 4, 5" in run(tmp_path / "none", f"{named}/99", "--mode=evaluate", status=2)
  said = run(tmp_path / "lora", *newest, "--config.lora.rank=2", status=2)
  assert "lora.rank = 0, now 2" in said
  assert "another --workdir" in run(finished, *newest, status=2)


@pytest.mark.slow
def test_the_sequential_baseline_shares_nothing(tmp_path):
  run(tmp_path, "--config.rollout.initial=0", config="sequential")
  for m in figures(tmp_path):
    if "rollout/decode_saving" in m:
      assert m["rollout/decode_saving"] == 0 and m["rollout/fallbacks"] == 0
