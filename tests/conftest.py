"""What every test stands on: eight CPU devices, strict shapes, examples that never change."""

import os

import hypothesis
import jax
import pytest

if "JAX_PLATFORMS" not in os.environ:  # tolerances are for the CPU; set it to test elsewhere
  jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # meshes and shardings without an accelerator
jax.config.update("jax_numpy_rank_promotion", "raise")  # [n] with [b, n] is said, never guessed
jax.config.update("jax_numpy_dtype_promotion", "standard")

hypothesis.settings.register_profile(
  "treepo_jax",
  deadline=None,  # the first example compiles
  derandomize=True,  # a test that passes today passes tomorrow
  max_examples=30,
)
hypothesis.settings.load_profile("treepo_jax")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
  """Frees what a file compiled: each program holds memory maps, and Linux allows 65,530 of them."""
  yield
  jax.clear_caches()
