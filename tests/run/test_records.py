"""Written trees say under which law their log-probs are."""

import types

import numpy as np
import pytest

from tests import toy
from treepo_jax import config as config_lib
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.run import records


def written(**rollout) -> tuple[dict, tree_lib.Tree]:
  """Returns (record, tree) of a random tree under a config."""
  config = config_lib.default()
  config.rollout.update(rollout)
  tree = toy.random_trees(3, trees=1)
  reward = toy.random_rewards(3, tree)
  advantage = toy.along_paths(tree, reward)
  prompt = types.SimpleNamespace(id=7, tokens=[1, 2], gold="4")
  return records.records(tree, reward, advantage, [prompt], 5, config=config)[0], tree


@pytest.mark.parametrize(
  "changes", [{"temperature": 0.8}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str
)
def test_log_probs_of_what_was_drawn_from_stand_beside_the_policys(changes):
  record, tree = written(**changes)
  plain, _ = written()
  assert len(record["nodes"]) == int(tree.size[0]) > 1
  for row, (node, other) in enumerate(zip(record["nodes"], plain["nodes"], strict=True)):
    n = int(tree.length[0, row])
    sampled = node.pop("sampled_log_probs")
    np.testing.assert_allclose(sampled, tree.sampled_log_probs[0, row, :n], atol=1e-6)
    np.testing.assert_allclose(node["log_probs"], tree.log_probs[0, row, :n], atol=1e-6)
    assert node == other  # nothing else differs, and without a filter they are not written
