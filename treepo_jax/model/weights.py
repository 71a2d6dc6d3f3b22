"""Hugging Face directories to params and back, without torch.

Reading goes tensor by tensor into stacked arrays, onto the mesh where there is one: every process
reads only the slices that its devices hold. Writing streams tensor by tensor.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from treepo_jax.config import UserError
from treepo_jax.model import hf_config, transformer
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

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}

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

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
  """One tensor of a checkpoint, not yet read."""

  file: Path
  slice: Any  # of safetensors: get_shape(), get_dtype(), [...] -> numpy

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.slice.get_shape())


def load(
  path: str | Path, dtype, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, dict, transformer.Architecture]:
  """Returns (graph, params, architecture) of a Qwen2, Qwen3 or Llama directory, in `dtype`.

  With a mesh every weight is made where mesh.shardings puts it; the most that the host holds is one
  stacked weight. Raises UserError naming file, key or tensor where the directory cannot be read.
  """
  folder = Path(path)
  arch = hf_config.read(folder)
  graph, abstract = transformer.abstract(arch, jnp.dtype(dtype))
  weights = {_key(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(abstract)}
  with contextlib.ExitStack() as stack:
    stored = _open(folder, stack)
    _check(folder, weights, stored)

    def make(keys, x):
      read = _reader(_key(keys), x, stored)
      if mesh is None:
        return jnp.asarray(read((slice(None),) * x.ndim))
      sharding = jax.sharding.NamedSharding(mesh, mesh_lib.spec(keys, x.shape, mesh))
      return jax.make_array_from_callback(x.shape, sharding, _once(read))

    return graph, jax.tree_util.tree_map_with_path(make, abstract), arch


def save(
  path: str | Path,
  arch: transformer.Architecture,
  params: dict,
  *,
  source: str | Path | None = None,
) -> None:
  """Writes a directory that `load` and transformers read: config, weights as they are, tokenizer.

  The tokenizer's files, generation_config.json and the ids of special tokens come from `source`,
  the directory that the model was loaded from. All is written beside `path` first and then renamed:
  a model is there whole or not at all. With several processes all call this and the first writes.
  Raises UserError where `path` cannot be written or holds a model in shards, or `source` is absent.
  """
  path, source = Path(path), None if source is None else Path(source)
  if source is not None and not source.is_dir():
    raise UserError(f"{source}: no such directory to take the tokenizer from")
  if (path / INDEX).exists():
    raise UserError(f"{path}: holds a model in shards ({INDEX}); choose another directory")
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
    _write(beside / WEIGHTS, _header(params), tensors)
    if not path.exists():
      beside.rename(path)
    else:
      for name in (*COMPANIONS, "config.json", WEIGHTS):
        if (beside / name).exists():
          os.replace(beside / name, path / name)
  except OSError as error:
    raise UserError(
      f"{path}: cannot write the model here: {error.strerror or error}; "
      "free space, mend the permissions or choose another directory"
    ) from error
  finally:
    shutil.rmtree(beside, ignore_errors=True)


def _key(keys: tuple) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator=".")


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
  """Opens one file or all shards and returns their tensors by name, none read yet."""
  if (folder / WEIGHTS).exists():
    files = [folder / WEIGHTS]
  elif (folder / INDEX).exists():
    index = hf_config.read_json(folder / INDEX)
    if "weight_map" not in index:
      raise UserError(f"{folder / INDEX}: the key weight_map is missing; copy the file again")
    files = [folder / name for name in sorted(set(index["weight_map"].values()))]
  else:
    raise UserError(
      f"{folder}: neither {WEIGHTS} nor {INDEX}; weights in another format "
      "(pytorch_model.bin) must be saved as safetensors first"
    )
  stored = {}
  for file in files:
    if not file.exists():
      raise UserError(f"{file}: no such file, but {INDEX} names it; copy this shard as well")
    try:
      tensors = stack.enter_context(safe_open(file, framework="numpy"))
    except (SafetensorError, OSError) as error:
      raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again") from error
    stored |= {name: Stored(file, tensors.get_slice(name)) for name in tensors.keys()}
  return stored


def _names(key: str, shape: tuple[int, ...]) -> list[str]:
  """Returns the checkpoint's tensors that make one of our weights: one a layer, or just one."""
  name = NAMES[key]
  return [name.format(i) for i in range(shape[0])] if "{}" in name else [name]


def _theirs(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape that each of those tensors has."""
  shape = shape[1:] if "{}" in NAMES[key] else shape
  return shape[::-1] if key.endswith("kernel") else shape


def _check(folder: Path, weights: dict, stored: dict[str, Stored]) -> None:
  """Raises UserError for the first tensor that is missing, misshapen, too many or not of floats."""
  wanted = {n: _theirs(key, x.shape) for key, x in weights.items() for n in _names(key, x.shape)}
  for name, shape in wanted.items():
    if name not in stored:
      tie = "; or is tie_word_embeddings true?" if name == NAMES["head.kernel"] else ""
      raise UserError(
        f"{folder}: no tensor {name} in its safetensors, which config.json asks for; "
        f"copy the model again or mend config.json{tie}"
      )
    file, kind = stored[name].file, stored[name].slice.get_dtype()
    if stored[name].shape != shape:
      raise UserError(
        f"{file}: tensor {name} has shape {list(stored[name].shape)}, but config.json asks for "
        f"{list(shape)}; config.json and weights are not of one model"
      )
    if kind not in DTYPES.values():
      allowed = ", ".join(DTYPES.values())
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


def _same(a: Stored, b: Stored) -> bool:
  """Returns whether two matrices are equal, some rows at a time."""
  if a.shape != b.shape:
    return False
  starts = range(0, a.shape[0], 4096)
  parts = (slice(i, min(i + starts.step, a.shape[0])) for i in starts)
  return all(np.array_equal(a.slice[part], b.slice[part]) for part in parts)


def _reader(key: str, x: jax.ShapeDtypeStruct, stored: dict[str, Stored]) -> Callable:
  """Returns index -> that part of one of our weights, read and cast tensor by tensor."""
  stacked, transposed = "{}" in NAMES[key], key.endswith("kernel")
  names = _names(key, x.shape)

  def read(index: tuple[slice, ...]) -> np.ndarray:
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, x.shape, strict=True)]
    out = np.empty(sizes, x.dtype)
    layers, index = (index[0], index[1:]) if stacked else (slice(None), index)
    for row, name in zip(out if stacked else out[None], names[layers], strict=True):
      part = stored[name].slice[index[::-1] if transposed else index]
      row[...] = part.T if transposed else part
    return out

  return read


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


def _header(params: dict) -> bytes:
  """Returns what a safetensors file begins with: its length, then names, dtypes, shapes, places."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  start = 0
  for key, x in _leaves(params):
    shape = _theirs(key, x.shape)
    for name in _names(key, x.shape):
      end = start + int(np.prod(shape)) * x.dtype.itemsize
      kind = DTYPES[str(x.dtype)]
      header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
      start = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data is aligned
  return len(text).to_bytes(8, "little") + text


def _tensors(params: dict) -> Iterator[np.ndarray]:
  """Yields the checkpoint's tensors in the header's order; one weight at a time is on the host."""
  for key, x in _leaves(params):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      x = multihost_utils.process_allgather(x, tiled=True)
    x = np.asarray(x)
    for part in x if "{}" in NAMES[key] else x[None]:
      yield np.ascontiguousarray(part.T if key.endswith("kernel") else part)


def _write(file: Path, header: bytes, tensors: Iterator[np.ndarray]) -> None:
  with file.open("wb") as out:
    out.write(header)
    for tensor in tensors:
      out.write(tensor.view(np.uint8).data)
    out.flush()
    os.fsync(out.fileno())  # a full disk shows here at the latest, before anything is renamed
