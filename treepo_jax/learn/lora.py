"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) A B, with A and B trained alone.

The update computes x W + x A B, and never holds an adapted weight or the gradient of a whole one.
Rollout, evaluation and export see plain weights, which are merged once a step.
"""

from typing import Any

import jax
import jax.numpy as jnp


def create(params: Any, key: jax.Array, *, rank: int, targets: tuple[str, ...]) -> dict:
  """Returns adapters that change nothing yet: A normal with variance 1 / rank, B zero, in float32.

  Args:
    params: of the model; the kernels of its layers are [layers, inputs, outputs].
    key: of the draws.
    rank: of A [layers, inputs, rank] and B [layers, rank, outputs].
    targets: names of the adapted projections, of config.PROJECTIONS.
  """
  adapters = {}
  for i, name in enumerate(targets):
    layers, inputs, outputs = params["blocks"][name]["kernel"].shape
    drawn = jax.random.normal(jax.random.fold_in(key, i), (layers, inputs, rank))
    adapters[name] = {"a": drawn * rank**-0.5, "b": jnp.zeros((layers, rank, outputs))}
  return adapters


def merge(params: Any, adapters: dict, *, scale: float) -> Any:
  """Returns the model's weights with each adapter's scale * A B added, in the weights' dtype."""
  blocks = dict(params["blocks"])
  for name, adapter in adapters.items():
    kernel = blocks[name]["kernel"]
    change = jnp.einsum(
      "lir,lro->lio", adapter["a"], adapter["b"], precision=jax.lax.Precision.HIGHEST
    )
    blocks[name] = blocks[name] | {"kernel": kernel + (scale * change).astype(kernel.dtype)}
  return params | {"blocks": blocks}
