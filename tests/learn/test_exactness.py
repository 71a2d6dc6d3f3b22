"""Every loss over packed trees against the same loss path by path, and against its definition.

The reference puts each trajectory in a row of its own, plainly causal, and writes each loss out
token by token as it is published; it shares nothing with packing or losses.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests import toy
from treepo_jax import config as config_lib
from treepo_jax.learn import advantages, packing, update
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import transformer
from treepo_jax.rollout import tree as tree_lib

SHAPE: dict[str, Any] = dict(
  vocab_size=64,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=4,
  hidden=24,
  norm_eps=1e-6,
  rope_theta=1e4,
  max_positions=128,
  output_bias=False,
)
FAMILIES = {
  "qwen2": dict(family="qwen2", rope_scaling=None, tied=True, qkv_bias=True, qk_norm=False),
  "qwen3": dict(family="qwen3", rope_scaling=None, tied=False, qkv_bias=False, qk_norm=True),
  "llama": dict(
    family="llama",
    rope_scaling=transformer.RopeScaling(8.0, 1.0, 4.0, 32),
    tied=False,
    qkv_bias=False,
    qk_norm=False,
  ),
}
WHOLE, CUT = 120, 40  # row lengths: every tree in one piece; the large ones cut

accumulate = jax.jit(update.accumulate, static_argnames=("graph", "config", "mesh"))


def settings(row_length=WHOLE, how="tree", depth=6, **learn):
  c: Any = config_lib.default()
  c.rollout.prompt_length, c.rollout.segment, c.rollout.page = 5, 4, 4
  c.rollout.depth = depth
  c.learn.row_length, c.learn.micro_rows, c.learn.packing = row_length, 8, how
  c.learn.clip_dual = 3.0
  c.learn.update(learn)
  return config_lib.validate(c)


def model(family="qwen2"):
  arch = transformer.Architecture(**SHAPE, **FAMILIES[family])
  graph, params = transformer.create(arch, jax.random.key(1))
  return graph, params, transformer.create(arch, jax.random.key(2))[1]


def sample(seed=0, **shape):
  """Returns trees with repeated leaves, and advantages of each trajectory at each of its rows."""
  shape = {"nodes": 20, **shape}
  tree = toy.random_trees(seed, vocabulary=SHAPE["vocab_size"], **shape)
  rng = np.random.default_rng(seed)
  old = rng.normal(-np.log(SHAPE["vocab_size"]), 0.7, tree.log_probs.shape).astype(np.float32)
  leaves = np.asarray(tree.leaves)
  again = np.where(np.arange(leaves.shape[1]) % 3 == 0, leaves, tree_lib.NO_ROW)
  leaves = np.concatenate([leaves, again], 1)
  tree = replace(tree, leaves=jnp.asarray(leaves), log_probs=jnp.asarray(old))
  weight = toy.along_paths(tree, np.ones(tree.parent.shape)).weight
  each = rng.uniform(0.5, 2, leaves.shape)[..., None].astype(np.float32)
  value = rng.normal(size=weight.shape).astype(np.float32) * weight
  return tree, advantages.Advantage(raw=value, white=value, weight=weight * each)


def paths(tree, advantage):
  """Returns the trajectories one by one, padded: arrays by name [n, T], and weights [n]."""
  tree = jax.tree.map(np.asarray, tree)
  longest = tree.prompt.shape[1] + int(tree.depth.max()) * tree.tokens.shape[2]
  rows, weights, through = [], [], {}
  for b, w in np.argwhere(tree.leaves != tree_lib.NO_ROW):
    nodes, row = [], int(tree.leaves[b, w])
    while row > 0:
      nodes, row = [row, *nodes], int(tree.parent[b, row])
    p = int(tree.prompt_length[b])
    made: dict[str, Any] = {
      name: np.zeros(longest, kind)
      for name, kind in (("tokens", int), ("old", float), ("a", float), ("node", int))
    }
    made["tokens"][:p] = tree.prompt[b, :p]
    made["node"][:] = -1
    at = p
    for node in nodes:
      n = int(tree.length[b, node])
      made["tokens"][at : at + n] = tree.tokens[b, node, :n]
      made["old"][at : at + n] = tree.log_probs[b, node, :n]
      made["a"][at : at + n] = advantage.white[b, w, node]
      made["node"][at : at + n] = b * tree.parent.shape[1] + node
      at += n
      through.setdefault(b * tree.parent.shape[1] + node, []).append(len(rows))
    made["end"] = np.where(np.arange(longest) < at, at, 0)
    rows.append(made)
    weights.append(advantage.weight[b, w].max())
  arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  return arrays, np.asarray(weights), through


def reference(graph, params, other, tree, advantage, config):
  """Returns the loss and its gradient, from the definitions, path by path."""
  x, weights, through = paths(tree, advantage)
  mask = x["node"] >= 0
  length = mask.sum(1)
  settings, longest = config.learn, config.rollout.depth * config.rollout.segment
  part = {"sequence": weights / length}.get(settings.aggregate, weights)
  part = np.broadcast_to(part[:, None], mask.shape)
  times = np.ones(mask.shape)
  summed = np.zeros(mask.shape)
  for node, users in through.items():
    times[x["node"] == node] = len(users)
    summed[x["node"] == node] = sum(part[i, 0] * x["a"][i][x["node"][i] == node][0] for i in users)
  if settings.shared == "once":
    part = part / times
  a, share = x["a"], part
  if settings.shared == "sum":
    a, share = summed / times, np.ones(mask.shape)
  divisor = {
    "token": (part * mask).sum(),
    "sequence": weights.sum(),
    "fixed": weights.sum() * longest,
  }[settings.aggregate]

  def forward(weights):
    tokens, end = jnp.asarray(x["tokens"], jnp.int32), jnp.asarray(x["end"], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = transformer.hidden(graph, weights, tokens, positions, end)
    log_probs, entropy = transformer.log_probs(graph, weights, hidden[:, :-1], tokens[:, 1:])
    return jnp.where(mask[:, 1:], log_probs, 0), jnp.where(mask[:, 1:], entropy, 0)

  tail = lambda values: jnp.asarray(values[:, 1:], jnp.float32)
  rollout, a, share, part = tail(np.where(mask, x["old"], 0)), tail(a), tail(share), tail(part)
  old, factor = rollout, jnp.ones(rollout.shape)
  if settings.correction != "none":
    old = forward(params)[0]
    gap = old - rollout
    if settings.correction == "sequence":
      gap = jnp.broadcast_to(gap.sum(1, keepdims=True), gap.shape)
    factor = jnp.minimum(jnp.exp(gap), settings.correction_cap)
  anchor = forward(other)[0]

  def loss(weights):
    log_probs, entropy = forward(weights)
    ratio = jnp.exp(log_probs - old)
    if settings.loss == "gspo":
      mean = (log_probs - old).sum(1) / jnp.asarray(length, jnp.float32)
      ratio = jnp.broadcast_to(jnp.exp(mean)[:, None], ratio.shape)
    clipped = jnp.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
    if settings.loss == "cispo":
      each = -a * jax.lax.stop_gradient(clipped) * log_probs
    elif settings.loss == "reinforce":
      each = -a * log_probs
    else:
      each = jnp.maximum(-a * ratio, -a * clipped)
      if settings.clip_dual:
        each = jnp.where(a < 0, jnp.minimum(each, -a * settings.clip_dual), each)
    total = share * factor * each - settings.entropy_weight * part * entropy
    if settings.kl != "none":
      d = log_probs - anchor
      kl = {"k1": d, "k2": d**2 / 2, "k3": jnp.exp(-d) - 1 + d}[settings.kl]
      total += settings.kl_weight * part * kl
    return (total * mask[:, 1:]).sum() / divisor

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  return float(value), gradient


def packed(graph, params, other, tree, advantage, config, mesh=None):
  """Returns the update's loss and gradient, and the batch."""
  mesh = mesh or mesh_lib.single()
  (batch,) = packing.pack(tree, advantage, config=config)
  state = update.create(params, config, mesh)
  if config.learn.kl != "none":
    state = replace(state, reference=update.create(other, config, mesh).params)
  placed = update.place(batch, config, mesh)
  if config.learn.kl != "none" or config.learn.correction != "none":
    placed = update.scorer(graph, config, mesh)(state, placed)
  gradient, ratios = accumulate(state, placed, graph=graph, config=config, mesh=mesh)
  return float(ratios["loss/total"].mean()), gradient, batch


def assert_equal(got, expected):
  """Compares losses, and every leaf of the gradients by its norm."""
  assert got[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)  # terms of order 1 cancel
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(expected[1]), strict=True
  ):
    x, y = np.asarray(x), np.asarray(y)
    error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-8)
    assert error < 1e-5, f"{jax.tree_util.keystr(path)}: {error}"


LOSSES: dict[str, dict[str, Any]] = {
  "dapo": {},
  "grpo": dict(aggregate="sequence", clip_high=0.2, clip_dual=0.0, kl="k3", kl_weight=0.3),
  "dr_grpo": dict(aggregate="fixed", clip_high=0.2, clip_dual=0.0),
  "cispo": dict(loss="cispo"),
  "reinforce, entropy": dict(loss="reinforce", entropy_weight=0.2),
  "k1, once": dict(kl="k1", kl_weight=0.5, shared="once"),
  "k2, once, by sequence": dict(kl="k2", kl_weight=0.5, shared="once", aggregate="sequence"),
  "sum": dict(shared="sum", entropy_weight=0.1),
  "sum, fixed": dict(shared="sum", aggregate="fixed", loss="cispo"),
  "corrected": dict(correction="token", correction_cap=1.5),
  "all at once": dict(
    correction="token", kl="k3", kl_weight=0.2, entropy_weight=0.1, shared="once", loss="cispo"
  ),
}
BY_TRAJECTORY: dict[str, dict[str, Any]] = {
  "gspo": dict(loss="gspo", aggregate="sequence", clip_low=0.1, clip_high=0.1),
  "gspo by token": dict(loss="gspo", clip_low=0.1, clip_high=0.1),
  "corrected by sequence": dict(correction="sequence", correction_cap=3.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_packed_tree_trains_as_its_paths(name):
  graph, params, other = model()
  tree, advantage = sample()
  expected = reference(graph, params, other, tree, advantage, settings(**LOSSES[name]))
  packings = [(WHOLE, "tree"), (CUT, "tree")]
  if "shared" in LOSSES[name] or name == "dapo":
    packings.append((WHOLE, "path"))
  for row_length, how in packings:
    config = settings(row_length, how, **LOSSES[name])
    *got, batch = packed(graph, params, other, tree, advantage, config)
    assert_equal(got, expected)
    context = int(batch.tokens_trained.sum() - (batch.count > 0).sum())
    assert (context > 0) == (row_length == CUT)


@pytest.mark.parametrize("name", BY_TRAJECTORY)
def test_losses_by_trajectory_are_exact_on_paths_and_refused_on_trees(name):
  graph, params, other = model()
  tree, advantage = sample()
  config = settings(how="path", **BY_TRAJECTORY[name])
  *got, _ = packed(graph, params, other, tree, advantage, config)
  assert_equal(got, reference(graph, params, other, tree, advantage, config))
  key = "correction" if "correction" in BY_TRAJECTORY[name] else "loss"
  with pytest.raises(
    config_lib.UserError, match=rf"learn.{key} = .* config.learn.packing = 'path'"
  ):
    settings(**BY_TRAJECTORY[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("devices", [1, 8])
def test_every_family_on_one_device_and_on_eight(family, devices):
  graph, params, other = model(family)
  tree, advantage = sample(3)
  config = settings(CUT)
  mesh = jax.make_mesh((devices, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  *got, _ = packed(graph, params, other, tree, advantage, config, mesh)
  assert_equal(got, reference(graph, params, other, tree, advantage, config))


@pytest.mark.slow
@pytest.mark.parametrize("row_length", [1200, 96])
def test_large_trees(row_length):
  """Two trees of up to 64 leaves and paths of up to 14 segments, whole and cut."""
  graph, params, other = model("qwen3")
  tree, advantage = sample(5, trees=2, nodes=180, depth=14)
  assert (np.asarray(tree.leaves) != tree_lib.NO_ROW).sum(1).max() >= 64
  assert int(tree.depth.max()) == 14
  config = settings(row_length, depth=14)
  *got, batch = packed(graph, params, other, tree, advantage, config)
  assert_equal(got, reference(graph, params, other, tree, advantage, config))
  context = int(batch.tokens_trained.sum() - (batch.count > 0).sum())
  assert (context > 0) == (row_length == 96)
