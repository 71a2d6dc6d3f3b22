"""TPUs that are not there: their devices as libtpu describes them, and what their chips can do."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from treepo_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peak figures of a chip (cloud.google.com/tpu/docs, read in November 2026).

  Attributes:
    hbm: bytes of memory.
    flops: bfloat16 operations a second.
    bandwidth: bytes a second between memory and chip.
    links: bytes a second between a chip and its neighbours, all links together.
    axes: of its topologies.
  """

  hbm: int
  flops: float
  bandwidth: float
  links: float
  axes: int


CHIPS = {
  "v5e": Chip(hbm=16 << 30, flops=197e12, bandwidth=800e9, links=1600e9 / 8, axes=2),
  "v5p": Chip(hbm=95 << 30, flops=459e12, bandwidth=2765e9, links=4800e9 / 8, axes=3),
  "v6e": Chip(hbm=32 << 30, flops=918e12, bandwidth=1600e9, links=3200e9 / 8, axes=2),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips that work together.

  Attributes:
    name: as given, "v5e:2x4".
    kind: "v5e".
    devices: all chips.
    local: the chips of one host, as a topology of their own.
    hosts: number of hosts.
  """

  name: str
  kind: str
  devices: Sequence[Any]
  local: Sequence[Any]
  hosts: int

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]


def describe(name: str) -> Topology:
  """Returns the topology "KIND:AxB" or "KIND:AxBxC"; raises UserError naming what is allowed."""
  kind, _, extents = name.partition(":")
  sizes = extents.split("x")
  if kind not in CHIPS or len(sizes) != CHIPS[kind].axes or not all(x.isdigit() for x in sizes):
    raise UserError(
      f"--topology={name}: must be like v5e:2x4, v6e:4x4 or v5p:2x2x4: one of {', '.join(CHIPS)}, "
      "then the chips along each axis, two for v5e and v6e, three for v5p"
    )
  devices = _devices(name, sizes)
  first = [x for x in devices if x.process_index == devices[0].process_index]
  corner = [len({x.coords[axis] for x in first}) for axis in range(len(sizes))]
  local = devices if len(first) == len(devices) else _devices(f"{kind}:{_by(corner)}", corner)
  return Topology(name, kind, devices, local, len(devices) // len(first))


def _devices(name: str, sizes: Sequence) -> Sequence[Any]:
  # A single chip is part of a host, and libtpu must be told so.
  part = {"chips_per_host_bounds": [1, 1, 1]} if all(int(x) == 1 for x in sizes) else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **part).devices
  except RuntimeError as error:
    if "libtpu" in str(error).lower() and "not" in str(error).lower():
      raise UserError(
        "--mode=plan compiles with libtpu, which is not installed: pip install 'treepo_jax[tpu]', "
        "or 'jax[tpu]' of the jax that is installed"
      ) from error
    raise UserError(f"--topology={name}: libtpu knows no such topology ({error})") from error


def _by(sizes: Sequence[int]) -> str:
  return "x".join(str(x) for x in sizes)
