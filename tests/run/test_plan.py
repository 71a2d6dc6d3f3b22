"""--mode=plan against what is known by hand, compiled by libtpu for chips that are not here."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from treepo_jax import config as config_lib
from treepo_jax import main
from treepo_jax.learn import packing, update
from treepo_jax.model import hf_config, transformer
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.run import hlo, plan, topology

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def described(monkeypatch):
  """Lets libtpu describe TPUs where there is none."""
  pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'treepo_jax[tpu]'")
  for name, value in main.NO_TPU.items():
    monkeypatch.setenv(name, value)


def settings(**keys) -> Any:
  c: Any = config_lib.default()
  c.rollout.update({"prompts": 4, "width": 4, "depth": 2, "rows": 32, "prompt_length": 32})
  c.learn.row_length, c.learn.micro_rows = 64, 4
  c.update_from_flattened_dict(keys)
  return config_lib.validate(c)


@pytest.mark.parametrize(
  "name, chips, hosts, local",
  [("v5e:1x1", 1, 1, 1), ("v5e:2x2", 4, 1, 4), ("v6e:4x4", 16, 4, 4), ("v5p:2x2x4", 16, 4, 4)],
)
def test_a_topology_has_its_chips_and_hosts(name, chips, hosts, local):
  found = topology.describe(name)
  assert (len(found.devices), found.hosts, len(found.local)) == (chips, hosts, local)
  assert found.chip is topology.CHIPS[name[:3]]


@pytest.mark.parametrize("name", ["v4:2x2", "v5e", "v5e:2x2x2", "v5p:4x4", "v6e:axb", "v5e:3x5"])
def test_a_topology_that_cannot_be_is_named(name):
  with pytest.raises(config_lib.UserError, match=f"--topology={name}"):
    topology.describe(name)


@pytest.mark.slow
def test_a_plan_says_what_lies_where(tmp_path, capsys):
  config = settings(**{"mesh.fsdp": 2, "mesh.tensor": 2, "plan.price": 1.2, "learn.kl": "k3"})
  found = plan.run(config, "v5e:2x2", tmp_path)
  assert json.loads((tmp_path / "plan.json").read_text()) == found
  assert found["chips"] == 4 and found["fits"] and found["hbm_bytes"] == 16 << 30
  steps = {step["name"]: step for step in found["steps"]}
  assert list(steps) == ["transfer", "start", "prefill", "expand", "decode", "score", "update"]
  for step in steps.values():
    assert step["fits"] and step["peak_bytes"] + step["margin_bytes"] == 16 << 30

  params = transformer.abstract(hf_config.read(config.model.path))[1]
  sizes = [
    (x.size, mesh_lib.spec(path, x.shape, plan_mesh(2, 2)))
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  ]
  parts = lambda spec: 2 ** sum(axis is not None for axis in spec)
  split = sum(4 * size / parts(spec) for size, spec in sizes)
  # Arrays are padded to tiles of 8 x 128, and halves of the embedding have a width of 64.
  assert split <= steps["transfer"]["argument_bytes"] <= 2 * split
  # The weights, Adam's two averages and the reference, and the batch.
  assert 4 * split <= steps["update"]["argument_bytes"] <= 6 * split
  assert steps["transfer"]["collective_bytes"] > 0  # what fsdp had split comes together
  assert steps["decode"]["flops"] > 0 and steps["update"]["flops"] > steps["decode"]["flops"]
  assert found["cost_per_1000_trajectories"] == pytest.approx(
    found["step_seconds"] * 4 / 3600 * 1.2 / 16 * 1000
  )
  assert "fits" in capsys.readouterr().out


def plan_mesh(fsdp: int, tensor: int) -> Mesh:
  return mesh_lib.create(settings(**{"mesh.fsdp": fsdp, "mesh.tensor": tensor}), jax.devices()[:4])


@pytest.mark.slow
def test_the_update_gathers_one_layer_at_a_time():
  """No device gathers more than its tensor part of one layer, of the head or of the embedding."""
  width, hidden, vocabulary = 256, 768, 1024
  arch = transformer.Architecture(
    family="qwen2",
    vocab_size=vocabulary,
    width=width,
    layers=5,
    heads=4,
    kv_heads=2,
    head_dim=64,
    hidden=hidden,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=1024,
    tied=False,
    qkv_bias=True,
    output_bias=False,
    qk_norm=False,
  )
  c = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "learn.row_length": 512}
  config = settings(**c, **{"model.dtype": "bfloat16", "model.remat": "layer"})
  mesh = mesh_lib.create(config, topology.describe("v5e:2x4").devices)
  graph, params = transformer.abstract(arch, jnp.bfloat16)
  state = update.abstract(params, config, mesh)
  batch = update.abstract_batch(packing.abstract(8, config), config, mesh)
  program = update.program(state, graph=graph, config=config, mesh=mesh)
  text = program.lower(state, batch).compile().as_text()
  gathered = [x for x in hlo.instructions(text) if x.operation == "all-gather"]
  size = {x.shape: int(np.prod(x.shape)) for x in gathered}
  layer, ends = width * hidden // 2, width * vocabulary // 2  # split over tensor
  assert layer in size.values(), "no layer's weights come together: fsdp does nothing"
  assert max(size.values()) <= max(layer, ends, 512 * width)  # the last: a row's activations
  assert not [x for x in hlo.instructions(text) if x.operation in hlo.HOST]


def test_what_does_not_fit_is_a_finding_with_a_key_to_change():
  chips = topology.describe("v5e:1x1")
  mesh = Mesh(np.asarray(chips.devices).reshape(1, 1, 1), mesh_lib.AXES)
  whole = NamedSharding(mesh, PartitionSpec())
  large = jax.ShapeDtypeStruct((60_000, 60_000), jnp.float32, sharding=whole)  # 14.4 GB
  program = plan.Program("update", jax.jit(lambda x: x @ x), (large,), 1, 0.0, 1.0)
  row = plan.compiled(program, chips)
  assert not row["fits"] and row["argument_bytes"] == 4 * 60_000**2
  shown = {"topology": "v5e:1x1", "chips": 1, "chip": "v5e", "hosts": 1, "hbm_bytes": 16 << 30}
  shown |= {"fits": False, "steps": [row], "largest": {}, "step_seconds": None}
  text = plan._report(shown | {"cost_per_1000_trajectories": None}, settings())
  assert "does not fit: set model.remat" in text


def test_memory_that_others_hold_counts():
  chips = topology.describe("v5e:1x1")
  mesh = Mesh(np.asarray(chips.devices).reshape(1, 1, 1), mesh_lib.AXES)
  whole = NamedSharding(mesh, PartitionSpec())
  small = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=whole)
  row = lambda held: plan.compiled(
    plan.Program("expand", jax.jit(lambda x: x + 1), (small,), 1, held, 1.0), chips
  )
  assert row(0.0)["fits"] and not row(float(16 << 30))["fits"]


def test_a_tensor_group_stays_on_a_host(tmp_path):
  config = settings(**{"mesh.fsdp": 2, "mesh.tensor": 8, "learn.micro_rows": 2})
  with pytest.raises(
    config_lib.UserError, match="config.mesh.tensor = 8 must divide the 4 devices"
  ):
    plan.run(config, "v6e:4x4", tmp_path)
