"""Safetensors files of a directory, one or in shards: read slice by slice, written as a stream."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from treepo_jax.config import UserError
from treepo_jax.model import hf_config

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 5_000_000_000  # of a file, as hubs and transformers cut them

PIECE = 1 << 23  # elements that are read at once

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


class Tensor(NamedTuple):
  """One tensor of a checkpoint, not yet read."""

  file: Path
  name: str
  shape: tuple[int, ...]
  kind: str  # dtype as safetensors names it

  def pieces(self, index: tuple[slice, ...]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the part at `index`, some rows at a time, each with its rows in the part."""
    start, stop, _ = index[0].indices(self.shape[0])
    rest = [range(*i.indices(n)) for i, n in zip(index[1:], self.shape[1:], strict=True)]
    step = max(1, PIECE // max(math.prod(map(len, rest)), 1))
    for i in range(start, stop, step):
      end = min(i + step, stop)
      # Opened anew: what was read of a file that is mapped counts as memory until it is closed.
      with safe_open(self.file, framework="numpy") as file:
        piece = file.get_slice(self.name)[(slice(i, end), *index[1:])]
      yield slice(i - start, end - start), piece


class Entry(NamedTuple):
  """One tensor that is to be written."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def size(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize


def find(folder: Path) -> dict[str, Tensor]:
  """Returns the tensors of a directory by name, none read; raises UserError naming a bad file."""
  tensors = {}
  for file in _files(folder):
    if not file.exists():
      raise UserError(f"{file}: no such file, but {INDEX} names it; copy this shard as well")
    try:
      with safe_open(file, framework="numpy") as opened:
        for name in opened.keys():
          part = opened.get_slice(name)
          tensors[name] = Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
      raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again") from error
  return tensors


def _files(folder: Path) -> list[Path]:
  if (folder / WHOLE).exists():
    return [folder / WHOLE]
  if not (folder / INDEX).exists():
    raise UserError(
      f"{folder}: neither {WHOLE} nor {INDEX}; weights in another format "
      "(pytorch_model.bin) must be saved as safetensors first"
    )
  index = hf_config.read_json(folder / INDEX)
  if "weight_map" not in index:
    raise UserError(f"{folder / INDEX}: the key weight_map is missing; copy the file again")
  return [folder / name for name in sorted(set(index["weight_map"].values()))]


def written(folder: Path) -> set[str]:
  """Returns the names of the files there that `write` may have written."""
  shard = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
  names = {file.name for file in folder.iterdir()}
  return {name for name in names if name in (WHOLE, INDEX) or shard.fullmatch(name)}


def write(
  folder: Path, entries: Iterable[Entry], tensors: Iterator[np.ndarray], shard_bytes: int
) -> None:
  """Writes `tensors`, which come in the order of `entries`, with an index where there are shards.

  A file holds at most shard_bytes of weights, or a single tensor.
  """
  shards: list[list[Entry]] = [[]]
  for entry in entries:
    if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > shard_bytes:
      shards.append([])
    shards[-1].append(entry)
  if len(shards) == 1:
    return _write(folder / WHOLE, shards[0], tensors)
  places = {}
  for i, shard in enumerate(shards, start=1):
    name = SHARD.format(i, len(shards))
    _write(folder / name, shard, tensors)
    places |= {entry.name: name for entry in shard}
  size = sum(entry.size for shard in shards for entry in shard)
  index = {"metadata": {"total_size": size}, "weight_map": places}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, entries: list[Entry], tensors: Iterator[np.ndarray]) -> None:
  with file.open("wb") as out:
    out.write(_header(entries))
    for entry in entries:
      tensor = next(tensors)
      assert (tensor.shape, tensor.dtype) == (entry.shape, entry.dtype), entry.name
      out.write(np.ascontiguousarray(tensor).view(np.uint8).data)
    out.flush()
    os.fsync(out.fileno())  # a full disk shows here at the latest, before anything is renamed


def _header(entries: list[Entry]) -> bytes:
  """Returns what a safetensors file begins with: its length, then names, dtypes, shapes, places."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  start = 0
  for entry in entries:
    place = [start, start + entry.size]
    kind = DTYPES[str(entry.dtype)]
    header[entry.name] = {"dtype": kind, "shape": entry.shape, "data_offsets": place}
    start += entry.size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data is aligned
  return len(text).to_bytes(8, "little") + text
