"""The decoder: packed rows are their paths, decoding is the packed forward, whatever the layers."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from treepo_jax.model import attention, transformer

ARCH = transformer.Architecture(
  family="qwen3",
  vocab_size=37,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  hidden=24,
  norm_eps=1e-6,
  rope_theta=1e4,
  rope_scaling=None,
  max_positions=64,
  tied=False,
  qkv_bias=True,
  output_bias=True,
  qk_norm=True,
)

# Row 0 holds two trees and padding, row 1 one tree; every tree is a prompt with branches below.
#   row 0:  0 1 2 -> 3 4 -> 5      row 1:  0 1 -> 2 3 4 -> 5 6
#                 |     `-> 6 7               |       `-> 7 8
#                 `-> 8                       `-> 9 10 11
#           9 -> 10
PARENTS = [
  [-1, 0, 1, 2, 3, 4, 4, 6, 2, -1, 9, None],
  [-1, 0, 1, 2, 3, 4, 5, 4, 7, 1, 9, 10],
]
LEAVES = [(0, 5), (0, 7), (0, 8), (0, 10), (1, 6), (1, 8), (1, 11)]


def _path(row: int, token: int) -> list[int]:
  parent = PARENTS[row][token]
  return [token] if parent is None or parent < 0 else [*_path(row, parent), token]


def _packed() -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns tokens, positions and end of the rows above; every token of a row is another one."""
  tokens = np.stack([np.arange(1, 13), np.arange(20, 32)]).astype(np.int32)
  positions, end = np.zeros_like(tokens), np.zeros_like(tokens)
  for row, parents in enumerate(PARENTS):
    for token, parent in enumerate(parents):
      if parent is not None:
        path = _path(row, token)
        positions[row, token] = len(path) - 1
        end[row, path] = token + 1
  return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(end)


@functools.cache
def _model(arch: transformer.Architecture = ARCH, dtype=jnp.float32):
  """Returns (graph, params) with every weight far from its trivial start."""
  random = np.random.default_rng(0)
  graph, abstract = transformer.abstract(arch, dtype)
  params = jax.tree.map(lambda x: jnp.asarray(0.4 * random.normal(size=x.shape), x.dtype), abstract)
  return graph, params


@functools.cache
def _hidden(graph):
  return jax.jit(functools.partial(transformer.hidden, graph))


def _paths(graph, params, paths: list[list[int]]) -> np.ndarray:
  """Returns hidden states of token paths, one a row, padded on the right."""
  length = max(map(len, paths))
  tokens = np.array([path + [0] * (length - len(path)) for path in paths], np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  end = np.broadcast_to(np.array([[len(path)] for path in paths], np.int32), tokens.shape)
  return np.asarray(_hidden(graph)(params, tokens, positions, end))


@pytest.fixture(params=[64, 4], ids=["dense", "blocks"])
def block(request, monkeypatch) -> int:
  """Tokens above which rows attend block by block: none of the rows here does, or all of them."""
  monkeypatch.setattr(attention, "BLOCK", request.param)
  return request.param


def test_packed_trees_are_their_paths(block):
  graph, params = _model()
  packed = np.asarray(jax.jit(functools.partial(transformer.hidden, graph))(params, *_packed()))
  tokens = _packed()[0]
  paths = [_path(*leaf) for leaf in LEAVES]
  alone = _paths(
    graph,
    params,
    [[int(tokens[r, i]) for i in path] for (r, _), path in zip(LEAVES, paths, strict=True)],
  )
  for (row, _), path, expected in zip(LEAVES, paths, alone, strict=True):
    np.testing.assert_allclose(packed[row, path], expected[: len(path)], atol=1e-5)
  assert np.isfinite(packed).all()  # padding too


@functools.cache
def _gradient(remat: str, block: int):
  """Returns (params, row, token) -> log-prob that the token gives to id 0, and its gradient."""
  assert block == attention.BLOCK
  graph, _ = _model()

  def out(params, row, token):
    hidden = transformer.hidden(graph, params, *_packed(), remat=remat)[row, token]
    return transformer.log_probs(graph, params, hidden, jnp.int32(0))[0]

  return jax.jit(jax.value_and_grad(out))


@pytest.mark.parametrize(("row", "token"), [(0, 5), (0, 8), (0, 10), (1, 8)])
def test_only_ancestors_move_a_token(row, token, block):
  _, params = _model()
  _, gradient = _gradient("none", block)(params, row, token)
  moved = np.abs(gradient["embed"]).sum(-1)  # every token of the batch is another one
  path = {int(_packed()[0][row, i]) for i in _path(row, token)}
  assert {int(i) for i in np.flatnonzero(moved)} == path


@pytest.mark.parametrize("remat", transformer.KEEP)
def test_remat_changes_nothing(remat, block):
  _, params = _model()
  plain, found = (_gradient(x, block)(params, 0, 7) for x in ("none", remat))
  chex.assert_trees_all_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("dots", 2), ("layer", 3)])
def test_only_whole_layers_attend_anew(remat, passes, monkeypatch):
  monkeypatch.setattr(attention, "BLOCK", 4)
  lowered = _gradient(remat, 4).lower(_model()[1], 0, 7).as_text()
  # Over the tiles, forward and backward and what is done anew; over the layers, there and back.
  assert lowered.count("stablehlo.while") == passes + 2


def test_float32_multiplies_in_float32_on_every_backend(block):
  graph, params = _model()

  def loss(params, targets):
    hidden = transformer.hidden(graph, params, *_packed())
    return transformer.log_probs(graph, params, hidden, targets)[0].sum()

  lowered = jax.jit(jax.value_and_grad(loss)).lower(params, _packed()[0]).as_text()
  products = [line for line in lowered.splitlines() if "dot_general" in line]
  assert len(products) > 20
  assert [line for line in products if "[HIGHEST, HIGHEST]" not in line] == []


def test_log_probs_are_the_softmax_of_the_logits():
  graph, params = _model()
  hidden = 3 * jax.random.normal(jax.random.key(0), (5, ARCH.width))
  targets = jnp.array([0, 3, 36, 7, 7])
  found, entropy = transformer.log_probs(graph, params, hidden, targets)
  log = np.asarray(hidden, np.float64) @ np.asarray(params["head"]["kernel"], np.float64)
  log -= np.log(np.exp(log).sum(-1, keepdims=True))
  np.testing.assert_allclose(found, log[np.arange(5), targets], rtol=1e-4)
  np.testing.assert_allclose(entropy, -(np.exp(log) * log).sum(-1), rtol=1e-4)


def test_prefill_sees_nothing_beyond_the_prompt():
  graph, params = _model()
  prefill = jax.jit(functools.partial(transformer.prefill, graph))
  tokens, length = jnp.array([[5, 6, 7, 8], [9, 1, 0, 0]]), jnp.array([4, 2])
  keys, values = prefill(params, tokens, length)
  assert keys.shape == values.shape == (ARCH.layers, 2, 4, ARCH.kv_heads, ARCH.head_dim)
  full = jnp.array([[9, 1, 7, 8], [5, 6, 7, 8]])  # the same prompts, one now a prefix
  other_keys, other_values = prefill(params, full, jnp.array([4, 4]))
  for found, other in ((keys, other_keys), (values, other_values)):
    np.testing.assert_allclose(found[:, 0], other[:, 1], atol=1e-5)
    np.testing.assert_allclose(found[:, 1, :2], other[:, 0, :2], atol=1e-5)


# Decoding: two groups of three rows. A group's context is a prompt of up to 6 tokens and two
# segments of 3 below it; row 0 goes on from the first, row 1 from the second, row 2 from neither.
PROMPT, SEGMENT, OWN = 6, 3, 4
LENGTHS = (5, 3)


def _context(graph, params):
  """Returns (Context, the path of each row [G][M] as tokens), layers in one array."""
  random = np.random.default_rng(1)
  tokens = random.integers(0, ARCH.vocab_size, (2, PROMPT + 2 * SEGMENT)).astype(np.int32)
  positions, end = np.zeros_like(tokens), np.zeros_like(tokens)
  visible = np.zeros((2, 3, tokens.shape[1]), bool)
  paths = []
  first, second = slice(PROMPT, PROMPT + SEGMENT), slice(PROMPT + SEGMENT, None)
  for group, length in enumerate(LENGTHS):
    positions[group, :length] = np.arange(length)
    end[group, :length] = tokens.shape[1]
    visible[group, :, :length] = True
    for row, part in enumerate((first, second)):
      positions[group, part] = length + np.arange(SEGMENT)
      end[group, part] = np.arange(tokens.shape[1])[part][-1] + 1
      visible[group, row, part] = True
    paths.append([tokens[group, visible[group, row]].tolist() for row in range(3)])
  model = nnx.merge(graph, params)
  cache = jax.jit(functools.partial(model.packed, remat="none"))(tokens, positions, end)[1]
  key, value = (jnp.swapaxes(x, 2, 3) for x in cache)  # [N, G, C, K, D] -> [N, G, K, C, D]
  key = jnp.swapaxes(key, -1, -2)
  fields = {"key": key, "value": value, "visible": jnp.asarray(visible)}
  return transformer.Context(**fields), paths


def _decode(graph, params, context, start, tokens, unroll: bool) -> np.ndarray:
  """Returns hidden states [steps, G, M, W] of tokens [steps, G, M] fed one by one."""
  n, g, k, _, d = context.value.shape
  junk = jnp.full((n, g, k, start.shape[1], OWN, d), 100, context.key.dtype)  # not yet written
  own = (junk.swapaxes(-1, -2), junk)
  if unroll:
    context = context.replace(key=list(context.key), value=list(context.value))
    own = (list(own[0]), list(own[1]))

  @jax.jit
  def step(params, tokens, positions, context, own, t):
    traced.append(True)
    layers = transformer.unstack(params) if unroll else None
    model = nnx.merge(graph, params)
    return transformer.decode_step(model, layers, tokens, positions, context, own, t)

  found, traced = [], []
  for t, row in enumerate(tokens):
    out, own = step(params, row, start + t, context, own, jnp.int32(t))
    found.append(np.asarray(out, np.float32))
  assert traced == [True]  # one program for every step
  return np.stack(found)


@pytest.mark.parametrize("unroll", [False, True], ids=["scanned", "unrolled"])
def test_decoding_is_the_packed_forward(unroll):
  graph, params = _model()
  context, paths = _context(graph, params)
  start = jnp.array([[len(path) for path in group] for group in paths])
  tokens = np.random.default_rng(2).integers(0, ARCH.vocab_size, (OWN, 2, 3)).astype(np.int32)
  found = _decode(graph, params, context, start, tokens, unroll)
  for group in range(2):
    for row in range(3):
      path = paths[group][row]
      whole = _paths(graph, params, [path + tokens[:, group, row].tolist()])[0]
      np.testing.assert_allclose(found[:, group, row], whole[len(path) :], atol=1e-5)


def test_bfloat16_is_near_float32():
  graph, params = _model()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  full = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  packed = _hidden(graph)(half, *_packed())
  assert packed.dtype == jnp.bfloat16
  exact = np.asarray(_hidden(graph)(full, *_packed()))
  assert np.abs(packed.astype(jnp.float32) - exact).mean() < 0.02 * np.abs(exact).mean()
  log_probs, entropy = transformer.log_probs(graph, half, packed, jnp.asarray(_packed()[0]))
  assert log_probs.dtype == entropy.dtype == jnp.float32

  context, paths = _context(graph, half)
  assert jnp.asarray(context.key).dtype == jnp.bfloat16
  start = jnp.array([[len(path) for path in group] for group in paths])
  tokens = np.random.default_rng(2).integers(0, ARCH.vocab_size, (OWN, 2, 3)).astype(np.int32)
  found = _decode(graph, half, context, start, tokens, True)
  whole = _paths(graph, full, [paths[0][0] + tokens[:, 0, 0].tolist()])[0][len(paths[0][0]) :]
  assert np.abs(found[:, 0, 0] - whole).mean() < 0.02 * np.abs(whole).mean()


def test_create_is_what_abstract_says():
  arch = dataclasses.replace(ARCH, width=8, layers=3, tied=True)
  graph, params = transformer.create(arch, jax.random.key(0), jnp.bfloat16)
  same, abstract = transformer.abstract(arch, jnp.bfloat16)
  assert graph == same and hash(graph) == hash(same)
  chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract)
  assert "head" not in params
  kernel = params["blocks"]["gate"]["kernel"].astype(jnp.float32)
  assert not np.array_equal(kernel[0], kernel[1])  # every layer has its own draw
  np.testing.assert_allclose(kernel.std(), arch.width**-0.5, rtol=0.1)


def test_llama3_frequencies_have_three_ranges():
  scaling = transformer.RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
  )
  plain = transformer.inverse_frequencies(dataclasses.replace(ARCH, head_dim=16))
  found = transformer.inverse_frequencies(
    dataclasses.replace(ARCH, head_dim=16, rope_scaling=scaling)
  )
  wave = 2 * np.pi / plain
  np.testing.assert_array_equal(found[wave < 16], plain[wave < 16])  # short waves stay
  np.testing.assert_allclose(found[wave > 64], plain[wave > 64] / 8, rtol=1e-6)  # long stretch
  between = (wave > 16) & (wave < 64)
  assert between.sum() == 2 and (found < plain)[between].all()
  assert (found > plain / 8)[between].all()
