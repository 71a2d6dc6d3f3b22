r"""Text and tokens of a policy: tokenizer, template, end-of-sequence set, `\boxed{...}` automaton.

A box is complete where the braces after `\boxed{` balance, counted as they stand, escaped or not.
Where a box opens inside a box, the inner one counts, so that a response stops exactly when there is
an answer to grade. A box with more than MAX_DEPTH open braces is given up: the search for `\boxed{`
begins again after the brace that went too deep.

Axes: V vocabulary; states of the automaton: (open braces, 0..MAX_DEPTH) x (bytes of `\boxed{` that
are matched), and CLOSED.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import transformers
from jaxtyping import Int8

from treepo_jax.config import TEMPLATES, UserError

BOX = rb"\boxed{"
MAX_DEPTH = 8  # braces open at once, the box's own included
START = 0  # state before the first token of a response
CLOSED = (MAX_DEPTH + 1) * len(BOX)  # absorbing: the response holds a complete box
STATES = CLOSED + 1
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")

# Byte-level BPE (GPT-2's) writes a printable byte as its character and the others from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {byte: byte for byte in PRINTABLE} | {
  0x100 + i: byte for i, byte in enumerate(b for b in range(256) if b not in PRINTABLE)
}


@dataclasses.dataclass(frozen=True)
class Text:
  """A tokenizer and what generation needs to know of it.

  Attributes:
    tokenizer: of transformers.
    eos_ids: every id that ends a response, of generation_config.json, config.json and tokenizer.
    pad_id: fills rows; the tokenizer's, or the first end-of-sequence id where it has none.
    thinking: what chat templates are told as enable_thinking (Qwen3; others do not ask).
  """

  tokenizer: transformers.PreTrainedTokenizerFast
  eos_ids: tuple[int, ...]
  pad_id: int
  thinking: bool = True

  def encode(self, text: str) -> list[int]:
    """Returns the tokens of `text` and nothing else."""
    return self.tokenizer.encode(text, add_special_tokens=False)

  def decode(self, ids) -> str:
    """Returns the text of tokens without special ones; bytes that are no UTF-8 become U+FFFD."""
    text = self.tokenizer.decode(
      list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)

  def prompt(self, question: str, template: str) -> list[int]:
    """Returns the prompt's tokens under one of TEMPLATES.

    "plain": the question and a line break, with the special tokens that the tokenizer itself adds
    (such as a first <s>); "boxed": the same with INSTRUCTION as a line of its own. "chat": the chat
    template with the question as the user's turn; "treepo": the same with INSTRUCTION as the
    system's turn, as TreePO's evaluation sets have it. Raises UserError where there is no template.
    """
    if template == "plain":
      return self.tokenizer.encode(question + "\n")
    if template == "boxed":
      return self.tokenizer.encode(f"{question}\n{INSTRUCTION}\n")
    if template not in TEMPLATES:
      names = ", ".join(repr(name) for name in TEMPLATES)
      raise UserError(f"config.data.template = {template!r}: must be one of {names}")
    if self.tokenizer.chat_template is None:
      raise UserError(
        f"config.data.template = {template!r}, but the tokenizer has no chat template: use "
        "'plain' or 'boxed'"
      )
    turns = [{"role": "user", "content": question}]
    if template == "treepo":
      turns = [{"role": "system", "content": INSTRUCTION}, *turns]
    text = self.tokenizer.apply_chat_template(
      turns, tokenize=False, add_generation_prompt=True, enable_thinking=self.thinking
    )
    return self.encode(str(text))

  def automaton(self, vocab_size: int) -> Int8[np.ndarray, "states v"]:
    """Returns the next state for each state and token; ids without text leave the state as it is.

    A response holds a complete box iff its tokens lead from START to CLOSED, however the box is cut
    into tokens. `vocab_size` is the model's and may exceed the tokenizer's.
    """
    return token_table(token_bytes(self.tokenizer, vocab_size))


def load(path: str | Path, *, thinking: bool = True) -> Text:
  """Loads the tokenizer of a Hugging Face directory; raises UserError naming what it lacks.

  A tokenizer.json is taken as it stands. The classes that transformers has for a model_type would
  put their own rules of cutting text in place of the file's.
  """
  path = Path(path)
  if not path.is_dir():
    raise UserError(
      f"config.model.path = {str(path)!r} is no directory: give one with config.json, "
      "*.safetensors and tokenizer.json"
    )
  if not any((path / name).is_file() for name in TOKENIZER_FILES):
    raise UserError(
      f"config.model.path = {str(path)!r} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}"
    )
  try:
    if (path / "tokenizer.json").is_file():
      tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    else:
      tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
  except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
    raise UserError(
      f"config.model.path = {str(path)!r} holds no tokenizer that can be loaded: {error}; "
      "copy its files again"
    ) from error
  if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
    raise UserError(
      f"config.model.path = {str(path)!r}: only tokenizers with a tokenizer.json are supported"
    )
  eos_ids = _eos_ids(path, tokenizer)
  pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else eos_ids[0]
  return Text(tokenizer=tokenizer, eos_ids=eos_ids, pad_id=pad_id, thinking=thinking)


def _eos_ids(path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> tuple[int, ...]:
  """Returns all end-of-sequence ids, each given as an int or a list, that the directory names."""
  named = [tokenizer.eos_token_id]
  for name in ("generation_config.json", "config.json"):
    if (path / name).is_file():
      try:
        settings = json.loads((path / name).read_text(encoding="utf-8"))
      except ValueError as error:
        raise UserError(f"{path / name}: cannot be read as JSON: {error}") from error
      named.append(settings["eos_token_id"] if "eos_token_id" in settings else None)
  ids = {int(i) for entry in named if entry is not None for i in np.atleast_1d(entry)}
  if not ids:
    raise UserError(
      f"{path}: neither generation_config.json, config.json nor the tokenizer names an eos_token_id"
    )
  return tuple(sorted(ids))


def token_bytes(tokenizer: transformers.PreTrainedTokenizerFast, vocab_size: int) -> list[bytes]:
  """Returns the bytes that each id adds to the text: none for special tokens and unused ids."""
  decoder = tokenizer.backend_tokenizer.decoder
  kinds = _decoder_kinds(json.loads(decoder.__getstate__()))  # which it has no attributes for
  if "ByteLevel" in kinds:
    spell = _spell_byte_level
  elif "ByteFallback" in kinds:
    spell = _spell_fallback
  else:
    raise UserError(
      f"the tokenizer's decoder is {', '.join(sorted(kinds))}, which is not supported: it must be "
      "ByteLevel or have ByteFallback"
    )
  table = [b""] * vocab_size
  added = tokenizer.added_tokens_decoder
  for token, index in tokenizer.get_vocab().items():
    if index < vocab_size and index not in added:
      table[index] = spell(token)
  for index, token in added.items():
    if index < vocab_size and not token.special:
      table[index] = token.content.encode()
  return table


def _decoder_kinds(decoder: dict) -> set[str]:
  parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
  return {part["type"] for part in parts}


def _spell_byte_level(token: str) -> bytes:
  """Returns the bytes of a byte-level token, each written as one printable character."""
  return token.translate(BYTE_OF).encode("latin-1")


def _spell_fallback(token: str) -> bytes:
  """Returns the bytes of a sentencepiece token: `<0x0A>` is a byte, U+2581 a space."""
  if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
    return bytes([int(token[3:5], 16)])
  return token.replace("\u2581", " ").encode()


def _byte_table() -> Int8[np.ndarray, "states 256"]:
  """Returns the next state for each state and byte."""
  table = np.zeros((STATES, 256), np.int8)
  table[CLOSED] = CLOSED
  for depth in range(MAX_DEPTH + 1):
    for matched in range(len(BOX)):
      row = table[depth * len(BOX) + matched]
      row[:] = depth * len(BOX)
      row[BOX[0]] = depth * len(BOX) + 1  # a backslash can only begin a box anew
      if depth:
        row[ord("}")] = CLOSED if depth == 1 else (depth - 1) * len(BOX)
        row[ord("{")] = (depth + 1) * len(BOX) if depth < MAX_DEPTH else START
      if matched:
        row[BOX[matched]] = depth * len(BOX) + matched + 1 if matched + 1 < len(BOX) else len(BOX)
  return table


def token_table(spelling: list[bytes]) -> Int8[np.ndarray, "states v"]:
  """Returns the byte automaton run over every token's bytes: next state [states, V]."""
  # Without a backslash or brace a token changes no depth, and only a piece of `boxed` goes on with
  # a match: nearly all of a large vocabulary does neither.
  does = [i for i, s in enumerate(spelling) if s in BOX or any(c in s for c in (b"\\", b"{", b"}"))]
  states = np.arange(STATES, dtype=np.int8)
  unmatched = np.where(states == CLOSED, CLOSED, states - states % len(BOX)).astype(np.int8)
  table = np.repeat(unmatched[:, None], len(spelling), 1)
  step = _byte_table()
  for i in does:
    state = states
    for byte in spelling[i]:
      state = step[state, byte]
    table[:, i] = state
  return table


def box_closed(text: str) -> bool:
  r"""Returns whether text holds a complete `\boxed{...}` of at most MAX_DEPTH open braces."""
  return any(_balances(text[match.end() :]) for match in re.finditer(r"\\boxed{", text))


def _balances(text: str) -> bool:
  """Returns whether a brace open before `text` closes in it, at most MAX_DEPTH open at once."""
  depth = 1
  for char in text:
    depth += (char == "{") - (char == "}")
    if depth in (0, MAX_DEPTH + 1):
      return depth == 0
  return False


def last_box(text: str) -> str | None:
  r"""Returns what stands in the complete `\boxed{...}` that begins last, or None."""
  start, end = -1, -1
  opened: list[int] = []  # where the content of each open box begins; -1 for any other open brace
  for match in re.finditer(r"\\boxed{|[{}]", text):
    if match.group() != "}":
      opened.append(-1 if match.group() == "{" else match.end())
    elif opened and (begin := opened.pop()) > start:
      start, end = begin, match.start()
  return None if start < 0 else text[start:end]
