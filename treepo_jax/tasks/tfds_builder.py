"""A TensorFlow data set of your own question files: built once, then read by name on every host.

python -m treepo_jax.tasks.tfds_builder --name=my_gsm8k --output=DIR --reader=gsm8k \\
  --input=train=gsm8k/train.jsonl,test=gsm8k/test.jsonl

Every NAME of --input becomes a split, and #READER after a file is its own. A run then reads it by
--config.data.root=DIR --config.data.path=tfds:my_gsm8k --config.data.eval_path=tfds:my_gsm8k, where
training takes the split train and evaluation the split test unless @SPLIT says otherwise.

Rows are stored as questions, that is read and checked, in ArrayRecord files: TensorFlow is needed
neither to write nor to read them.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from treepo_jax.config import UserError
from treepo_jax.tasks import sources
from treepo_jax.tasks.readers import Question


class Questions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Builds splits of questions, in their order; rows are what the reader "plain" reads."""

  def __init__(self, name: str, splits: Mapping[str, Sequence[Question]], version: str, **settings):
    self.name = name  # pyright: ignore[reportAttributeAccessIssue], as TFDS's own AdhocBuilder does
    self.VERSION = tfds.core.Version(version)
    self._questions = splits
    super().__init__(**settings)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    features = {"question": text(), "answer": text(), "grader": text()}
    return tfds.core.DatasetInfo(
      builder=self,
      description="Questions with their right answers, and how answers are compared with them.",
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,  # the run shuffles
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager
    return {split: self._generate_examples(split) for split in self._questions}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
    for i, question in enumerate(self._questions[split]):
      yield (
        i,
        {"question": question.text, "answer": question.gold, "grader": question.grader},
      )


def build(name: str, inputs: str, output: str, *, reader: str, version: str = "1.0.0") -> Path:
  """Builds the data set and returns its folder; raises UserError naming what cannot be used.

  Args:
    name: of the data set: small letters, digits and underscores.
    inputs: files, each with the name of its split, as sources.parse reads them.
    output: what config.data.root will be; rows of `inputs` are relative to the working directory.
    reader: of files that name none.
    version: of the data set; one that is there already is not written again.
  """
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(f"--name={name}: small letters, digits and underscores, a letter first")
  if not re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", version):
    raise UserError(f"--version={version}: three numbers, such as 1.0.0")
  specs = sources.parse(inputs, "--input", reader)
  names = [spec.name for spec in specs]
  if "" in names or len(set(names)) < len(names):
    raise UserError(f"--input={inputs}: give each file a split of its own, train=FILE,test=FILE")
  splits = {spec.name: sources.table(spec, split="train", root="").questions for spec in specs}
  builder = Questions(name, splits, version, data_dir=output, file_format="array_record")
  folder = Path(builder.data_dir)
  if folder.exists():
    raise UserError(f"{folder} is there already: remove it, or give another --version")
  builder.download_and_prepare()
  return folder


def main(arguments: Sequence[str]) -> None:
  """Builds what the command line says."""
  parser = argparse.ArgumentParser(prog="python -m treepo_jax.tasks.tfds_builder")
  parser.add_argument("--name", required=True, help="of the data set, as in tfds:NAME")
  parser.add_argument("--input", required=True, help="train=FILE[#READER],test=FILE[#READER]")
  parser.add_argument("--output", required=True, help="folder to write to, later config.data.root")
  parser.add_argument("--reader", default="plain", help="of files that name none")
  parser.add_argument("--version", default="1.0.0", help="of the data set")
  given = parser.parse_args(arguments)
  folder = build(given.name, given.input, given.output, reader=given.reader, version=given.version)
  print(f"{folder}: --config.data.root={given.output} --config.data.path=tfds:{given.name}")


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except UserError as error:
    print(f"tfds_builder: {error}", file=sys.stderr)
    sys.exit(2)
