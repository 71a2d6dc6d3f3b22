"""Ours against peers on the same work in one run: Tunix's GRPO, transformers' generate.

python experiments/bench_peers.py --tunix=PYTHON_OF_ITS_ENVIRONMENT --json=peers.json

Tunix 0.1.7 wants Python 3.12 and an environment of its own: `pip install google-tunix==0.1.7`
there, and give its interpreter. transformers comes with the extra `test`. What is not installed is
named as skipped.

Against Tunix (peer_tunix.py has its side): a random Qwen2 of 3.9M parameters in float32, 4 prompts
of 256 tokens, 8 answers of 256 tokens to each, none of which ends early. Sampling: answers decoded
each by itself. Trees: as many answers of the same length from TREE, which decodes less. A step:
generation, log-probs of a reference policy, advantages, an AdamW update with the KL to the
reference in its loss; flat with GRPO's advantages, trees with TreePO's. Tunix holds all 32 rows in
one micro-batch as its bench does, or 8, which takes less memory; ours 2 rows of ROW_LENGTH tokens.
Every kind of work is a process of its own, ours with a core a device; they run in turn, and peaks
of resident memory are each process's own.

Against transformers: whole generations of bench_decode.py's 28M policy.

Medians; ratio is ours over theirs, for memory theirs over ours: higher is better.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peer_tunix as peer

from treepo_jax import config as config_lib
from treepo_jax.learn import advantages, packing, update
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer
from treepo_jax.rollout import grow
from treepo_jax.rollout import tree as tree_lib
from treepo_jax.tasks.data import Prompt

SEGMENT = 32
TREE = {"initial": 2, "branching": 2, "fallback": "random"}  # 2, 4, then 8 branches; 8 segments
FLAT = {"initial": 0, "branching": 1, "fallback": "none"}
ROW_LENGTH = 2048

ARCHITECTURE = transformer.Architecture(
  family="qwen2",
  vocab_size=peer.VOCABULARY,
  width=peer.WIDTH,
  layers=peer.LAYERS,
  heads=peer.HEADS,
  kv_heads=peer.KV_HEADS,
  head_dim=peer.HEAD_DIM,
  hidden=peer.HIDDEN,
  norm_eps=1e-6,
  rope_theta=1e6,
  rope_scaling=None,
  max_positions=4096,
  tied=True,
  qkv_bias=True,
  output_bias=False,
  qk_norm=False,
)


def configure(tree: bool):
  """Returns the config of a worker and lets each core be a device; before jax starts."""
  config = config_lib.default()
  with config.unlocked():
    mesh_lib.split_host(config)
    config.rollout.update(
      prompts=peer.PROMPTS,
      width=peer.SAMPLES,
      depth=peer.NEW // SEGMENT,
      segment=SEGMENT,
      page=SEGMENT,
      prompt_length=peer.PROMPT,
      rows=-(-peer.PROMPTS * peer.SAMPLES // jax.device_count()),
      group=peer.SAMPLES // 2,
      merge=False,
      repetition_count=0,
      **(TREE if tree else FLAT),
    )
    config.advantage.estimator = "treepo" if tree else "grpo"
    config.learn.update(
      row_length=ROW_LENGTH,
      micro_rows=2,
      aggregate="sequence",
      clip_low=peer.CLIP,
      clip_high=peer.CLIP,
      kl="k1",
      kl_weight=peer.BETA,
    )
    config.train.learning_rate = peer.RATE
  return config_lib.validate(config)


class Worker:
  """Our side: the verbs of a training step, on a random policy."""

  def __init__(self, tree: bool):
    self.config = configure(tree)
    self.mesh = mesh_lib.create(self.config)
    self.graph, params = transformer.create(ARCHITECTURE, jax.random.key(0))
    self.state = update.create(params, self.config, self.mesh)
    self.shape = grow.settings(self.config, vocabulary=peer.VOCABULARY, eos_ids=(), closed=-1)
    self.table = np.zeros((1, peer.VOCABULARY), np.int8)
    tokens = [[peer.Bytes().bos_id(), *peer.Bytes().encode(text)] for text in peer.texts()]
    self.prompts = [Prompt(id=i, text="", tokens=t, gold="") for i, t in enumerate(tokens)]
    self.key = jax.random.key(0)

  def sample(self) -> tree_lib.Tree:
    """Grows the trees, all of whose answers are whole."""
    self.key, key = jax.random.split(self.key)
    tree, cost = grow.grow(
      update.weights(self.state, self.config),
      key,
      self.prompts,
      graph=self.graph,
      table=self.table,
      shape=self.shape,
      mesh=self.mesh,
    )
    self.saving = 1 - cost["rollout/tokens_decoded"] / peer.TOKENS
    self.answers = [[tree_lib.response(tree, b, row) for row in rows] for b, rows in enumerate(tree.leaves)]
    assert all(len(answer) == peer.NEW for answers in self.answers for answer in answers)
    return tree

  def step(self) -> None:
    """Takes a whole step; `config` says how."""
    tree = self.sample()
    reward = np.zeros(tree.parent.shape, np.float32)
    for b, rows in enumerate(tree.leaves):
      reward[b, rows] = [sum(answer) % 97 / 97 for answer in self.answers[b]]
    credit = jax.device_get(advantages.estimate(tree, reward, config=self.config))
    batches = packing.pack(tree, credit, config=self.config)
    self.state, measured = update.step(
      self.state, batches, graph=self.graph, config=self.config, mesh=self.mesh
    )
    jax.device_get(measured)
