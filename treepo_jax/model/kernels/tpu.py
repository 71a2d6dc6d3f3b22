"""What kernels share: sizes of a TPU core, and the product of matrices in it."""

import jax
import jax.numpy as jnp

from treepo_jax.config import UserError

MASKED = -1e30  # finite: who sees nothing stays finite
LANES = 128  # of a vector register; a number a row stands in each of them alike
SUBLANES = 8  # rows of numbers of a vector register
SCALARS = 230_000  # that fit the scalar memory, 1 MiB on v5e, v5p and v6e


def dot(x, y, x_axis: int, y_axis: int):
  """Returns the product of two matrices over the axes given, in float32."""
  exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  dims = ((x_axis,), (y_axis,)), ((), ())
  return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)


def check_scalars(count: int, what: str) -> None:
  """Raises UserError where a kernel would be given more scalars than a core holds."""
  if count > SCALARS:
    raise UserError(
      f"{what} take {count} scalars of a kernel, and a TPU core holds {SCALARS}; or set "
      "config.model.attention = 'xla'"
    )
