r"""Tokenizers, end-of-sequence sets, templates and the `\boxed{...}` automaton over token ids."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tasks import shared
from treepo_jax.config import EMBEDDED_POLICY, UserError
from treepo_jax.tasks import text as text_lib

EMBEDDED = text_lib.load(EMBEDDED_POLICY)
VOCABULARY = json.loads((Path(EMBEDDED_POLICY) / "config.json").read_text())["vocab_size"]
TABLE = EMBEDDED.automaton(VOCABULARY)
PIECES = ["\\boxed{", "\\boxed", "\\", "{", "}", "}}", "bo", "xed{", "7", "é", "{{{{", "}}}}", " "]
mixed = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def closed(table: np.ndarray, ids) -> bool:
  state = text_lib.START
  for i in ids:
    state = table[state, i]
  return bool(state == text_lib.CLOSED)


@given(st.text(max_size=80))
@example("日本 🎉\r\n\t e\u0301 \\boxed{1}<eos>\u0000")
def test_round_trip(text):
  assert EMBEDDED.tokenizer.decode(EMBEDDED.encode(text), skip_special_tokens=False) == text


def test_digits_are_tokens():
  assert len(EMBEDDED.encode("2025")) == 4
  assert len(EMBEDDED.encode("12 + 5 = 17; ")) == 8


def test_pad_is_not_eos():
  assert EMBEDDED.eos_ids == (EMBEDDED.tokenizer.eos_token_id,)
  assert EMBEDDED.pad_id not in EMBEDDED.eos_ids


@given(mixed)
def test_table_agrees_with_text(text):
  assert closed(TABLE, EMBEDDED.encode(text)) == text_lib.box_closed(text)


@given(mixed)
def test_table_agrees_byte_by_byte(text):
  """However the text is cut into tokens, here into single bytes, the verdict is the same."""
  single = {
    spelled[0]: i
    for i, spelled in enumerate(text_lib.token_bytes(EMBEDDED.tokenizer, VOCABULARY))
    if len(spelled) == 1
  }
  assert closed(TABLE, [single[byte] for byte in text.encode()]) == text_lib.box_closed(text)


@given(mixed)
def test_last_box_is_found_where_one_is_complete(text):
  if text_lib.box_closed(text):
    assert text_lib.last_box(text) is not None


@pytest.mark.parametrize(
  ("text", "complete", "last"),
  [
    (r"\boxed{}", True, ""),
    (r"\boxed{17}", True, "17"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", True, r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{a{b{c{d}}}}", True, "a{b{c{d}}}"),
    (r"\boxed{17", False, None),
    (r"\boxed 5", False, None),
    (r"\boxed {5}", False, None),
    (r"boxed{5}", False, None),
    (r"\bo\boxed{5}", True, "5"),
    (r"\boxed{5 and \boxed{6}", True, "6"),
    (r"\boxed{\boxed{6}}", True, "6"),
    (r"\boxed{1} \boxed{2}", True, "2"),
    (r"} \boxed{1}", True, "1"),
    (r"\boxed{" + "{" * 7 + "}" * 8, True, "{" * 7 + "}" * 7),
    (r"\boxed{" + "{" * 8 + "}" * 9, False, "{" * 8 + "}" * 8),  # nine open braces: given up
    (r"\boxed{" + "{" * 8 + r"\boxed{5}", True, "5"),  # and the search begins again
  ],
)
def test_boxes(text, complete, last):
  assert text_lib.box_closed(text) is complete
  assert closed(TABLE, EMBEDDED.encode(text)) is complete
  assert text_lib.last_box(text) == last


def test_special_tokens_leave_the_state():
  """They add no text, so a box is complete across them; so are ids beyond the tokenizer's."""
  table = EMBEDDED.automaton(VOCABULARY + 3)
  extra = [EMBEDDED.pad_id, *EMBEDDED.eos_ids, VOCABULARY + 2]
  np.testing.assert_array_equal(
    table[:, extra], np.tile(np.arange(text_lib.STATES)[:, None], len(extra))
  )


def test_decoding_leaves_special_tokens_out():
  ids = [*EMBEDDED.encode("7"), EMBEDDED.pad_id, *EMBEDDED.eos_ids]
  assert EMBEDDED.decode(np.array(ids)) == "7"


def test_closed_is_absorbing():
  assert (TABLE[text_lib.CLOSED] == text_lib.CLOSED).all()
  assert TABLE.shape == (text_lib.STATES, VOCABULARY)


def write_policy(directory: Path, **files) -> Path:
  """Copies the embedded tokenizer and writes JSON files beside it."""
  for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
    shutil.copy(Path(EMBEDDED_POLICY) / name, directory / name)
  for name, content in files.items():
    (directory / f"{name}.json").write_text(json.dumps(content))
  return directory


def test_every_named_eos_counts(tmp_path):
  config = {"model_type": "qwen2", "eos_token_id": 7}
  path = write_policy(tmp_path, config=config, generation_config={"eos_token_id": [9, 7, 8]})
  assert text_lib.load(path).eos_ids == (0, 7, 8, 9)


def test_eos_may_be_missing_from_some(tmp_path):
  path = write_policy(
    tmp_path, config={"model_type": "qwen2"}, generation_config={"eos_token_id": None}
  )
  assert text_lib.load(path).eos_ids == (0,)


def test_missing_directory_is_named(tmp_path):
  with pytest.raises(UserError, match=r"config\.model\.path.*nowhere.* is no directory"):
    text_lib.load(tmp_path / "nowhere")


def test_missing_tokenizer_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
  with pytest.raises(UserError, match=r"config\.model\.path.*tokenizer"):
    text_lib.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_damaged_file_is_named(tmp_path, name):
  (write_policy(tmp_path) / name).write_text("{")
  with pytest.raises(UserError, match=str(tmp_path)):
    text_lib.load(tmp_path)


def test_templates(tmp_path):
  assert EMBEDDED.decode(EMBEDDED.prompt("1 + 1 = ?", "plain")) == "1 + 1 = ?\n"
  with pytest.raises(UserError, match=r"config\.data\.template.*chat template"):
    EMBEDDED.prompt("1 + 1 = ?", "chat")
  with pytest.raises(UserError, match=r"config\.data\.template = 'poem'"):
    EMBEDDED.prompt("1 + 1 = ?", "poem")
  path = write_policy(tmp_path)
  settings = json.loads((path / "tokenizer_config.json").read_text())
  settings["chat_template"] = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
  )
  (path / "tokenizer_config.json").write_text(json.dumps(settings))
  text = text_lib.load(path)
  assert text.decode(text.prompt("1 + 1 = ?", "chat")) == "[1 + 1 = ?]>"
  instruction = r"Please reason step by step, and put your final answer within \boxed{}."
  assert text.decode(text.prompt("1 + 1 = ?", "treepo")) == f"[{instruction}][1 + 1 = ?]>"
  assert EMBEDDED.decode(EMBEDDED.prompt("1 + 1 = ?", "boxed")) == f"1 + 1 = ?\n{instruction}\n"
  with pytest.raises(UserError, match="'treepo', but .*'plain' or 'boxed'"):
    EMBEDDED.prompt("1 + 1 = ?", "treepo")


def test_the_prompt_of_the_paper():
  """TreePO's evaluation sets: system turn, bare question, Qwen's template."""
  text = text_lib.load(shared.path("data", "tokenizers", "qwen3"))
  ids = text.prompt("What is $1+1$?", "treepo")
  assert text.tokenizer.decode(ids) == (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
    "<|im_end|>\n<|im_start|>user\nWhat is $1+1$?<|im_end|>\n<|im_start|>assistant\n"
  )


@pytest.fixture(scope="module")
def qwen3() -> text_lib.Text:
  return text_lib.load(shared.path("data", "tokenizers", "qwen3"))


def vectors() -> list[dict]:
  """Returns public pairs of a text and its ids under the tokenizer of Qwen2, 2.5 and 3."""
  lines = shared.path("data", "tokenizers", "qwen_test_vectors.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_qwen3_encodes_as_published(qwen3):
  for vector in vectors():
    assert qwen3.encode(vector["text"]) == vector["ids"]
    kept = qwen3.tokenizer.decode(vector["ids"], skip_special_tokens=False)
    assert kept == vector["text"]


def test_qwen2_5_encodes_as_published(tmp_path):
  """From vocab.json and merges.txt alone, as checkpoints of the first years hold them."""
  for name in ("vocab.json", "merges.txt"):
    shutil.copy(shared.path("data", "tokenizers", "qwen2.5", name), tmp_path)
  special = {"151643": "<|endoftext|>", "151644": "<|im_start|>", "151645": "<|im_end|>"}
  settings = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "added_tokens_decoder": {i: {"content": t, "special": True} for i, t in special.items()},
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  # as in Qwen2.5-Instruct: generation_config.json names more ends than config.json
  (tmp_path / "config.json").write_text('{"model_type": "qwen2", "eos_token_id": 151645}')
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
  text = text_lib.load(tmp_path)
  assert (text.eos_ids, text.pad_id) == ((151643, 151645), 151643)  # pad is an end as well
  for vector in vectors():
    assert text.encode(vector["text"]) == vector["ids"]
  assert len(text_lib.token_bytes(text.tokenizer, 151936)) == 151936


def test_qwen_vocabulary_in_time(qwen3):
  """152k tokens of several characters, padded beyond the tokenizer's size: 10 seconds of work."""
  began = time.process_time()
  table = qwen3.automaton(151936)
  assert time.process_time() - began < 10
  assert table.shape == (text_lib.STATES, 151936)
  for answer in (
    r"so \boxed{\frac{1}{2}}.",
    r"so \boxed{\frac{1}{2}",
    "日本\\boxed{é}",
    r"$$\boxed{(3, \frac{\pi}{2})}$$",
    r"\boxed{{}} \boxed{}{{",
  ):
    assert closed(table, qwen3.encode(answer)) == text_lib.box_closed(answer)
    assert qwen3.decode(qwen3.encode(answer)) == answer


def test_every_qwen_token_moves_as_its_bytes_do(qwen3):
  """Those of several braces, of backslashes and of part of a character: from every state."""
  spelling = text_lib.token_bytes(qwen3.tokenizer, 151936)
  table = text_lib.token_table(spelling)
  assert sum(s.count(b"{") + s.count(b"}") > 1 for s in spelling) > 100
  assert any(s and not s.decode(errors="ignore") for s in spelling)
  step = text_lib._byte_table()
  state = np.repeat(np.arange(text_lib.STATES, dtype=np.int8)[:, None], len(spelling), 1)
  lengths = np.array([len(s) for s in spelling])
  for j in range(lengths.max()):
    (longer,) = np.nonzero(lengths > j)
    state[:, longer] = step[state[:, longer], [spelling[i][j] for i in longer]]
  np.testing.assert_array_equal(table, state)


def test_qwen_spelling_is_the_decoded_text(qwen3):
  spelling = text_lib.token_bytes(qwen3.tokenizer, 151936)
  for i in range(0, 151600, 997):
    assert spelling[i].decode(errors="replace") == qwen3.decode([i])
  emoji = qwen3.encode("😶‍🌫️")  # cut within characters
  assert b"".join(spelling[i] for i in emoji) == "😶‍🌫️".encode()
  assert any("\ufffd" in qwen3.decode([i]) for i in emoji)


def test_qwen3_thinks_or_does_not(qwen3):
  asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  plain = dataclasses.replace(qwen3, thinking=False)
  texts = [t.tokenizer.decode(t.prompt("Hi", "chat")) for t in (qwen3, plain)]
  assert texts == [asked, asked + "<think>\n\n</think>\n\n"]


def test_byte_fallback_tokenizer(tmp_path):
  """Sentencepiece-style tokens: `<0x7B>` is a brace."""
  source = shared.path("data", "models", "stories260K")
  text = text_lib.load(source)
  table = text.automaton(512)
  assert text.eos_ids == (2,)
  for answer in (r"so \boxed{17} now", r"so \boxed{17 now", r"\boxed{日本}"):
    ids = text.encode(answer)
    assert closed(table, ids) == text_lib.box_closed(answer)


@pytest.mark.parametrize("family", [None, "qwen2", "llama"])
def test_the_file_is_used_as_it_is(family, tmp_path):
  """The families' classes of transformers rebuild a tokenizer by rules of their own instead."""
  path = Path(EMBEDDED_POLICY)
  if family is not None:
    path = write_policy(tmp_path, config={"model_type": family, "eos_token_id": 0})
    (path / "tokenizer_config.json").unlink()
  loaded = text_lib.load(path)
  raw = tokenizers.Tokenizer.from_file(str(Path(EMBEDDED_POLICY) / "tokenizer.json"))
  for text in ("Ann has 12 figs. She gets 3 times as many.", "12 + 5 = 17; ", "e\u0301", "<eos>"):
    assert loaded.encode(text) == raw.encode(text).ids
