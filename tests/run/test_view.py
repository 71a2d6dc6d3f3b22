"""The page of a step's trees: what it shows, and what text of a prompt or policy cannot do."""

import base64
import hashlib
import html.parser
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.run.recorded import decode, node, record
from treepo_jax import config
from treepo_jax.run import layout, view


class Reader(html.parser.HTMLParser):
  """Collects tags with their attributes and the text inside each; knows that tags must pair up."""

  VOID = {"meta", "path", "circle", "br"}

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self.texts: list[tuple[str, str]] = []
    self.open: list[str] = []
    self.feed(text)
    self.close()
    assert not self.open, f"never closed: {self.open}"

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open:
      self.texts.append((self.open[-1], data))

  def of_class(self, name: str) -> list[dict]:
    return [a for _, a in self.tags if "class" in a and name in a["class"].split()]

  def data(self) -> list[dict]:
    return [json.loads(text) for tag, text in self.texts if tag == "script" and text[0] == "{"]


def written(records: list[dict], tmp_path: Path, title: str = "Step 3") -> str:
  path = tmp_path / "trees" / "step_3.html"
  view.page(records, path, decode, title)
  assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left
  return path.read_text(encoding="utf-8")


def test_every_segment_and_every_outcome_is_drawn(tmp_path):
  records = [record(seed) for seed in range(4)]
  text = written(records, tmp_path)
  page = Reader(text)
  assert len(page.of_class("card")) == sum(len(r["nodes"]) for r in records)
  assert len(page.of_class("line")) == sum(len(r["nodes"]) - 1 for r in records)
  ends = [a for a in page.of_class("end") if "unused" not in a["class"]]
  assert len(ends) == sum(len(r["leaves"]) for r in records)
  cut = [a for a in page.of_class("line") if "cut" in a["class"].split()]
  assert len(cut) == sum(len(r["fallback_of"]) for r in records) > 0
  children = [Counter(n["parent"] for n in r["nodes"][1:]) for r in records]
  assert len(page.of_class("fork")) == sum(n > 1 for c in children for n in c.values())
  for stop in view.STOPS:
    ended = sum(r["nodes"][row]["stop"] == stop for r in records for row in r["leaves"])
    unused = sum(n["stop"] == stop for r in records for n in r["nodes"]) - ended
    assert text.count(f'class="badge {stop}"') == ended + unused + 1  # the legend has one


def test_the_figures_of_a_tree_are_the_records(tmp_path):
  one = record(1)
  one["nodes"] = one["nodes"][:1] + [
    node(1, 0, [0, 1, 2]) | {"log_probs": [-1.0, -2.0, -3.0]},
    node(2, 1, [3, 4], "eos") | {"log_probs": [0.0, 0.0], "reward": 1.0, "advantage": 0.5},
    node(3, 1, [5], "answer") | {"log_probs": [-0.5], "reward": 0.0, "advantage": -0.25},
  ]
  one |= {"leaves": [3, 2], "fallback_of": {"3": 2}}
  text = written([one], tmp_path)
  for figure in ("<b>6</b> tokens decoded", "<b>9</b> path tokens", "<b>33.3 %</b> saved"):
    assert figure in text
  assert "mean reward <b>0.50</b>" in text
  figures = {n["row"]: dict(n["figures"]) for n in Reader(text).data()[0]["nodes"]}
  assert figures[1] == {
    "tokens": "3",
    "mean log-prob": "\u22122.000",
    "trajectories through it": "2 of 2",
    "branches": "2",
    "mean advantage": "+0.125",
  }
  assert figures[3]["fallback"] == "grown from trajectory 2, cut here"
  assert figures[3]["ended"].startswith("answer: ")
  assert figures[2]["advantage"] == "+0.500" and figures[2]["trajectory"] == "5 tokens"
  # Colour: the ends of the scale are the largest advantage of the page, the sign picks the hue.
  assert "+0.50</span><em>advantage</em>" in text
  cards = {int(a["data-row"]): a["style"] for a in Reader(text).of_class("card")}
  assert "var(--pos);--m:100%" in cards[2] and "var(--neg);--m:71%" in cards[3]


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (1234.5, "+1,234.50"),
    (-0.5, "\u22120.50"),
    (0.0, "0.00"),
    (-0.001, "0.00"),
    (None, "\u2013"),
    (float("-inf"), "\u2212inf"),
  ],  # fmt: skip
)
def test_numbers_as_they_are_set_in_print(value, shown):
  assert view._number(value, 2, sign=True) == shown


EVIL = "</script></style></div><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"


def test_text_cannot_leave_its_place(tmp_path):
  evil = record(0) | {"gold": EVIL, "prompt_id": EVIL}
  path = tmp_path / "page.html"
  view.page([evil], path, lambda ids: EVIL * len(ids), EVIL)
  text = path.read_text(encoding="utf-8")
  page = Reader(text)
  assert not [tag for tag, _ in page.tags if tag == "img"]
  scripts = [a for tag, a in page.tags if tag == "script"]
  assert scripts == [{"type": "application/json"}, {}]  # the data, and the page's own
  assert not [name for _, a in page.tags for name in a if name.startswith("on")]
  assert page.data()[0]["nodes"][1]["pieces"][0] == EVIL  # shown in full all the same


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path):
  text = written([record(0)], tmp_path)
  page = Reader(text)
  policy = next(a for t, a in page.tags if t == "meta" and "http-equiv" in a)["content"]
  script = [t for tag, t in page.texts if tag == "script"][-1]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
  assert not {"src", "srcset", "action"} & {name for _, a in page.tags for name in a}
  links = [a["href"] for _, a in page.tags if "href" in a]
  assert links == ["#t0"]
  for outside in ("http://", "https://", "@import", "url(", "fetch(", "XMLHttpRequest"):
    assert outside not in text


def test_what_cannot_be_seen_is_shown(tmp_path):
  path = tmp_path / "page.html"
  view.page([record(0)], path, lambda ids: "a\x00b\x1bc\ud800" * len(ids), "t")
  assert "a\u2400b\u241bc?" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
  "records", [[], [record(0) | {"nodes": [node(0, -1, [])], "leaves": [], "fallback_of": {}}]]
)
def test_a_page_without_trajectories_is_still_a_page(tmp_path, records):
  Reader(written(records, tmp_path))


def test_trees_without_credit_or_rewards_are_drawn(tmp_path):
  bare = record(2)
  for each in bare["nodes"]:
    each |= {"reward": None, "advantage": None}
    del each["advantage_white"]
  text = written([bare], tmp_path)
  assert "mean reward <b>\u2013</b>" in text
  assert "--tone" not in text.split("</style>")[1].split("<script>")[0]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(config.UserError, match="cannot write .*page.html.*--workdir"):
    view.page([record(0)], tmp_path / "file" / "page.html", decode, "t")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_parses(tmp_path):
  script = tmp_path / "view.js"
  script.write_text((Path(view.__file__).parent / "view.js").read_text(encoding="utf-8"))
  subprocess.run(["node", "--check", script], check=True)


def test_the_style_sheet_has_the_rows_of_the_layout():
  style = (Path(view.__file__).parent / "view.css").read_text(encoding="utf-8")
  assert f"--row: {layout.ROW:.0f}px" in style
