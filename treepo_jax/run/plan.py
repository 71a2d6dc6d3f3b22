"""--mode=plan: every program of a run compiled for TPUs that are not there, and what it says.

The programs are those of a run, lowered from shapes: no weight is read and nothing is computed. A
host's rollout is compiled for the chips of one host, for hosts roll out by themselves; the update
and the transfer of the new weights for all chips.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from treepo_jax.learn import packing, update
from treepo_jax.model import attention, hf_config, hub, transformer
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.rollout import grow, programs
from treepo_jax.run import cost, hlo
from treepo_jax.run import metrics as metrics_lib
from treepo_jax.run import topology as topology_lib
from treepo_jax.run.topology import Topology
from treepo_jax.tasks import text as text_lib

GIB = 1 << 30
FULL = 0.9  # of a packed row's columns that hold a token, of the decoder's rows that are in use

# What to change where a program does not fit, by its name.
REMEDY = {
  "transfer": "raise mesh.tensor or mesh.fsdp, or take more chips",
  "start": "lower rollout.pages, rollout.prompts, or raise mesh.tensor",
  "prefill": "lower rollout.pages or rollout.prompt_length, or raise mesh.tensor",
  "decode": "lower rollout.rows or rollout.pages, or raise mesh.tensor",
  "expand": "lower rollout.prompts, rollout.width or rollout.pages",
  "score": "lower learn.micro_rows or learn.row_length, or raise mesh.tensor",
  "update": "set model.remat = 'layer', lower learn.micro_rows or learn.row_length, or raise "
  "mesh.fsdp or mesh.tensor",
}


@dataclasses.dataclass(frozen=True)
class Program:
  """A program of a run, not yet compiled.

  Attributes:
    name: what it does.
    run: jitted.
    arguments: shapes with their layout.
    chips: that it is spread over.
    resident: bytes a chip that lie in its memory beside the arguments.
    calls: how often a training step runs it, a host; of the decoder its steps, a token a row each.
    moved: bytes that a call reads and writes at least; None: as XLA counts, which takes a slice of
      what a loop carries for the whole, and a loop for once.
  """

  name: str
  run: Any
  arguments: tuple
  chips: int
  resident: float
  calls: float
  moved: float | None = None


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a step is taken to be, a host or all: by config.plan, for it depends on the model.

  Attributes:
    tokens: decoded a step by all hosts, each shared one once.
    steps: of the decoder, a shard.
    context: tokens that a row sees on average.
    micro_batches: of the update, a step.
  """

  tokens: float
  steps: float
  context: float
  micro_batches: int


def run(config, topology: str, workdir: Path) -> dict:
  """Compiles every program of a run for the topology; prints and writes plan.json and plan.md.

  Raises UserError where the topology, the mesh or the model cannot be; a program that does not fit
  is a finding, told with the key to change.
  """
  chips = topology_lib.describe(topology)
  config = mesh_lib.resolve(config, len(chips.devices))
  mesh = mesh_lib.create(config, chips.devices)
  found = []
  listed = list(programs_of(config, chips, mesh))
  print(f"Compiling {len(listed)} programs for {topology}: {len(chips.devices)} chips", flush=True)
  for i, program in enumerate(listed):
    print(f"  {i + 1}/{len(listed)} {program.name} ...", end=" ", flush=True)
    found.append(compiled(program, chips))
    print(f"{found[-1]['compile_seconds']:.0f} s", flush=True)
  plan = {
    "topology": topology,
    "chip": chips.kind,
    "chips": len(chips.devices),
    "hosts": chips.hosts,
    "hbm_bytes": chips.chip.hbm,
    "fits": all(step["fits"] for step in found),
    "steps": found,
  }
  plan |= _totals(found, chips, config) | {"largest": _largest(found, config, mesh)}
  workdir.mkdir(parents=True, exist_ok=True)
  with metrics_lib.replacing(workdir / "plan.json") as temporary:
    temporary.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
  text = _report(plan, config)
  with metrics_lib.replacing(workdir / "plan.md") as temporary:
    temporary.write_text(text, encoding="utf-8")
  print("\n" + text)
  return plan


def expected(config, shards: int) -> Expected:
  """Returns what a training step is taken to be (config.plan), over `shards` of the rollout."""
  r, plan = config.rollout, config.plan
  longest = r.response_length or r.depth * r.segment
  answer = plan.response or 0.4 * longest
  trajectories = r.prompts * r.width
  tokens = trajectories * answer * (1 - plan.saving)
  rows = min(r.rows, trajectories / shards)
  packed = tokens + r.prompts * r.prompt_length / 2
  micro = packed / (FULL * config.learn.row_length * config.learn.micro_rows)
  return Expected(
    tokens=tokens,
    steps=tokens / shards / (FULL * rows),
    context=r.prompt_length / 2 + answer / 2,
    micro_batches=max(math.ceil(micro), config.learn.minibatches),
  )


def _architecture(config) -> transformer.Architecture:
  """Returns what the model is, of its directory or its name; its weights need not be here."""
  if not Path(config.model.path).is_dir() and (arch := hf_config.known(config.model.path)):
    return arch
  return hf_config.read(hub.find(config.model.path, config.model.revision))


def programs_of(config, topology: Topology, mesh: Mesh) -> Iterator[Program]:
  """Yields the programs in the order of a step: weights to the rollout, rollout, update."""
  arch = _architecture(config)
  attention.check(config, arch.head_dim)
  graph, params = transformer.abstract(arch, jnp.dtype(config.model.dtype))
  state = update.abstract(params, config, mesh)
  kept = _bytes(state)
  shards = mesh_lib.shards(mesh)
  step = expected(config, shards)
  chips = len(topology.devices)
  yield Program(
    "transfer", update.transfer(config, mesh), (state.params, state.base), chips, 0.0, 1.0
  )
  yield from _rollout(config, topology, mesh, arch, graph, params, kept, step)

  k = math.ceil(step.micro_batches / config.learn.minibatches)
  padded = 1 << (k - 1).bit_length()  # a micro-batch of padding alone is skipped
  batch = packing.abstract(config.learn.micro_rows * padded, config)
  batch = update.abstract_batch(batch, config, mesh)
  calls = config.learn.minibatches * k / padded
  if config.learn.kl != "none" or config.learn.correction != "none":
    scorer = update.scorer(graph, config, mesh)
    yield Program("score", scorer, (state, batch), chips, 0.0, calls, 2 * kept)
    put = functools.partial(jax.ShapeDtypeStruct, sharding=batch.tokens.sharding)
    batch = jax.tree.map(lambda x: put(x.shape, x.dtype), jax.eval_shape(scorer, state, batch))
  optimize = update.program(state, graph=graph, config=config, mesh=mesh)
  whole = _bytes(_rolled_out(params, mesh))
  # A micro-batch reads the weights forward, again and backward, and adds to the gradient.
  moved = padded * (3 * whole + 2 * _bytes(state.params)) + 2 * kept
  yield Program("update", optimize, (state, batch), chips, 0.0, calls, moved)


def _rollout(config, topology: Topology, mesh: Mesh, arch, graph, params, kept: float, step):
  """Yields the programs of a host's rollout."""
  here = mesh
  if topology.hosts > 1:
    here = mesh_lib.along_data(topology.local, config.mesh.tensor)
  per_shard = -(-config.rollout.prompts // mesh_lib.shards(mesh))
  shape = grow.settings(
    config,
    vocabulary=arch.vocab_size - 1,  # as of a tokenizer with fewer tokens than the model
    eos_ids=(arch.vocab_size - 3, arch.vocab_size - 2),
    closed=text_lib.CLOSED,
  )
  shape = grow.fit(shape, per_shard, here)
  dtype = params["embed"].dtype
  calls = programs.build(graph, dtype, shape, per_shard, here)
  lie = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  params = _rolled_out(params, here)
  whole = mesh_lib.replicated(here)
  key = lie(jax.eval_shape(lambda: jax.random.key(0)), whole)
  table = jax.ShapeDtypeStruct((text_lib.STATES, arch.vocab_size), jnp.int8, sharding=whole)
  number = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)
  split = NamedSharding(here, PartitionSpec(mesh_lib.BATCH_AXES))
  size = (mesh_lib.shards(here), per_shard)
  reward = jax.ShapeDtypeStruct((*size, shape.width), jnp.float32, sharding=split)
  layers = jax.eval_shape(transformer.unstack, params) if shape.unroll else None

  chips, weights = len(topology.local), _bytes(params)
  rows = shape.groups * shape.group
  per_token = 2 * arch.layers * arch.kv_heads * arch.head_dim * dtype.itemsize
  read = weights + rows * step.context * per_token / here.shape["tensor"]
  strides = step.steps / shape.decoder.stride
  yield from (
    Program("start", calls.start, calls.asked, chips, kept + weights, 1.0),
    Program(
      "prefill",
      calls.prefill,
      (calls.growth, params, number(jnp.int32)),
      chips,
      kept,
      float(math.ceil(per_shard / min(programs.PREFILL, per_shard))),
      weights,
    ),
    Program(
      "expand",
      calls.advance,
      (calls.growth, calls.segment, reward, key, number(jnp.float32)),
      chips,
      kept + weights,
      strides,
      2 * (_bytes(calls.growth) - _bytes(calls.growth.pool)),
    ),
    Program(
      "decode",
      calls.decode.program(*calls.decode.size(shape.groups, shape.shared)),
      (calls.growth, params, layers, table, key),
      chips,
      kept,
      step.steps,
      read,
    ),
  )


def _rolled_out(params, mesh: Mesh):
  """Returns the shapes of weights as a rollout takes them."""
  put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(put, params, mesh_lib.shardings(params, mesh, over=("tensor",)))


def _bytes(tree) -> float:
  """Returns the bytes a chip of shapes with their layout."""
  own = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return float(sum(own(x) for x in jax.tree.leaves(tree)))


def compiled(program: Program, topology: Topology) -> dict[str, Any]:
  """Returns a program's row of plan.json: bytes and operations a chip."""
  chip = topology.chip
  traced = program.run.trace(*program.arguments)
  operations = cost.flops(traced.jaxpr) / program.chips
  found = _measured(traced.lower(), topology)
  row = {"name": program.name, "calls": program.calls, "flops": operations} | found
  row["resident_bytes"] = program.resident
  if "says" in found:  # the compiler found no room
    return row | {"argument_bytes": _bytes(program.arguments), "fits": False, "seconds": None}
  moved = found["bytes_once"] if program.moved is None else program.moved
  peak = found["argument_bytes"] + found["temp_bytes"] + found["output_bytes"] + program.resident
  return row | {
    "bytes_accessed": moved,
    "seconds": cost.seconds(operations, moved, found["collective_bytes"], chip),
    "peak_bytes": peak,
    "margin_bytes": chip.hbm - peak,
    "fits": peak <= chip.hbm,
  }


def _measured(lowered: jax.stages.Lowered, topology: Topology) -> dict[str, Any]:
  """Returns what compiling says, or said when the same program was compiled for the same chips.

  JAX cannot read programs for other devices back from its cache, so the figures are kept instead,
  beside it.
  """
  made_by = topology.name, jax.__version__, metadata.version("libtpu")
  name = hashlib.sha256("\n".join([*made_by, lowered.as_text()]).encode()).hexdigest()
  folder = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009, made as it is imported
  kept = Path(folder or "") / "plans" / f"{name}.json"
  if folder and kept.exists():
    return json.loads(kept.read_text(encoding="utf-8"))
  begun = time.perf_counter()
  try:
    with _uncached():
      made = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    names = ("temp", "output", "collective", "peak", "margin")
    found: dict[str, Any] = {f"{name}_bytes": None for name in names}
    found |= {"bytes_accessed": None, "says": str(error).splitlines()[0]}
  else:
    memory: Any = made.memory_analysis()
    counted = made.cost_analysis() or {}
    found = {
      "argument_bytes": memory.argument_size_in_bytes,
      "temp_bytes": memory.temp_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      "collective_bytes": sum(hlo.collective_bytes(made.as_text()).values()),
      "bytes_once": counted.get("bytes accessed", 0.0),
    }
  found["compile_seconds"] = time.perf_counter() - begun
  if folder:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with metrics_lib.replacing(kept) as temporary:
      temporary.write_text(json.dumps(found), encoding="utf-8")
  return found


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
  """Keeps JAX from writing what it compiles to its cache: it could not read it."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, float("inf"))
  try:
    yield
  finally:
    jax.config.update(name, before)


def _totals(rows: list[dict], topology: Topology, config) -> dict[str, Any]:
  """Returns the least seconds of a training step and what 1,000 trajectories cost."""
  if any(row["seconds"] is None for row in rows):
    return {"step_seconds": None, "cost_per_1000_trajectories": None}
  seconds = sum(row["seconds"] * row["calls"] for row in rows)
  hours = seconds * len(topology.devices) / 3600
  made = config.rollout.prompts * config.rollout.width
  price = config.plan.price * hours / made * 1000 if config.plan.price else None
  return {"step_seconds": seconds, "cost_per_1000_trajectories": price}


def _largest(rows: list[dict], config, mesh: Mesh) -> dict[str, int | None]:
  """Returns what the memory left over would hold.

  The page pool exactly. Decode rows and rows of a micro-batch if what a program needs beside its
  arguments grows in proportion to them: try the figure before trusting it.
  """
  by_name = {row["name"]: row for row in rows}
  decode, optimize = by_name["decode"], by_name["update"]
  growing = [by_name[name] for name in ("prefill", "expand", "decode")]
  arch = _architecture(config)
  width = jnp.dtype(config.model.dtype).itemsize
  page = 2 * arch.layers * arch.kv_heads * arch.head_dim * width * config.rollout.page
  page /= mesh.shape["tensor"] if arch.kv_heads % mesh.shape["tensor"] == 0 else 1
  largest: dict[str, int | None] = dict.fromkeys(
    ("rollout.pages", "rollout.rows", "learn.micro_rows")
  )
  if all(row["fits"] for row in growing):
    left = min(row["margin_bytes"] for row in growing)
    largest["rollout.pages"] = config.rollout.pages + int(left / page)
    times = 1 + decode["margin_bytes"] / max(decode["temp_bytes"], 1)
    group, r = config.rollout.group, config.rollout
    most = -(-r.prompts // mesh_lib.shards(mesh)) * -(-r.width // group) * group
    largest["rollout.rows"] = min(int(r.rows * times) // group * group, most)
  if optimize["fits"]:
    times = 1 + optimize["margin_bytes"] / max(optimize["temp_bytes"], 1)
    shards = mesh_lib.shards(mesh)
    largest["learn.micro_rows"] = int(config.learn.micro_rows * times) // shards * shards
  return largest


def _report(plan: dict[str, Any], config) -> str:
  """Returns the plan as a Markdown page."""
  gib = lambda x: "-" if x is None else f"{x / GIB:.2f}"
  lines = [
    f"# {config.model.path} on {plan['topology']}: " + ("fits" if plan["fits"] else "does not fit"),
    "",
    f"{plan['chips']} {plan['chip']} chips, {plan['hosts']} hosts, {gib(plan['hbm_bytes'])} GiB a "
    f"chip; mesh.data = {config.mesh.data}, fsdp = {config.mesh.fsdp}, tensor = "
    f"{config.mesh.tensor}. GiB a chip; `other` lies in memory while the program runs.",
    "",
    "| program | arguments | temporary | output | other | peak | left | TFLOP | GB moved | GB sent "
    "| s | calls a step |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  number = lambda x, unit: "-" if x is None else f"{x / unit:.3g}"
  for row in plan["steps"]:
    cells = [row["name"], *(gib(row[f"{x}_bytes"]) for x in ("argument", "temp", "output"))]
    cells += [gib(row["resident_bytes"]), gib(row["peak_bytes"])]
    cells += [gib(row["margin_bytes"]) if row["fits"] else "**does not fit**"]
    cells += [number(row["flops"], 1e12), number(row["bytes_accessed"], 1e9)]
    cells += [number(row["collective_bytes"], 1e9), number(row["seconds"], 1)]
    lines.append(f"| {' | '.join(cells)} | {row['calls']:.3g} |")
  lines.append("")
  for row in plan["steps"]:
    if not row["fits"]:
      lines.append(f"- {row['name']} does not fit: {REMEDY[row['name']]}. {row.get('says', '')}")
  largest = {name: size for name, size in plan["largest"].items() if size is not None}
  if largest:
    sizes = ", ".join(f"config.{name} = {size}" for name, size in largest.items())
    lines.append(f"- Largest that should fit, each by itself: {sizes}.")
  if plan["step_seconds"] is not None:
    lines.append(
      f"- A training step takes at least {plan['step_seconds']:.0f} s, at the chip's published "
      "peaks and without what the host does: a bound from below, not a forecast."
    )
  if plan["cost_per_1000_trajectories"] is not None:
    lines.append(
      f"- 1,000 trajectories cost at least {plan['cost_per_1000_trajectories']:.2f} at "
      f"{config.plan.price} a chip-hour."
    )
  step = expected(config, max(plan["chips"] // config.mesh.tensor, 1))
  lines.append(
    f"- Assumed (config.plan): {step.tokens:,.0f} tokens decoded a step, {config.plan.saving:.0%} "
    f"shared; {FULL:.0%} of rows in use."
  )
  return "\n".join(lines) + "\n"
