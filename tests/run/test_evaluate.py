"""An evaluation from its answers to its summary: killed anywhere, by set, of every kind.

Answers are made up here, by prompt and kind; tests/run/test_train.py samples them.
"""

import dataclasses
import json
import random

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from treepo_jax import config as config_lib
from treepo_jax.config import UserError
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.run import collect, evaluate, plots, preemption, results, scores, setup
from treepo_jax.run import metrics as metrics_lib
from treepo_jax.run.results import Kind
from treepo_jax.tasks import data

SIZES = {"easy": 7, "hard": 5, "": 3}


def prompts() -> list[data.Prompt]:
  """Prompts of the sets in turn, as a mix has them."""
  found = [
    data.Prompt(id=100 * s + i, text=f"{name} {i}", tokens=[1], gold="1", dataset=name)
    for s, (name, size) in enumerate(SIZES.items())
    for i in range(size)
  ]
  return random.Random(0).sample(found, len(found))


def config(**changes):
  c = config_lib.default()
  c.eval.update({"samples": 4, "chunk": 3, "bootstrap": 50} | changes)
  return config_lib.validate(c)


class Sampler:
  """Stands for collect.collect: makes answers up, by prompt; counts its calls, may be stopped."""

  def __init__(self, lives: int = 10**9):
    self.calls, self.lives = 0, lives

  def __call__(self, params, key, asked, *, setup, shape, config, room):
    if self.calls == self.lives:
      raise preemption.Stopped(2)
    self.calls += 1
    assert len(asked) <= room
    b, w = len(asked), shape.width
    extracted = [self.answers(p, w, shape.branch.initial) for p in asked]
    blank = jnp.zeros(b, jnp.int32)
    tree = tree_lib.create(
      jnp.ones((b, 1), jnp.int32), blank, blank.astype(jnp.uint32), width=w, depth=1, segment=8
    )
    tree = dataclasses.replace(
      tree,
      depth=tree.depth + 2,
      length=jnp.tile(jnp.arange(w + 1, dtype=jnp.int32) % 8, (b, 1)),
      leaves=jnp.tile(jnp.arange(1, w + 1, dtype=jnp.int32), (b, 1)),
    )
    return collect.Rollout(
      tree=tree,
      prompts=list(asked),
      reward=np.zeros((b, w + 1), np.float32),
      correct=[[a == p.gold for a in e] for e, p in zip(extracted, asked, strict=True)],
      answers=extracted,
      texts=[[f"so {a}" for a in e] for e in extracted],
      metrics={
        "rollout/tokens_decoded": 5.0 * b * w,
        "rollout/tokens_path": 10.0 * b * w,
        "rollout/tokens_prefilled": float(b),
        "reward/grader_errors": 0.0,
        "reward/mean": 0.5,
        "time/rollout": 0.5,
        "time/reward": 0.25,
      },
    )

  def answers(self, prompt: data.Prompt, width: int, initial: int) -> list[str | None]:
    draw = random.Random(f"{prompt.id} {width} {initial}")
    easy = 3 if prompt.dataset == "easy" else 1
    return [draw.choice(["1"] * easy + ["2", "3", None]) for _ in range(width)]


@pytest.fixture(scope="module")
def policy() -> setup.Setup:
  return setup.load(config())


@pytest.fixture
def sampler(monkeypatch, policy):
  """Replaces the policy and the sampling; returns what takes their place."""
  return lambda made: replace(monkeypatch, policy, made)


def replace(monkeypatch: pytest.MonkeyPatch, policy: setup.Setup, made: Sampler) -> Sampler:
  monkeypatch.setattr(collect, "collect", made)
  monkeypatch.setattr(setup, "load", lambda config: policy)
  monkeypatch.setattr(data, "heldout", lambda config, text: data.Batch(prompts(), 0, 0))
  return made


def test_the_summary_is_that_of_the_answers(sampler, tmp_path):
  sampler(Sampler())
  summary = evaluate.run(config(), tmp_path)
  assert summary is not None
  rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
  assert len(rows) == 15 and all(len(r["answers"]) == 4 for r in rows)
  for row in rows:
    assert [t.removeprefix("so ") for t in row["answers"]] == [str(a) for a in row["extracted"]]
    assert row["tokens"] == [8 + i for i in range(1, 5)]
    for a, g, c in zip(row["extracted"], row["group"], row["correct"], strict=True):
      assert (g == -1) == (a is None) and c == (a == "1")
  shares = {name: [] for name in ("easy", "hard", "heldout")}
  for row in rows:
    shares[row["dataset"]].append(np.mean(row["correct"]))
  for name, share in shares.items():
    found = summary["sets"][name]
    assert found["accuracy"] == pytest.approx(np.mean(share)) == found["pass@1"]
    assert found["prompts"] == len(share) == SIZES[name if name != "heldout" else ""]
    assert found["standard_error"] == pytest.approx(np.std(share, ddof=1) / len(share) ** 0.5)
    assert found["tokens_decoded"] == 5 * 4 * len(share) and found["tokens_path"] == 40 * len(share)
    assert found["seconds"] == 0.75 * -(-len(share) // 3)
  every = np.concatenate([*shares.values()])
  assert summary["accuracy"] == pytest.approx(every.mean()) == pytest.approx(summary["pass@1"])
  assert summary["unweighted"]["accuracy"] == pytest.approx(
    np.mean([np.mean(x) for x in shares.values()])
  )
  low, high = summary["interval"]
  assert low < summary["accuracy"] < high and summary["decode_saving"] == 0.5
  assert summary["maj@4"] == pytest.approx(
    np.mean([scores.majority_at(r["group"], r["correct"], [4]) for r in rows])
  )
  assert summary["bootstrap@4"] < summary["maj@4"] < summary["pass@4"]
  assert summary["prompts"] == 15 and summary["seconds"] == 6 * 0.75
  table = (tmp_path / "table.md").read_text()
  assert all(f"| {name} |" in table for name in (*shares, "Overall", "unweighted"))
  assert matplotlib.image.imread(tmp_path / "plots" / "evaluation.png").std() > 0.01
  assert not (tmp_path / "plots" / "budget.png").exists() and summary["curve"] == []


CURVE = {"widths": (2, 4), "branchings": (2, 3)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, policy):
  """Calls and files of an evaluation that was never stopped."""
  folder = tmp_path_factory.mktemp("evaluation")
  with pytest.MonkeyPatch.context() as patch:
    made = replace(patch, policy, Sampler())
    patch.setattr(plots, "plot_evaluation", lambda summary, path: None)
    patch.setattr(plots, "plot_budget", lambda curve, path: None)
    evaluate.run(config(**CURVE), folder)
  names = ("config.json", "answers.jsonl", "metrics.jsonl", "summary.json", "table.md")
  return made.calls, {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def whole(tmp_path, monkeypatch, finished):
  """The same, in a folder of the test's own; nothing is drawn again."""
  monkeypatch.setattr(plots, "plot_evaluation", lambda summary, path: None)
  monkeypatch.setattr(plots, "plot_budget", lambda curve, path: None)
  (tmp_path / "whole").mkdir()
  for name, content in finished[1].items():
    (tmp_path / "whole" / name).write_bytes(content)
  return finished


@pytest.mark.parametrize("lives", [0, 1, 8, 23])
def test_stopped_and_started_again_it_is_the_same(sampler, tmp_path, whole, lives):
  calls, files = whole
  first = sampler(Sampler(lives))
  with pytest.raises(SystemExit):
    evaluate.run(config(**CURVE), tmp_path / "killed")
  assert not (tmp_path / "killed" / "summary.json").exists()
  second = sampler(Sampler())
  evaluate.run(config(**CURVE), tmp_path / "killed")
  assert first.calls == lives and second.calls == calls - lives
  assert {n: (tmp_path / "killed" / n).read_bytes() for n in files} == files


@pytest.mark.parametrize("seed", range(6))
def test_files_cut_anywhere_are_made_whole(sampler, tmp_path, whole, seed):
  """A kill may leave half a line of answers, answers that are not entered, or the other way."""
  calls, files = whole
  draw, folder = random.Random(seed), tmp_path / "whole"
  for name in ("answers.jsonl", "metrics.jsonl"):
    if draw.random() < 0.7:
      (folder / name).write_bytes(files[name][: draw.randrange(len(files[name]))])
  again = sampler(Sampler())
  evaluate.run(config(**CURVE), folder)
  assert again.calls <= calls
  assert {n: (folder / n).read_bytes() for n in files} == files


def test_a_finished_evaluation_samples_nothing(sampler, tmp_path, whole):
  again = sampler(Sampler())
  evaluate.run(config(**CURVE), tmp_path / "whole")
  assert again.calls == 0


def test_another_config_or_other_data_is_refused(sampler, tmp_path, whole, monkeypatch):
  folder, (_, files) = tmp_path / "whole", whole
  sampler(Sampler())
  for change, words in (({"samples": 5}, "eval.samples = 4, now 5"), ({"chunk": 9}, "eval.chunk")):
    with pytest.raises(UserError, match=words):
      evaluate.run(config(**CURVE | change), folder)
  evaluate.run(config(**CURVE, every=3), folder)  # which changes no answer
  other = [dataclasses.replace(p, id=p.id + 1) for p in prompts()]
  monkeypatch.setattr(data, "heldout", lambda config, text: data.Batch(other, 0, 0))
  with pytest.raises(UserError, match="the data has changed"):
    evaluate.run(config(**CURVE, every=3), folder)
  monkeypatch.setattr(evaluate, "_weights", lambda config, policy: ({}, "runs/a/checkpoints/9"))
  with pytest.raises(UserError, match=r"holds answers of .*embedded, now it is runs/a/check"):
    evaluate.run(config(**CURVE, every=3), folder)
  assert (folder / "answers.jsonl").read_bytes() == files["answers.jsonl"]
  (folder / "answers.jsonl").write_bytes(b"x" + files["answers.jsonl"][1:])
  with pytest.raises(UserError, match=r"answers\.jsonl: a line is damaged"):
    evaluate._recover(folder, list(evaluate._units(prompts(), config(**CURVE))), _name(folder))


def _name(folder) -> str:
  return metrics_lib.read(folder / "metrics.jsonl")[0]["eval/weights"]


def test_the_workdir_of_a_training_run_is_left_alone(sampler, tmp_path):
  made = sampler(Sampler())
  with metrics_lib.Writer(tmp_path, 0) as writer:
    writer.write(0, {"reward/mean": 0.5})
  before = (tmp_path / "metrics.jsonl").read_bytes()
  with pytest.raises(UserError, match="a run of another mode: give another --workdir"):
    evaluate.run(config(), tmp_path)
  assert made.calls == 0 and (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_curve_has_every_kind_once(sampler, tmp_path):
  c = config(**CURVE)
  assert evaluate.kinds(c) == [
    Kind("sequential", 4),
    Kind("sequential", 2),
    Kind("tree", 4, 2),
    Kind("tree", 4, 3),
  ]
  assert evaluate.kinds(config()) == [Kind("sequential", 4)]
  tree = config(sampling="tree", widths=(4, 8))
  assert evaluate.kinds(tree) == [
    Kind("tree", 4), Kind("sequential", 4), Kind("sequential", 8), Kind("tree", 8)
  ]  # fmt: skip
  sampler(Sampler())
  summary = evaluate.run(c, tmp_path)
  assert summary is not None
  assert [(p["sampling"], p["width"], p["branching"]) for p in summary["curve"]] == [
    dataclasses.astuple(kind) for kind in evaluate.kinds(c)
  ]
  for point in summary["curve"]:
    assert point["tokens_decoded"] == 15 * 5 * point["width"]
    assert f"maj@{point['width']}" in point and point["prompts"] == 15
  assert summary["curve"][0]["maj@4"] == summary["maj@4"]
  assert matplotlib.image.imread(tmp_path / "plots" / "budget.png").std() > 0.01
  assert "| 4 tree b=3 |" in (tmp_path / "table.md").read_text()


def test_trees_have_the_shape_that_is_asked_for(policy):
  c, shape = config(), policy.shape
  tree = evaluate.sampler(Kind("tree", 8, 2), c, shape)
  assert (tree.width, tree.branch.initial, tree.branch.branching) == (8, 2, 2)
  assert tree.fallback == shape.fallback and tree.merge
  alone = evaluate.sampler(Kind("sequential", 8), c, shape)
  assert (alone.width, alone.branch.initial, alone.fallback.place) == (8, 8, "none")
  # The rollout's shape: all of its answers leave the prompt, so all of these do.
  wide = evaluate.sampler(Kind("tree", 64), c, shape)
  assert shape.branch.initial == shape.width == 16 and wide.branch.initial == 64
  forced = dataclasses.replace(shape, branch=dataclasses.replace(shape.branch, initial=2))
  assert evaluate.sampler(Kind("tree", 64), c, forced).branch.initial == 2


def test_a_pool_of_pages_that_is_given_stays(policy):
  shape = policy.shape
  assert evaluate.sampler(Kind("tree", 4), config(), shape).pages == 0
  small = dataclasses.replace(shape, pages=shape.pages_of_tree)
  assert evaluate.sampler(Kind("tree", 4), config(), small).pages == shape.pages_of_tree
  wide = evaluate.sampler(Kind("tree", 64), config(), small)
  assert wide.pages == wide.pages_of_tree > shape.pages_of_tree


def test_prompts_with_fewer_answers_or_none():
  """Trees may return fewer than their width: k goes up to the fewest, none is one wrong answer."""
  two, four = results.Answers(1, [0, 1], [True, False]), results.Answers(2, [0] * 4, [True] * 4)
  found = results.score({"a": [two, four]}, bootstrap=9, seed=0)["a"]
  assert found["accuracy"] == [0.5, 1.0] and found["pass@2"] == [1.0, 1.0]
  assert found["maj@2"] == [0.5, 1.0] and set(found) == {
    "accuracy", "pass@1", "pass@2", "maj@1", "maj@2", "bootstrap@2"
  }  # fmt: skip
  none = results.Answers(3, [], [])
  found = results.score({"a": [two, none]}, bootstrap=0, seed=0)["a"]
  assert found == {"accuracy": [0.5, 0.0], "pass@1": [0.5, 0.0], "maj@1": [0.5, 0.0]}


def test_while_training_each_named_set_has_its_accuracy(sampler, policy):
  sampler(Sampler())
  found = evaluate.accuracy({}, prompts(), policy=policy, config=config())
  assert set(found) == {"eval/accuracy", "eval/accuracy/easy", "eval/accuracy/hard"}
  sets = {"eval/accuracy/easy": 7, "eval/accuracy/hard": 5}
  rest = 15 * found["eval/accuracy"] - sum(n * found[name] for name, n in sets.items())
  assert 0 <= rest / 3 <= 1 and found["eval/accuracy/easy"] > found["eval/accuracy/hard"]
