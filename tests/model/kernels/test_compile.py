"""Kernels compile for TPUs by Mosaic, ahead of time and without one, alone and where they are used.

What is asserted of memory and collectives is read in the compiled program.
"""

import dataclasses
import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.model import attention, transformer
from treepo_jax.model.kernels import packed, shared

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)

CHIPS = ("v5e", "v5p", "v6e")
# Read when libtpu loads: several processes may, no cloud machine is asked for, nothing is logged.
ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_LOG_DIR": "disabled",
}


@functools.cache
def mesh(chip: str, *sizes: int) -> Mesh:
  """Returns a mesh (data, fsdp, tensor) of a topology's chips; one chip without sizes."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  get = functools.partial(topologies.get_topology_desc, platform="tpu")
  depth = "x1" if chip == "v5p" else ""
  if sizes:
    topology = get(topology_name=f"{chip}:2x{np.prod(sizes) // 2}{depth}")
  else:
    topology = get(topology_name=f"{chip}:1x1{depth}", chips_per_host_bounds=[1, 1, 1])
  devices = np.array(topology.devices).reshape(sizes or (1, 1, 1))
  return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def abstract(over: Mesh, shape, dtype=jnp.int32, spec=()):
  """Returns an array's shape, laid out over the mesh."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(over, PartitionSpec(*spec)))


def kernels(text: str) -> int:
  return text.count('custom_call_target="tpu_custom_call"')


def collectives(text: str) -> list[str]:
  return re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)


def made(text: str, shape: tuple[int, ...]) -> list[str]:
  """Returns the operations that make an array of this shape; views of one are not counted."""
  size = ",".join(map(str, shape))
  made = re.findall(rf"= \(?\w+\[(?:1,)?{size}\][^=]*? ([\w-]+)\(", text)
  return [name for name in made if name not in ("parameter", "bitcast", "get-tuple-element")]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_compiles(chip, dtype, head_dim):
  over = mesh(chip)
  length, sizes = 1024, [(2, 1024, n, head_dim) for n in (4, 2, 2, 4)]
  assert packed.block_of(length) == 512

  def both(query, key, value, gradient, end):
    out, sums = packed.forward(query, key, value, end)
    return packed.backward(query, key, value, end, out, sums, gradient)

  given = [abstract(over, size, dtype) for size in sizes] + [abstract(over, (2, length))]
  compiled = jax.jit(both).lower(*given).compile()
  assert kernels(str(compiled.as_text())) == 3


def looped(pool, pages, visible, query):
  """Attends in each of the layers, 8 times over, as the segment decoder does."""
  rows = visible.shape[1]
  table = shared.table(pages, visible)

  def layer(x, n):
    out, sums = shared.attend(x, pool[0], pool[1], n, table, rows=rows, scale=0.1)
    return (out + sums[..., None]).astype(x.dtype), None

  def body(carry):
    step, x = carry
    return step + 1, jax.lax.scan(layer, x, jnp.arange(pool[0].shape[0]))[0]

  return jax.lax.while_loop(lambda carry: carry[0] < 8, body, (jnp.asarray(0), query))[1]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("head_dim", "page"), [(64, 128), (128, 16), (128, 128)])
def test_shared_compiles_and_copies_no_pool(chip, dtype, head_dim, page):
  over = mesh(chip, 2, 1, 2)
  split, heads = ("data",), ("data", "tensor")
  groups, rows, share, shape = 4, 5, 3, (2, 3 * 2**17 // page, 4, page, head_dim)
  specs = PartitionSpec(None, *heads), PartitionSpec(*split), PartitionSpec(*heads)
  run = jax.shard_map(
    looped,
    mesh=over,
    in_specs=((specs[0], specs[0]), specs[1], specs[1], specs[2]),
    out_specs=specs[2],
    check_vma=False,
  )
  pool = abstract(over, shape, dtype, (None, *heads))
  given = (
    (pool, pool),
    abstract(over, (groups, 9), spec=split),
    abstract(over, (groups, rows, 9 * page), jnp.bool_, split),
    abstract(over, (groups, 4, rows * share, head_dim), dtype, heads),
  )
  compiled = jax.jit(run).lower(*given).compile()
  text, memory = str(compiled.as_text()), compiled.memory_analysis()
  assert kernels(text) == 1 and not collectives(text)
  local = (shape[0], shape[1] // 2, 2, page, head_dim)
  assert not made(text, local) and not made(text, (*local[:3], head_dim, page))
  assert memory is not None
  assert memory.argument_size_in_bytes > 2 * np.prod(local) * jnp.dtype(dtype).itemsize
  assert memory.temp_size_in_bytes < 0.1 * memory.argument_size_in_bytes


ARCH = transformer.Architecture(
  family="qwen2",
  vocab_size=512,
  width=256,
  layers=3,
  heads=8,
  kv_heads=2,
  head_dim=128,
  hidden=512,
  norm_eps=1e-6,
  rope_theta=1e4,
  rope_scaling=None,
  max_positions=4096,
  tied=True,
  qkv_bias=True,
  output_bias=False,
  qk_norm=False,
)


@pytest.mark.parametrize(("remat", "count"), [("dots", 3), ("layer", 4)])
def test_update_runs_kernels_in_the_scan_over_layers(remat, count):
  """Rematerialising "dots" keeps the attention: the forward kernel runs once and not twice."""
  over = mesh("v5e", 2, 2, 2)
  graph, params = transformer.abstract(ARCH, jnp.bfloat16)
  choice = attention.choose("auto", over, local=False)

  def loss(params, tokens, end):
    hidden = transformer.hidden(graph, params, tokens, tokens, end, remat=remat, choice=choice)
    return hidden.astype(jnp.float32).sum()

  params = jax.tree.map(lambda x: abstract(over, x.shape, x.dtype), params)
  tokens = abstract(over, (4, 384), spec=(("data", "fsdp"),))
  compiled = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile()
  text = str(compiled.as_text())
  assert kernels(text) == count
  assert not re.search(r"\b384,384\]", text)  # no matrix of scores


@pytest.mark.parametrize(("head_dim", "page"), [(64, 128), (128, 64)])
def test_segment_decoder_writes_its_pages_and_copies_no_pool(head_dim, page):
  over, split = mesh("v5e", 2, 1, 2), (("data", "fsdp"),)
  arch = dataclasses.replace(ARCH, head_dim=head_dim, kv_heads=4)
  graph, params = transformer.abstract(arch, jnp.bfloat16)
  groups, rows, shared_pages, stride = 4, 4, 12, 128
  settings = segment_lib.Settings(
    segment=stride, stride=stride, temperature=1.0, vocabulary=512, eos_ids=(1,), closed=2
  )
  pool = jax.eval_shape(lambda: pages_lib.create(3, 2**19 // page, 4, page, head_dim, jnp.bfloat16))
  sizes = {"tokens": (stride,), "pages": (stride // page,), "sees": (shared_pages,)}
  dtypes = {"live": bool, "sees": bool, "prompt_id": jnp.uint32}
  given = {}
  for field in dataclasses.fields(segment_lib.Rows):
    shape = (groups, rows, *sizes.get(field.name, ()))
    shape = (groups, shared_pages) if field.name in ("context", "start") else shape
    given[field.name] = jax.ShapeDtypeStruct(shape, dtypes.get(field.name, jnp.int32))
  choice = attention.choose("auto", over, local=True)

  def local(pool, rows, params, table, key):
    pool, rows = jax.tree.map(lambda x: x[0], (pool, rows))
    rows = segment_lib.Rows(**rows)
    out = segment_lib.decode(
      pool, rows, params, None, table, key, graph=graph, settings=settings, choice=choice
    )
    return jax.tree.map(lambda x: x[None], out)

  spec = PartitionSpec(*split)
  specs = (spec, spec, *(PartitionSpec(),) * 3)
  axes = {"data", "fsdp"}  # heads are split by the compiler, but in the kernels
  run = jax.shard_map(
    local, mesh=over, in_specs=specs, out_specs=spec, axis_names=axes, check_vma=False
  )
  by_head = lambda x: (*split, None, None, "tensor") if x.ndim == 5 else split
  own = jax.tree.map(lambda x: abstract(over, (2, *x.shape), x.dtype, by_head(x)), (pool, given))
  whole = jax.tree.map(
    lambda x: abstract(over, x.shape, x.dtype),
    (params, jax.ShapeDtypeStruct((3, 512), jnp.int8), jax.eval_shape(jax.random.key, 0)),
  )
  layout = jax.tree.map(lambda x: x.sharding, own[0])
  compiled = jax.jit(run, donate_argnums=0, out_shardings=(layout, None)).lower(*own, *whole)
  compiled = compiled.compile()
  text, memory = str(compiled.as_text()), compiled.memory_analysis()
  assert kernels(text) == 1
  assert not re.search(r" (infeed|outfeed|send|recv)\(", text)
  layers, pages, heads, *page_shape = pool.key.shape
  written = made(text, (layers, pages, heads // 2, *page_shape))
  assert set(written) == {"scatter", "fusion"}  # the segment's pages, in place
  assert memory is not None
  size = 2 * pool.key.size * 2 / 2
  assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < 0.1 * size


def test_programs_for_other_platforms_hold_no_kernel():
  sizes = [(2, 256, n, 64) for n in (4, 2, 2)]
  given = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
  attend = functools.partial(attention.packed, choice=attention.Choice("auto", "cpu"))
  text = jax.jit(attend).lower(*given, jax.ShapeDtypeStruct((2, 256), jnp.int32)).as_text()
  assert "tpu_custom_call" not in text
  assert attention.choose("auto", mesh("v6e"), local=True).platform == "tpu"
