"""Operations counted in jaxprs, and the roofline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treepo_jax.model import transformer
from treepo_jax.run import cost, topology

ONES = jnp.ones


def count(run, *arguments) -> float:
  return cost.flops(jax.jit(run).trace(*arguments).jaxpr)


@pytest.mark.parametrize(
  "run, arguments, expected",
  [
    (lambda a, b: a @ b, (ONES((4, 8)), ONES((8, 3))), 2 * 4 * 8 * 3),
    (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (ONES((5, 4, 8)), ONES((5, 8, 3))), 5 * 192),
    (lambda a, b: jax.lax.scan(lambda c, _: (c @ b, None), a, length=7)[0], None, 7 * 512),
    (lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b @ b, lambda: a @ b), None, 2 * 512),
    (lambda a, b: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ b, a), None, 512),
  ],
)
def test_products_count_as_often_as_they_run(run, arguments, expected):
  assert count(run, *(arguments or (ONES((4, 8)), ONES((8, 8))))) == expected


def test_a_gradient_costs_two_forward_passes_more():
  forward = count(lambda a, b: (a @ b).sum(), ONES((4, 8)), ONES((8, 8)))
  both = count(jax.grad(lambda a, b: (a @ b).sum(), argnums=(0, 1)), ONES((4, 8)), ONES((8, 8)))
  assert both == 2 * forward or both == 3 * forward  # what is linear needs no forward product


def test_a_policy_costs_two_operations_a_weight_and_token():
  arch = transformer.Architecture(
    *("qwen2", 64, 32, 3, 4, 2, 8, 48, 1e-6, 1e4, None, 64, False, True, False, False)
  )
  graph, params = transformer.abstract(arch)
  rows = jax.ShapeDtypeStruct((2, 16), jnp.int32)
  hidden = lambda params, rows: transformer.hidden(graph, params, rows, rows, rows)
  weights = sum(
    np.prod(x.shape[1:])
    for path, x in jax.tree_util.tree_leaves_with_path(params["blocks"])
    if "kernel" in str(path)
  )
  scores = 2 * 2 * 16 * 16 * 4 * 8  # of a row, a layer: queries by keys, weights by values
  assert count(hidden, params, rows) == 3 * (2 * 2 * 16 * weights + 2 * scores)


def test_the_slowest_of_three_tells():
  chip = topology.CHIPS["v5e"]
  assert cost.seconds(chip.flops, 0.0, 0.0, chip) == 1
  assert cost.seconds(chip.flops, 3 * chip.bandwidth, 2 * chip.links, chip) == 3
