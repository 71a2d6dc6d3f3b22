"""Walking a known node is drawing anew: the joint law is that of independent samples.

Nodes are drawn here with sampling.draw from a table of distributions, so that every joint
probability is known; wrong ways to share are put to the same test, and fail it.
"""

import collections
import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from treepo_jax.decoding import pages as pages_lib
from treepo_jax.decoding import sampling
from treepo_jax.rollout import schedule, sharing
from treepo_jax.rollout import tree as tree_lib

TOKENS, SEGMENT, PAIRS = 3, 3, 20_000
FALSE_ALARM = 1e-4  # of a right walk so many seeds fail


# After every text of fewer than SEGMENT tokens, by its number.
LOGITS = 1.5 * np.random.default_rng(0).normal(size=(2 * TOKENS**SEGMENT, TOKENS))


def number(tokens) -> jax.Array:
  """Returns a text as a number; that of another length is another one."""
  place = jnp.ones((), jnp.int32)
  for token in tokens:
    place = place * TOKENS + token
  return place


def law() -> np.ndarray:
  """Returns the probability of each whole text."""
  chance = special.softmax(LOGITS, -1)
  out = np.zeros((TOKENS,) * SEGMENT)
  for text in np.ndindex(out.shape):
    out[text] = np.prod([chance[int(number(text[:i])), t] for i, t in enumerate(text)])
  return out.reshape(-1) / out.sum()


def drawn(uniform, tokens=None, given: jax.Array | int = 0):
  """Returns a node's tokens and their shares; the first `given` of `tokens` are taken over."""
  said, low, high = [], [], []
  for step in range(SEGMENT):
    row = jnp.asarray(LOGITS, jnp.float32)[number(said)]
    draw = sampling.draw(row[None], uniform[step][None], 1.0, TOKENS)
    token = draw.token[0]
    if tokens is not None:
      token = jnp.where(step < given, tokens[step], token)
    said.append(token)
    low.append(draw.low[0])
    high.append(draw.high[0])
  return jnp.stack(said), jnp.stack(low), jnp.stack(high)


def paths_of(tree: tree_lib.Tree, pages: int, **changes) -> schedule.Paths:
  """Returns what is known of the nodes of a tree: nothing but what is said."""
  n, s = tree.tokens.shape
  zero, blank = np.zeros(n, np.int32), np.zeros((n, s), np.float32)
  values = {"prompt": zero[:1] - 1, "pages": np.full((n, pages), pages_lib.NO_PAGE, np.int32)}
  values |= {"given": zero, "waits": zero > 0, "twin": zero - 1, "states": blank.astype(np.int8)}
  values |= {"low": blank, "high": blank, "entropy": blank}
  return schedule.Paths(**jax.tree.map(jnp.asarray, values | changes))


def known(tokens, low, high):
  """Returns a tree that holds one whole node, a new one beside it, and the shares."""
  tree = tree_lib.create(
    jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32),
    width=2, depth=1, segment=SEGMENT,
  )  # fmt: skip
  tree = jax.tree.map(lambda x: x[0], tree)
  tree = tree_lib.attach(tree, jnp.zeros(2, jnp.int32), jnp.full(2, -1))
  tree = dataclasses.replace(
    tree,
    tokens=tree.tokens.at[1].set(tokens),
    length=tree.length.at[1].set(SEGMENT),
    status=tree.status.at[1].set(tree_lib.DEPTH),
  )
  spread = lambda x: jnp.zeros((3, SEGMENT)).at[1].set(x)
  return tree, paths_of(tree, 1, low=spread(low), high=spread(high))


def walked(first, second):
  """Returns (tokens of a node, tokens of one that walks it, tokens walked, whether all)."""
  tokens, low, high = drawn(first)
  tree, paths = known(tokens, low, high)
  rows = jnp.array([2, 3])  # the new one, and none
  shared = sharing.walk(tree, paths, jnp.zeros(3, jnp.int32), rows, jnp.stack([second, second]))
  return tokens, drawn(second, tokens, shared.known[0])[0], shared.known[0], shared.whole[0]


def keeping_the_first_number(first, second):
  """Wrong: where the walk is left, the token is drawn with the other's number."""
  tokens, other, given, _ = walked(first, second)
  mixed = jnp.where(jnp.arange(SEGMENT) == given, first, second)
  return tokens, drawn(mixed, tokens, given)[0]


def drawing_twice(first, second):
  """Wrong: a token is kept with its probability, and else drawn from all, itself among them."""
  tokens, other, given, _ = walked(first, second)
  return tokens, drawn((second * 7919) % 1, tokens, given)[0]


def wider(first, second):
  """Wrong: tokens are kept more readily than they are likely (lenience)."""
  tokens, low, high = drawn(first)
  kept = (second >= low - 0.1) & (second < high + 0.1)
  given = jnp.cumprod(kept).sum()
  return tokens, drawn(second, tokens, given)[0]


@functools.cache
def joint(way) -> np.ndarray:
  """Returns how often each pair of texts was drawn."""
  uniform = jax.random.uniform(jax.random.key(5), (PAIRS, 2, SEGMENT))
  first, second, *_ = jax.jit(jax.vmap(lambda u: way(u[0], u[1])))(uniform)
  code = lambda x: np.asarray(x) @ TOKENS ** np.arange(SEGMENT)[::-1]
  cells = np.bincount(
    code(first) * TOKENS**SEGMENT + code(second), minlength=TOKENS ** (2 * SEGMENT)
  )
  return cells.reshape(TOKENS**SEGMENT, -1)


def pvalue(count: np.ndarray) -> float:
  """Returns how likely independent samples are so far off; rare pairs are put together."""
  expected = PAIRS * np.outer(law(), law()).reshape(-1)
  rare = expected < 5
  put = lambda x: np.append(x[~rare], x[rare].sum())
  return float(stats.chisquare(put(count.reshape(-1)), put(expected)).pvalue)


def information(count: np.ndarray) -> float:
  """Returns the mutual information of the pairs in nats, less what chance alone gives."""
  share = count / count.sum()
  sides = np.outer(share.sum(1), share.sum(0))
  some = share > 0
  cells = [(count.sum(axis) > 0).sum() - 1 for axis in (0, 1)]
  chance = cells[0] * cells[1] / (2 * count.sum())
  return float((share[some] * np.log(share[some] / sides[some])).sum() - chance)


def test_one_that_walks_is_an_independent_sample():
  count = joint(walked)
  assert pvalue(count) > FALSE_ALARM
  assert abs(information(count)) < 3e-3
  for side in (0, 1):
    assert stats.chisquare(count.sum(side), PAIRS * law()).pvalue > FALSE_ALARM


@pytest.mark.parametrize("way", [keeping_the_first_number, drawing_twice, wider])
def test_wrong_ways_to_walk_are_seen(way):
  assert pvalue(joint(way)) < 1e-12


def test_a_walk_goes_as_far_as_decoding_would_and_changes_nothing():
  uniform = jax.random.uniform(jax.random.key(1), (2000, 2, SEGMENT))
  first, second, given, whole = jax.jit(jax.vmap(lambda u: walked(u[0], u[1])))(uniform)
  alone = jax.jit(jax.vmap(lambda u: drawn(u[1])[0]))(uniform)
  np.testing.assert_array_equal(second, alone)
  common = np.cumprod(np.asarray(first) == np.asarray(alone), 1).sum(1)
  assert (np.asarray(given) <= common).all()
  assert (np.asarray(given) == common).mean() > 0.999  # but for numbers within rounding of a bound
  np.testing.assert_array_equal(np.asarray(whole), np.asarray(given) == SEGMENT)
  assert 0.02 < np.asarray(whole).mean() < 0.9


# ------------------------------------------------------------------------------------------------
# Many nodes at once, with numbers that are compared with their shares one by one.
# ------------------------------------------------------------------------------------------------

WIDTH, NODES, LONG, PAGE = 8, 17, 6, 2
PER_NODE = LONG // PAGE
HALF = np.float32(0.65)  # share of the likelier of two tokens
ENDED = (tree_lib.EOS, tree_lib.DEPTH, tree_lib.SHORT)
LOGS = ("log_probs", "sampled_log_probs")
SHARES = ("low", "high", "states", "entropy")


def code(*what) -> int:
  return zlib.crc32(repr(what).encode())


@dataclasses.dataclass
class Case:
  """Nodes of one tree, some open and some complete, with all that they will ever draw."""

  tree: tree_lib.Tree
  paths: schedule.Paths
  above: np.ndarray
  rows: np.ndarray
  uniform: np.ndarray  # of every node
  texts: list[list[int]]  # what each node would be if it were decoded by itself


def case(seed: int) -> Case:
  random = np.random.default_rng(seed)
  tree = tree_lib.create(
    jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32),
    width=WIDTH, depth=2, segment=LONG,
  )  # fmt: skip
  tree = jax.tree.map(lambda x: np.array(x[0]), tree)
  paths = jax.tree.map(np.array, paths_of(tree, PER_NODE))
  uniform = random.random((NODES, LONG), np.float32)
  size, texts = int(random.integers(6, NODES + 1)), [[] for _ in range(NODES)]
  twins = random.random() < 0.5  # node 2 is node 1
  spare, above = random.permutation(200).tolist(), np.zeros(NODES, np.int32)
  for row in range(1, size):
    parent = 0 if row < 3 else int(random.choice([0, 1, 2]))
    holder = 1 if twins and parent == 2 else parent
    tree.parent[row], tree.depth[row], above[row] = parent, tree.depth[parent] + 1, holder
    if row == 2 and twins:
      uniform[2] = uniform[1]
    # some begin with tokens that were not drawn
    forced = int(random.integers(1, 4)) if row > 2 and random.random() < 0.2 else 0
    text, over = [], False
    while len(text) < LONG and not over:
      i, turn = len(text), code(holder, text) % 2
      likely = bool(uniform[row, i] < HALF)
      text.append(1 + (int(likely) + turn) % 2)
      paths.low[row, i], paths.high[row, i] = (0, HALF) if likely else (HALF, 1)
      if i < forced:
        paths.low[row, i] = paths.high[row, i] = 0
        text[-1] = int(random.integers(1, 3))
      inner = holder == 0 and text in (texts[1][: i + 1], texts[2][: i + 1])
      over = row > 2 and not inner and code("ends", holder, text) % 9 == 0
    texts[row] = text
    opened = row > 2 and forced < len(text) and random.random() < 0.6
    opened &= (tree.status == tree_lib.OPEN).sum() < WIDTH
    n = int(random.integers(forced, len(text))) if opened else len(text)
    tree.tokens[row, :n] = text[:n]
    for k, name in enumerate((*LOGS, "entropy")):
      value = [code(k, holder, text[: i + 1]) % 512 / 64 for i in range(n)]
      getattr(paths if name == "entropy" else tree, name)[row, :n] = value
    paths.states[row, :n] = [code("state", holder, text[: i + 1]) % 100 for i in range(n)]
    paths.low[row, n:] = paths.high[row, n:] = 0
    held = PER_NODE
    if opened:
      tree.status[row], paths.given[row] = tree_lib.OPEN, n
      held = int(random.integers(0, n // PAGE + 1))
    else:
      tree.length[row] = n
      kinds = [tree_lib.ACTIVE, tree_lib.INNER, tree_lib.DEPTH, tree_lib.PRUNED]
      kinds = [tree_lib.EOS, tree_lib.SHORT] if over else kinds
      tree.status[row] = tree_lib.INNER if row < 3 else random.choice(kinds)
      held = 0 if tree.status[row] in (*ENDED, tree_lib.PRUNED) else held
    if row == 2 and twins:
      paths.twin[2], held = 1, 0
    paths.pages[row, :held] = [spare.pop() for _ in range(held)]
  opened = np.flatnonzero(tree.status == tree_lib.OPEN).tolist()
  others = [row for row in range(3, size) if tree.status[row] in (tree_lib.ACTIVE, *ENDED)]
  # Of complete ones those asked are no copies of one that nobody can walk.
  closed = [(above[row], texts[row]) for row in range(1, size) if 0 in paths.high[row, :1]]
  others = [row for row in others if (above[row], texts[row]) not in closed]
  asked = sorted([*opened, *random.permutation(others)[: WIDTH - len(opened)].tolist()])
  rows = np.array(asked + [NODES] * (WIDTH - len(asked)), np.int32)
  tree.size[...] = size
  return Case(tree, paths, above, rows, uniform, texts)


def expected(given: Case) -> dict[int, dict]:
  """Returns by row asked with whom it goes, and how far."""
  tree, paths = given.tree, given.paths
  opened = tree.status == tree_lib.OPEN
  knows = np.where(opened, paths.given, tree.length)
  gone = np.isin(tree.status, (tree_lib.UNUSED, tree_lib.PRUNED)) | (paths.twin >= 0)
  found = {}
  for x in given.rows[given.rows < NODES].tolist():
    best = {"other": x, "common": 0, "whole": False}
    for y in range(1, NODES):
      if gone[y] or y == x or given.above[y] != given.above[x]:
        continue
      if not opened[x] and (y > x or opened[y]):
        continue
      common = 0
      while common < knows[y]:
        same = tree.tokens[x, common] == tree.tokens[y, common]
        if common >= knows[x]:
          number = given.uniform[x, common]
          same = opened[x] and paths.low[y, common] <= number < paths.high[y, common]
        if not same:
          break
        common += 1
      fits = knows[x] <= knows[y] if opened[x] else knows[x] == knows[y]
      whole = not opened[y] and common == knows[y] and fits
      better = common > best["common"] or best["other"] == x
      if not best["whole"] and (whole or better):
        best = {"other": y, "common": common, "whole": bool(whole)}
    found[x] = best | {"known": max(best["common"], int(knows[x]))}
  leaders = {}
  for x, best in found.items():
    going = bool(opened[x]) and not best["whole"]
    text = (int(given.above[x]), *given.texts[x][: best["known"]])
    best["waits"] = going and leaders.setdefault(text, x) != x
  return found


@functools.cache
def _shared():
  def run(tree, paths, above, rows, uniform):
    match = sharing.walk(tree, paths, above, rows, uniform)
    return match, *sharing.apply(tree, paths, rows, match)

  return jax.jit(run)


def shared(given: Case):
  """Returns (match, tree, paths, pages held once more, pages held once less)."""
  numbers = given.uniform[np.minimum(given.rows, NODES - 1)]
  return jax.device_get(_shared()(given.tree, given.paths, given.above, given.rows, numbers))


SEEDS = range(150)


def test_nodes_go_as_far_with_others_as_their_numbers_say_and_the_first_of_equals_leads():
  seen = collections.Counter()
  for seed in SEEDS:
    given = case(seed)
    match, after = shared(given)[:2]
    opened = given.tree.status == tree_lib.OPEN
    asked = [x for x in given.rows.tolist() if x < NODES]
    leads = {}
    for k, (x, best) in enumerate(expected(given).items()):
      assert asked[k] == x
      found = {name: match[name][k].item() for name in best}
      assert found == best, (seed, x)
      # It is what it would have been by itself.
      text = given.texts[x]
      assert after.tokens[x, : best["known"]].tolist() == text[: best["known"]]
      if best["whole"]:
        assert not opened[best["other"]] and text == given.texts[best["other"]]
        assert best["known"] == len(text)
        others = [asked[j] for j in np.flatnonzero(match.whole)]
        assert best["other"] not in others  # a twin has no twin
      elif opened[x]:
        key = (given.above[x], *text[: best["known"]])
        assert best["waits"] == (key in leads)  # for one before it that does not wait
        leads.setdefault(key, x)
      moved = opened[x] and best["known"] > given.paths.given[x]
      seen.update(
        waits=best["waits"],
        twin=bool(opened[x] and best["whole"]),
        duplicate=bool(not opened[x] and best["whole"]),
        moved=bool(moved and not best["whole"]),
        behind=bool(moved and opened[best["other"]]),
        alone=best["other"] == x,
      )
    assert not match.waits[len(asked) :].any()
  assert len(seen) == 6 and min(seen.values()) > 4, seen


def test_what_is_shared_is_written_and_pages_are_whole_ones_of_the_common_tokens():
  seen = collections.Counter()
  for seed in SEEDS:
    given = case(seed)
    _, tree, paths, more, less = shared(given)
    before, known, goes = given.tree, given.paths, expected(given)
    count = collections.Counter(known.pages[known.pages >= 0].tolist())
    count.update(more[more >= 0].tolist())
    count.subtract(less[less >= 0].tolist())
    held = collections.Counter(paths.pages[paths.pages >= 0].tolist())
    assert +count == held
    for x in range(NODES):
      best = goes.get(x)
      if best is None:
        for a, b in ((tree, before), (paths, known)):
          for name in ("tokens", "length", "status", *LOGS) if a is tree else (*SHARES, "given"):
            np.testing.assert_array_equal(getattr(a, name)[x], getattr(b, name)[x])
        assert paths.pages[x].tolist() == known.pages[x].tolist()
        assert paths.twin[x] == known.twin[x] and paths.waits[x] == known.waits[x]
        continue
      other, common, opened = best["other"], best["common"], before.status[x] == tree_lib.OPEN
      for a, b, names in ((tree, before, ("tokens", *LOGS)), (paths, known, SHARES)):
        for name in names:
          new, old = getattr(a, name)[x], getattr(b, name)
          assert new[:common].tolist() == old[other, :common].tolist()
          assert new[common:].tolist() == old[x, common:].tolist()
      assert paths.given[x] == best["known"] and paths.waits[x] == best["waits"]
      assert paths.twin[x] == (other if best["whole"] else tree_lib.NO_ROW)
      mine, theirs = known.pages[x].tolist(), known.pages[other].tolist()
      if best["whole"]:
        status = before.status[other]
        status = tree_lib.ACTIVE if status == tree_lib.INNER else status
        assert tree.status[x] == (status if opened else before.status[x])
        assert tree.length[x] == before.length[other] == len(given.texts[x])
        assert paths.pages[x].tolist() == [pages_lib.NO_PAGE] * PER_NODE  # they are the other's
        seen["given back"] += any(page >= 0 for page in mine)
        continue
      assert tree.status[x] == before.status[x] and tree.length[x] == before.length[x]
      own = sum(page >= 0 for page in mine)
      lent = max(sum(page >= 0 for page in theirs[: common // PAGE]), own) if opened else own
      assert paths.pages[x].tolist() == mine[:own] + theirs[own:lent] + mine[lent:]
      seen["lent"] += lent > own
      seen["none to lend"] += bool(opened) and before.status[other] in ENDED and common >= PAGE
  assert len(seen) == 3 and min(seen.values()) > 10, seen


def test_a_twin_has_no_twin_where_rounding_sets_copies_apart():
  # 1 and 2 are complete and the same, decoded in two calls; 3 draws what 2 says by a hair.
  given = case(0)
  tree, paths = given.tree, jax.tree.map(np.array, paths_of(given.tree, PER_NODE))
  for name in ("tokens", "length", "parent", "depth", "status", *LOGS):
    getattr(tree, name)[:] = 0
  tree.parent[1:4], tree.depth[1:4], tree.tokens[1:3] = 0, 1, 1
  tree.length[1:3] = LONG
  tree.status[1:4] = tree_lib.ACTIVE, tree_lib.ACTIVE, tree_lib.OPEN
  paths.high[1:3] = HALF
  paths.high[2, 3] = np.nextafter(HALF, np.float32(1))
  paths.pages[1:3] = np.arange(2 * PER_NODE).reshape(2, PER_NODE)
  rows = np.array([2, 3] + [NODES] * (WIDTH - 2), np.int32)
  uniform = np.zeros((NODES, LONG), np.float32)
  uniform[3, 3] = HALF
  above = np.zeros(NODES, np.int32)
  _, tree, paths, _, _ = shared(Case(tree, paths, above, rows, uniform, []))
  assert paths.twin[2] == 1
  assert paths.twin[3] in (1, tree_lib.NO_ROW)
