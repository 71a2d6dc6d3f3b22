"""The embedded policy and the script that makes it."""

import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from experiments import pretrain_embedded
from treepo_jax.config import EMBEDDED_POLICY
from treepo_jax.model import transformer, weights
from treepo_jax.tasks import arithmetic

FOLDER = Path(EMBEDDED_POLICY)
TOKENIZER = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_files_agree():
  config = json.loads((FOLDER / "config.json").read_text())
  assert config["vocab_size"] == TOKENIZER.get_vocab_size() == pretrain_embedded.VOCABULARY
  assert config["eos_token_id"] == TOKENIZER.token_to_id("<eos>") == pretrain_embedded.EOS
  assert config["pad_token_id"] == TOKENIZER.token_to_id("<pad>") == pretrain_embedded.PAD
  assert (FOLDER / "model.safetensors").stat().st_size < 8e6
  assert "Accuracy on" in (FOLDER / "README.md").read_text()


def test_answers_span_several_segments():
  """Careful answers are 26 to 56 tokens with the end-of-sequence one, about 40 on average."""
  rng = random.Random(0)
  problems = [arithmetic.problem(0, i, split="heldout", levels=(3, 4, 5)) for i in range(300)]
  answers = [arithmetic.solution(p, "careful", rng) for p in problems]
  lengths = [len(TOKENIZER.encode(answer).ids) + 1 for answer in answers]
  assert min(lengths) >= 24
  assert max(lengths) <= 56
  assert 37 < np.mean(lengths) < 43


def test_a_policy_that_can_learn():
  """Right often enough to be rewarded, wrong often enough to improve: 25 to 55 % of 200."""
  graph, params, _ = weights.load(FOLDER, jnp.float32)
  table = pretrain_embedded.evaluate(graph, params, TOKENIZER, count=200)
  assert 0.25 < table["all"]["accuracy"] < 0.55
  assert table["careful"]["accuracy"] > 0.8
  assert 0.2 < table["careful"]["share"] < 0.6


def test_packed_families_train_as_single_rows():
  """A prompt with three branches weighs and costs what three rows of their own do."""
  rng = random.Random(0)
  problem = arithmetic.problem(0, 0, split="train", levels=(3,))
  tree = pretrain_embedded.family(TOKENIZER, problem, rng)
  prompt = [node for node in tree if node[4] == 0]
  singles = []
  for share in pretrain_embedded.STYLE_SHARES.values():
    branch = [node for node in tree if node[4] == share]
    size = len(prompt) + len(branch)
    tokens = [node[0] for node in prompt + branch]
    rows = [(t, i, size, max(i - 1, 0), share * (i >= len(prompt))) for i, t in enumerate(tokens)]
    singles.append([rows])
  graph, params = transformer.create(pretrain_embedded.ARCHITECTURE, jax.random.key(0))
  loss = jax.jit(pretrain_embedded.loss, static_argnames="graph")
  packed = loss(params, pretrain_embedded.collate([[tree, tree]]), graph=graph)
  alone = loss(params, pretrain_embedded.collate(singles), graph=graph)
  np.testing.assert_allclose(packed, alone, rtol=1e-5)
