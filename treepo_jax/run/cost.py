"""What a program costs: its operations, counted in its jaxpr, against the peaks of a chip."""

import math
from typing import Any

import jax
from jax.extend import core


def flops(jaxpr: Any) -> float:
  """Returns the operations of a jaxpr's matrix products on all devices: 2 for each multiply-add.

  A scan counts as often as it runs, a branch as the one that does most, a loop whose end depends on
  data once; what stands under a shard_map, on each of its devices.
  """
  total = 0.0
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      total += _product(equation)
      continue
    inner = [flops(x) for x in _inside(params)]
    if name == "scan":
      total += params["length"] * sum(inner)
    elif name == "cond":
      total += max(inner)
    elif name == "pallas_call":  # every step of its grid, also those that would be skipped
      total += math.prod(x for x in params["grid_mapping"].grid if isinstance(x, int)) * sum(inner)
    elif name == "shard_map":
      axes = params.get("manual_axes") or params["mesh"].axis_names
      total += math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
    else:
      total += sum(inner)
  return total


def _inside(params: dict[str, Any]) -> list[Any]:
  """Returns the jaxprs that an equation runs."""
  kinds = (core.Jaxpr, core.ClosedJaxpr)
  leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, kinds))
  return [x for x in leaves if isinstance(x, kinds)]


def _product(equation) -> float:
  left, right = (x.aval.shape for x in equation.invars)
  (_, contracted), (_, batch) = equation.params["dimension_numbers"]
  others = (size for i, size in enumerate(right) if i not in (*contracted, *batch))
  return 2.0 * math.prod(left) * math.prod(others)


def seconds(flops: float, moved: float, sent: float, chip) -> float:
  """Returns the least time for so much work of a chip, all three at once (a roofline)."""
  return max(flops / chip.flops, moved / chip.bandwidth, sent / chip.links)
