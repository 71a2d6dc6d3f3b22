"""pass@k and maj@k against all subsets by brute force; the paper's bootstrap and its Overall."""

import itertools
import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_jax.run import scores

ANSWERS = st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=1, max_size=6)


def vote(votes: list[tuple[int, bool]], value: dict[int, Fraction]) -> Fraction:
  """Returns what the majority of some answers is worth, ties broken evenly; nobody votes: 0."""
  count = Counter(group for group, _ in votes if group >= 0)
  best = [group for group in count if count[group] == max(count.values())]
  return sum((value[group] for group in best), Fraction(0)) / max(len(best), 1)


def worth(answers: list[tuple[int, bool]]) -> dict[int, Fraction]:
  """Returns the share of right answers of each class."""
  groups = {g for g, _ in answers}
  verdicts = {g: [c for h, c in answers if h == g] for g in groups}
  return {g: Fraction(sum(cs), len(cs)) for g, cs in verdicts.items()}


@settings(max_examples=200)
@given(answers=ANSWERS)
def test_both_are_the_means_over_all_subsets(answers):
  group, correct = [g for g, _ in answers], [c for _, c in answers]
  ks = range(1, len(answers) + 1)
  majorities = scores.majority_at(group, correct, list(ks))
  for k, majority in zip(ks, majorities, strict=True):
    subsets = list(itertools.combinations(answers, k))
    passes = Fraction(sum(any(c for _, c in s) for s in subsets), len(subsets))
    assert scores.pass_at(sum(correct), len(correct), k) == pytest.approx(float(passes), abs=1e-12)
    value = worth(answers)
    expected = sum((vote(list(s), value) for s in subsets), Fraction(0)) / len(subsets)
    assert majority == pytest.approx(float(expected), abs=1e-12)


@settings(max_examples=40)
@given(answers=ANSWERS)
def test_one_answer_is_the_mean_and_all_answers_are_one_vote(answers):
  group, correct = [g for g, _ in answers], [c for _, c in answers]
  one, whole = scores.majority_at(group, correct, [1, len(answers)])
  voted = [c for g, c in answers if g >= 0]
  assert one == pytest.approx(sum(voted) / len(answers))
  assert whole == pytest.approx(float(vote(answers, worth(answers))))


def test_many_answers_are_those_of_drawn_subsets():
  """32 of 64 answers: the exact chance lies within 4.5 standard errors of 20,000 drawn subsets."""
  rng = np.random.default_rng(0)
  group = [0] * 14 + [1] * 13 + [2] * 12 + [-1] * 9 + list(range(3, 19))
  correct = [g == 1 for g in group]
  (exact,) = scores.majority_at(group, correct, [32])
  value, count = worth(list(zip(group, correct, strict=True))), 20_000
  drawn = [
    float(vote([(group[i], correct[i]) for i in rng.choice(64, 32, replace=False)], value))
    for _ in range(count)
  ]
  assert 0.2 < exact < 0.5
  assert abs(np.mean(drawn) - exact) < 4.5 * np.std(drawn) / count**0.5


@pytest.mark.parametrize(("count", "classes"), [(64, 3), (scores.MOST_ANSWERS, 2)])
def test_chances_of_large_sets_stay_chances(count, classes):
  """One of the classes always wins; two of the most answers allowed win half of the time."""
  group = [i % classes for i in range(count)]
  shares = [
    scores.majority_at(group, [g == right for g in group], [1, 2, count // 2, count])
    for right in range(classes if classes > 2 else 1)
  ]
  np.testing.assert_allclose(np.sum(shares, 0), 1 if classes > 2 else 0.5, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_sixty_four_answers_take_a_moment(size):
  group = [i // size for i in range(64)]
  begun = time.process_time()
  for _ in range(5):
    scores.majority_at(group, [g == 0 for g in group], scores.ladder(64))
  assert (time.process_time() - begun) / 5 < 0.25


@pytest.mark.parametrize("k", [0, 4])
def test_subsets_that_cannot_be_are_refused(k):
  for call in (
    lambda: scores.pass_at(1, 3, k),
    lambda: scores.majority_at([0, 0, 1], [True, True, False], [k]),
    lambda: scores.bootstrap_majority([0, 0, 1], [True, True, False], k, draws=3, seed=0),
  ):
    with pytest.raises(ValueError, match=f"k = {k} of 3 answers"):
      call()
  many = [0] * (scores.MOST_ANSWERS + 1)
  with pytest.raises(ValueError, match="at most"):
    scores.majority_at(many, [True] * len(many), [1])


@settings(max_examples=15)
@given(answers=st.lists(st.tuples(st.integers(-1, 2), st.booleans()), min_size=1, max_size=5))
def test_the_bootstrap_converges_to_its_expectation(answers):
  """All n^k draws with replacement, in order: ties go to the first drawn, who is graded."""
  group, correct = [g for g, _ in answers], [c for _, c in answers]
  k, total, count = min(len(answers), 4), 0, 40_000
  for drawn in itertools.product(answers, repeat=k):
    votes = Counter(g for g, _ in drawn if g >= 0)
    winners = [c for g, c in drawn if g >= 0 and votes[g] == max(votes.values())]
    total += winners[0] if winners else 0
  expected = total / len(answers) ** k
  found = scores.bootstrap_majority(group, correct, k, draws=count, seed=7)
  assert abs(found - expected) <= 5 * math.sqrt(expected * (1 - expected) / count) + 1e-9
  assert found == scores.bootstrap_majority(group, correct, k, draws=count, seed=7)


def test_the_bootstrap_of_equal_answers_is_their_verdict():
  for verdict in (True, False):
    found = scores.bootstrap_majority([3] * 16, [verdict] * 16, 16, draws=1000, seed=42)
    assert found == float(verdict)


# Table 1 of the paper, maj@16 in percent, and its set sizes: AIME 30, AMC 83, MATH 500, Minerva
# 272, Olympiad 675.
SIZES = (30, 83, 500, 272, 675)
TABLE_1 = {
  "GRPO": ((17.13, 44.42, 72.89, 30.94, 35.09), 46.63),
  "GRPO w/ TreePO Sampling": ((19.66, 51.63, 81.85, 33.74, 44.76), 54.61),
  "TreePO w/ Fixed Init Divergence": ((28.89, 56.63, 82.41, 35.76, 47.75), 56.88),
  "TreePO w/ More Init Divergence": ((27.83, 55.53, 85.34, 34.98, 49.15), 58.21),
}


@pytest.mark.parametrize("row", TABLE_1)
def test_overall_is_that_of_table_1(row):
  means, printed = TABLE_1[row]
  sets = [scores.Estimate(m / 100, 0.01, n) for m, n in zip(means, SIZES, strict=True)]
  found = scores.overall(sets)
  assert 100 * found.mean == pytest.approx(printed, abs=0.0101)  # columns are rounded to 0.01
  assert found.prompts == sum(SIZES) == 1560
  assert 100 * scores.unweighted(sets).mean == pytest.approx(np.mean(means))
  assert abs(100 * scores.unweighted(sets).mean - printed) > 1


def test_overall_is_the_mean_over_all_prompts():
  rng = np.random.default_rng(3)
  parts = [rng.random(n) for n in (4, 11, 30)]
  found = scores.overall([scores.estimate(p) for p in parts])
  assert found.mean == pytest.approx(np.mean(np.concatenate(parts)))


def test_intervals_cover_the_mean_they_estimate():
  """Of 2,000 evaluations of two sets, prompts drawn anew, about 95 % of the intervals cover."""
  rng, covered = np.random.default_rng(1), 0
  for _ in range(2000):
    sets = [
      scores.estimate(rng.binomial(8, rng.beta(a, b, n)) / 8)
      for a, b, n in ((1, 2, 60), (4, 1, 140))
    ]
    interval = scores.overall(sets).interval
    assert interval is not None
    covered += interval[0] <= (60 / 3 + 140 * 4 / 5) / 200 <= interval[1]
  assert 0.93 < covered / 2000 < 0.97


def test_one_prompt_has_no_interval():
  alone = scores.estimate([1.0])
  assert alone.standard_error is None and alone.interval is None
  assert scores.overall([alone, scores.estimate([0.0, 1.0])]).interval is None
  assert scores.estimate([1.0, 1.0]).interval == [1.0, 1.0]


@pytest.mark.parametrize(
  ("count", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_the_ladder_of_k(count, ks):
  assert scores.ladder(count) == ks
