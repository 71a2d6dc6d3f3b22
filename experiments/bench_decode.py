"""Tokens decoded per second: the segment decoder against transformers' generate, in one run.

python experiments/bench_decode.py --json=decode.json        (needs the extra `test` for torch)

Both sides get the same weights, rows, prompts and number of new tokens, sample at temperature 1
from the whole vocabulary in float32, and use all cores (ours takes each as a device, as the command
does; PyTorch runs a thread on each). Nothing ends early. Their runs alternate; the median of each
side and the ratio of medians are printed. `whole` includes prefill; `decode` leaves it out: the
time of a shorter generation (one segment of ours, one token of generate) is taken off, with its
tokens.

Shapes: a random Qwen2 of 28M parameters with 64 rows, prompts of 256 and 64 new tokens; the
embedded policy with 16, 64 and 256 rows. Rows are different prompts (nothing shared), or some
prompts x 16 samples, what a GRPO step asks for: there our side reads each prompt once.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from treepo_jax import config as config_lib
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import weights
from treepo_jax.rollout import grow
from treepo_jax.tasks.data import Prompt

SEGMENT = 16  # tokens of a segment of ours: the host plans every so many


@dataclasses.dataclass(frozen=True)
class Case:
  """One row of the table."""

  model: str
  path: str
  prompts: int
  samples: int
  prompt: int
  new: int

  @property
  def rows(self) -> int:
    return self.prompts * self.samples


def random_qwen2(folder: str) -> str:
  """Writes a random Qwen2 of 28M parameters and returns its directory."""
  shape = transformers.Qwen2Config(
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    intermediate_size=1536,
    vocab_size=8192,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
  )
  torch.manual_seed(0)
  transformers.Qwen2ForCausalLM(shape).save_pretrained(folder)
  return folder


class Ours:
  """The rollout engine as plain sampling: no trees, no shared segments."""

  def __init__(self, case: Case):
    config = config_lib.default()
    with config.unlocked():
      config.rollout.update(
        segment=SEGMENT,
        page=SEGMENT,
        depth=case.new // SEGMENT,
        width=case.samples,
        branching=1,
        fallback="none",
        prompt_length=case.prompt,
        rows=-(-case.rows // jax.device_count()),
        group=min(case.samples, 4),
        merge=False,  # every token is decoded, on both sides
        repetition_count=0,
      )
      config.learn.row_length = case.prompt + case.new
    self.mesh = mesh_lib.create(config)
    self.graph, self.params, arch = weights.load(case.path, "float32")
    vocabulary = arch.vocab_size
    frozen = config_lib.validate(config)
    self.shape = grow.settings(frozen, vocabulary=vocabulary, eos_ids=(), closed=-1)
    self.table = np.zeros((1, vocabulary), np.int8)

    self.short = dataclasses.replace(self.shape, depth=1, response_length=SEGMENT)

  def __call__(
    self, prompts: np.ndarray, key: jax.Array, samples: int, shape: grow.Settings
  ) -> float:
    """Returns the seconds of one generation."""
    asked = [
      Prompt(id=i, text="", tokens=list(map(int, p)), gold="") for i, p in enumerate(prompts)
    ]
    begun = time.perf_counter()
    tree, cost = grow.grow(
      self.params,
      key,
      asked,
      graph=self.graph,
      table=self.table,
      shape=shape,
      mesh=self.mesh,
    )
    seconds = time.perf_counter() - begun
    assert cost["rollout/tokens_decoded"] == len(asked) * samples * shape.response_length
    return seconds


class Theirs:
  """transformers' generate with its key-value cache."""

  def __init__(self, case: Case):
    self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(case.path).eval()
    self.model.generation_config.eos_token_id = None

  def __call__(self, prompts: np.ndarray, samples: int, new: int) -> float:
    """Returns the seconds of one generation."""
    rows = torch.tensor(np.repeat(prompts, samples, 0))
    begun = time.perf_counter()
    with torch.no_grad():
      out = self.model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
      )
    seconds = time.perf_counter() - begun
    assert out.shape[1] == prompts.shape[1] + new
    return seconds


def measure(case: Case, runs: int) -> dict:
  """Returns the figures of one case: medians of `runs` runs of each side, taken in turn."""
  ours, theirs = Ours(case), Theirs(case)
  prompts = np.random.default_rng(0).integers(2, 400, (case.prompts, case.prompt))
  seconds = {"ours": [], "our_short": [], "theirs": [], "their_short": []}
  for i in range(runs + 1):
    new = (
      ours(prompts, jax.random.key(i), case.samples, ours.shape),
      ours(prompts, jax.random.key(i), case.samples, ours.short),
      theirs(prompts, case.samples, case.new),
      theirs(prompts, case.samples, 1),
    )
    if i:  # the first of each compiles or warms up
      for values, value in zip(seconds.values(), new, strict=True):
        values.append(value)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  tokens = case.rows * case.new
  ours_rate = case.rows * (case.new - SEGMENT) / (median["ours"] - median["our_short"])
  theirs_rate = case.rows * (case.new - 1) / (median["theirs"] - median["their_short"])
  return dataclasses.asdict(case) | {
    "ours_tokens_per_s": tokens / median["ours"],
    "theirs_tokens_per_s": tokens / median["theirs"],
    "ours_decode_tokens_per_s": ours_rate,
    "theirs_decode_tokens_per_s": theirs_rate,
    "ratio_whole": median["theirs"] / median["ours"],
    "ratio_decode": ours_rate / theirs_rate,
    "runs": runs,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description="Tokens decoded per second against transformers.")
  parser.add_argument("--quick", action="store_true", help="fewer runs")
  parser.add_argument("--json", type=Path, help="file for the figures")
  args = parser.parse_args()
  cores = len(os.sched_getaffinity(0))
  jax.config.update("jax_num_cpu_devices", cores)
  torch.set_num_threads(cores)
  runs = 2 if args.quick else 5
  embedded = config_lib.EMBEDDED_POLICY
  with tempfile.TemporaryDirectory() as folder:
    big = random_qwen2(folder)
    cases = [
      Case("random Qwen2, 28M", big, 64, 1, 256, 64),
      Case("random Qwen2, 28M", big, 4, 16, 256, 64),
      Case("embedded, 0.8M", embedded, 16, 1, 48, 64),
      Case("embedded, 0.8M", embedded, 64, 1, 48, 64),
      Case("embedded, 0.8M", embedded, 4, 16, 48, 64),
      Case("embedded, 0.8M", embedded, 16, 16, 48, 64),
    ]
    rows = []
    for case in cases:
      row = measure(case, runs)
      row["path"] = "random" if case.path == big else "embedded"
      rows.append(row)
      print(
        f"{case.model}: {case.prompts} prompts x {case.samples}, {case.prompt} + {case.new} tokens:"
        f" ours {row['ours_tokens_per_s']:,.0f} tokens/s, generate"
        f" {row['theirs_tokens_per_s']:,.0f} ({row['ratio_whole']:.1f}x); decode alone"
        f" {row['ours_decode_tokens_per_s']:,.0f} against"
        f" {row['theirs_decode_tokens_per_s']:,.0f} ({row['ratio_decode']:.1f}x)",
        flush=True,
      )
  if args.json:
    args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
  main()
