"""Weak scaling on paper: the update of --mode=plan from 4 to 256 chips, work a chip held fixed.

python experiments/weak_scaling.py [--config=configs/gsm8k_qwen2p5_1p5b.py] [--json=FILE]

Each topology compiles the update for its chips, with rollout.prompts in proportion to them. Told
are the least seconds of computing and of sending at the chip's published peaks, and the share of
time that sending would take if nothing overlapped: an upper bound of what scaling costs. Needs
libtpu and no TPU; a minute or two a topology.
"""

import argparse
import json
import os
import runpy
from pathlib import Path

from treepo_jax import main as command

os.environ.update(command.NO_TPU)  # before jax is imported

from treepo_jax import config as config_lib  # noqa: E402
from treepo_jax.model import mesh as mesh_lib  # noqa: E402
from treepo_jax.run import plan, topology  # noqa: E402

SIZES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
PROMPTS = 16  # a step and chip


def update(path: str, name: str) -> dict:
  """Returns the row of one topology."""
  chips = topology.describe(name)
  c = runpy.run_path(path)["get_config"]()
  c.rollout.prompts = PROMPTS * len(chips.devices)
  config = mesh_lib.resolve(config_lib.validate(c), len(chips.devices))
  mesh = mesh_lib.create(config, chips.devices)
  program = next(p for p in plan.programs_of(config, chips, mesh) if p.name == "update")
  row = plan.compiled(program, chips)
  computing = row["flops"] / chips.chip.flops
  sending = row["collective_bytes"] / chips.chip.links
  return {
    "topology": name,
    "chips": len(chips.devices),
    "peak_gib": row["peak_bytes"] / plan.GIB,
    "computing": computing,
    "sending": sending,
    "share": sending / (sending + computing),
    "compile_seconds": row["compile_seconds"],
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/gsm8k_qwen2p5_1p5b.py")
  parser.add_argument("--kind", default="v5e", choices=("v5e", "v6e"))
  parser.add_argument("--json", type=Path)
  options = parser.parse_args()
  rows = []
  print("| topology | chips | GiB a chip | s computing | s sending | share sent |")
  print("|---|---|---|---|---|---|")
  for size in SIZES:
    rows.append(update(options.config, f"{options.kind}:{size}"))
    r = rows[-1]
    cells = [r["topology"], f"{r['chips']}", f"{r['peak_gib']:.2f}", f"{r['computing']:.2f}"]
    print(f"| {' | '.join(cells)} | {r['sending']:.2f} | {r['share']:.0%} |", flush=True)
  if options.json:
    options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
