"""Prompts by position: resumable, distinct, stable identities, clear messages."""

import json

import pytest

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


def take(config, start, count, split="train"):
  return data.take(data.source(config, split=split), TEXT, start=start, count=count, config=config)


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
  source = data.source(config, split="train")
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


def test_gsm8k_answers(tmp_path):
  rows = [{"question": "q", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}]
  assert data.read_jsonl(write(tmp_path / "a.jsonl", rows)) == [data.Question("q", "4")]


@pytest.mark.parametrize(
  ("row", "complaint"),
  [
    ("{", "Expecting"),
    ("[1]", "expected an object, got list"),
    ({"question": "q"}, "expected 'answer'"),
    ({"answer": "1"}, "expected 'answer' and one of prompt, question, problem"),
    ({"question": "q", "prompt": "q", "answer": "1"}, "one of prompt, question, problem"),
    ({"question": 3, "answer": "1"}, "'question' must be a text"),
    ({"question": "q", "answer": None}, "'answer' must be a text or a number"),
    ({"question": "q", "answer": "so #### "}, "'answer' is empty"),
    ({"question": "good", "answer": "2"}, "line 1 with another answer"),
  ],
)
def test_bad_row_is_named(tmp_path, row, complaint):
  path = write(tmp_path / "bad.jsonl", [{"question": "good", "answer": "1"}, "", row])
  with pytest.raises(UserError) as error:
    data.read_jsonl(path)
  assert f"{path}, line 3: " in str(error.value)
  assert complaint in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
  (tmp_path / "bad.jsonl").write_bytes(b'{"question": "q", "answer": "\xff"}\n')
  with pytest.raises(UserError, match="line 1: "):
    data.read_jsonl(tmp_path / "bad.jsonl")


def test_missing_and_empty_files(tmp_path):
  with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
    data.read_jsonl(tmp_path / "nowhere.jsonl")
  (tmp_path / "empty.jsonl").write_text("\n")
  with pytest.raises(UserError, match="empty.jsonl: no rows"):
    data.read_jsonl(tmp_path / "empty.jsonl")


def test_unknown_split():
  with pytest.raises(ValueError, match="'test'; allowed: train, heldout"):
    data.source(make(), split="test")
