"""Which axis every weight is split over, in one table a family."""

import dataclasses
import types

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from treepo_jax.config import UserError
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer

QWEN2 = transformer.Architecture(
  family="qwen2",
  vocab_size=64,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=4,
  hidden=24,
  norm_eps=1e-6,
  rope_theta=1e4,
  rope_scaling=None,
  max_positions=64,
  tied=True,
  qkv_bias=True,
  output_bias=False,
  qk_norm=False,
)
ARCHS = {
  "qwen2": QWEN2,
  "qwen3": dataclasses.replace(
    QWEN2, family="qwen3", head_dim=8, qkv_bias=False, qk_norm=True, tied=False
  ),
  "llama": dataclasses.replace(QWEN2, family="llama", qkv_bias=False),
}

WHOLE = ()
BLOCKS = {
  "attention_norm.scale": WHOLE,
  "query.kernel": (None, "fsdp", "tensor"),
  "key.kernel": (None, "fsdp", "tensor"),
  "value.kernel": (None, "fsdp", "tensor"),
  "output.kernel": (None, "tensor", "fsdp"),
  "feed_norm.scale": WHOLE,
  "gate.kernel": (None, "fsdp", "tensor"),
  "up.kernel": (None, "fsdp", "tensor"),
  "down.kernel": (None, "tensor", "fsdp"),
}
REST = {"embed": ("tensor", "fsdp"), "norm.scale": WHOLE}
EXTRA = {
  "qwen2": {f"blocks.{name}.bias": WHOLE for name in ("query", "key", "value")},
  "qwen3": {
    "blocks.query_norm.scale": WHOLE,
    "blocks.key_norm.scale": WHOLE,
    "head.kernel": ("fsdp", "tensor"),
  },
  "llama": {},
}


def _mesh(*shape: int) -> jax.sharding.Mesh:
  return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _specs(tree, mesh) -> dict[str, PartitionSpec]:
  leaves = jax.tree_util.tree_leaves_with_path(mesh_lib.shardings(tree, mesh))
  return {jax.tree_util.keystr(k, simple=True, separator="."): x.spec for k, x in leaves}


def _config(**sizes: int):
  return types.SimpleNamespace(
    mesh=types.SimpleNamespace(**({"data": -1, "fsdp": 1, "tensor": 1} | sizes))
  )


@pytest.mark.parametrize("family", ARCHS)
def test_every_weight_of_a_family(family):
  _, params = transformer.abstract(ARCHS[family])
  golden = REST | {f"blocks.{key}": spec for key, spec in BLOCKS.items()} | EXTRA[family]
  expected = {key: PartitionSpec(*spec) for key, spec in golden.items()}
  assert _specs(params, _mesh(2, 2, 2)) == expected


def test_dimensions_that_do_not_divide_stay_whole():
  arch = dataclasses.replace(QWEN2, vocab_size=63, hidden=26)
  specs = _specs(transformer.abstract(arch)[1], _mesh(1, 2, 4))
  assert specs["embed"] == PartitionSpec(None, "fsdp")
  assert specs["blocks.gate.kernel"] == PartitionSpec(None, "fsdp", None)
  assert specs["blocks.down.kernel"] == PartitionSpec(None, None, "fsdp")
  assert specs["blocks.query.kernel"] == PartitionSpec(None, "fsdp", "tensor")


def test_the_optimizer_is_split_as_its_weights_are():
  mesh = _mesh(2, 2, 2)
  _, params = transformer.abstract(QWEN2)
  state = jax.eval_shape(optax.adamw(1e-3).init, params)
  moments = mesh_lib.shardings(state, mesh)[0]
  assert moments.mu == moments.nu == mesh_lib.shardings(params, mesh)
  assert moments.count.spec == PartitionSpec()


def test_shardings_hold_real_arrays():
  mesh = _mesh(2, 2, 2)
  graph, abstract = transformer.abstract(QWEN2)
  params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract)
  split = jax.device_put(params, mesh_lib.shardings(params, mesh))
  kernel = split["blocks"]["down"]["kernel"]
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 12, 8)}
  assert split["norm"]["scale"].sharding == mesh_lib.replicated(mesh)


def test_hidden_states_are_the_same_on_a_mesh():
  mesh = _mesh(2, 2, 2)
  graph, abstract = transformer.abstract(QWEN2)
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda x: (0.4 * random.normal(size=x.shape)).astype(x.dtype), abstract)
  tokens = random.integers(0, 64, (4, 6)).astype(np.int32)
  positions = np.broadcast_to(np.arange(6, dtype=np.int32), (4, 6))
  end = np.full((4, 6), 6, np.int32)
  hidden = jax.jit(lambda *args: transformer.hidden(graph, *args))
  whole = hidden(params, tokens, positions, end)
  rows = jax.sharding.NamedSharding(mesh, PartitionSpec(mesh_lib.BATCH_AXES))
  split = hidden(
    jax.device_put(params, mesh_lib.shardings(params, mesh)),
    *(jax.device_put(x, rows) for x in (tokens, positions, end)),
  )
  np.testing.assert_allclose(split, whole, atol=1e-5)


def test_create_fills_the_data_axis():
  mesh = mesh_lib.create(_config(fsdp=2, tensor=2))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert mesh_lib.shards(mesh) == 4
  assert mesh.axis_types == (AxisType.Auto,) * 3
  assert mesh_lib.shards(mesh_lib.create(_config())) == 8
  assert dict(mesh_lib.single().shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": 2, "fsdp": 2}, {"fsdp": 16}])
def test_create_names_sizes_that_are_not_the_devices(sizes):
  with pytest.raises(UserError, match="config.mesh: data .* but there are 8 devices"):
    mesh_lib.create(_config(**sizes))
