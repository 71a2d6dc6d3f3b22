"""What is read from compiled programs, against programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from treepo_jax.run import hlo

WORDS = 6  # a loop's length


def mesh():
  return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def compiled(run, *shapes, specs):
  put = lambda shape, spec: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh(), spec)
  )
  return jax.jit(run).lower(*map(put, shapes, specs)).compile().as_text()


def test_a_collective_counts_as_often_as_its_loop_runs():
  def one(x):
    return jax.lax.psum(x, "x")

  def run(x):
    once = jax.shard_map(one, mesh=mesh(), in_specs=PartitionSpec(), out_specs=PartitionSpec())
    return jax.lax.scan(lambda c, _: (once(c) * 0.5, None), x, length=WORDS)[0]

  text = compiled(run, (16, 4), specs=[PartitionSpec()])
  assert hlo.collective_bytes(text)["all-reduce"] == WORDS * 16 * 4 * 4
  assert sum(hlo.collective_bytes(text).values()) == WORDS * 16 * 4 * 4


def test_a_gathered_weight_is_found_with_its_shape():
  text = compiled(
    lambda x, w: x @ w, (8, 64), (64, 32), specs=[PartitionSpec("x"), PartitionSpec("x")]
  )
  gathered = [x.shape for x in hlo.instructions(text) if x.operation == "all-gather"]
  assert (64, 32) in gathered


def test_of_a_branch_the_one_that_does_most_counts():
  def run(x, flag):
    total = lambda x: jax.lax.with_sharding_constraint(x.sum(0), NamedSharding(mesh(), replicated))
    replicated = PartitionSpec()
    return jax.lax.cond(flag.sum() > 0, total, lambda x: jnp.zeros(x.shape[1]), x)

  text = compiled(run, (16, 4), (4,), specs=[PartitionSpec("x"), PartitionSpec()])
  assert hlo.collective_bytes(text)["all-reduce"] > 0


def test_other_text_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.collective_bytes("nothing")
