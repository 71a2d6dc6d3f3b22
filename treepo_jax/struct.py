"""Frozen pytree dataclasses: chex's, with their constructor known to type checkers.

Fields may be typed with shapes (jaxtyping); tests check them on construction. A changed copy is
made with dataclasses.replace.
"""

import typing

import chex

T = typing.TypeVar("T")


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def dataclass(cls: type[T]) -> type[T]:
  """Makes the class a frozen dataclass whose fields are the leaves of a pytree."""
  return chex.dataclass(frozen=True)(cls)
