"""Memory of one update by row length, as the compiler plans it: nothing is run.

python experiments/update_memory.py --json=memory.json

Compiles the whole optimizer step (forward, backward, AdamW) of a narrow Qwen2 with a vocabulary of
152k for one row of 4k to 128k tokens a micro-batch, layers recomputed in the backward pass, and
reads what it takes at its peak beside its arguments. The last column is what a token adds, against
the line before. Short rows have their peak in the head, where a token adds little to the logits of
one chunk, long ones in the layers, which a vocabulary of 512 shows by themselves. With all scores
of a layer at once (`dense`) a token adds the more the longer the row is. The compiler is the CPU's;
elsewhere the figures differ.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from treepo_jax import config as config_lib
from treepo_jax.learn import packing, update
from treepo_jax.model import attention, transformer
from treepo_jax.model import mesh as mesh_lib

ARCHITECTURE = transformer.Architecture(
  family="qwen2",
  vocab_size=151936,
  width=256,
  layers=4,
  heads=4,
  kv_heads=2,
  head_dim=64,
  hidden=1024,
  norm_eps=1e-6,
  rope_theta=1e6,
  rope_scaling=None,
  max_positions=131072,
  tied=True,
  qkv_bias=True,
  output_bias=False,
  qk_norm=False,
)
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
MICRO_BATCHES = 2
BLOCK = attention.BLOCK


def abstract_batch(rows: int, length: int) -> packing.Batch:
  """Returns the shapes of a placed batch, read from the axes that packing.Batch names."""
  sizes = {"*k": MICRO_BATCHES, "r": rows, "l": length}

  def shape(kind: Any) -> jax.ShapeDtypeStruct:
    dtype = jnp.int32 if "int32" in kind.dtypes else jnp.float32
    return jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in kind.dim_str.split()), dtype)

  needed = (f for f in dataclasses.fields(packing.Batch) if f.default is dataclasses.MISSING)
  return packing.Batch(**{field.name: shape(field.type) for field in needed})


def temporary(length: int, plan: dict) -> int:
  """Returns the bytes that the compiled update takes beside its arguments and results."""
  config = config_lib.default()
  config.model.remat = plan["remat"]
  config.learn.row_length, config.learn.micro_rows = length, 1
  frozen, mesh = config_lib.validate(config), mesh_lib.single()
  architecture = dataclasses.replace(ARCHITECTURE, vocab_size=plan["vocabulary"])
  graph, params = transformer.abstract(architecture)
  state = jax.eval_shape(lambda p: update.create(p, frozen, mesh), params)
  program = update.program(state, graph=graph, config=frozen, mesh=mesh)
  attention.BLOCK = length if plan["dense"] else BLOCK
  jax.clear_caches()  # the program is the same for every block; its trace is not
  analysis = program.lower(state, abstract_batch(1, length)).compile().memory_analysis()
  assert analysis is not None  # a backend may not say; the CPU's does
  return analysis.temp_size_in_bytes


def measure(plan: dict, lengths: tuple[int, ...]) -> dict:
  """Prints and returns bytes by row length, and what each token adds to the line before."""
  print(", ".join(f"{key} {value}" for key, value in plan.items()))
  rows, last = [], None
  for length in lengths:
    size = temporary(length, plan)
    more = last and (size - last[1]) / (length - last[0])
    each = f", {more / 1024:,.1f} KiB a token more" if more else ""
    print(f"  {length:>6} tokens: {size / 2**20:>7,.0f} MiB{each}", flush=True)
    rows.append({"row_length": length, "bytes": size, "bytes_a_token_more": more})
    last = length, size
  return plan | {"rows": rows}


def main() -> None:
  parser = argparse.ArgumentParser(description="Memory of the compiled update by row length.")
  parser.add_argument("--quick", action="store_true", help="the three shortest rows, two tables")
  parser.add_argument("--json", type=Path, help="file for the figures")
  args = parser.parse_args()
  layer = {"remat": "layer", "vocabulary": ARCHITECTURE.vocab_size, "dense": False}
  plans = [layer, layer | {"vocabulary": 512}]
  lengths = LENGTHS[:3] if args.quick else LENGTHS
  tables = [measure(plan, lengths) for plan in plans]
  if not args.quick:
    others = [layer | {"remat": "dots"}, layer | {"remat": "none"}, layer | {"dense": True}]
    tables += [measure(plan, LENGTHS[:3]) for plan in others]
  if args.json:
    args.json.write_text(json.dumps(tables, indent=2))


if __name__ == "__main__":
  main()
