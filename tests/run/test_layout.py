"""Where segments stand and what is known of them, from recorded trees."""

import pytest

from tests.run.recorded import decode, node, record
from treepo_jax.run import layout


@pytest.fixture(params=range(6))
def tree(request) -> layout.Tree:
  return layout.trees([record(request.param)], decode)[0]


def test_cards_never_overlap(tree):
  boxes = [(n.x, n.y - n.height / 2, n.x + n.width, n.y + n.height / 2) for n in tree.nodes]
  for i, (left, top, right, bottom) in enumerate(boxes):
    assert left >= 0 and top >= 0 and right <= tree.width and bottom <= tree.height
    for other in boxes[:i]:
      apart = other[0] >= right or other[2] <= left or other[1] >= bottom or other[3] <= top
      assert apart


def test_ends_take_a_row_each_and_parents_stand_left_of_children(tree):
  ends = [each for each in tree.nodes if not each.children]
  assert [end.y for end in ends] == [(i + 0.5) * layout.ROW for i in range(len(ends))]
  for each in tree.nodes:
    for child in each.children:
      assert child.x > each.x + each.width
      assert child.depth == each.depth + 1


def test_a_segment_knows_the_trajectories_through_it():
  raw = record(3)
  tree = layout.trees([raw], decode)[0]
  parent = {n["row"]: n["parent"] for n in raw["nodes"]}
  through = {row: [] for row in parent}
  for leaf in raw["leaves"]:
    row = leaf
    while row >= 0:
      through[row].append(leaf)
      row = parent[row]
  for each in tree.nodes:
    assert sorted(leaf.row for leaf in each.leaves) == sorted(through[each.row])
    if each.leaves:
      mean = sum(raw["nodes"][row]["advantage_white"] for row in through[each.row])
      assert each.credit == pytest.approx(mean / len(each.leaves))
  assert [leaf.row for leaf in sorted(tree.leaves, key=lambda n: n.order or 0)] == raw["leaves"]
  length = {n["row"]: len(n["tokens"]) for n in raw["nodes"]}
  assert tree.decoded == sum(length.values())
  assert tree.path_tokens == sum(length[row] * len(leaves) for row, leaves in through.items())
  assert tree.fallbacks == len(raw["fallback_of"])


def test_a_token_is_read_behind_the_one_before_it():
  def stripped(ids: list[int]) -> str:  # as decoders that put spaces between words, not before
    return " ".join(f"w{i}" for i in ids)

  raw = record(0) | {"prompt_tokens": [7]}
  tree = layout.trees([raw], stripped)[0]
  for each in tree.nodes[1:]:
    assert each.text == "".join(f" w{i}" for i in each.tokens)
    assert [p for _, p in each.pieces] == each.log_probs


def test_tokens_that_only_together_make_a_character_are_one_piece():
  def of_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")

  word = "a\u20acb".encode()  # one byte, three, one
  log_probs = [-1.0, -2.0, -4.0, -8.0, -16.0]
  nodes = [node(0, -1, []), node(1, 0, [*word], "eos") | {"log_probs": log_probs}]
  raw = record(0) | {"nodes": nodes, "leaves": [1], "fallback_of": {}}
  pieces = layout.trees([raw], of_bytes)[0].nodes[1].pieces
  assert pieces == [("a", -1.0), ("\u20ac", -14.0), ("b", -16.0)]


def test_a_token_without_text_is_shown_by_its_number():
  tree = layout.trees([record(0)], lambda ids: "")[0]
  assert tree.nodes[1].pieces[0][0] == f"\u27e8{tree.nodes[1].tokens[0]}\u27e9"
