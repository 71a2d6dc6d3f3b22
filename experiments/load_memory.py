"""Host memory of loading a sharded checkpoint; what was loaded against what transformers has.

python experiments/load_memory.py --folder=runs/load_memory --json=load_memory.json

Writes a random checkpoint of Qwen2.5-1.5B's shapes in bfloat16 (3.1 GB in files of at most 500 MB;
--quick: 129 MB in files of 50), loads it in a fresh process onto a mesh of one CPU device, where
the arrays themselves are host memory, and reports the peak of that process over the size of the
weights: its whole resident memory, and what loading added to what Python and jax held before. The
same process then writes the directory anew, which must give every tensor bit for bit, and takes the
log-probs of a short sequence, which are compared with those of transformers in a third process.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SHARD_BYTES = 500_000_000
LENGTH = 24  # tokens of the sequence
SIZES = {  # of Qwen2.5-1.5B
  "vocab_size": 151936,
  "hidden_size": 1536,
  "intermediate_size": 8960,
  "num_hidden_layers": 28,
  "num_attention_heads": 12,
  "num_key_value_heads": 2,
}
QUICK = SIZES | {"vocab_size": 16384, "hidden_size": 768, "intermediate_size": 3072}
QUICK |= {"num_hidden_layers": 6, "num_attention_heads": 6}
CONFIG = {
  "architectures": ["Qwen2ForCausalLM"],
  "model_type": "qwen2",
  "hidden_act": "silu",
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e6,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "bos_token_id": None,
  "eos_token_id": None,
}


def build(folder: Path, sizes: dict, shard_bytes: int) -> int:
  """Writes a random checkpoint, one tensor after the other; returns its weights' bytes."""
  import ml_dtypes

  from treepo_jax.model import hf_config, shards, transformer, weights

  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(CONFIG | sizes, indent=2))
  entries = weights.entries(transformer.abstract(hf_config.read(folder), ml_dtypes.bfloat16)[1])
  random = np.random.default_rng(0)

  def tensors() -> Iterator[np.ndarray]:
    for entry in entries:
      x = 0.02 * random.standard_normal(entry.shape, np.float32)
      yield (x + ("norm" in entry.name)).astype(entry.dtype)

  shards.write(folder, entries, tensors(), shard_bytes)
  return sum(entry.size for entry in entries)


def memory(key: str) -> int:
  """Returns bytes of this process, of /proc: VmRSS resident now, VmHWM at most so far."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def load(folder: Path, dtype: str) -> dict:
  """Loads the folder, as the process that is measured."""
  import jax
  import jax.numpy as jnp

  from treepo_jax.model import mesh, transformer, weights

  on = mesh.single()
  jnp.zeros(1).block_until_ready()
  before, begun = memory("VmRSS"), time.perf_counter()
  graph, params, arch = weights.load(folder, dtype, on)
  seconds = time.perf_counter() - begun
  out = {"before_bytes": before, "peak_bytes": memory("VmHWM"), "seconds": seconds}
  out["array_bytes"] = sum(x.nbytes for x in jax.tree.leaves(params))

  @jax.jit
  def log_probs(params, tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    end = jnp.full(tokens.shape, tokens.shape[1])
    hidden = transformer.hidden(graph, params, tokens, positions, end)
    return transformer.log_probs(graph, params, hidden[:, :-1], tokens[:, 1:])[0]

  tokens = sequence(arch.vocab_size)
  np.save(folder / f"ours_{dtype}.npy", np.asarray(log_probs(params, tokens)))
  if dtype == "bfloat16":
    peak = memory("VmHWM")
    weights.save(folder / "saved", arch, params, shard_bytes=2 * SHARD_BYTES)
    out["save_added_bytes"] = memory("VmHWM") - peak
    out["round_trip_exact"] = same(folder, folder / "saved")
  return out


def sequence(vocab_size: int) -> np.ndarray:
  return np.random.default_rng(1).integers(0, vocab_size, (1, LENGTH)).astype(np.int32)


def same(a: Path, b: Path) -> bool:
  """Returns whether two directories hold the same tensors, bit for bit."""
  from treepo_jax.model import shards

  ours, theirs = shards.find(a), shards.find(b)

  def bits(tensor: shards.Tensor) -> Iterator[np.ndarray]:
    pieces = tensor.pieces((slice(None),) * len(tensor.shape))
    return (piece.view(np.uint16) for _, piece in pieces)

  return ours.keys() == theirs.keys() and all(
    np.array_equal(x, y)
    for name in ours
    for x, y in zip(bits(ours[name]), bits(theirs[name]), strict=True)
  )


def reference(folder: Path, dtype: str) -> dict:
  """Takes the log-probs by transformers."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
  tokens = torch.tensor(sequence(model.config.vocab_size)).long()
  with torch.no_grad():
    logits = model.eval()(tokens).logits[:, :-1].float()
  chosen = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]
  np.save(folder / f"theirs_{dtype}.npy", chosen.numpy())
  return {}


def main() -> None:
  parser = argparse.ArgumentParser(description="Host memory of loading a sharded checkpoint.")
  parser.add_argument("--folder", type=Path, required=True, help="a new one; removed at the end")
  parser.add_argument("--quick", action="store_true", help="a checkpoint of 129 MB")
  parser.add_argument("--json", type=Path, help="file for the figures")
  parser.add_argument(
    "--part", choices=("load", "reference"), help="what a process of its own does"
  )
  parser.add_argument("--dtype", default="bfloat16")
  args = parser.parse_args()
  if args.part:
    print(json.dumps((load if args.part == "load" else reference)(args.folder, args.dtype)))
    return
  sizes = (QUICK, SHARD_BYTES // 10) if args.quick else (SIZES, SHARD_BYTES)
  size = build(args.folder, *sizes)

  def run(part: str, dtype: str) -> dict:
    command = [
      sys.executable,
      __file__,
      f"--folder={args.folder}",
      "--part",
      part,
      "--dtype",
      dtype,
    ]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

  figures: dict = {"checkpoint_bytes": size, "files": len(list(args.folder.glob("*.safetensors")))}
  try:
    for dtype in ("bfloat16", "float32"):
      loaded = run("load", dtype)
      run("reference", dtype)
      of = loaded["array_bytes"]
      loaded["peak_over_size"] = loaded["peak_bytes"] / of
      loaded["added_over_size"] = (loaded["peak_bytes"] - loaded["before_bytes"]) / of
      ours, theirs = (np.load(args.folder / f"{who}_{dtype}.npy") for who in ("ours", "theirs"))
      loaded["log_prob_difference"] = {
        "mean": float(np.abs(ours - theirs).mean()),
        "max": float(np.abs(ours - theirs).max()),
      }
      figures[dtype] = loaded
    exact = np.load(args.folder / "theirs_float32.npy")
    for who in ("ours", "theirs"):
      error = np.abs(np.load(args.folder / f"{who}_bfloat16.npy") - exact)
      figures[f"{who}_bfloat16_to_exact"] = {"mean": float(error.mean()), "max": float(error.max())}
  finally:
    shutil.rmtree(args.folder)
  print(json.dumps(figures, indent=2))
  if args.json:
    args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
  main()
