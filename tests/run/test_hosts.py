"""Several processes on this machine: two of four devices do what one of eight does."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from tests.run.test_train import ROOT, environment, figures, run, trees
from treepo_jax import config as config_lib
from treepo_jax.learn import update
from treepo_jax.run import checkpoint, hosts, setup

STEPS = 3
OPTIONS = {
  "train.steps": STEPS,
  "train.checkpoint_every": 100,
  "train.trees_every": 1,
  "rollout.prompts": 8,
  "rollout.width": 4,
  "rollout.initial": 3,
  "rollout.branching": 1,
  "rollout.depth": 3,
  "rollout.rows": 8,
  "model.unroll": False,  # this and the next compile faster
  "rollout.merge": False,
  "eval.prompts": 8,
  "eval.samples": 4,
  "eval.sampling": "tree",  # the programs of training
  "eval.every": 0,
  "learn.micro_rows": 8,
  "learn.minibatches": 2,
}
FLAGS = [f"--config.{key}={value}" for key, value in OPTIONS.items()]


def start(*commands: list[str], devices: int) -> list[subprocess.Popen]:
  """Starts processes of one run, each with its own flags and with those of a coordinator."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    subprocess.Popen(
      [sys.executable, *command],
      cwd=ROOT,
      env=environment(devices) | {"PORT": str(port), "PROCESS": str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i, command in enumerate(commands)
  ]


def train(workdir: Path) -> list[subprocess.Popen]:
  module = "import os, sys, treepo_jax.main as m\n"
  module += "sys.argv += ['--coordinator=127.0.0.1:' + os.environ['PORT'], '--processes=2', "
  module += "'--process=' + os.environ['PROCESS']]\nm.cli()"
  command = ["-c", module, "--config=configs/tiny.py", f"--workdir={workdir}", *FLAGS]
  return start(command, command, devices=4)


def end(processes: list[subprocess.Popen], status: int = 0) -> list[str]:
  said = [process.communicate()[0] for process in processes]
  assert [process.returncode for process in processes] == [status] * len(said), "\n\n".join(said)
  return said


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("hosts") / "two"
  said = end(train(workdir))
  assert "accuracy on 8 held-out prompts" in said[0]
  assert "accuracy" not in said[1]
  return workdir


def weights(workdir: Path):
  c = tiny.get_config()
  c.update_from_flattened_dict(OPTIONS)
  config = config_lib.validate(c)
  policy = setup.load(config)
  like = update.create(policy.params, config, policy.mesh)
  state, position = checkpoint.Checkpoints(workdir, 2).restore(like)
  return policy.params, state, position


# Decoders are as large as the fullest device of a host needs, not of the run.
SIZES = {"rollout/row_steps", "rollout/row_occupancy"}


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(together, tmp_path):
  run(tmp_path, *FLAGS, devices=8)
  one, two = figures(tmp_path), figures(together)
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for key in a.keys() - SIZES:
      assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
  for step in range(STEPS):
    name = f"trees/step_{step}.jsonl"
    for a, b in zip(trees(tmp_path / name), trees(together / name), strict=True):
      assert (a["prompt_id"], a["leaves"], a["fallback_of"]) == (
        b["prompt_id"], b["leaves"], b["fallback_of"],
      )  # fmt: skip
      for n, m in zip(a["nodes"], b["nodes"], strict=True):
        for key in ("parent", "tokens", "stop", "reward"):
          assert n[key] == m[key], key
        np.testing.assert_allclose(n["log_probs"], m["log_probs"], atol=1e-4)

  before, expected, position = weights(tmp_path)  # what two processes saved, one restores
  _, got, its_position = weights(together)
  assert position == its_position
  difference = jax.tree.map(lambda a, b: float(abs(a - b).max()), got.params, expected.params)
  moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), expected.params, before)
  assert max(jax.tree.leaves(difference)) <= 1e-5 < 1e-4 < max(jax.tree.leaves(moved))


@pytest.mark.slow
def test_all_stop_where_one_is_told_to_and_continue(together, tmp_path):
  processes = train(tmp_path)
  metrics = tmp_path / "metrics.jsonl"
  while not (metrics.exists() and metrics.read_text()):
    assert processes[0].poll() is None, "ended before it could be stopped"
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGTERM)
  said = end(processes, 128 + signal.SIGTERM)
  assert "the same command continues" in said[0]
  done = len(figures(tmp_path))
  assert 1 <= done < STEPS + 1
  assert f"{done} steps are saved" in said[0]
  assert f"continues at step {done}" in end(train(tmp_path))[0]
  assert figures(tmp_path) == figures(together)
  for step in range(STEPS):
    name = f"trees/step_{step}.jsonl"
    assert trees(tmp_path / name) == trees(together / name)


WORKER = """
import os, dataclasses, jax, jax.numpy as jnp, numpy as np
from treepo_jax import config
from treepo_jax.learn import packing, update
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.run import hosts
hosts.join("127.0.0.1:" + os.environ["PORT"], 2, int(os.environ["PROCESS"]))
me = jax.process_index()
hosts.CHUNK = 1000
own = {"x": np.random.default_rng(me).normal(size=700 * (me + 1)), "who": me}
got = hosts.gather(own)
assert [g["who"] for g in got] == [0, 1]
for i, g in enumerate(got):
  np.testing.assert_array_equal(g["x"], np.random.default_rng(i).normal(size=700 * (i + 1)))
assert [hosts.gather(None), hosts.first()] == [[None, None], me == 0]
assert list(range(5))[hosts.part(5)] == [[0, 1, 2], [3, 4]][me]
assert list(range(1))[hosts.part(1)] == [[0], []][me]

c = config.default()
c.mesh.fsdp, c.mesh.tensor = 2, 2
mesh = mesh_lib.create(c)
local = mesh_lib.local(mesh)
assert dict(local.shape) == {"data": 1, "fsdp": 1, "tensor": 2}
assert {d.process_index for d in local.devices.flat} == {me}
x = np.arange(32.0).reshape(4, 8)
sharding = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
split = jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
copy = hosts.local_copy({"query": {"kernel": split}}, mesh)["query"]["kernel"]
assert copy.sharding == jax.NamedSharding(local, jax.P(None, "tensor"))
np.testing.assert_array_equal(np.asarray(copy), x)

batch = {f.name: np.ones((4, 3), int) for f in dataclasses.fields(packing.Batch)}
batch |= {"node": np.arange(12).reshape(4, 3), "reference_log_probs": np.zeros((4, 3))}
split = jax.NamedSharding(mesh, jax.P(mesh_lib.BATCH_AXES))
batch = {k: jax.make_array_from_callback((4, 3), split, lambda i: x[i]) for k, x in batch.items()}
total = update._add_divergence(jnp.zeros(12), packing.Batch(**batch), mesh)
np.testing.assert_array_equal(jax.device_get(total), np.ones(12))

c.mesh.fsdp = 1
make, crossed = jax.make_mesh, np.array(jax.devices())[[0, 2, 1, 3]].reshape(2, 1, 2)
jax.make_mesh = lambda *_, axis_types: jax.sharding.Mesh(crossed, mesh_lib.AXES, axis_types)
assert [d.process_index for d in mesh_lib.create(c).devices.flat] == [0, 0, 1, 1]
jax.make_mesh = make

c.mesh.tensor = 4
try:
  mesh_lib.create(c)
except config.UserError as error:
  assert "config.mesh.tensor = 4" in str(error)
else:
  raise AssertionError("a tensor group over two hosts")

def mistake():
  raise config.UserError("file 7 is missing")
try:
  hosts.on_first(mistake)
except config.UserError as error:
  assert "file 7" in str(error)
else:
  raise AssertionError("only one process knows")
"""


def test_what_processes_give_each_other():
  end(start(["-c", WORKER], ["-c", WORKER], devices=2))


def test_one_process_gives_itself():
  own = {"x": np.ones(3)}
  assert hosts.gather(own) == [own] and hosts.first()
  assert list(range(5))[hosts.part(5)] == [0, 1, 2, 3, 4]
  hosts.join(None, None, None)
  assert jax.process_count() == 1


@pytest.mark.parametrize(
  ("coordinator", "processes", "process", "words"),
  [
    (None, 2, 0, "--coordinator=HOST:PORT"),
    ("auto", 2, None, "finds all three"),
    ("a:1", None, 0, "--processes=N"),
    ("a:1", 2, None, "--process=0"),
    ("a:1", 2, 2, "--process=2"),
  ],
)
def test_flags_that_do_not_go_together_are_named(coordinator, processes, process, words):
  with pytest.raises(config_lib.UserError, match=words):
    hosts.join(coordinator, processes, process)
