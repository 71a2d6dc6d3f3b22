"""What n answers to a prompt say of a policy: mean@k, pass@k, maj@k; and means over prompts.

Of one prompt: `correct` says which answers are right, `group` which are the same answer (a class
index of rewards.groups). An answer without a box is of no class, -1: it has no vote, and where
nobody votes the majority is wrong.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from treepo_jax.config import MOST_ANSWERS

NO_GROUP = -1  # the class of an answer without a box
NORMAL_95 = 1.959963984540054  # standard errors either side of a mean that cover 95 %


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over prompts and how far it may lie from that of all prompts like them.

  Attributes:
    mean: in [0, 1].
    standard_error: of the mean, by the normal approximation with a prompt's answers as one cluster
      (Miller 2024, Adding Error Bars to Evals, arXiv 2411.00640); None for a single prompt.
    prompts: how many.
  """

  mean: float
  standard_error: float | None
  prompts: int

  @property
  def interval(self) -> list[float] | None:
    """The 95 % confidence interval, cut to [0, 1]."""
    if self.standard_error is None:
      return None
    width = NORMAL_95 * self.standard_error
    return [max(self.mean - width, 0.0), min(self.mean + width, 1.0)]


def pass_at(right: int, count: int, k: int) -> float:
  """Returns the chance that k of `count` answers, drawn without replacement, hold a right one.

  1 - C(count - right, k) / C(count, k), unbiased (Chen et al. 2021, Evaluating LLMs on Code, Eq 1).
  Raises ValueError where k is not in 1..count.
  """
  _check(k, count)
  return 1 - math.comb(count - right, k) / math.comb(count, k)


def majority_at(group: Sequence[int], correct: Sequence[bool], ks: Sequence[int]) -> list[float]:
  """Returns for each k the chance that the most frequent of k answers is right, exactly.

  The k are drawn without replacement from all n, every subset alike; ties are broken evenly. An
  answer of a class whose verdicts differ (a grader need not be transitive) is right as often as the
  class is. With k = n it is the one vote of all answers.

  For a class of c answers to win with m votes, each other class has fewer, or m and shares the win:
  the coefficients of x^k y^t in C(c, m) x^m (1 + x)^free prod_h (sum_{j < m} C(h, j) x^j +
  C(h, m) x^m y), where h runs over the other classes of at least m answers and the answers of
  smaller ones and those without a vote are free, count the subsets in which t others tie.
  Raises ValueError where a k is not in 1..n or n is above MOST_ANSWERS.
  """
  n, most = len(group), max(ks)
  for k in ks:
    _check(k, n)
  if n > MOST_ANSWERS:
    raise ValueError(f"{n} answers to a prompt: at most {MOST_ANSWERS}")
  sizes = Counter(g for g in group if g != NO_GROUP)
  worth: defaultdict[int, float] = defaultdict(
    float
  )  # shares of right answers, added up over classes of a size
  for g, size in sizes.items():
    worth[size] += float(np.mean([c for h, c in zip(group, correct, strict=True) if h == g]))
  subsets = np.zeros(most + 1)
  for size, value in worth.items():
    if value:
      others = list(sizes.values())
      others.remove(size)
      subsets += value * _wins(size, others, n, most)
  return [float(subsets[k]) / math.comb(n, k) for k in ks]


def _wins(size: int, others: Sequence[int], n: int, most: int) -> np.ndarray:
  """Returns for k = 0..most how many k-subsets of n a class of `size` wins, ties by shares."""
  won = np.zeros(most + 1)
  for m in range(1, min(size, most) + 1):
    rivals = [h for h in others if h >= m]
    free = n - size - sum(rivals)
    left = most - m  # places that others have at most
    ways = np.zeros((left // m + 1, left + 1))  # by how many tie, by places taken
    ways[0] = _choose(free, left)
    for rival in rivals:
      before, choose = ways, _choose(rival, m)
      ways = np.zeros_like(before)
      for votes in range(min(m, left + 1)):
        ways[:, votes:] += choose[votes] * before[:, : left + 1 - votes]
      ways[1:, m:] += choose[m] * before[:-1, : left + 1 - m]
    share = 1 / np.arange(1, len(ways) + 1)
    won[m:] += math.comb(size, m) * (share @ ways)
  return won


def _choose(n: int, most: int) -> np.ndarray:
  """Returns C(n, 0..most)."""
  return np.array([float(math.comb(n, j)) for j in range(most + 1)])


def bootstrap_majority(
  group: Sequence[int],
  correct: Sequence[bool],
  k: int,
  *,
  draws: int,
  seed: int | Sequence[int],
) -> float:
  """Returns how often the most frequent of k answers is right, by the paper's bootstrap.

  `draws` times k of the n answers are drawn with replacement (TreePO: 1000 of 16 out of 16); a tie
  goes to the answer that was drawn first, and the first drawn of the winners is graded. Its mean
  lies below that of majority_at, for some answers are drawn twice and others never.
  """
  _check(k, len(group))
  classes = np.unique([NO_GROUP, *group], return_inverse=True)[1][1:]  # 0: no vote
  drawn = np.random.default_rng(seed).integers(len(group), size=(draws, k))
  rows, voted = np.arange(draws)[:, None], classes[drawn]
  counts = np.zeros((draws, int(classes.max()) + 1), int)
  np.add.at(counts, (rows, voted), 1)
  counts[:, 0] = 0
  votes = counts[rows, voted]
  first = votes.argmax(1)
  right = np.asarray(correct, bool)[drawn[rows[:, 0], first]] & (votes.max(1) > 0)
  return float(right.mean())


def ladder(count: int) -> list[int]:
  """Returns the k that are reported for `count` answers: powers of two, and all of them."""
  return sorted({2**i for i in range(count.bit_length())} | {count})


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
  """Returns the mean of the prompts' values and its standard error over prompts."""
  found = np.asarray(values, float)
  error = float(found.std(ddof=1) / len(found) ** 0.5) if len(found) > 1 else None
  return Estimate(float(found.mean()), error, len(found))


def overall(sets: Sequence[Estimate]) -> Estimate:
  """Returns the mean over all prompts of all sets: the paper's Overall, weighted by their sizes.

  The sets are given and only their prompts are drawn: variances add, with the squares of the
  weights.
  """
  return _mean(sets, [s.prompts for s in sets])


def unweighted(sets: Sequence[Estimate]) -> Estimate:
  """Returns the mean over sets, each as much as any other."""
  return _mean(sets, [1] * len(sets))


def _mean(sets: Sequence[Estimate], weights: Sequence[int]) -> Estimate:
  shares = np.array(weights) / sum(weights)
  errors = [s.standard_error for s in sets]
  known = [e for e in errors if e is not None]
  return Estimate(
    float(shares @ [s.mean for s in sets]),
    float(np.linalg.norm(shares * known)) if len(known) == len(errors) else None,
    sum(s.prompts for s in sets),
  )


def _check(k: int, count: int) -> None:
  if not 1 <= k <= count:
    raise ValueError(f"k = {k} of {count} answers: must be from 1 to {count}")
