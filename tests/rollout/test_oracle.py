"""The rollout's oracle itself: published numbers, each option by hand, laws on random scripts."""

import math
import random
from typing import Any

import pytest

from tests import rollout_oracle as oracle

SEGMENT = 4


def rules(**options) -> oracle.Rules:
  given: dict[str, Any] = {"segment": SEGMENT, "width": 8, "depth": 4} | options
  return oracle.Rules(**given)


def said(length=SEGMENT, why=None, boxed=None, log_probs=None, entropy=1.0, **more) -> dict:
  log_probs = [-1.0] * length if log_probs is None else log_probs
  boxed = why == "answer" if boxed is None else boxed
  more |= {"length": length, "why": why, "log_probs": log_probs}
  return more | {"boxed": boxed, "entropy": entropy}


def drawing(**drawn):
  """Returns draws that are the same in all waves: a number for all, or a list of them."""

  def draw(purpose: str, wave: int) -> list[float]:
    u = drawn.get(purpose, 0.5)
    return (list(u) if isinstance(u, list) else [u] * 16) + [0.5] * 16

  return draw


def plant(ends: dict[int, dict] | None = None, draw=None, judge=oracle.unjudged, **options) -> dict:
  """Grows a whole tree whose rows say a full segment, but for those in `ends`."""
  size = options.get("segment", SEGMENT)
  options = {"segment": size, "width": 8, "depth": 4, "initial": 2} | options

  def write(row: int, depth: int, given: int) -> dict:
    more = (ends or {}).get(row, {})
    return said(**{"length": len(more["log_probs"]) if "log_probs" in more else size} | more)

  *_, tree = oracle.grow(write, draw=draw or drawing(), judge=judge, **options)
  return tree


def sizes(tree: dict) -> list[int]:
  return [len(wave) for wave in tree["waves"]]


def stops(tree: dict) -> list[str]:
  return [tree["status"][leaf] for leaf in tree["leaves"]]


def children(tree: dict, wave: int) -> list[int]:
  rows = [row for row in tree["waves"][wave] if tree["status"][row] == "inner"]
  return [tree["parent"].count(row) for row in rows]


def regrown(tree: dict) -> list[tuple[int, int, int, int]]:
  """Returns (source, parent, given, guide) of the nodes that fallback made, in order."""
  rows = [row for row, source in enumerate(tree["source"]) if source >= 0]
  return [tuple(tree[k][row] for k in ("source", "parent", "given", "guide")) for row in rows]


# ------------------------------------------------------------------------------------------------
# Published numbers.
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("weights", "total", "counts"),
  [
    ([0.25] * 4, 7, [2, 2, 2, 1]),
    ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
    ([0.7, 0.2, 0.1], 3, [1, 1, 1]),
    ([0.6, 0.4], 5, [3, 2]),
    ([0.05, 0.05, 0.9], 13, [2, 1, 10]),
    ([1 / 3] * 3, 8, [3, 3, 2]),
  ],
)
def test_largest_remainder(weights, total, counts):
  assert oracle.largest_remainder(weights, total) == counts


@pytest.mark.parametrize(
  ("active", "total", "last", "spread"),
  [
    (4, 7, [1, 1, 1, 4], [2, 2, 2, 1]),
    (3, 8, [2, 2, 4], [3, 3, 2]),
    (5, 12, [2, 2, 2, 2, 4], [3, 3, 2, 2, 2]),
    (2, 4, [2, 2], [2, 2]),
    (6, 6, [1] * 6, [1] * 6),
    (5, 16, [3, 3, 3, 3, 4], [4, 3, 3, 3, 3]),
  ],
)
def test_even_allocation(active, total, last, spread):
  nothing = [[-1.0]] * active
  assert oracle.allocate(rules(remainder="last"), nothing, total) == last
  assert oracle.allocate(rules(), nothing, total) == spread


@pytest.mark.parametrize(
  ("temperature", "counts"),
  [(2.0, [4, 4, 4, 4]), (1.0, [3, 4, 5, 4]), (0.1, [1, 2, 12, 1]), (1e9, [4, 4, 4, 4])],
)
def test_allocation_by_log_prob(temperature, counts):
  scores = [[-0.2], [-0.5], [-0.8], [-0.3]]
  shape = rules(allocation="segment", allocation_temperature=temperature)
  assert oracle.allocate(shape, scores, 16) == counts


@pytest.mark.parametrize(
  ("width", "b", "finished", "ended", "active", "total"),
  [
    (16, 2, 0, 0, 2, 4),
    (16, 2, 1, 1, 3, 8),
    (16, 2, 4, 3, 5, 12),
    (16, 2, 8, 1, 8, 8),
    (16, 8, 0, 0, 8, 16),
    (8, 4, 3, 1, 3, 5),
    (16, 2, 15, 2, 1, 1),
  ],
)
def test_budgets(width, b, finished, ended, active, total):
  assert oracle.budget(width, b, finished, ended, active) == total


@pytest.mark.parametrize(
  ("b", "initial", "depth", "waves"),
  [
    (2, 2, 14, [2, 4, 8] + [16] * 11),
    (2, 8, 14, [8] + [16] * 13),
    (4, 4, 8, [4] + [16] * 7),
    (8, 8, 8, [8] + [16] * 7),
  ],
)
def test_batches_where_nothing_ends_early(b, initial, depth, waves):
  shape = {"width": 16, "branching": b, "initial": initial, "depth": depth}
  tree = plant(**shape)
  assert sizes(tree) == waves and stops(tree) == ["length"] * 16
  saved = 1 - sum(tree["length"]) / (16 * depth * SEGMENT)
  assert saved == pytest.approx(oracle.saving(**shape))
  deep = plant(**shape, response_length=99)  # never as long
  assert sizes(deep) == waves and stops(deep) == ["depth"] * 16


def test_the_scripted_tree():
  ends = {row: {"why": "eos"} for row in (4, 7, 10, 14)}
  tree = plant(ends, width=16, depth=5, remainder="last")
  assert sizes(tree) == [2, 4, 8, 12, 12]
  assert children(tree, 1) == [2, 2, 4] and children(tree, 2) == [2, 2, 2, 2, 4]
  name = {row: f"{k}-{i}" for k, wave in enumerate(tree["waves"], 1) for i, row in enumerate(wave)}
  paths = [oracle.path(tree["parent"], leaf) for leaf in tree["leaves"]]
  assert ["/".join(name[row] for row in rows) for rows in paths] == [
    *("1-0/2-1", "1-0/2-0/3-0", "1-1/2-2/3-3", "1-1/2-3/3-7"),
    *(f"1-0/2-0/3-1/4-{i}/5-{i}" for i in range(2)),
    *(f"1-1/2-2/3-2/4-{i}/5-{i}" for i in range(2, 4)),
    *(f"1-1/2-3/3-4/4-{i}/5-{i}" for i in range(4, 6)),
    *(f"1-1/2-3/3-5/4-{i}/5-{i}" for i in range(6, 8)),
    *(f"1-1/2-3/3-6/4-{i}/5-{i}" for i in range(8, 12)),
  ]


def test_where_all_paths_loop_the_prompt_is_grown_anew():
  tree = plant({1: {"why": "repetition"}, 2: {"why": "repetition"}})
  assert sizes(tree) == [2, 2, 4, 6, 6] and len(tree["leaves"]) == 8 and tree["fallbacks"] == 2
  assert regrown(tree) == [(0, 0, 0, 0)] * 2
  assert stops(tree) == ["repetition"] * 2 + ["length"] * 6


@pytest.mark.parametrize(
  ("tokens", "segment", "window", "windows", "kept"),
  [
    (2148, 512, 512, 0, [2048, 1536, 1024, 512, 0]),
    (2148, 512, 0, 0, [2048, 1536, 1024, 512, 0]),
    (2148, 512, 512, 2, [2048, 1536]),
    (2148, 512, 1024, 0, [2048, 1024, 0]),
    (1300, 1024, 512, 0, [1024, 512, 0]),
    (2000, 512, 128, 3, [1920, 1792, 1664]),  # published: 1536, as given tokens are a node there
    (300, 512, 0, 0, [0]),
    (512, 512, 512, 0, [0]),
    (300, 512, 512, 0, [None]),  # the prompt itself; published: the same tokens, none
  ],
)
def test_random_cuts(tokens, segment, window, windows, kept):
  shape = rules(segment=segment, fallback_window=window, fallback_windows=windows)
  u = [(k + 0.5) / len(kept) for k in range(len(kept))]
  assert [oracle.cut(shape, [0.0] * tokens, x) for x in u] == kept


BOX, EOS, LOOP = {"boxed": True}, {"why": "eos"}, {"loops": True}


@pytest.mark.parametrize(
  ("say", "stop_at", "first", "expected"),
  [
    (BOX | EOS | LOOP, "eos", False, "answer"),
    (BOX | EOS | LOOP, "eos", True, "repetition"),
    (BOX, "eos", False, "inner"),
    (BOX | LOOP, "eos", False, "repetition"),
    (EOS | LOOP, "eos", False, "eos"),
    (BOX, "segment", False, "answer"),
    (BOX | EOS, "segment", False, "answer"),
    (BOX | {"why": "repetition"}, "segment", False, "answer"),
    (BOX | {"why": "repetition"}, "segment", True, "repetition"),
    (EOS, "segment", False, "eos"),
    ({"why": "answer"}, "box", False, "answer"),
    ({"why": "answer"} | LOOP, "box", True, "repetition"),
    (EOS, "box", False, "eos"),
    (LOOP, "box", False, "repetition"),
    ({}, "box", False, "inner"),
  ],
)
def test_what_becomes_of_a_path(say, stop_at, first, expected):
  shape = rules(stop_at=stop_at, repetition_first=first)
  assert oracle.classify(shape, said(**say), 4, 1) == expected


@pytest.mark.parametrize("why", ["eos", "answer", None, "repetition"])
@pytest.mark.parametrize("first", [False, True])
def test_the_longest_answer_comes_before_the_deepest_and_before_loops(why, first):
  shape = rules(response_length=14, repetition_first=first)
  at, beyond = (oracle.classify(shape, said(why=why), n, 4) for n in (14, 15))
  if why == "repetition" and first:
    assert at == beyond == "repetition"
  else:
    assert at == (why if why in ("eos", "answer") else "length") and beyond == "length"
  deep = oracle.classify(shape, said(why=why), 13, 4)
  assert deep == ("depth" if why is None or (why == "repetition" and not first) else why)
  boxed = rules(response_length=14, stop_at="segment")
  assert oracle.classify(boxed, said(boxed=True), 14, 4) == "answer"
  assert oracle.classify(boxed, said(boxed=True), 15, 4) == "length"


# ------------------------------------------------------------------------------------------------
# Options by hand.
# ------------------------------------------------------------------------------------------------


def test_what_is_beyond_the_longest_answer_is_cut_off():
  ends = {row: {"why": "eos", "log_probs": [-1.0, -2.0, -3.0]} for row in (3, 4)}
  tree = plant(ends, width=2, response_length=6)
  assert stops(tree) == ["length"] * 2
  assert oracle.response(tree, 3) == [-1.0] * 5 + [-2.0]


@pytest.mark.parametrize(
  ("options", "u", "expected"),
  [
    ({}, 0.5, 8),  # as many as width
    ({"initial": 3}, 0.5, 3),
    ({"initial": 2, "initial_max": 5}, 0.0, 2),
    ({"initial": 2, "initial_max": 5}, 0.25, 3),
    ({"initial": 2, "initial_max": 5}, 0.99, 5),
    ({"initial": 5, "initial_max": 5}, 0.99, 5),
    ({"initial": 2, "initial_max": 5, "response_tokens": 15}, 0.99, 3),
    ({"response_tokens": 3}, 0.5, 1),
    ({"response_tokens": 400}, 0.5, 8),
    ({"initial": 2, "initial_max": 5, "step_paths": 6}, 0.5, 6),
    ({"initial": 2, "step_paths": 9}, 0.5, 8),
    ({"initial": 2, "step_paths": 6, "response_tokens": 23}, 0.5, 5),
  ],
)
def test_branches_of_the_prompt(options, u, expected):
  assert oracle.divergence(rules(**options), drawing(branching=u)) == expected


def test_branching_is_drawn_by_wave():
  draw = lambda purpose, wave: [[0.0, 0.0, 0.99, 0.5, 0.5][wave]] * 16
  tree = plant(draw=draw, width=16, branching=1, branching_max=3, fallback="none")
  assert sizes(tree) == [2, 2, 6, 12]


def test_a_step_has_as_many_paths_as_its_tokens_allow():
  assert sizes(plant(step_paths=3, initial=2)) == [3] * 4 + [3] * 4 + [2] * 4
  tree = plant({1: {"why": "eos"}}, step_paths=3)
  assert sizes(tree)[:2] == [3, 3] and children(tree, 0) == [2, 1]


@pytest.mark.parametrize(
  ("tokens", "floor", "waves"),
  [
    (64, 0, [2, 4, 5, 5]),  # 64 // (4 + 4) = 8, 64 // (8 + 4) = 5, 64 // (12 + 4) = 4 < 5
    (40, 0, [2, 4, 4, 4]),
    (24, 0, [2, 3, 3, 3]),  # 24 // (4 + 4) = 3
    (24, 4, [2, 4, 4, 4]),
    (24, 9, [2, 4, 8, 9]),
  ],
)
def test_response_tokens_bound_the_trajectories(tokens, floor, waves):
  tree = plant(width=9, response_tokens=tokens, min_width=floor, fallback="none")
  assert sizes(tree) == waves


def test_response_tokens_count_what_has_finished():
  # one of 4 tokens has finished, one of 4 goes on: (20 - 4) // (4 + 4) = 2 more
  tree = plant({1: {"why": "eos"}}, response_tokens=20, branching=4, fallback="none")
  assert sizes(tree)[:2] == [2, 2]
  # integers: (27 - 4) * 2 // (8 + 8) = 2 where two paths of 4 go on
  tree = plant({1: {"why": "eos"}}, response_tokens=27, branching=4, initial=3, fallback="none")
  assert sizes(tree)[:2] == [3, 2]


def test_response_tokens_bound_fallback():
  ends: dict[int, dict] = {row: {"why": "eos"} for row in range(1, 40)}
  fall = lambda **more: plant(ends, branching=8, initial=2, **more)
  assert sizes(fall()) == [2, 6]
  assert sizes(fall(response_tokens=20)) == [2, 3]  # (20 - 8) * 2 // 8
  assert sizes(fall(response_tokens=11)) == [2]  # less than the mean of 4 is left
  assert sizes(fall(response_tokens=11, min_width=3)) == [2, 1]
  assert sizes(fall(response_tokens=11, min_width=3, fallback="none")) == [2]
  ends[2] = {"why": "eos", "length": 3}
  assert sizes(fall(response_tokens=17)) == [2, 2]  # (17 - 7) // 3.5, of integers 10 * 2 // 7
  assert sizes(fall(response_tokens=2)) == [1]  # spent already


def test_allocation_looks_at_the_whole_response_or_its_end():
  long, short = [-0.5] * 8 + [-0.1] * 4, [-0.3] * 4
  found = {
    (which, favour): oracle.allocate(
      rules(allocation=which, favour=favour, allocation_temperature=0.01), [long, short], 6
    )
    for which in ("sum", "mean", "segment")
    for favour in ("low", "high")
  }
  assert found == {
    ("sum", "low"): [5, 1],
    ("sum", "high"): [1, 5],
    ("mean", "low"): [5, 1],
    ("mean", "high"): [1, 5],
    ("segment", "low"): [1, 5],
    ("segment", "high"): [5, 1],
  }
  assert oracle.score(rules(allocation="sum"), long) == pytest.approx(-4.4)
  assert oracle.score(rules(allocation="mean"), long) == pytest.approx(-4.4 / 12)


def test_unlikely_paths_branch_more():
  ends = {2: {"log_probs": [-9.0] * 4}}
  shape = {"allocation": "mean", "initial": 3}
  assert children(plant(ends, **shape), 0) == [1, 4, 1]
  assert children(plant(ends, **shape, favour="high"), 0) == [3, 1, 2]


VALUES = {
  row: {"log_probs": [x] * 4, "entropy": y}
  for row, (x, y) in enumerate([(-3.0, 0.5), (-1.0, 0.9), (-2.0, 0.1), (-3.0, 0.9)], 1)
}


@pytest.mark.parametrize(
  ("how", "share", "keep", "dropped"),
  [
    ("log_prob", 0.25, 2, [4]),  # the later of two alike
    ("log_prob", 0.5, 2, [1, 4]),
    ("log_prob", 0.75, 2, [1, 4]),
    ("log_prob", 0.75, 0, [1, 3, 4]),
    ("log_prob", 0.24, 0, []),
    ("log_prob", 1.0, 4, []),
    ("log_prob", 1.0, 9, []),
    ("entropy", 0.25, 0, [4]),
    ("entropy", 0.5, 0, [2, 4]),
    ("entropy", 0.75, 0, [1, 2, 4]),
    ("none", 1.0, 0, []),
  ],
)
def test_paths_of_low_value_are_pruned(how, share, keep, dropped):
  tree = plant(VALUES, initial=4, depth=2, prune=how, prune_share=share, prune_keep=keep)
  assert [row for row in tree["waves"][0] if tree["status"][row] == "pruned"] == dropped
  assert sizes(tree)[1] == 8  # their budget goes to the others
  assert not set(dropped) & set(tree["leaves"])
  assert not set(dropped) & set(tree["parent"])


def test_all_paths_may_be_pruned():
  tree = plant(width=2, prune="log_prob", prune_share=1.0, prune_keep=0)
  assert not tree["leaves"] and set(tree["status"][1:]) == {"pruned"}
  assert sizes(tree) == [2, 2, 2, 2, 2, 1, 1, 1]  # of 17 rows, a path needs four
  assert regrown(tree) == [(0, 0, 0, 0)] * 11


def test_rewards_nearby_are_the_value():
  # 1 and 2 branch by four; one of each ends, with 1 and -1
  ends = {3: {"why": "eos"}, 7: {"why": "eos"}}
  judge = lambda leaf: -1.0 if leaf == 7 else 1.0
  tree = plant(ends, judge=judge, branching=4, depth=3, prune="reward", prune_share=0.5)
  dropped = [row for row, status in enumerate(tree["status"]) if status == "pruned"]
  assert dropped == [8, 9, 10]

  grown = oracle.planted()
  for parent in (0, 0, 1, 1, 2, 2, 0, 7, 6):
    oracle.create(grown, parent)
  value = lambda row: oracle.value(rules(prune="reward"), grown, row, {3: 1.0, 5: -2.0}.__getitem__)
  assert [value(row) for row in (4, 6, 7, 8, 9)] == [0.0] * 5
  grown["leaves"] = [3, 5]
  assert [value(row) for row in (4, 6, 9)] == [1.0, -2.0, -2.0]  # the nearest that has any
  assert [value(row) for row in (7, 8)] == [-0.5] * 2  # of the prompt


def test_short_answers_are_dropped_and_their_budget_with_them():
  ends = {1: {"why": "eos"}, 4: {"why": "eos"}}
  tree = plant(ends, min_length=5)
  assert [tree["status"][row] for row in (1, 4)] == ["short", "eos"]
  assert sizes(tree)[:3] == [2, 2, 4]  # 2 * 1, then 2 * (1 + 1)
  assert tree["leaves"][0] == 4 and 1 not in tree["leaves"] and len(tree["leaves"]) == 8


def test_where_all_answers_are_short_the_room_ends():
  ends = {row: {"why": "eos"} for row in range(1, 99)}
  tree = plant(ends, min_length=5, width=3, depth=2, branching=5)
  # 13 rows, a path needs two: (13 - 3) // 2, (13 - 6) // 2, (13 - 9) // 2, (13 - 11) // 2
  assert sizes(tree) == [2, 3, 3, 2, 1] and not tree["leaves"]
  assert regrown(tree) == [(0, 0, 0, 0)] * 9


STOPS = ["repetition", "answer", "depth", "eos", "length", "eos"]
LENGTHS = [9, 3, 16, 8, 14, 2]
U = [0.2, 0.9, 0.8, 0.4, 0.1, 0.3]


@pytest.mark.parametrize(
  ("which", "least", "u", "order"),
  [
    ("answered", 0, U, [5, 3, 1]),
    ("answered", 3, U, [3, 1]),
    ("answered", 9, U, []),
    ("boxed", 0, U, [1]),
    ("boxed", 4, U, []),
    ("any", 0, U, [4, 0, 5, 3, 2, 1]),
    ("any", 9, U, [4, 0, 2]),
    ("strict", 0, U, [1, 3, 5, 2, 4, 0]),
    ("strict", 8, U, [3, 2, 4, 0]),
    ("finished_first", 0, [0.5] * 6, [1, 3, 5, 2, 4, 0]),  # alike: by weight, then in their order
    ("finished_first", 0, [0.0, 0.0, 0.5, 0.0, 0.5, 0.0], [2, 4, 0, 1, 3, 5]),
    # the noise orders like u^(1 / weight): 0.5^(1 / 7) = 0.82^(1 / 2)
    ("finished_first", 0, [0.83, 0.5, 0.1, 0.1, 0.1, 0.1], [0, 1, 3, 5, 2, 4]),
    ("finished_first", 0, [0.81, 0.5, 0.1, 0.1, 0.1, 0.1], [1, 0, 3, 5, 2, 4]),
    ("longest", 0, [0.5] * 6, [2, 4, 0, 3, 1, 5]),
    ("longest", 0, [0.5, 0.5, 0.5, 0.5, 0.5, 0.99], [5, 2, 4, 0, 3, 1]),
  ],
)
def test_who_is_cut_in_which_order(which, least, u, order):
  shape = rules(fallback_from=which, fallback_least=least)
  assert oracle.sources(shape, STOPS, LENGTHS, u) == order


def test_weighted_orders_are_drawn_by_weight():
  rng = random.Random(0)
  counts = {}
  for _ in range(4000):
    u = [rng.random() for _ in range(4)]
    stops = ["answer", "eos", "depth", "repetition"]
    first, *_ = oracle.sources(rules(fallback_from="finished_first"), stops, [1] * 4, u)
    counts[first] = counts.get(first, 0) + 1
  for i, p in enumerate([7 / 18, 5 / 18, 4 / 18, 2 / 18]):
    assert counts[i] / 4000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000))


@pytest.mark.parametrize(
  ("how", "u", "kept"),
  [
    ("log_prob", 0.5, 2),
    ("start", 0.5, 0),
    ("block", 0.0, 0),
    ("block", 0.15, 0),  # means -1, -2.5, -1: weights .154, .691, .154
    ("block", 0.16, 2),
    ("block", 0.84, 2),
    ("block", 0.85, 4),
    ("inverse_block", 0.44, 0),  # .450, .100, .450
    ("inverse_block", 0.46, 2),
    ("inverse_block", 0.56, 4),
    ("inverse_block", 0.999999, 4),
  ],
)
def test_where_a_trajectory_is_cut(how, u, kept):
  log_probs = [-0.5, -1.5, -4.0, -1.0, -1.0]
  assert oracle.cut(rules(fallback=how, fallback_block=2), log_probs, u) == kept
  assert oracle.cut(rules(fallback="log_prob"), [-1.0, -2.0, -2.0], u) == 1  # the first of equals


def test_a_cut_inside_a_segment_gives_its_first_tokens():
  ends = {
    1: {"log_probs": [-1.0, -1.1, -1.2, -1.3]},
    2: {"why": "eos", "log_probs": [-2.0, -2.1, -9.0, -2.3]},
    3: {"why": "eos", "log_probs": [-5.0, -5.1, -5.2, -7.0]},
    4: {"why": "eos", "log_probs": [-8.0, -8.1, -8.2, -8.3]},
  }
  shape = {"width": 3, "branching": 1, "initial": 1, "fallback": "log_prob"}
  tree = plant(ends, drawing(order=[0.9, 0.1]), **shape)
  assert tree["leaves"] == [2, 3, 4]
  assert regrown(tree) == [(2, 1, 2, 2), (3, 1, 3, 3)]
  assert oracle.response(tree, 3) == [-1.0, -1.1, -1.2, -1.3, -2.0, -2.1, -5.2, -7.0]
  # what was given to row 3 is given on
  assert oracle.response(tree, 4) == [-1.0, -1.1, -1.2, -1.3, -2.0, -2.1, -5.2, -8.3]
  assert tree["length"][3:] == [4, 4]


def test_a_window_too_long_for_an_answer_grows_the_prompt():
  ends = {row: {"why": "eos", "length": 3} for row in range(1, 20)}
  tree = plant(ends, width=4, branching=1, fallback_window=4)
  assert regrown(tree) == [(0, 0, 0, 0)] * 2
  assert regrown(plant(ends, width=4, branching=1)) == [(1, 0, 0, 0), (2, 0, 0, 0)]


def test_windows_shorter_than_a_segment():
  ends = {row: {"why": "eos"} for row in range(1, 20)}
  cuts = lambda u: regrown(plant(ends, drawing(cut=u), width=2, initial=1, fallback_window=2))
  assert cuts(0.1) == [(1, 0, 2, 1)] and cuts(0.9) == [(1, 0, 0, 0)]


def test_only_the_first_source_grows_again_from_the_start():
  ends = {row: {"why": "eos"} for row in range(1, 20)}
  draw = drawing(order=[0.3, 0.1, 0.2, 0.4])
  tree = plant(ends, draw, initial=3, fallback="start")
  assert sizes(tree) == [3, 2, 2, 1]
  assert {(source, parent) for source, parent, *_ in regrown(tree)} == {(2, 0)}


def test_copies_are_drawn_by_place_in_the_order():
  ends = {row: {"why": "eos"} for row in range(1, 30)}
  draw = drawing(order=[0.3, 0.1, 0.2], copies=[0.99, 0.0, 0.5], branching=0.0)
  tree = plant(ends, draw, initial=3, branching=1, branching_max=3, width=12)
  assert [source for source, *_ in regrown(tree)][:6] == [2, 2, 2, 3, 1, 1]
  fixed = plant(ends, draw, initial=3, step_paths=3, width=8)
  assert [source for source, *_ in regrown(fixed)] == [2, 2, 2, 3, 3]


def test_fallback_grows_where_answers_disagree():
  # 1 and 2 branch to 3, 4 and 5, 6, all of which end; those below 2 disagree
  ends = {row: {"why": "eos"} for row in range(3, 20)}
  reward = lambda row: -1.0 if row == 5 else 1.0
  grow = lambda u: regrown(plant(ends, drawing(place=u), reward, fallback="disagree", width=8))
  # 0: 3/4 + 1e-3, 1: 1e-3, 2: 1 + 1e-3
  assert grow([0.0, 0.4284])[:4] == [(3, 0, 0, 0)] * 2 + [(3, 0, 0, 0)] * 2
  assert grow([0.4287, 0.43]) == [(3, 1, 0, 0)] * 2 + [(5, 2, 0, 0)] * 2
  assert grow([0.99, 0.99]) == [(5, 2, 0, 0)] * 4  # drawn one by one, with replacement


def test_nothing_is_regrown_without_fallback():
  tree = plant({1: {"why": "eos"}, 2: {"why": "eos"}}, fallback="none")
  assert sizes(tree) == [2] and tree["leaves"] == [1, 2] and not tree["fallbacks"]


# ------------------------------------------------------------------------------------------------
# Laws, for scripts and draws of any kind.
# ------------------------------------------------------------------------------------------------

SHAPES = {
  "usual": {},
  "published": {"stop_at": "eos", "remainder": "last"},
  "stops with the segment": {"stop_at": "segment", "repetition_first": True},
  "independent": {"initial": 0},
  "drawn": {"branching": 1, "branching_max": 4, "initial": 1, "initial_max": 6},
  "wide": {"branching": 8, "initial": 1, "width": 16, "depth": 2},
  "deep": {"branching": 1, "initial": 1, "width": 5, "depth": 6},
  "one segment": {"depth": 1, "width": 5, "initial": 3, "response_length": 3},
  "cut short": {"response_length": 11, "fallback_from": "any"},
  "by log-prob": {"allocation": "mean", "allocation_temperature": 2.0, "width": 11},
  "steps": {"step_paths": 3},
  "tokens": {"response_tokens": 40, "min_width": 3},
  "small windows": {"fallback_window": 3, "fallback_windows": 2, "fallback_from": "longest"},
  "large windows": {"fallback_window": 6, "fallback_from": "finished_first", "branching": 1},
  "least likely": {"fallback": "log_prob", "fallback_from": "strict"},
  "blocks": {"fallback": "block", "fallback_block": 3, "fallback_from": "boxed"},
  "other blocks": {"fallback": "inverse_block", "fallback_block": 5, "fallback_least": 6},
  "start": {"fallback": "start"},
  "disagree": {"fallback": "disagree"},
  "no fallback": {"fallback": "none"},
  "short": {"min_length": 6},
  "hardly any": {"min_length": 13, "width": 4},
  "pruned": {"prune": "log_prob", "prune_share": 0.4},
  "pruned by entropy": {"prune": "entropy", "prune_share": 0.7, "prune_keep": 1},
  "pruned by reward": {"prune": "reward", "prune_share": 1.0, "prune_keep": 0, "min_length": 3},
}
MAY_BE_CUT = {"answered": {"answer", "eos"}, "boxed": {"answer"}}


def random_script(seed: str, stop_at: str):
  """Returns write and draw; no two tokens have the same log-prob, so that it tells them apart."""
  hazard = random.Random(seed).choice([0.1, 0.4, 0.7])

  def write(row: int, depth: int, given: int) -> dict:
    rng = random.Random(f"{seed} {row}")
    loops, ends, boxed = rng.random() < 0.05, rng.random() < hazard, rng.random() < 0.5
    why = "repetition" if loops else None
    length = SEGMENT
    if ends:
      why = "answer" if boxed and stop_at == "box" else "eos"
      length = rng.randint(given + 1, SEGMENT)
    log_probs = [-rng.random() for _ in range(length)]
    return said(length, why, boxed, log_probs, rng.random(), loops=loops)

  def draw(purpose: str, wave: int) -> list[float]:
    rng = random.Random(f"{seed} {purpose} {wave}")
    return [rng.random() for _ in range(16)]

  return write, draw


def check_wave(shape: oracle.Rules, tree: dict) -> None:
  """Asserts what holds after every wave."""
  opened = [row for row, status in enumerate(tree["status"]) if status == "open"]
  assert len(tree["leaves"]) + len(opened) <= shape.width
  assert opened == [*range(len(tree["parent"]) - len(opened), len(tree["parent"]))]
  fresh = [tree["source"][row] < 0 for row in opened]
  assert all(fresh) or not any(fresh)  # fallback waits until nothing goes on
  last = tree["waves"][-1] if tree["waves"] else []
  active = [row for row in last if tree["status"][row] == "inner"]
  if tree["waves"] and opened:
    assert all(fresh) == bool(active)
  if all(fresh) and active:
    assert sorted({tree["parent"][row] for row in opened}) == active  # each goes on


def check_tree(shape: oracle.Rules, tree: dict) -> None:
  """Asserts what holds of a whole tree."""
  parent, status, length = tree["parent"], tree["status"], tree["length"]
  assert tree["waves"] and sum(tree["waves"], []) == [*range(1, len(parent))]
  assert len(parent) <= (shape.rows or 1 + shape.width * shape.depth)
  inner = [row for row, s in enumerate(status) if s == "inner"]
  for row in range(1, len(parent)):
    assert 0 <= parent[row] < row and parent[row] in inner
    assert tree["depth"][row] == tree["depth"][parent[row]] + 1 <= shape.depth
    assert length[row] == len(tree["log_probs"][row]) > tree["given"][row]
    assert row not in inner or length[row] == shape.segment
    assert row in inner or len(oracle.response(tree, row)) <= shape.longest
    check_start(shape, tree, row)
  ended = [row for row in range(1, len(parent)) if row not in inner]
  assert [row for row in ended if status[row] not in ("short", "pruned")] == tree["leaves"]
  for row in ended:
    tokens = len(oracle.response(tree, row))
    assert status[row] == "pruned" or (tokens < shape.min_length) == (status[row] == "short")
  assert tree["fallbacks"] == sum(source >= 0 for source in tree["source"])


def check_start(shape: oracle.Rules, tree: dict, row: int) -> None:
  """Asserts that a row goes on where its source, if any, was cut."""
  source, given, guide = (tree[key][row] for key in ("source", "given", "guide"))
  assert bool(given) == bool(guide) and given < shape.segment
  if source > 0:
    assert source < row
    kept = shape.segment * (tree["depth"][row] - 1) + given
    old, new = oracle.response(tree, source), oracle.response(tree, row)
    assert kept < len(old) and new[:kept] == old[:kept]
    assert new[kept] not in old  # no log-prob occurs twice
    if shape.fallback != "disagree":
      may = MAY_BE_CUT.get(shape.fallback_from, set(oracle.WEIGHTS))
      assert tree["status"][source] in may and len(old) >= shape.fallback_least
  else:
    assert not given
    assert source < 0 or tree["parent"][row] == 0


@pytest.mark.parametrize("name", SHAPES)
def test_random_scripts_give_lawful_trees(name):
  options = {"segment": SEGMENT, "width": 8, "depth": 4, "initial": 2} | SHAPES[name]
  shape = oracle.Rules(**options)
  trees = []
  for seed in range(40):
    write, draw = random_script(f"{name} {seed}", shape.stop_at)
    judge = lambda leaf, seed=seed: random.Random(f"{seed} {leaf}").choice([-1.0, 1.0])
    for tree in oracle.grow(write, draw=draw, judge=judge, **options):
      check_wave(shape, tree)
    check_tree(shape, tree)
    trees.append(tree)
    *_, again = oracle.grow(write, draw=draw, judge=judge, **options)
    assert again == tree
  full = shape.fallback != "none" and not shape.response_tokens and not shape.rows
  for tree in trees:
    assert len(tree["leaves"]) == shape.width or not full
    assert len(tree["leaves"]) >= shape.min_width
  regrows = shape.fallback != "none" and shape.initial > 0
  assert (sum(tree["fallbacks"] > 0 for tree in trees) > 3) == regrows
  everything = {s for tree in trees for s in tree["status"]}
  assert ("short" in everything) == (shape.min_length > 0)
  assert ("pruned" in everything) == (shape.prune != "none")
  inside = shape.fallback_window or shape.fallback in ("log_prob", "block", "inverse_block")
  assert any(any(tree["given"]) for tree in trees) == bool(inside)
