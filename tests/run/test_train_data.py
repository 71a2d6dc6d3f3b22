"""Training on a mix of a file and a generator, held out on two sets, as a user starts it."""

import json

import pytest

from tests.run.test_train import figures, run


@pytest.mark.slow
def test_a_mix_trains_and_counts_what_is_too_long(tmp_path):
  rows = [{"question": f"({i} + 2) * 2 = ?", "answer": 2 * i + 4} for i in range(1, 11)]
  long = [{"question": row["question"] * 9, "answer": row["answer"]} for row in rows]
  (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [*rows, *long])))
  (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows[:3])))
  printed = run(
    tmp_path / "run",
    f"--config.data.root={tmp_path}",
    "--config.data.path=own=train.jsonl,made=arithmetic",
    "--config.data.weights=(2,1)",
    "--config.data.eval_path=own=own.jsonl,made=arithmetic",
    "--config.data.overlong=drop",
    "--config.train.steps=2",
    "--config.eval.every=0",
    "--config.eval.prompts=4",
  )
  assert "3 of 20 training questions are held out too, the first in own: '(1 + 2)" in printed
  assert sum(m["data/overlong"] for m in figures(tmp_path / "run")[:2]) > 0
  summary = json.loads((tmp_path / "run/summary.json").read_text())
  assert summary["heldout_prompts"] == 3 + 4
