"""Answers graded per second, against math-verify alone, in one run.

python experiments/bench_grading.py --data=DIR --json=grading.json

DIR holds the public sets by these names: qwen_math_rollouts/math_cot_100.jsonl (800 sampled answers
of a Qwen2.5-Math model), math500, gsm8k, aime24, amc23, minerva_math, olympiadbench, svamp (each
test.jsonl) and simplerl_math_level3to5/train.jsonl.

Two loads: the 800 sampled answers; and 10,000 answers, those 800 and boxed gold answers, half of
them against their own question's gold answer, half against that of the question before. Ours: after
warm-up, without anything remembered from an earlier repetition, with the default configuration.
math-verify alone: gold answer in $...$, whole text, its defaults, in this process. Repetitions of
the two sides alternate; medians, and the ratio of medians. --quick gives math-verify every tenth
answer of the second load.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections import Counter
from pathlib import Path

import math_verify

from treepo_jax import config as config_lib
from treepo_jax.tasks import answers, rewards, text

MIXED = 10_000
REPETITIONS = 3


def rows(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sampled(data: Path) -> list[tuple[str, str]]:
  """Returns (gold answer, text) of the sampled answers."""
  groups = rows(data / "qwen_math_rollouts" / "math_cot_100.jsonl")
  return [(group["gt"], answer) for group in groups for answer in group["code"]]


def golds(data: Path) -> list[list[str]]:
  """Returns the gold answers of each set."""
  sets = [
    [r["answer"] for r in rows(data / "math500" / "test.jsonl")],
    [r["answer"].split("####")[1].strip() for r in rows(data / "gsm8k" / "test.jsonl")],
    *([str(r["answer"]) for r in rows(data / name / "test.jsonl")] for name in ("aime24", "amc23")),
    [str(text.last_box(r["solution"])) for r in rows(data / "minerva_math" / "test.jsonl")],
    [", ".join(r["final_answer"]) for r in rows(data / "olympiadbench" / "test.jsonl")],
    [str(r["Answer"]) for r in rows(data / "svamp" / "test.jsonl")],
    [r["answer"] for r in rows(data / "simplerl_math_level3to5" / "train.jsonl") if r["answer"]],
  ]
  return sets


def mixed(data: Path) -> list[tuple[str, str]]:
  """Returns MIXED (gold answer, text): the sampled ones, then gold answers."""
  made = sampled(data)
  for given in golds(data):
    for before, gold in zip([given[-1], *given], given, strict=False):
      made += [(gold, rf"so the answer is \boxed{{{answer}}}.") for answer in (gold, before)]
  return made[:MIXED]


def ours(load: list[tuple[str, str]], config) -> tuple[float, rewards.Grades]:
  """Returns the seconds that the load takes, nothing remembered, and the grades."""
  rewards.close()
  answers._read.cache_clear()
  rewards._gold.cache_clear()
  rewards.warm_up(config)
  begun = time.perf_counter()
  given, texts = zip(*load, strict=True)
  grades = rewards.grade(texts, given, ["math"] * len(load), config=config)
  return time.perf_counter() - begun, grades


def alone(load: list[tuple[str, str]]) -> float:
  begun = time.perf_counter()
  for gold, answer in load:
    math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(answer))
  return time.perf_counter() - begun


def main() -> None:
  parser = argparse.ArgumentParser(description="Answers graded per second.")
  parser.add_argument("--data", type=Path, required=True, help="folder of the public sets")
  parser.add_argument("--quick", action="store_true", help="under five minutes on two cores")
  parser.add_argument("--json", type=Path, help="file to write the table to")
  args = parser.parse_args()
  logging.getLogger("math_verify").setLevel(logging.ERROR)
  config = config_lib.validate(config_lib.default())
  alone([("1/2", r"\boxed{\frac{1}{2}}")])  # its tables are built with its first answer
  table = []
  for name, load in (("sampled", sampled(args.data)), ("mixed", mixed(args.data))):
    share = load[::10] if args.quick and name == "mixed" else load
    taken: dict[str, list[float]] = {"ours": [], "alone": []}
    grades = None
    for _ in range(REPETITIONS):
      seconds, grades = ours(load, config)
      taken["ours"].append(seconds / len(load))
      taken["alone"].append(alone(share) / len(share))
    assert grades is not None
    rate = {side: 1 / statistics.median(each) for side, each in taken.items()}
    row = {
      "load": name,
      "answers": len(load),
      "right": int(grades.correct.sum()),
      "errors": grades.errors,
      "status": dict(Counter(grades.status)),
      "ours_per_s": rate["ours"],
      "math_verify_per_s": rate["alone"],
      "ratio": rate["ours"] / rate["alone"],
    }
    table.append(row)
    print(
      f"{name:<8} {len(load):>6} answers, {row['right']} right, {row['errors']} not graded: "
      f"{rate['ours']:,.0f} a second, math-verify alone {rate['alone']:,.0f}: {row['ratio']:.1f}x"
    )
  rewards.close()
  machine = {"cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]}
  if args.json:
    args.json.write_text(json.dumps({"rows": table, "host": machine}, indent=2) + "\n")


if __name__ == "__main__":
  main()
