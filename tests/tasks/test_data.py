"""Prompts by position: resumable, distinct, stable identities, clear messages."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.tasks import shared
from treepo_jax import config as config_lib
from treepo_jax.config import EMBEDDED_POLICY, UserError
from treepo_jax.tasks import arithmetic, data
from treepo_jax.tasks import text as text_lib

TEXT = text_lib.load(EMBEDDED_POLICY)


def make(**changes):
  config = config_lib.default()
  config.update_from_flattened_dict(changes)
  return config


def write(path, rows) -> str:
  path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
  return str(path)


def take(config, start, count):
  return data.take(data.source(config), TEXT, start=start, count=count, config=config)


def test_position_continues_where_the_batch_ended():
  config = make()
  whole = take(config, 0, 24)
  first = take(config, 0, 10)
  second = take(config, first.position, 14)
  assert first.prompts + second.prompts == whole.prompts
  assert second.position == whole.position


def test_prompts_are_distinct_and_seeded():
  ids = [p.id for p in take(make(), 0, 200).prompts]
  assert len(set(ids)) == 200
  assert all(0 <= i < 2**32 for i in ids)
  assert ids != [p.id for p in take(make(seed=1), 0, 200).prompts]


def test_identity_is_of_the_question():
  """Golden: saved runs name prompts by it."""
  assert data.identity("1 + 1 = ?") == 1398885340
  prompt = take(make(), 5, 1).prompts[0]
  assert prompt.id == data.identity(prompt.text)
  assert TEXT.decode(prompt.tokens) == prompt.text + "\n"


def test_heldout_is_fixed_and_held_out():
  a = data.heldout(make(**{"eval.prompts": 64}), TEXT)
  b = data.heldout(make(**{"eval.prompts": 64, "seed": 5}), TEXT)
  assert a == b
  assert len(a.prompts) == 64
  asked = {p.text for p in take(make(), 0, 2000).prompts}
  assert not asked & {p.text for p in a.prompts}


def test_embedded_prompts_fit():
  """All levels fit the default config.rollout.prompt_length."""
  config = make(**{"data.levels": arithmetic.LEVELS})
  assert max(len(p.tokens) for p in take(config, 0, 1000).prompts) <= 56


def test_overlong_prompt_is_named():
  config = make(**{"rollout.prompt_length": 12})
  with pytest.raises(UserError) as error:
    take(config, 0, 50)
  message = str(error.value)
  long = next(p for p in take(make(), 0, 50).prompts if len(p.tokens) > 12)
  for part in (str(long.id), f"{len(long.tokens)} tokens", "config.rollout.prompt_length = 12"):
    assert part in message


def test_overlong_prompts_are_dropped_and_counted():
  config = make(**{"rollout.prompt_length": 24, "data.overlong": "drop"})
  batch = take(config, 0, 20)
  assert len(batch.prompts) == 20
  assert max(len(p.tokens) for p in batch.prompts) <= 24
  assert batch.dropped == batch.position - 20 > 0


def test_a_source_without_fitting_prompts_ends(monkeypatch):
  monkeypatch.setattr(data, "PATIENCE", 50)
  with pytest.raises(UserError, match=r"only 0 fit config\.rollout\.prompt_length = 2"):
    take(make(**{"rollout.prompt_length": 2, "data.overlong": "drop"}), 0, 1)


def jsonl(tmp_path, rows, **changes):
  path = write(tmp_path / "rows.jsonl", rows)
  return make(**{"data.path": path, "data.eval_path": path, **changes})


def test_jsonl_epochs(tmp_path):
  """Each epoch holds every row once, in an order of its own that config.seed decides."""
  config = jsonl(tmp_path, [{"question": f"{i} + 0 = ?", "answer": i} for i in range(8)])
  source = data.source(config)
  epochs = [[source.read(8 * e + i).gold for i in range(8)] for e in range(3)]
  assert all(sorted(epoch) == [str(i) for i in range(8)] for epoch in epochs)
  assert epochs[0] != epochs[1]
  assert [p.gold for p in data.heldout(config, TEXT).prompts] == [str(i) for i in range(8)]


def test_jsonl_batch_across_epochs_has_no_repeats(tmp_path):
  config = jsonl(tmp_path, [{"prompt": f"{i} + 0 = ?", "answer": str(i)} for i in range(8)])
  position = 0
  for _ in range(6):
    batch = take(config, position, 5)
    assert len({p.id for p in batch.prompts}) == 5
    position = batch.position


def test_jsonl_with_too_few_rows(tmp_path):
  config = jsonl(tmp_path, [{"prompt": "1 + 1 = ?", "answer": "2"}] * 3)
  with pytest.raises(UserError, match="4 different prompts are needed, but only 1"):
    take(config, 0, 4)


def test_jsonl_heldout_drops(tmp_path):
  rows = [{"prompt": "1 + 1 = ?" * i, "answer": "2"} for i in range(1, 12)]
  config = jsonl(tmp_path, rows, **{"data.overlong": "drop", "rollout.prompt_length": 32})
  batch = data.heldout(config, TEXT)
  assert 0 < len(batch.prompts) < 11
  assert len(batch.prompts) + batch.dropped == 11


def test_prompts_carry_grader_and_set(tmp_path):
  assert {p.grader for p in take(make(), 0, 4).prompts} == {"number"}
  rows = [{"nums": [1, i], "target": 1 + i} for i in range(1, 5)]
  config = jsonl(tmp_path, rows, **{"data.reader": "countdown", "rollout.prompt_length": 256})
  assert {(p.grader, p.dataset) for p in take(config, 0, 4).prompts} == {("countdown", "")}


def sums(tmp_path, name: str, numbers) -> str:
  return write(tmp_path / name, [{"question": f"{i} + 0 = ?", "answer": i} for i in numbers])


def test_several_heldout_sets(tmp_path):
  """Each by its name and reader, in order, at most eval.prompts of each; one text may be in two."""
  sums(tmp_path, "a.jsonl", range(6))
  sums(tmp_path, "b.jsonl", range(4, 9))
  write(tmp_path / "c.jsonl", [{"nums": [1, 2], "target": 3}])
  config = make(
    **{
      "data.root": str(tmp_path),
      "data.path": "arithmetic",
      "data.eval_path": "a=a.jsonl,b=b.jsonl,c=c.jsonl#countdown",
      "eval.prompts": 5,
      "data.overlong": "drop",
      "rollout.prompt_length": 256,
    }
  )
  prompts = data.heldout(config, TEXT).prompts
  assert [(p.dataset, p.gold) for p in prompts[:10]] == [
    *(("a", str(i)) for i in range(5)),
    *(("b", str(i)) for i in range(4, 9)),
  ]
  assert [(p.dataset, p.grader) for p in prompts[10:]] == [("c", "countdown")]
  assert prompts[4].id == prompts[5].id  # 4 + 0 = ? in both
  assert prompts[4].tokens == prompts[5].tokens


@pytest.mark.parametrize("paths", ["a.jsonl,b=b.jsonl", "a=a.jsonl,a=b.jsonl"])
def test_several_heldout_sets_need_names(tmp_path, paths):
  config = make(**{"data.root": str(tmp_path), "data.path": "arithmetic", "data.eval_path": paths})
  with pytest.raises(UserError, match=r"config\.data\.eval_path = .*a name of its own"):
    data.heldout(config, TEXT)


def test_a_mix_continues_at_its_position(tmp_path):
  config = make(
    **{
      "data.path": f"file={sums(tmp_path, 'a.jsonl', range(50))},made=arithmetic",
      "data.eval_path": "arithmetic",
      "data.weights": (3, 1),
    }
  )
  whole = take(config, 0, 40)
  counts = [sum(p.dataset == name for p in whole.prompts) for name in ("file", "made")]
  assert counts == [30, 10]
  first = take(config, 0, 16)
  second = take(config, first.position, 24)  # a source made anew, as a run that continues does
  assert first.prompts + second.prompts == whole.prompts
  other = make(**{"seed": 1, **{k: config.data[k[5:]] for k in ("data.path", "data.eval_path")}})
  other.data.weights = (3, 1)
  assert [p.id for p in take(other, 0, 40).prompts] != [p.id for p in whole.prompts]


def test_fingerprint():
  """What a copy of a question may differ in; numbers and words count."""
  text = r"Find $\frac{1}{2} + X$, if $X = 3$."
  for same in (
    r"find $\frac{1}{2}\,+\;x$,  if\n$x\quad=\ 3$.",
    r"Find~$\frac{1}{2} +X$, if $X=3$.",
  ):
    assert data.fingerprint(same.replace(r"\n", "\n")) == data.fingerprint(text)
  for other in (text.replace("3", "4"), text.replace("+", "-"), r"\quadratic", r"\atic"):
    assert data.fingerprint(other) != data.fingerprint(text)
  assert data.fingerprint(r"\quadratic") != data.fingerprint("ratic")


def leaky(tmp_path, leakage: str):
  """Four of ten training questions are held out, differently spaced, in two sets."""
  write(tmp_path / "h.jsonl", [{"question": f"{i}  +  0 = ?", "answer": i} for i in (2, 5, 40)])
  sums(tmp_path, "i.jsonl", (7, 9))
  return make(
    **{
      "data.root": str(tmp_path),
      "data.path": sums(tmp_path, "train.jsonl", range(10)) + ",arithmetic",
      "data.weights": (1, 1),
      "data.eval_path": "h=h.jsonl,i=i.jsonl",
      "data.leakage": leakage,
    }
  )


def test_leakage_is_reported(tmp_path, caplog):
  source = data.source(leaky(tmp_path, "report"))
  assert "4 of 10 training questions are held out too, the first in h: '2 + 0 = ?'" in caplog.text
  texts = {source.read(i).text for i in range(40)}
  assert "2 + 0 = ?" in texts


def test_leakage_is_dropped(tmp_path, caplog):
  source = data.source(leaky(tmp_path, "drop"))
  assert "4 of 10 training questions" in caplog.text
  golds = [q.gold for q in map(source.read, range(24)) if q.grader == "math"]
  assert sorted(golds) == sorted(2 * ["0", "1", "3", "4", "6", "8"])


def test_leakage_is_an_error(tmp_path):
  with pytest.raises(UserError, match=r"4 of 10 .* config\.data\.leakage = 'drop'"):
    data.source(leaky(tmp_path, "error"))


def test_nothing_is_left_to_train_on(tmp_path):
  path = sums(tmp_path, "a.jsonl", range(3))
  config = make(**{"data.path": path, "data.eval_path": path, "data.leakage": "drop"})
  with pytest.raises(UserError, match="every training question is held out too"):
    data.source(config)


@pytest.mark.parametrize(
  ("train", "heldout"),
  [
    ("simplerl_math_level3to5/train.jsonl#math", "math500/test.jsonl#math"),
    ("gsm8k/train.jsonl#gsm8k", "gsm8k/test.jsonl#gsm8k"),
    ("countdown/train.jsonl#countdown", "countdown/test.jsonl#countdown"),
  ],
)
def test_published_sets_do_not_leak(train, heldout):
  root = str(shared.path("data"))
  config = {"data.root": root, "data.path": train, "data.eval_path": heldout}
  data.source(make(**config, **{"data.leakage": "error"}))


def test_a_leak_into_math500_is_found(tmp_path):
  """Seen red: one MATH-500 problem among the training rows, its spaces and case changed."""
  root = shared.path("data")
  lines = (root / "math500/test.jsonl").read_text(encoding="utf-8").splitlines()
  row = json.loads(lines[123])
  row["problem"] = row["problem"].upper().replace(" ", "  ")
  path = write(tmp_path / "train.jsonl", [row, {"problem": "1 + 1", "answer": "2"}])
  heldout = f"math500={root}/math500/test.jsonl"
  config = {"data.path": path, "data.eval_path": heldout, "data.reader": "math"}
  with pytest.raises(UserError, match="1 of 2 training questions are held out too, the first in"):
    data.source(make(**config, **{"data.leakage": "error"}))


def test_training_needs_a_set_of_its_own(tmp_path):
  config = make(**{"data.eval_path": sums(tmp_path, "a.jsonl", range(3))})
  assert len(data.heldout(config, TEXT).prompts) == 3
  with pytest.raises(UserError, match=r"config\.data\.path is empty"):
    data.source(config)


def shipped(name: str):
  """Returns a file of configs/ with the shared data and Qwen's tokenizer."""
  path = Path(__file__).parents[2] / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.model.path = str(shared.path("data", "tokenizers", "qwen3"))
  config.data.root = str(shared.path("data"))
  return config


@pytest.mark.parametrize(
  ("name", "questions", "sets", "dropped"),
  [
    ("gsm8k", 7473, {"gsm8k": 1319}, 0),
    (
      "math",
      8520,
      {"math500": 500, "aime24": 30, "amc23": 40, "minerva": 272, "olympiadbench": 673},
      2,
    ),
    ("countdown", 8000, {"countdown": 1024}, 0),
  ],
)
def test_shipped_configs_load_their_data(name, questions, sets, dropped):
  config = config_lib.validate(shipped(name))
  text = text_lib.load(config.model.path)
  batch = data.heldout(config, text)
  assert Counter(p.dataset for p in batch.prompts) == sets
  assert batch.dropped == dropped
  source = data.source(config)
  assert source.size == questions
  prompts = data.take(source, text, start=0, count=config.rollout.prompts, config=config).prompts
  assert str(text.tokenizer.decode(prompts[0].tokens)).startswith(
    "<|im_start|>system\nPlease reason"
  )
  assert prompts[0].text in text.tokenizer.decode(prompts[0].tokens)


def test_svamp_beside_gsm8k():
  config = shipped("gsm8k")
  config.data.eval_path = "gsm8k=gsm8k/test.jsonl,svamp=svamp/test.jsonl#svamp"
  config.eval.prompts = 100
  text = text_lib.load(config.model.path)
  prompts = data.heldout(config, text).prompts
  assert Counter(p.dataset for p in prompts) == {"gsm8k": 100, "svamp": 100}
