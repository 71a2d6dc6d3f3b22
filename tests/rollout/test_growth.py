"""The state machine without a model: waves, stops, branches and cuts are the oracle's."""

import jax
import numpy as np
import pytest

from tests import rollout_oracle as oracle
from tests.rollout import drive
from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import segment as segment_lib
from treepo_jax.rollout import growth as growth_lib
from treepo_jax.rollout import tree as tree_lib


def sizes(tree: dict) -> list[int]:
  return [len(wave) for wave in tree["waves"]]


def names(tree: dict) -> dict[int, str]:
  """Returns the published ids of nodes: step-position of each segment of the path."""
  own = {row: f"{k}-{i}" for k, wave in enumerate(tree["waves"], 1) for i, row in enumerate(wave)}
  return {row: "/".join(own[r] for r in oracle.path(tree["parent"], row)) for row in own}


def stops(growth: growth_lib.Growth, b: int = 0) -> list[str]:
  leaves = growth.tree.leaves[b]
  return [tree_lib.STOP_NAMES[int(growth.tree.status[b, row])] for row in leaves[leaves >= 0]]


def scripted(ends: dict[int, str], segment: int = 4) -> drive.Script:
  """Returns a script in which only these rows end, with full segments."""
  return lambda name, row, depth: (segment, ends[row] if row in ends else None)


COMPANY = [3, 2, 9, 14, 19, 1]
POOLS = {
  "a tree for each": drive.settings(prompts=6),
  "one tree": drive.settings(prompts=6, pages=1),
  "two trees, few rows": drive.settings(prompts=6, pages=2, groups=3, group=2),
}


@pytest.mark.parametrize(
  ("width", "branching", "initial", "depth", "waves", "percent"),
  [
    (16, 2, 2, 14, [2, 4, 8] + [16] * 11, 15.2),
    (16, 2, 8, 14, [8] + [16] * 13, 3.6),
    (16, 4, 4, 8, [4] + [16] * 7, 9.4),
    (16, 8, 8, 8, [8] + [16] * 7, 6.2),
  ],
)
def test_where_nothing_ends_early(width, branching, initial, depth, waves, percent):
  shape = drive.settings(
    width=width, branching=branching, initial=initial, depth=depth, segment=2, repetition_count=0
  )
  growth, trees = drive.against_oracle(shape, [5], scripted({}, segment=2))
  assert sizes(trees[0]) == waves
  path = int(growth.tree.depth[0, growth.tree.leaves[0]].sum()) * 2
  assert path == width * depth * 2
  saving = 1 - int(growth.counters.decoded) / path
  assert saving == pytest.approx(oracle.saving(width, branching, initial, depth))
  assert round(100 * saving, 1) == percent
  assert set(stops(growth)) == {"length"}  # the longest answer comes before the deepest


def test_depth_ends_what_is_shorter_than_the_longest_answer():
  shape = drive.settings(width=4, depth=2, response_length=9)
  growth, trees = drive.against_oracle(shape, [5], scripted({}))
  assert stops(growth) == ["depth"] * 4 and sizes(trees[0]) == [2, 4]


def test_the_published_scripted_tree():
  # path 1 ends in step 2, paths 0, 3 and 7 in step 3: rows 3.. are step 2, rows 7.. step 3
  shape = drive.settings(width=16, depth=5)
  ends = {4: "eos", 7: "eos", 10: "eos", 14: "eos"}
  growth, trees = drive.against_oracle(shape, [5], scripted(ends))
  assert sizes(trees[0]) == [2, 4, 8, 12, 12]
  children = np.bincount(growth.tree.parent[0, 1 : growth.tree.size[0]], minlength=15)
  assert children[[3, 5, 6]].tolist() == [2, 2, 4]
  assert children[[8, 9, 11, 12, 13]].tolist() == [2, 2, 2, 2, 4]
  assert [names(trees[0])[row] for row in growth.tree.leaves[0].tolist()] == [
    "1-0/2-1",
    "1-0/2-0/3-0",
    "1-1/2-2/3-3",
    "1-1/2-3/3-7",
    "1-0/2-0/3-1/4-0/5-0",
    "1-0/2-0/3-1/4-1/5-1",
    "1-1/2-2/3-2/4-2/5-2",
    "1-1/2-2/3-2/4-3/5-3",
    *(f"1-1/2-3/3-{i}/4-{j}/5-{j}" for i, j in [(4, 4), (4, 5), (5, 6), (5, 7)]),
    *(f"1-1/2-3/3-6/4-{j}/5-{j}" for j in range(8, 12)),
  ]


def test_where_all_paths_loop_the_prompt_is_grown_anew():
  ends = {1: "repetition", 2: "repetition"}
  growth, trees = drive.against_oracle(POOLS["a tree for each"], COMPANY, scripted(ends))
  assert sizes(trees[0]) == [2, 2, 4, 6, 6] and trees[0]["fallbacks"] == 2
  assert growth.tree.source[0, 3:5].tolist() == [0, 0]
  assert stops(growth) == ["repetition"] * 2 + ["length"] * 6


SHAPES = {
  "usual": {"stride": 2},
  "spread": {"stride": 2, "remainder": "spread", "branching": 3, "width": 11, "depth": 3},
  "no fallback": {"fallback": "none", "width": 9, "remainder": "spread"},
  "drawn start": {"initial": 2, "initial_max": 6, "width": 7, "group": 3},
  "one by one": {"branching": 1, "initial": 1, "width": 5, "depth": 5, "stride": 2},
  "wide": {"branching": 8, "initial": 3, "width": 16, "depth": 2, "group": 1},
  "cut short": {"response_length": 11, "width": 6, "depth": 4, "segment": 4, "page": 4},
  "one segment": {"depth": 1, "width": 5, "initial": 3, "response_length": 3},
  "step tokens, longest first": {"step_paths": 5, "width": 11, "fallback_from": "longest"},
  "response tokens": {"response_tokens": 90, "width": 12, "min_width": 4},
  "by sum": {"allocation": "sum", "width": 12, "branching": 1, "branching_max": 4},
  "by mean, high": {"allocation": "mean", "favour": "high", "width": 16, "branching": 3},
  "by segment, windows": {"allocation": "segment", "width": 16, "fallback_window": 2},
  "windows of three": {"stride": 2, "fallback_window": 3, "fallback_windows": 2, "depth": 5},
  "windows of six": {"fallback_window": 6, "depth": 5, "fallback_from": "any"},
  "before the least likely": {
    "stride": 2,
    "fallback": "log_prob",
    "fallback_from": "longest",
    "width": 12,
  },
  "blocks": {"fallback": "block", "fallback_block": 3, "fallback_from": "finished_first"},
  "likely blocks": {"fallback": "inverse_block", "fallback_block": 5, "fallback_from": "strict"},
  "from the start": {"fallback": "start", "fallback_from": "any", "branching_max": 5},
  "where rewards disagree": {"fallback": "disagree", "width": 14, "branching_max": 3},
  "boxes by segment": {"stop_at": "segment", "fallback_from": "boxed", "fallback_least": 6},
  "boxes with EOS": {"stride": 2, "stop_at": "eos", "repetition_first": True, "width": 12},
  "no short ones": {"stride": 2, "min_length": 6, "width": 12, "fallback_from": "finished_first"},
  "no short ones, no fallback": {"min_length": 9, "fallback": "none"},
  "pruned by log-prob": {"prune": "log_prob", "prune_share": 0.5, "prune_keep": 1, "width": 16},
  "pruned by entropy": {
    "stride": 2,
    "prune": "entropy",
    "prune_share": 0.25,
    "width": 16,
    "initial": 6,
  },
  "pruned by reward": {"prune": "reward", "prune_share": 0.5, "width": 16, "min_length": 5},
}


@pytest.mark.parametrize("name", SHAPES)
def test_random_scripts_give_the_tree_of_the_oracle(name):
  prompts = 30
  shape = drive.settings(prompts=prompts, **SHAPES[name])
  script = drive.hazards(4, shape)
  heat = 0.5 if shape.branch.allocation == "sum" else 1.0
  growth, trees = drive.against_oracle(shape, [*range(prompts)], script, heat=heat)
  tree = growth.tree
  finished = (tree.leaves != tree_lib.NO_ROW).sum(1)
  assert growth.done.all() and (finished <= shape.width).all()
  if shape.fallback.place != "none":
    assert (finished == shape.width).all() or shape.spare or shape.branch.response_tokens
    assert shape.depth == 1 or sum(t["fallbacks"] > 0 for t in trees.values()) > 3
  if shape.spare:
    lost = tree.status >= tree_lib.SHORT
    assert lost.any(1).sum() > 5
    assert shape.fallback.place == "none" or finished.sum() > 0.8 * tree.leaves.size
  regrown = tree.source > 0
  b, row = np.nonzero(regrown)
  cut = np.asarray(tree.status)[b, tree.source[b, row]]
  if shape.fallback.source == "answered" and shape.fallback.place != "disagree":
    assert set(cut.tolist()) <= {tree_lib.EOS, tree_lib.ANSWER}
  reach = np.asarray(jax.vmap(tree_lib.ancestors)(tree.parent))
  assert reach[b, tree.source[b, row], tree.parent[b, row]].all()  # kept is of the source's path
  assert (tree.parent[b, row] != tree.source[b, row]).all()  # and not the whole of it


def test_trees_do_not_depend_on_rows_pages_or_company():
  whole, *others = POOLS.values()
  *_, (alone, _) = drive.run(whole, COMPANY, drive.hazards(4))
  by_id = {name: jax.tree.map(lambda x, b=b: x[b], alone.tree) for b, name in enumerate(COMPANY)}
  for shape, order in zip([whole, *others], [COMPANY[::-1], COMPANY, COMPANY[::-1]], strict=True):
    *_, (growth, _) = drive.run(shape, order, drive.hazards(4))
    for b, name in enumerate(order):
      found = jax.tree.map(lambda x, b=b: x[b], growth.tree)
      jax.tree.map(np.testing.assert_array_equal, found, by_id[name])
  *_, (other, _) = drive.run(whole, COMPANY, drive.hazards(4), seed=1)
  assert not np.array_equal(other.tree.parent, alone.tree.parent)  # other cuts


@pytest.mark.parametrize("pool", POOLS)
def test_pages_are_free_or_held_once_and_at_the_end_all_free(pool):
  shape = POOLS[pool]
  lengths = [1, 2, 3, 4, 5, 6]  # of no page, one page, .. three pages
  trees, most, growth, together = shape.pages // shape.pages_of_tree, 0, None, 0
  for growth, _ in drive.run(shape, COMPANY, drive.hazards(4), lengths=lengths):
    pages = drive.held(growth)
    assert sorted(growth.pool.free[: growth.pool.size].tolist() + pages) == [*range(shape.pages)]
    most = max(most, len(pages))
    ended = (growth.tree.leaves != tree_lib.NO_ROW).sum(1)
    queued = (growth.tree.status == tree_lib.OPEN).sum(1)
    assert (ended + queued <= shape.width).all()
    running = growth.admitted & ~growth.done
    together = max(together, int(running.sum()))
    # besides those being decoded, just the nodes that have or will have children hold pages
    has = (growth.paths.pages != pages_lib.NO_PAGE).any(-1)
    has[growth.slots.tree[growth.slots.live], growth.slots.node[growth.slots.live]] = False
    above = np.isin(growth.tree.status, (tree_lib.INNER, tree_lib.ACTIVE)) & running[:, None]
    np.testing.assert_array_equal(has[:, 1:], above[:, 1:])
  assert growth is not None and growth.pool.size == shape.pages and most > 0
  assert together > trees or trees in (1, 6)  # a tree hardly ever becomes the largest


def test_padding_is_not_grown():
  real = [True, False, True, True, False, False]
  *_, (growth, _) = drive.run(POOLS["a tree for each"], COMPANY, drive.hazards(4), real=real)
  count = (growth.tree.leaves != tree_lib.NO_ROW).sum(1)
  assert count.tolist() == [8 * r for r in real]
  assert (growth.tree.size > 1).tolist() == real


@pytest.mark.parametrize(
  ("length", "why", "found", "kept"),
  [
    (1, "eos", "eos", 5),
    (2, "answer", "answer", 6),
    (2, "eos", "eos", 6),  # exactly the longest answer
    (3, "eos", "length", 6),  # its stop is cut off
    (3, "answer", "length", 6),
    (4, None, "length", 6),
    (4, "repetition", "length", 6),
  ],
)
def test_the_longest_answer_inside_a_segment(length, why, found, kept):
  shape = drive.settings(response_length=6, width=2, depth=3)
  script = lambda name, row, depth: (length, why) if depth == 2 else (4, None)
  growth, _ = drive.against_oracle(shape, [5], script)
  assert stops(growth) == [found] * 2
  assert growth.counters.decoded == 2 * 4 + 2 * length  # cut off or not, it was sampled
  leaf = int(growth.tree.leaves[0, 0])
  host = jax.tree.map(np.asarray, growth.tree)
  assert len(tree_lib.response(host, 0, leaf)) == kept


def test_a_loop_is_found_across_segments():
  shape = drive.settings(width=2, depth=6, repetition_window=3, repetition_count=3, prompts=2)
  # tree 0 says 1 2 3 1 2 3 .. from its third token on, tree 1 never the same twice
  loop = [90, 91] + [1, 2, 3] * 10
  *_, last = _with_tokens(shape, lambda b, at: loop[at] if b == 0 else 100 + at)
  assert stops(last, 0) == ["repetition"] * 2 and stops(last, 1) == ["length"] * 2
  assert last.tree.depth[0, last.tree.leaves[0]].tolist() == [3, 3]  # 9 tokens of it: 2 + 9 <= 12


def _with_tokens(shape, text):
  """Yields the state of trees whose paths all read text(b, position)."""
  create, take, plan = drive.programs(shape)
  ones = np.ones((2, shape.prompt_length), np.int32)
  growth = create(ones, np.full(2, 3, np.int32), np.arange(2, dtype=np.uint32), np.ones(2, bool))
  segment = segment_lib.nothing((shape.groups, shape.group), shape.decoder.stride)
  nothing = np.zeros((2, shape.width), np.float32)
  while True:
    key = jax.random.key(0)
    growth = take(growth, segment, key)
    growth, need = jax.device_get(plan(growth, key, np.float32(1), nothing))
    yield growth
    if not need[3]:
      return
    segment = drive.write(growth, lambda name, row, depth: (4, None), {})
    for at in zip(*np.nonzero(growth.slots.live), strict=True):
      b, node = growth.slots.tree[at], growth.slots.node[at]
      first = 4 * (int(growth.tree.depth[b, node]) - 1)
      segment.tokens[at][:] = [text(b, first + i) for i in range(4)]
