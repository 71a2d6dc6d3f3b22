"""Programs of these tests run once and are small: compiling them is what takes the time."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
