"""Weights against transformers, both ways, and every way in which a directory can be wrong."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from safetensors.flax import load_file, save_file

from treepo_jax.config import UserError
from treepo_jax.model import mesh as mesh_lib
from treepo_jax.model import shards, transformer, weights

LENGTH, PROMPT = 80, 16
SHARED = Path(os.environ.get("TREEPO_SHARED", Path(__file__).parents[3] / "shared"))
STORIES = SHARED / "data" / "models" / "stories260K"
QWEN3 = SHARED / "data" / "tokenizers" / "qwen3"


def _forward(graph):
  """Returns jitted (params, tokens [B, L]) -> logits [B, L, V] of plain causal rows."""

  @jax.jit
  def logits(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    end = jnp.full(tokens.shape, tokens.shape[1])
    return nnx.merge(graph, params).logits(
      transformer.hidden(graph, params, tokens, positions, end)
    )

  return logits


def _greedy(logits, params, prompt: list[int], length: int) -> list[int]:
  row = np.zeros((1, length), np.int32)
  row[0, : len(prompt)] = prompt
  for i in range(len(prompt), length):
    row[0, i] = np.asarray(logits(params, row))[0, i - 1].argmax()
  return row[0].tolist()


def _reference_logits(model, tokens) -> np.ndarray:
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens).long()).logits.float().numpy()


def _tokens(vocab_size: int = 61) -> np.ndarray:
  return np.random.default_rng(0).integers(0, vocab_size, (1, LENGTH)).astype(np.int32)


def _equal(a, b) -> None:
  """Bit for bit, dtypes included; NaN-free weights."""
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def test_logits_and_greedy_tokens_are_those_of_transformers(case, reference):
  import torch

  model, folder = reference(case)
  graph, params, _ = weights.load(folder, "float32")
  logits = _forward(graph)
  tokens = _tokens()
  expected = _reference_logits(model, tokens)
  assert np.abs(expected).max() > 2  # a model that says something
  np.testing.assert_allclose(logits(params, tokens), expected, atol=1e-4)
  prompt = tokens[:, :PROMPT]
  greedy = model.generate(
    torch.tensor(prompt).long(), do_sample=False, max_new_tokens=LENGTH - PROMPT, pad_token_id=0
  )
  assert _greedy(logits, params, prompt[0].tolist(), LENGTH) == greedy[0].tolist()


def test_saved_model_is_the_one_loaded(case, reference, tmp_path):
  model, folder = reference(case)
  _, params, arch = weights.load(folder, "float32")
  weights.save(tmp_path / "ours", arch, params, source=folder)
  _equal(load_file(tmp_path / "ours" / shards.WHOLE), load_file(folder / shards.WHOLE))
  again = type(model).from_pretrained(tmp_path / "ours")
  assert again.dtype == model.dtype
  for key in ("rope_parameters", "bos_token_id", "eos_token_id", "tie_word_embeddings", "head_dim"):
    if hasattr(model.config, key):
      assert getattr(again.config, key) == getattr(model.config, key), key
  tokens = _tokens()
  np.testing.assert_array_equal(_reference_logits(again, tokens), _reference_logits(model, tokens))
  _, reloaded, same = weights.load(tmp_path / "ours", "float32")
  assert same == arch
  _equal(reloaded, params)


def test_bfloat16_is_kept_bit_for_bit(reference, tmp_path):
  import torch

  model, folder = reference("qwen2")
  half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
  half.save_pretrained(tmp_path / "half")
  graph, params, arch = weights.load(tmp_path / "half", "bfloat16")
  weights.save(tmp_path / "ours", arch, params, source=folder)
  _equal(load_file(tmp_path / "ours" / shards.WHOLE), load_file(tmp_path / "half" / shards.WHOLE))
  assert type(model).from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
  _equal(
    weights.load(tmp_path / "half", "float32")[1],
    jax.tree.map(lambda x: x.astype(jnp.float32), params),
  )
  # as far from the rounded weights' exact logits as transformers in bfloat16 is
  tokens = _tokens()
  exact = _reference_logits(
    type(model).from_pretrained(tmp_path / "half", dtype=torch.float32), tokens
  )
  error = np.abs(_forward(graph)(params, tokens) - exact)
  theirs = np.abs(_reference_logits(half, tokens) - exact)
  assert error.mean() < 1.5 * theirs.mean()
  assert error.max() < 2 * theirs.max()


def test_float16_is_read(reference, tmp_path):
  import torch

  model, folder = reference("llama_tied")
  half = type(model).from_pretrained(folder, dtype=torch.float16)
  half.save_pretrained(tmp_path)
  _, params, _ = weights.load(tmp_path, "float32")
  embed = half.get_input_embeddings().weight.detach().float().numpy()
  np.testing.assert_array_equal(params["embed"], embed)


def test_shards_are_one_model(reference, tmp_path):
  model, folder = reference("qwen3")
  model.save_pretrained(tmp_path, max_shard_size="20KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  _equal(weights.load(tmp_path, "float32")[1], weights.load(folder, "float32")[1])


def test_stories260k_is_what_transformers_says():
  if not STORIES.exists():
    pytest.skip(f"stories260K is not at {STORIES}")
  expected = json.loads((STORIES / "reference.json").read_text())
  graph, params, arch = weights.load(STORIES, "float32")
  logits = _forward(graph)
  greedy = expected["greedy_200_token_ids_from_bos"]
  ids = expected["input_ids"]
  row = np.zeros((1, len(greedy)), np.int32)
  row[0, : len(ids)] = ids
  log_probs = jax.nn.log_softmax(logits(params, row))[0]
  found = [log_probs[i, token] for i, token in enumerate(ids[1:])]
  np.testing.assert_allclose(found, expected["next_token_logprobs"], atol=1e-4)
  top, value = zip(*expected["last_top5"], strict=True)
  np.testing.assert_allclose(log_probs[len(ids) - 1][jnp.array(top)], value, atol=1e-4)
  assert _greedy(logits, params, greedy[:1], len(greedy)) == greedy
  assert arch.tied and arch.heads == 2 * arch.kv_heads


# On the mesh


def _mesh(*shape: int) -> jax.sharding.Mesh:
  return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def test_mesh_holds_the_same_weights(case, reference):
  _, folder = reference(case)
  mesh = _mesh(2, 2, 2)
  graph, whole, arch = weights.load(folder, "float32")
  meshed_graph, split, meshed_arch = weights.load(folder, "float32", mesh)
  assert (meshed_graph, meshed_arch) == (graph, arch)
  _equal(split, whole)
  assert jax.tree.map(lambda x: x.sharding, split) == mesh_lib.shardings(whole, mesh)
  kernel = split["blocks"]["gate"]["kernel"]
  assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 24)}


def test_mesh_saves_the_same_file(reference, tmp_path):
  _, folder = reference("qwen3")
  _, params, arch = weights.load(folder, "float32", _mesh(1, 4, 2))
  weights.save(tmp_path / "ours", arch, params)
  _equal(load_file(tmp_path / "ours" / shards.WHOLE), load_file(folder / shards.WHOLE))


def test_mesh_reads_every_weight_once_and_never_whole(reference, monkeypatch):
  _, folder = reference("qwen2")
  read = []

  class Watched(shards.Tensor):
    def pieces(self, index):
      for rows, piece in super().pieces(index):
        read.append((piece.size, int(np.prod(self.shape))))
        yield rows, piece

  monkeypatch.setattr(shards, "Tensor", Watched)
  _, params, _ = weights.load(folder, "float32", _mesh(2, 2, 2))
  assert sum(part for part, _ in read) == sum(x.size for x in jax.tree.leaves(params))
  assert {part for part, whole in read if whole == 32 * 48} == {32 * 48 // 4}


@pytest.mark.slow
def test_loading_holds_no_second_copy(tmp_path):
  """129 MB of bfloat16 in several files, in processes of their own; exact, and saved as it was."""
  pytest.importorskip("torch")
  root, out = Path(__file__).parents[2], tmp_path / "figures.json"
  command = [sys.executable, root / "experiments" / "load_memory.py", "--quick", f"--json={out}"]
  subprocess.run(
    [*command, f"--folder={tmp_path / 'model'}"],
    env=os.environ | {"PYTHONPATH": str(root)},
    check=True,
    stdout=subprocess.DEVNULL,
  )
  figures = json.loads(out.read_text())
  assert figures["files"] > 2 and figures["bfloat16"]["round_trip_exact"]
  assert figures["bfloat16"]["added_over_size"] < 1.3
  assert figures["float32"]["added_over_size"] < 1.3
  assert figures["float32"]["log_prob_difference"]["max"] < 1e-4
  # both round, each its own way
  ours, theirs = (figures[f"{who}_bfloat16_to_exact"] for who in ("ours", "theirs"))
  assert ours["mean"] < 2 * theirs["mean"]


# What can be wrong with a directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Returns (arch, params, directory) of a small untied Qwen2 saved by us; needs no torch."""
  arch = transformer.Architecture(
    family="qwen2",
    vocab_size=11,
    width=8,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    hidden=12,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=32,
    tied=False,
    qkv_bias=True,
    output_bias=False,
    qk_norm=False,
  )
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), transformer.abstract(arch)[1]
  )
  folder = tmp_path_factory.mktemp("model") / "saved"
  weights.save(folder, arch, params)
  return arch, params, folder


@pytest.fixture
def broken(model, tmp_path):
  """Returns a copy of the model's directory, and edit(function of its tensors)."""
  folder = tmp_path / "broken"
  shutil.copytree(model[2], folder)

  def edit(change):
    tensors = load_file(folder / shards.WHOLE)
    change(tensors)
    save_file(tensors, folder / shards.WHOLE)

  return folder, edit


def _set(folder: Path, **keys) -> None:
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | keys))


def _error(folder: Path) -> str:
  with pytest.raises(UserError) as caught:
    weights.load(folder, "float32")
  return str(caught.value)


def test_round_trip_without_torch(model):
  arch, params, folder = model
  _, loaded, found = weights.load(folder, "float32")
  assert found == arch
  _equal(loaded, params)


def test_no_directory(tmp_path):
  assert "nowhere: no such directory" in _error(tmp_path / "nowhere")


def test_no_weights(broken):
  (broken[0] / shards.WHOLE).unlink()
  assert "neither model.safetensors nor model.safetensors.index.json" in _error(broken[0])


def test_index_names_an_absent_shard(broken):
  folder, _ = broken
  (folder / shards.WHOLE).rename(folder / "model-00001-of-00002.safetensors")
  files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
  (folder / shards.INDEX).write_text(json.dumps({"weight_map": files}))
  assert "model-00002-of-00002.safetensors: no such file, but" in _error(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_index_that_is_none(broken, text):
  folder, _ = broken
  (folder / shards.WHOLE).unlink()
  (folder / shards.INDEX).write_text(text)
  assert "model.safetensors.index.json" in _error(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(broken, keep):
  file = broken[0] / shards.WHOLE
  file.write_bytes(file.read_bytes()[:keep])
  assert "model.safetensors: not a whole safetensors file" in _error(broken[0])


def test_missing_tensor(broken):
  folder, edit = broken
  edit(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
  assert "no tensor model.layers.1.mlp.up_proj.weight" in _error(folder)


def test_missing_head_asks_about_tying(broken):
  folder, edit = broken
  edit(lambda tensors: tensors.pop("lm_head.weight"))
  assert "tie_word_embeddings" in _error(folder)
  _set(folder, tie_word_embeddings=True)
  assert "head" not in weights.load(folder, "float32")[1]


def test_misshapen_tensor(broken):
  folder, edit = broken
  name = "model.layers.0.self_attn.k_proj.weight"
  edit(lambda tensors: tensors.update({name: jnp.zeros((8, 4))}))
  message = _error(folder)
  assert f"tensor {name} has shape [8, 4], but config.json asks for [4, 8]" in message


def test_tensor_that_is_not_of_floats(broken):
  folder, edit = broken
  edit(lambda tensors: tensors.update({"model.norm.weight": jnp.zeros(8, jnp.int8)}))
  assert "tensor model.norm.weight is I8; supported are F32" in _error(folder)


def test_tensor_without_a_place(broken):
  folder, edit = broken
  edit(lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": jnp.zeros((12, 8))}))
  assert "tensor model.layers.2.mlp.up_proj.weight has no place" in _error(folder)


def test_frequencies_of_old_checkpoints_are_ignored(broken, model):
  folder, edit = broken
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  edit(lambda tensors: tensors.update({name: jnp.zeros(2)}))
  _equal(weights.load(folder, "float32")[1], model[1])


def test_tied_head_is_read_once_where_it_is_the_embedding(broken, model):
  folder, edit = broken
  _set(folder, tie_word_embeddings=True)
  assert "lm_head.weight differs from model.embed_tokens.weight" in _error(folder)
  edit(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
  _, params, arch = weights.load(folder, "float32")
  assert arch.tied and "head" not in params
  np.testing.assert_array_equal(params["embed"], model[1]["embed"])


# Saving


def test_a_real_tokenizer_comes_along_byte_for_byte(model, tmp_path):
  """transformers then reads from the copy what it reads from the source: ids, template, ends."""
  transformers = pytest.importorskip("transformers")
  if not QWEN3.exists():
    pytest.skip(f"the tokenizer of Qwen3 is not at {QWEN3}")
  arch, params, _ = model
  source = tmp_path / "source"
  source.mkdir()
  files = ("tokenizer.json", "tokenizer_config.json")
  for name in files:
    shutil.copyfile(QWEN3 / name, source / name)
  ends = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
  (source / "generation_config.json").write_text(json.dumps(ends))
  weights.save(tmp_path / "ours", arch, params, source=source)
  for name in files:
    assert (tmp_path / "ours" / name).read_bytes() == (source / name).read_bytes()
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
  turns = [{"role": "user", "content": "7 🎉"}]
  text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
  assert text == "<|im_start|>user\n7 🎉<|im_end|>\n<|im_start|>assistant\n"
  assert tokenizer.encode("<|im_start|>hello<|im_end|>") == [151644, 14990, 151645]
  generation = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
  assert generation.eos_token_id == [151645, 151643]


def test_tokenizer_and_special_tokens_come_along(model, tmp_path):
  arch, params, _ = model
  source = tmp_path / "source"
  source.mkdir()
  for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "notes.txt"):
    (source / name).write_text(name)
  (source / "config.json").write_text(json.dumps({"eos_token_id": [3, 4], "bos_token_id": 1}))
  weights.save(tmp_path / "ours", arch, params, source=source)
  assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
  ]
  assert (tmp_path / "ours" / "tokenizer.json").read_text() == "tokenizer.json"
  config = json.loads((tmp_path / "ours" / "config.json").read_text())
  ids = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
  assert ids == [1, [3, 4], None]
  with pytest.raises(UserError, match="nowhere: no such directory"):
    weights.save(tmp_path / "ours", arch, params, source=tmp_path / "nowhere")


def test_save_replaces_a_model_and_nothing_else(model, broken):
  arch, params, _ = model
  folder, _ = broken
  (folder / "notes.txt").write_text("mine")
  changed = params | {"embed": params["embed"] + 1}
  weights.save(folder, arch, changed, source=folder)
  _equal(weights.load(folder, "float32")[1], changed)
  assert (folder / "notes.txt").read_text() == "mine"


def test_weights_are_cut_into_files_that_transformers_reads(case, reference, tmp_path):
  model, folder = reference(case)
  _, params, arch = weights.load(folder, "float32")
  weights.save(tmp_path / "ours", arch, params, source=folder, shard_bytes=20_000)
  files = sorted((tmp_path / "ours").glob("*.safetensors"))
  assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
  sizes = [sum(x.nbytes for x in load_file(file).values()) for file in files]
  assert max(sizes) <= 20_000
  index = json.loads((tmp_path / "ours" / shards.INDEX).read_text())
  assert index["metadata"]["total_size"] == sum(sizes)
  assert all(name in load_file(tmp_path / "ours" / f) for name, f in index["weight_map"].items())
  _equal({k: v for f in files for k, v in load_file(f).items()}, load_file(folder / shards.WHOLE))
  again = type(model).from_pretrained(tmp_path / "ours")
  tokens = _tokens()
  np.testing.assert_array_equal(_reference_logits(again, tokens), _reference_logits(model, tokens))


def test_one_file_and_shards_replace_each_other(model, broken):
  """What is left over of the other kind would be read in place of the new weights."""
  arch, params, _ = model
  folder, _ = broken
  for i, limit in enumerate((100, 10**9, 1000)):
    changed = params | {"embed": params["embed"] + i}
    weights.save(folder, arch, changed, shard_bytes=limit)
    _equal(weights.load(folder, "float32")[1], changed)
    assert (folder / shards.WHOLE).exists() == (limit == 10**9)
    named = (
      set(json.loads((folder / shards.INDEX).read_text())["weight_map"].values())
      if (folder / shards.INDEX).exists()
      else {shards.WHOLE}
    )
    assert {file.name for file in folder.glob("*.safetensors")} == named


def test_a_full_disk_leaves_what_was_there(model, broken):
  arch, params, _ = model
  folder, _ = broken
  before = (folder / shards.WHOLE).read_bytes()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  for path in (folder, folder.with_name("new")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
      with pytest.raises(UserError, match=f"{path}: cannot write the model here: File too large"):
        weights.save(path, arch, jax.tree.map(lambda x: x + 1, params))
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert (folder / shards.WHOLE).read_bytes() == before
  assert [file.name for file in folder.parent.iterdir()] == [folder.name]


def test_a_path_that_cannot_be(model, tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "model"):
    with pytest.raises(UserError, match=f"{path}: cannot write the model here"):
      weights.save(path, *model[:2])
  assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_params_of_another_architecture_are_a_mistake(model, tmp_path):
  arch, params, _ = model
  with pytest.raises(ValueError, match="not those of"):
    weights.save(tmp_path / "ours", arch, params | {"embed": params["embed"][1:]})
  assert not (tmp_path / "ours").exists()


def test_every_weight_has_a_name(model):
  arch = model[0].__class__(
    **(vars(model[0]) | {"qk_norm": True, "output_bias": True})  # every weight there is
  )
  leaves = jax.tree_util.tree_leaves_with_path(transformer.abstract(arch)[1])
  assert {weights._key(keys) for keys, _ in leaves} == weights.NAMES.keys()
  assert len(set(weights.NAMES.values())) == len(weights.NAMES)
