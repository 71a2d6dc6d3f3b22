"""A mix of sources by weight, read by position.

Positions are cut into blocks; in every block each source has exactly its share of the places, in
an order that (seed, block) decides. So the mix is a pure function of the position, its shares are
exact over every block, and each source is read in its own order, epoch after epoch.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from treepo_jax.config import UserError
from treepo_jax.tasks.readers import Question
from treepo_jax.tasks.sources import Source

LARGEST = 1_000_000  # places of a block
FINEST = 10_000  # places of one whose weights are no small whole numbers: exact to 1e-4
STREAM = 2**31  # parts the order of blocks from the orders of epochs


def mix(sources: Sequence[Source], *, weights: Sequence[int | float], seed: int) -> Source:
  """Returns the sources mixed, without end; without weights in proportion to their sizes.

  Raises UserError where the weights do not go with the sources.
  """
  shares = _shares(sources, weights)
  total = sum(shares)
  origin = np.repeat(np.arange(len(shares)), shares)  # the source of each place, before shuffling

  @functools.lru_cache(maxsize=2)
  def block(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source of each place, and how many places before it are of the same source."""
    chosen = np.random.default_rng([seed, number, STREAM]).permutation(origin)
    earlier = np.empty(total, np.int64)
    for i, share in enumerate(shares):
      earlier[chosen == i] = np.arange(share)
    return chosen, earlier

  def read(position: int) -> Question:
    number, place = divmod(position, total)
    chosen, earlier = block(number)
    i = int(chosen[place])
    return sources[i].read(number * shares[i] + int(earlier[place]))

  return Source(read=read, size=None)


def _shares(sources: Sequence[Source], weights: Sequence[int | float]) -> list[int]:
  """Returns the places of each source in a block."""
  if not weights:
    weights = [source.size for source in sources if source.size is not None]
    if len(weights) < len(sources):
      raise UserError(
        "config.data.weights is empty, but a source of config.data.path has no end: give a weight "
        f"for each of the {len(sources)} sources"
      )
  if len(weights) != len(sources) or min(weights) <= 0:
    raise UserError(
      f"config.data.weights = {tuple(weights)}: give one above 0 for each of the {len(sources)} "
      "sources of config.data.path"
    )
  if not all(float(w).is_integer() for w in weights) or sum(weights) > LARGEST:
    weights = [max(1, round(FINEST * w / sum(weights))) for w in weights]
  shares = [int(w) for w in weights]
  return [share // math.gcd(*shares) for share in shares]
