"""Sources by name: JSONL, Parquet and TFDS hold the same questions; what is wrong is named."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.tasks import shared
from treepo_jax import config as config_lib
from treepo_jax.config import UserError
from treepo_jax.tasks import data, sources, tfds_builder
from treepo_jax.tasks.readers import Question
from treepo_jax.tasks.sources import Spec

KEY = "config.data.path"


def table(text: str, root="", split="train") -> sources.Table:
  (spec,) = sources.parse(text, KEY, "plain")
  return sources.table(spec, split=split, root=str(root))


def load(text: str, split="train", **changes) -> sources.Source:
  config = config_lib.default()
  config.update_from_flattened_dict(changes)
  (spec,) = sources.parse(text, KEY, "plain")
  return sources.load(spec, split=split, config=config)


def write(path: Path, rows) -> str:
  path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
  return str(path)


def test_names():
  found = sources.parse("a=x/b.jsonl#gsm8k, tfds:math_qa/c@train[:10%] ,m.n:f#o.p:q", KEY, "plain")
  assert found == [
    Spec("a", "x/b.jsonl", "gsm8k", KEY),
    Spec("", "tfds:math_qa/c@train[:10%]", "plain", KEY),
    Spec("", "m.n:f", "o.p:q", KEY),
  ]


@pytest.mark.parametrize("text", ["", "a.jsonl,", "#gsm8k", "a.jsonl#gsm 8k"])
def test_a_name_of_no_form(text):
  with pytest.raises(UserError, match=r"config\.data\.path = .* \[NAME=\]WHERE\[#READER\]"):
    sources.parse(text, KEY, "plain")


ROWS = [{"question": f"{i} é\n?", "answer": i} for i in range(2500)]
QUESTIONS = tuple(Question(f"{i} é\n?", str(i)) for i in range(2500))


def test_parquet_file_and_folder(tmp_path):
  (tmp_path / "many").mkdir()
  parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1000]), tmp_path / "many/0.parquet")
  parquet.write_table(pyarrow.Table.from_pylist(ROWS[1000:]), tmp_path / "many/1.parquet")
  assert table("many", tmp_path).questions == QUESTIONS
  assert table("many/0.parquet", tmp_path).questions == QUESTIONS[:1000]
  assert table(write(tmp_path / "rows.jsonl", ROWS)).questions == QUESTIONS


def test_parquet_of_lists_and_objects(tmp_path):
  rows = [{"nums": [1, 2], "target": 3}, {"nums": [4, 5, 6], "target": 15}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
  found = table("a.parquet#countdown", tmp_path)
  assert [json.loads(q.gold) for q in found.questions] == rows


def test_tfds_round_trip(tmp_path):
  """A built set, read by name in another process: the questions that went in, no TensorFlow."""
  write(tmp_path / "train.jsonl", ROWS)
  write(tmp_path / "test.jsonl", [{"nums": [1, 2], "target": 3}])
  inputs = f"train={tmp_path}/train.jsonl,test={tmp_path}/test.jsonl#countdown"
  folder = tfds_builder.build("my_sums", inputs, str(tmp_path / "sets"), reader="plain")
  assert folder == tmp_path / "sets/my_sums/1.0.0"
  program = f"""
import sys
from treepo_jax.tasks import sources
(spec,) = sources.parse("s=tfds:my_sums#plain", "x", "gsm8k")
for split in ("train", "heldout"):
  found = sources.table(spec, split=split, root={str(tmp_path / "sets")!r})
  print(found.rows, found.questions[0], found.questions[-1])
assert "tensorflow" not in sys.modules
"""
  ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr
  first, last = (Question(f"{i} é\n?", str(i), "math", "s") for i in (0, 2499))
  train, heldout = ran.stdout.splitlines()
  assert train == f"2500 {first} {last}"
  assert heldout.startswith("1 Question(text='Use each of the numbers 1, 2 ")
  assert heldout.endswith("grader='countdown', dataset='s')")

  sets = str(tmp_path / "sets")
  assert table("tfds:my_sums@train[10:20]", sets).questions == QUESTIONS[10:20]
  for text, complaint in [
    ("tfds:my_sums@dev", "Unknown split 'dev'"),
    ("tfds:my_sums@train[", "Error parsing split"),
    ("tfds:no_such_set", "Dataset no_such_set not found"),
    ("tfds:my_sums#gsm8k", "my_sums@train, row 1: 'answer' has no '####'"),
  ]:
    with pytest.raises(UserError, match=complaint.replace("[", r"\[")):
      table(text, sets)
  with pytest.raises(UserError, match="is there already"):
    tfds_builder.build("my_sums", inputs, sets, reader="plain")


def test_tfds_of_gsm8k(tmp_path):
  root = shared.path("data", "gsm8k")
  name = "gsm8k_copy"
  tfds_builder.main(
    [f"--name={name}", f"--input=test={root}/test.jsonl", f"--output={tmp_path}", "--reader=gsm8k"]
  )
  assert table(f"tfds:{name}", tmp_path, split="heldout") == table(f"{root}/test.jsonl#gsm8k")


@pytest.mark.parametrize(
  ("name", "inputs", "version", "complaint"),
  [
    ("My-Set", "train=a.jsonl", "1.0.0", "--name=My-Set"),
    ("a", "a.jsonl", "1.0.0", "--input=a.jsonl: give each file a split"),
    ("a", "train=a.jsonl,train=b.jsonl", "1.0.0", "give each file a split"),
    ("a", "train=nowhere.jsonl", "1.0.0", "nowhere.jsonl: no such file"),
    ("a", "train=a.jsonl", "1", "--version=1: three numbers"),
  ],
)
def test_a_set_that_cannot_be_built(tmp_path, name, inputs, version, complaint):
  with pytest.raises(UserError, match=complaint):
    tfds_builder.build(name, inputs, str(tmp_path), reader="plain", version=version)
  assert not list(tmp_path.iterdir())


def test_functions_of_the_user(tmp_path, monkeypatch):
  (tmp_path / "my_sums_task.py").write_text(
    "from treepo_jax.tasks.readers import Question\n"
    "def ask(seed, split, position):\n"
    "  return Question(f'{split} {seed}: {position} + 1 = ?', str(position + 1), 'number')\n"
    "def nothing(seed, split, position): pass\n"
    "def read(row): return Question(row['q'], row['a'])\n"
    "def text(row): return row['q']\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  source = load("mine=my_sums_task:ask", seed=7)
  assert source.size is None
  assert source.read(41) == Question("train 7: 41 + 1 = ?", "42", "number", "mine")
  assert load("my_sums_task:ask", "heldout", seed=7).read(0).text == "heldout 0: 0 + 1 = ?"
  with pytest.raises(UserError, match=r"nothing\(0, 'train', 3\): None is not a Question"):
    load("my_sums_task:nothing").read(3)
  path = write(tmp_path / "rows.jsonl", [{"q": "what?", "a": "that"}])
  assert table(f"{path}#my_sums_task:read").questions == (Question("what?", "that"),)
  with pytest.raises(UserError, match="line 1: 'what\\?' is not a Question"):
    table(f"{path}#my_sums_task:text")
  with pytest.raises(UserError, match=r"line 1: KeyError\('q'\) \(reader 'my_sums_task:read'\)"):
    table(f"{write(tmp_path / 'bad.jsonl', [{}])}#my_sums_task:read")


def test_the_embedded_task_by_name():
  source = load("sums=arithmetic")
  assert source.size is None
  assert source.read(0).grader == "number"
  assert source.read(0).dataset == "sums"


def test_gsm8k_answers_by_the_plain_reader(tmp_path):
  rows = [{"question": "q", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}]
  assert table(write(tmp_path / "a.jsonl", rows)).questions == (data.Question("q", "4"),)


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
    ({"question": "good", "answer": "2"}, "line 1 with another answer"),
  ],
)
def test_a_bad_row_is_named(tmp_path, row, complaint):
  path = write(tmp_path / "bad.jsonl", [{"question": "good", "answer": "1"}, "", row])
  with pytest.raises(UserError) as error:
    table(path)
  assert f"{path}, line 3: " in str(error.value)
  assert complaint in str(error.value)


def test_a_bad_row_of_parquet_is_named(tmp_path):
  rows = [{"question": "a", "answer": "1"}, {"question": None, "answer": "1"}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
  with pytest.raises(UserError, match="a.parquet, row 2: 'question' must be a text"):
    table("a.parquet", tmp_path)


def test_rows_without_an_answer_are_left_out_and_said(tmp_path, caplog):
  rows = [{"question": f"q{i}", "answer": "" if i % 3 else "1"} for i in range(9)]
  found = table(write(tmp_path / "rows.jsonl", rows))
  assert (found.rows, found.empty, len(found.questions)) == (9, 6, 3)
  assert "rows.jsonl, line 2: an empty answer; 6 of 9 rows" in caplog.text


def test_equal_rows_count_once(tmp_path):
  found = table(write(tmp_path / "rows.jsonl", [{"prompt": "q", "answer": 1}] * 3))
  assert (found.rows, len(found.questions)) == (3, 1)


def test_files_that_cannot_be_read(tmp_path):
  (tmp_path / "bytes.jsonl").write_bytes(b'{"question": "q", "answer": "\xff"}\n')
  (tmp_path / "empty.jsonl").write_text("\n")
  (tmp_path / "no.parquet").write_text("no Parquet")
  (tmp_path / "folder").mkdir()
  write(tmp_path / "blank.jsonl", [{"question": "q", "answer": ""}])
  for name, complaint in [
    ("nowhere.jsonl", "nowhere.jsonl: no such file; config.data.path names JSONL"),
    ("bytes.jsonl", "line 1: "),
    ("empty.jsonl", "empty.jsonl: no rows"),
    ("blank.jsonl", "blank.jsonl: no rows with an answer"),
    ("no.parquet", "no.parquet: cannot be read as Parquet"),
    ("folder", "folder: no rows"),
  ]:
    with pytest.raises(UserError, match=complaint):
      table(name, tmp_path)
