"""The trees of a step as one HTML page that opens from disk: branches, ends, credit.

A card is a segment. A line is the thicker the more trajectories go through it, its colour is their
mean advantage. What each trajectory came to stands in a table beside its leaf.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import os
import statistics
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from treepo_jax.run import layout
from treepo_jax.run import metrics as metrics_lib

# Why a trajectory ended: its badge's mark, and what it means.
STOPS = {
  "eos": ("\u25cf", "the model ended its answer"),
  "answer": ("\u25a0", "the box of the answer closed"),
  "length": ("\u25c6", "the limit of a response was reached"),
  "depth": ("\u25b2", "the limit of the tree's depth was reached"),
  "repetition": ("\u21bb", "it repeated itself"),
}

_MINUS, _DOT, _NONE, _CUT = "\u2212", "\u00b7", "\u2013", "\u2026"


class _Span(NamedTuple):
  """What the ends of the colours stand for, over the whole page."""

  credit: float  # from -credit to credit
  low: float  # the least reward
  high: float  # the highest


def page(records: Sequence[dict], path: str | Path, decode: layout.Decode, title: str) -> None:
  """Writes the trees of `records`, the lines of a trees/step_*.jsonl, as one self-contained page.

  `decode` turns token ids into text. The page loads nothing from anywhere and runs no script but
  its own; all text of prompts and policies is escaped. Raises UserError where `path` cannot be
  written.
  """
  trees = layout.trees(records, decode)
  script = _asset("view.js")
  leaves = [leaf for tree in trees for leaf in tree.leaves]
  credit = [abs(leaf.credit) for leaf in leaves if leaf.credit is not None]
  rewards = [leaf.reward for leaf in leaves if leaf.reward is not None]
  span = _Span(
    max(credit, default=0.0) or 1.0, min(rewards, default=0.0), max(rewards, default=0.0)
  )
  shared = os.path.commonprefix([t.question for t in trees]).rfind("\n") + 1 if trees[1:] else 0
  text = string.Template(_asset("view.html")).substitute(
    title=html.escape(title),
    digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    style=_asset("view.css"),
    script=script,
    totals=_totals(trees),
    legend=_legend(span, any(leaf.white is not None for leaf in leaves)),
    index="".join(_entry(i, tree, shared, span) for i, tree in enumerate(trees)),
    trees="".join(_section(i, tree, span) for i, tree in enumerate(trees)),
  )
  with metrics_lib.replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def _asset(name: str) -> str:
  return importlib.resources.files("treepo_jax.run").joinpath(name).read_text(encoding="utf-8")


def _number(value: float | None, digits: int = 2, sign: bool = False) -> str:
  """Returns a number as it is set in print, a dash where there is none."""
  if value is None:
    return _NONE
  plain = f"{abs(value):,.{digits}f}"
  if not plain.strip("0.,"):
    return plain  # zero as far as it is shown has no sign
  return (_MINUS if value < 0 else "+" if sign else "") + plain


def _mean(values: Sequence[float], digits: int = 2) -> str:
  return _number(statistics.fmean(values) if values else None, digits)


def _saving(decoded: int, path_tokens: int) -> str:
  return f"{_number(100 * (1 - decoded / path_tokens), 1)} %" if path_tokens else _NONE


def _tone(value: float | None, scale: float) -> str:
  """Returns the style that colours an element by a value from -scale to scale; none: neutral."""
  if value is None or not math.isfinite(value):
    return ""
  share = min(1.0, abs(value) / scale)
  # The square root lifts small values off the neutral colour; the figure stands beside it.
  return f"--tone:var(--{'pos' if value > 0 else 'neg'});--m:{100 * math.sqrt(share):.0f}%"


def _reward_tone(reward: float | None, span: _Span) -> str:
  middle, half = (span.low + span.high) / 2, (span.high - span.low) / 2
  if half == 0 or reward is None:
    return _tone(reward, abs(span.high) or 1.0)
  return _tone(reward - middle, half)


def _badge(stop: str) -> str:
  mark, meaning = STOPS[stop]
  return f'<span class="badge {stop}" title="{meaning}"><i>{mark}</i>{stop}</span>'


def _totals(trees: Sequence[layout.Tree]) -> str:
  rewards = [reward for tree in trees for reward in tree.rewards]
  decoded, path_tokens = sum(t.decoded for t in trees), sum(t.path_tokens for t in trees)
  mixed = sum(len(set(tree.rewards)) > 1 for tree in trees)
  figures = (
    ("prompts", f"{len(trees):,}"),
    ("trajectories", f"{sum(len(tree.leaves) for tree in trees):,}"),
    ("mean reward", _mean(rewards, 3)),
    ("with mixed rewards", f"{mixed:,}"),
    ("tokens decoded", f"{decoded:,}"),
    ("path tokens", f"{path_tokens:,}"),
    ("saved", _saving(decoded, path_tokens)),
    ("fallbacks", f"{sum(tree.fallbacks for tree in trees):,}"),
  )
  return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in figures)


def _legend(span: _Span, whitened: bool) -> str:
  ends = _number(-span.credit, 2, True), _number(span.credit, 2, True)
  kind = "advantage, whitened" if whitened else "advantage"
  stops = "".join(f"<li>{_badge(stop)}{meaning}</li>" for stop, (_, meaning) in STOPS.items())
  return (
    f'<div class="scale"><span>{ends[0]}</span><i></i><span>{ends[1]}</span><em>{kind}</em></div>'
    f"<ul>{stops}</ul>"
  )


def _entry(number: int, tree: layout.Tree, shared: int, span: _Span) -> str:
  """Returns the line of the index: the question, a cell for each trajectory's reward, the figures.

  `shared`: characters that all prompts begin with, a system prompt for example.
  """
  cells = "".join(f'<i style="{_reward_tone(leaf.reward, span)}"></i>' for leaf in tree.leaves)
  question = html.escape(" ".join(tree.question[shared:].split())[:120])
  saving = _saving(tree.decoded, tree.path_tokens)
  keys = {
    "kind": "mixed" if len(set(tree.rewards)) > 1 else "same",
    "order": number,
    "reward": statistics.fmean(tree.rewards) if tree.rewards else 0.0,
    "saving": 1 - tree.decoded / tree.path_tokens if tree.path_tokens else 0.0,
  }
  attributes = "".join(f' data-{key}="{value}"' for key, value in keys.items())
  return (
    f'<li{attributes}><a href="#t{number}"><span class="ask"><b>{number + 1}</b>{question}</span>'
    f'<span class="cells">{cells}</span>'
    f'<span class="small">reward {_mean(tree.rewards)} {_DOT} saved {saving}</span></a></li>'
  )


def _section(number: int, tree: layout.Tree, span: _Span) -> str:
  width, height = tree.width + 20, tree.height
  lines = "".join(_lines(node, width, span) for node in tree.nodes)
  cards = "".join(_card(node, span) for node in tree.nodes)
  outcomes = "".join(_outcome(node, span) for node in tree.nodes if not node.children)
  figures = (
    f"<b>{tree.decoded:,}</b> tokens decoded",
    f"<b>{tree.path_tokens:,}</b> path tokens",
    f"<b>{_saving(tree.decoded, tree.path_tokens)}</b> saved",
    f"mean reward <b>{_mean(tree.rewards)}</b>",
    f"<b>{len(tree.leaves)}</b> trajectories",
    f"<b>{len(tree.nodes) - 1}</b> segments",
    f"<b>{tree.fallbacks}</b> fallbacks",
  )
  bar = 100 * min(1.0, tree.decoded / tree.path_tokens) if tree.path_tokens else 0
  return (
    f'<section id="t{number}" style="--tall:{height + 200:.0f}px"><header><h2><b>{number + 1}</b>'
    f"<code>prompt {html.escape(tree.prompt_id)}</code>"
    f'<span class="gold">answer <b>{html.escape(tree.gold)}</b></span></h2>'
    f'<div class="question" dir="auto">{html.escape(tree.question)}</div>'
    f'<div class="sums">{"".join(f"<span>{figure}</span>" for figure in figures)}'
    f'<i class="spent"><i style="width:{bar:.1f}%"></i></i></div></header>'
    f'<div class="scroll"><div class="tree" style="width:{width:.0f}px;height:{height:.0f}px">'
    f'<svg width="{width:.0f}" height="{height:.0f}" aria-hidden="true">{lines}</svg>{cards}</div>'
    f'<div class="outcomes"><div class="head"><span>#</span><span>ended</span><span>tokens</span>'
    f"<span>reward</span><span>advantage</span></div>{outcomes}</div></div>"
    f'<script type="application/json">{_data(tree)}</script></section>'
  )


def _lines(node: layout.Node, width: float, span: _Span) -> str:
  """Returns the lines to a node's children, a dot where they part, and a leaf's to its outcome."""
  start, at = node.x + node.width, f'data-row="{node.row}"'
  if not node.children:
    kind = "lead" if node.order is not None else "lead unused"
    return f'<path class="{kind}" {at} d="M{start:.1f} {node.y:.1f}H{width:.0f}"/>'
  parts = []
  for child in node.children:
    bend = (start + child.x) / 2
    thick = 1.2 + 1.3 * math.sqrt(len(child.leaves))
    kind = "line" if child.source is None else "line cut"
    parts.append(
      f'<path class="{kind}" data-row="{child.row}" style="{_tone(child.credit, span.credit)};'
      f'stroke-width:{thick:.1f}" d="M{start:.1f} {node.y:.1f}'
      f'C{bend:.1f} {node.y:.1f} {bend:.1f} {child.y:.1f} {child.x:.1f} {child.y:.1f}"/>'
    )
  if len(node.children) > 1:
    parts.append(f'<circle class="fork" {at} cx="{start + 2:.1f}" cy="{node.y:.1f}" r="4.5"/>')
  return "".join(parts)


def _card(node: layout.Node, span: _Span) -> str:
  text = " ".join(node.text.split())
  if node.row == 0:
    text = "prompt"
  elif node.children:
    text = text[: 2 * node.letters * node.lines]  # the style sheet cuts it exactly
  elif len(text) > node.letters + 2:
    text = _CUT + text[-node.letters - 1 :]  # a leaf shows how it ends, where the answer is
  kinds = ("root", node.row == 0), ("cut", node.source is not None), ("unused", not node.leaves)
  kind = " ".join(["card", *(name for name, true in kinds if true)])
  many = f'<b class="many">{len(node.leaves)}</b>' if len(node.leaves) > 1 else ""
  return (
    f'<div class="{kind}" data-row="{node.row}" tabindex="0" style="left:{node.x:.1f}px;'
    f"top:{node.y - node.height / 2:.1f}px;width:{node.width:.1f}px;height:{node.height:.0f}px;"
    f'--n:{node.lines};{_tone(node.credit, span.credit)}">'
    f'<span dir="auto">{html.escape(text)}</span>{many}</div>'
  )


def _outcome(node: layout.Node, span: _Span) -> str:
  """Returns the table's row for an end of the tree: why it ended, its reward and advantage."""
  badge = _badge(node.stop) if node.stop else '<span class="badge">open</span>'
  if node.order is None:
    unused = f"<span></span>{badge}<em>not returned</em>"
    return f'<div class="end unused" data-row="{node.row}">{unused}</div>'
  credit = node.credit
  length = 50 * abs(credit) / span.credit if credit is not None else 0.0
  start = 50.0 if credit is not None and credit > 0 else 50.0 - length
  return (
    f'<div class="end" data-row="{node.row}"><span>{node.order + 1}</span>{badge}'
    f"<span>{node.path_tokens:,}</span>"
    f'<span class="reward"><i style="{_reward_tone(node.reward, span)}"></i>'
    f"{_number(node.reward)}</span>"
    f'<span class="credit" style="{_tone(credit, span.credit)}"><i><i style="left:{start:.1f}%;'
    f'width:{length:.1f}%"></i></i>{_number(credit, 2, True)}</span></div>'
  )


def _data(tree: layout.Tree) -> str:
  """Returns what the page shows of each segment when it is pointed at, as JSON inside a script."""
  nodes = [
    {
      "row": node.row,
      "parent": node.parent,
      "source": node.source,
      "figures": _figures(node, tree),
      "pieces": [piece for piece, _ in node.pieces],
      # Hundredths: what a colour and a hint can show.
      "heat": [round(100 * p) if math.isfinite(p) else None for _, p in node.pieces],
    }
    for node in tree.nodes
  ]
  data = {"question": tree.question, "nodes": nodes}
  text = json.dumps(data, ensure_ascii=False, allow_nan=False)
  return text.replace("<", "\\u003c")  # so that no text can end the script


def _figures(node: layout.Node, tree: layout.Tree) -> list[tuple[str, str]]:
  """Returns the name and value of each figure of a segment, in reading order."""
  if node.row == 0:
    return [("trajectories", str(len(tree.leaves))), ("branches", str(len(node.children)))]
  figures = [
    ("tokens", f"{len(node.tokens):,}"),
    ("mean log-prob", _number(node.log_prob, 3)),
    ("trajectories through it", f"{len(node.leaves)} of {len(tree.leaves)}"),
  ]
  if len(node.children) > 1:
    figures.append(("branches", str(len(node.children))))
  if node.children:
    figures.append(("mean advantage", _number(node.credit, 3, True)))
  if node.stop:
    figures.append(("ended", f"{node.stop}: {STOPS[node.stop][1]}"))
    figures.append(("trajectory", f"{node.path_tokens:,} tokens"))
    figures.append(("reward", _number(node.reward, 3)))
    figures.append(("advantage", _number(node.advantage, 3, True)))
    if node.white is not None:
      figures.append(("whitened", _number(node.white, 3, True)))
  if node.weight != 1.0:
    figures.append(("weight", _number(node.weight, 3)))
  if node.source is not None:
    leaf = next(n for n in tree.nodes if n.row == node.source)
    name = f"row {leaf.row}" if leaf.order is None else f"trajectory {leaf.order + 1}"
    figures.append(("fallback", f"grown from {name}, cut here"))
  return figures
