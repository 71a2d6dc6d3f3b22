"""What merging siblings would save on answers that were sampled elsewhere, by segment length.

python experiments/natural_sharing.py --answers=answers.jsonl --tokenizer=DIR/tokenizer.json

Every line of the file holds a list of answers to one prompt under --key. Of their tokens a tree
decodes each distinct segment after each distinct prefix once, whole; the last column is the bound:
each distinct prefix once, as if segments were one token long.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer

SEGMENTS = (16, 32, 64, 128, 1)


def decoded(answers: list[tuple[int, ...]], segment: int) -> int:
  """Returns the tokens of all distinct segments of the answers' tree."""
  ends = {a[: min(i + segment, len(a))] for a in answers for i in range(0, len(a), segment)}
  return sum(len(end) - (len(end) - 1) // segment * segment for end in ends)


def main() -> None:
  parser = argparse.ArgumentParser(description="Tokens that siblings have in common.")
  parser.add_argument("--answers", type=Path, required=True, help="JSONL, a prompt a line")
  parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
  parser.add_argument("--key", default="answers", help="of the list of texts")
  args = parser.parse_args()
  tokenizer = Tokenizer.from_file(str(args.tokenizer))
  groups = [json.loads(line)[args.key] for line in args.answers.read_text().splitlines()]
  tokens = [[tuple(e.ids) for e in tokenizer.encode_batch(texts)] for texts in groups]
  total = sum(len(answer) for answers in tokens for answer in answers)
  print(f"{len(groups)} prompts, {sum(map(len, tokens))} answers, {total:,} tokens")
  for segment in SEGMENTS:
    saved = 1 - sum(decoded(answers, segment) for answers in tokens) / total
    print(f"segments of {segment:>3}: {saved:.1%} saved" + (" (the bound)" if segment == 1 else ""))


if __name__ == "__main__":
  main()
