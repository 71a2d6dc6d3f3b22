"""Hugging Face directories to params and back, without torch.

Reading goes tensor by tensor into stacked arrays, onto the mesh where there is one: every process
reads only the slices that its devices hold. Writing streams tensor by tensor.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from treepo_jax.config import UserError
from treepo_jax.model import hf_config, shards, transformer
from treepo_jax.model import mesh as mesh_lib

# Our weight -> its name in a checkpoint; {} is the layer, one row of our stacked array.
# A kernel is [in, out] here and [out, in] there.
NAMES = {
  "embed": "model.embed_tokens.weight",
  "blocks.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
  "blocks.query.kernel": "model.layers.{}.self_attn.q_proj.weight",
  "blocks.query.bias": "model.layers.{}.self_attn.q_proj.bias",
  "blocks.query_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
  "blocks.key.kernel": "model.layers.{}.self_attn.k_proj.weight",
  "blocks.key.bias": "model.layers.{}.self_attn.k_proj.bias",
  "blocks.key_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
  "blocks.value.kernel": "model.layers.{}.self_attn.v_proj.weight",
  "blocks.value.bias": "model.layers.{}.self_attn.v_proj.bias",
  "blocks.output.kernel": "model.layers.{}.self_attn.o_proj.weight",
  "blocks.output.bias": "model.layers.{}.self_attn.o_proj.bias",
  "blocks.feed_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
  "blocks.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
  "blocks.up.kernel": "model.layers.{}.mlp.up_proj.weight",
  "blocks.down.kernel": "model.layers.{}.mlp.down_proj.weight",
  "norm.scale": "model.norm.weight",
  "head.kernel": "lm_head.weight",
}

# Written anew are config.json and the weights; these come along from the source.
COMPANIONS = (
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
)

ALIGNMENT = 64  # bytes


def load(
  path: str | Path, dtype, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, dict, transformer.Architecture]:
  """Returns (graph, params, architecture) of a directory in `dtype`; hf_config.CLASSES are read.

  With a mesh every weight is made where mesh.shardings puts it. The host holds one stacked weight
  (or this process's part of it) beside what is on the devices, which on a CPU is that very memory.
  Raises UserError naming file, key or tensor where the directory cannot be read.
  """
  folder = Path(path)
  arch = hf_config.read(folder)
  graph, abstract = transformer.abstract(arch, jnp.dtype(dtype))
  leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
  stored = shards.find(folder)
  _check(folder, {_key(keys): x for keys, x in leaves}, stored)

  def make(keys, x) -> jax.Array:
    read = _reader(_key(keys), x, stored)
    if mesh is None:
      return jnp.asarray(read((slice(None),) * x.ndim))
    sharding = jax.sharding.NamedSharding(mesh, mesh_lib.spec(keys, x.shape, mesh))
    array = jax.make_array_from_callback(x.shape, sharding, _once(read))
    return array.block_until_ready()  # or the weights of several wait on the host to be sent

  return graph, jax.tree.unflatten(structure, [make(keys, x) for keys, x in leaves]), arch


def save(
  path: str | Path,
  arch: transformer.Architecture,
  params: dict,
  *,
  source: str | Path | None = None,
  shard_bytes: int = shards.SHARD_BYTES,
) -> None:
  """Writes a directory that `load` and transformers read: config, weights as they are, tokenizer.

  The tokenizer's files, generation_config.json and the ids of special tokens come from `source`,
  the directory that the model was loaded from. All is written beside `path` first and then renamed:
  a new model is there whole or not at all, and one that was there before is replaced. Weights
  beyond `shard_bytes` are cut into files. With several processes all call this, the first writes.
  Raises UserError where `path` cannot be written or `source` is absent.
  """
  path, source = Path(path), None if source is None else Path(source)
  if source is not None and not source.is_dir():
    raise UserError(f"{source}: no such directory to take the tokenizer from")
  shapes = jax.tree.map(lambda x: x.shape, transformer.abstract(arch)[1])
  if jax.tree.map(lambda x: x.shape, params) != shapes:
    raise ValueError(f"the params are not those of {arch}")
  tensors = _tensors(params)
  if jax.process_index() != 0:
    for _ in tensors:  # takes part in gathering
      pass
    return
  config = hf_config.form(arch, str(params["embed"].dtype), source)
  beside = path.absolute()
  beside = beside.with_name(f".{beside.name}.{os.getpid()}.partial")
  try:
    beside.mkdir(parents=True, exist_ok=True)
    if source is not None:
      for name in COMPANIONS:
        if (source / name).exists():
          shutil.copyfile(source / name, beside / name)
    (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards.write(beside, entries(params), tensors, shard_bytes)
    if path.exists():
      _replace(path, beside)
    else:
      beside.rename(path)
  except OSError as error:
    raise UserError(
      f"{path}: cannot write the model here: {error.strerror or error}; "
      "free space, mend the permissions or choose another directory"
    ) from error
  finally:
    shutil.rmtree(beside, ignore_errors=True)


def _key(keys: tuple) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator=".")


def _replace(path: Path, beside: Path) -> None:
  """Moves the new files over the old ones; files of weights that are then left over go."""
  left = shards.written(path) - shards.written(beside)
  for file in beside.iterdir():
    os.replace(file, path / file.name)
  for name in left:
    (path / name).unlink()


def _names(key: str, shape: tuple[int, ...]) -> list[str]:
  """Returns the checkpoint's tensors that make one of our weights: one a layer, or just one."""
  name = NAMES[key]
  return [name.format(i) for i in range(shape[0])] if "{}" in name else [name]


def _theirs(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape that each of those tensors has."""
  shape = shape[1:] if "{}" in NAMES[key] else shape
  return shape[::-1] if key.endswith("kernel") else shape


def _check(folder: Path, weights: dict, stored: dict[str, shards.Tensor]) -> None:
  """Raises UserError for the first tensor that is missing, misshapen, too many or not of floats."""
  wanted = {n: _theirs(key, x.shape) for key, x in weights.items() for n in _names(key, x.shape)}
  for name, shape in wanted.items():
    if name not in stored:
      tie = "; or is tie_word_embeddings true?" if name == NAMES["head.kernel"] else ""
      raise UserError(
        f"{folder}: no tensor {name} in its safetensors, which config.json asks for; "
        f"copy the model again or mend config.json{tie}"
      )
    file, _, found, kind = stored[name]
    if found != shape:
      raise UserError(
        f"{file}: tensor {name} has shape {list(found)}, but config.json asks for "
        f"{list(shape)}; config.json and weights are not of one model"
      )
    if kind not in shards.DTYPES.values():
      allowed = ", ".join(shards.DTYPES.values())
      raise UserError(f"{file}: tensor {name} is {kind}; supported are {allowed}")
  embed, head = NAMES["embed"], NAMES["head.kernel"]
  extra = {n for n in stored if n not in wanted and not n.endswith("rotary_emb.inv_freq")}
  if head in extra and not _same(stored[head], stored[embed]):
    raise UserError(
      f"{stored[head].file}: {head} differs from {embed}, but tie_word_embeddings is true; "
      f"set it to false in {folder / 'config.json'}"
    )
  for name in sorted(extra - {head}):
    raise UserError(
      f"{stored[name].file}: tensor {name} has no place in the model that config.json describes; "
      "config.json and weights are not of one model"
    )


def _same(a: shards.Tensor, b: shards.Tensor) -> bool:
  """Returns whether two matrices are equal, some rows at a time."""
  if a.shape != b.shape:
    return False
  whole = (slice(None),) * len(a.shape)
  pieces = zip(a.pieces(whole), b.pieces(whole), strict=True)
  return all(np.array_equal(ours, theirs) for (_, ours), (_, theirs) in pieces)


def _reader(key: str, x: jax.ShapeDtypeStruct, stored: dict[str, shards.Tensor]) -> Callable:
  """Returns index -> that part of one of our weights, read and cast tensor by tensor."""
  stacked, transposed = "{}" in NAMES[key], key.endswith("kernel")
  names = _names(key, x.shape)

  def read(index: tuple[slice, ...]) -> np.ndarray:
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, x.shape, strict=True)]
    out = _empty(sizes, x.dtype)
    layers, index = (index[0], index[1:]) if stacked else (slice(None), index)
    for row, name in zip(out if stacked else out[None], names[layers], strict=True):
      theirs = row.T if transposed else row
      for rows, piece in stored[name].pieces(index[::-1] if transposed else index):
        theirs[rows] = piece
    return out

  return read


def _empty(shape: list[int], dtype) -> np.ndarray:
  """Returns an array at an address that jax takes over on a CPU as it stands, without a copy."""
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  room = np.empty(size + ALIGNMENT, np.uint8)
  start = -room.ctypes.data % ALIGNMENT
  return room[start : start + size].view(dtype).reshape(shape)


def _once(read: Callable) -> Callable:
  """Keeps what was read, so that devices that hold the same part share one reading."""
  parts = {}

  def cached(index: tuple[slice, ...]) -> np.ndarray:
    key = tuple((part.start, part.stop) for part in index)
    if key not in parts:
      parts[key] = read(index)
    return parts[key]

  return cached


def _leaves(params: dict) -> list[tuple[str, Any]]:
  return [(_key(keys), x) for keys, x in jax.tree_util.tree_leaves_with_path(params)]


def entries(params: dict) -> list[shards.Entry]:
  """Returns the checkpoint's tensors in the order in which they are written."""
  return [
    shards.Entry(name, _theirs(key, x.shape), np.dtype(x.dtype))
    for key, x in _leaves(params)
    for name in _names(key, x.shape)
  ]


def _tensors(params: dict) -> Iterator[np.ndarray]:
  """Yields the checkpoint's tensors in that order; one tensor at a time is on the host."""
  for key, x in _leaves(params):
    for part in (x[i] for i in range(len(x))) if "{}" in NAMES[key] else (x,):
      if isinstance(part, jax.Array) and not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
      part = np.asarray(part)
      yield part.T if key.endswith("kernel") else part
