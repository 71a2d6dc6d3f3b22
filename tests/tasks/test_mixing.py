"""Mixes: exact shares, a pure function of the position, each source whole before it comes again."""

from collections import Counter

import pytest

from treepo_jax.config import UserError
from treepo_jax.tasks import mixing, sources
from treepo_jax.tasks.readers import Question
from treepo_jax.tasks.sources import Source


def listed(name: str, size: int) -> Source:
  return sources.listed(tuple(Question(f"{name}{i}", "1", dataset=name) for i in range(size)))


def endless(name: str) -> Source:
  return Source(read=lambda position: Question(f"{name}{position}", "1", dataset=name), size=None)


def mixed(*parts: Source, weights=(), seed=0) -> Source:
  parts = tuple(sources.shuffled(part, seed=seed, index=i) for i, part in enumerate(parts))
  return mixing.mix(parts, weights=weights, seed=seed)


def read(source: Source, start: int, stop: int) -> list[Question]:
  return [source.read(position) for position in range(start, stop)]


@pytest.mark.parametrize(
  ("weights", "block", "counts"),
  [((7, 3), 10, (7, 3)), ((0.75, 0.25), 4, (3, 1)), ((2.0, 2.0), 2, (1, 1)), ((), 60, (40, 20))],
)
def test_shares_are_exact_in_every_block(weights, block, counts):
  source = mixed(listed("a", 40), listed("b", 20), weights=weights)
  for k in range(3):
    found = Counter(q.dataset for q in read(source, k * block, (k + 1) * block))
    assert (found["a"], found["b"]) == counts


def test_weights_that_are_no_round_numbers():
  """0.3333: 1 to 2 within 1e-4 of all."""
  source = mixed(endless("a"), endless("b"), weights=(1 / 3, 2 / 3))
  found = Counter(q.dataset for q in read(source, 0, 30_000))
  assert abs(found["a"] - 10_000) <= 3


def test_large_weights_make_no_large_block():
  source = mixed(endless("a"), endless("b"), weights=(3_000_000, 1_000_000))
  assert Counter(q.dataset for q in read(source, 0, 4)) == {"a": 3, "b": 1}


def test_the_order_within_a_block_is_mixed():
  source = mixed(listed("a", 500), listed("b", 500))
  first = Counter(q.dataset for q in read(source, 0, 500))
  assert 180 < first["a"] < 320  # 250 +- 8 in a random order; 500 or 0 in none


def test_each_source_is_whole_in_each_of_its_epochs():
  """No question of a source comes again before all of it have come, whatever the weights."""
  source = mixed(listed("a", 30), listed("b", 7), weights=(2, 3))
  questions = read(source, 0, 600)
  orders = []
  for name, size in (("a", 30), ("b", 7)):
    own = [q.text for q in questions if q.dataset == name]
    epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
    assert all(len(set(epoch)) == size for epoch in epochs)
    assert epochs[0] != epochs[1]
    orders.append(epochs[0])
  assert orders[0][0][1:] != orders[1][0][1:]  # sources are not shuffled alike


def test_a_mix_is_a_function_of_seed_and_position():
  """Read backwards, from anywhere, by another run: the same questions."""
  make = lambda seed=0: mixed(listed("a", 30), endless("b"), weights=(1, 2), seed=seed)
  whole = read(make(), 0, 200)
  again = make()
  assert [again.read(i) for i in reversed(range(200))] == whole[::-1]
  assert read(make(), 117, 200) == whole[117:]
  other = read(make(seed=1), 0, 200)
  assert [q.dataset for q in other] != [q.dataset for q in whole]  # which source is whose turn
  texts = lambda questions: [q.text for q in questions if q.dataset == "a"]
  assert texts(other)[:30] != texts(whole)[:30]  # and the order within it


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (1, 0), (1, -1)])
def test_weights_that_do_not_fit(weights):
  with pytest.raises(UserError, match="one above 0 for each of the 2 sources"):
    mixed(listed("a", 3), listed("b", 3), weights=weights)


def test_no_size_to_go_by():
  with pytest.raises(UserError, match="has no end: give a weight"):
    mixed(listed("a", 3), endless("b"))
