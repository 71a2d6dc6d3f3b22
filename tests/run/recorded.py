"""Makes trees as a run records them, grown at random: branches, ends, fallbacks, surplus ends."""

import random

WORDS = "so the sum of two and three is five \\boxed{5} <eos>".split(" ")


def decode(ids: list[int]) -> str:
  return "".join(f" {WORDS[i % len(WORDS)]}" for i in ids)


def record(seed: int, width: int = 16, depth: int = 6, segment: int = 9) -> dict:
  """Grows a tree at random as the rollout does: branch, stop, cut a finished one and grow again."""
  draw = random.Random(seed)
  nodes = [node(0, -1, [])]
  levels, leaves, sources = {0: 0}, [], {}
  active = [0]
  while len(leaves) < width:
    if not active:
      cut = draw.choice(leaves)
      active = [draw.choice(_path(nodes, cut)[:-1])]
      sources[len(nodes)] = cut
    share = max(min(2 * len(active), width - len(leaves)), len(active)) if not sources else 1
    parents = sorted(active * -(-share // len(active)))[:share]
    active = []
    for parent in parents:
      row, level = len(nodes), levels[parent] + 1
      stop = draw.choices([None, "answer", "eos", "repetition", "length"], [30, 4, 2, 0.6, 0.4])[0]
      stop = "depth" if stop is None and level == depth else stop
      count = draw.randint(2, segment) if stop in ("answer", "eos") else segment
      nodes.append(node(row, parent, [draw.randrange(90) for _ in range(count)], stop, draw))
      levels[row] = level
      (active if stop is None else leaves).append(row)
  mean = sum(nodes[row]["reward"] for row in leaves) / len(leaves)
  for row in leaves:
    nodes[row]["advantage"] = nodes[row]["reward"] - mean
    nodes[row]["advantage_white"] = 1.3 * (nodes[row]["reward"] - mean) - 0.05
  return {
    "step": 3,
    "prompt_id": str(1000 + seed),
    "prompt_tokens": [1, 2, 3, 4, 5 + seed],
    "gold": "5",
    "nodes": nodes,
    "leaves": leaves[:width],
    "fallback_of": {str(row): source for row, source in sources.items()},
  }


def node(row: int, parent: int, tokens: list, stop=None, draw=None) -> dict:
  log_probs = [-draw.expovariate(2.0) for _ in tokens] if draw else []
  reward = draw.choice([1.0, 1.0, -1.0]) if stop and draw else None
  return {
    "row": row,
    "parent": parent,
    "tokens": tokens,
    "log_probs": log_probs,
    "stop": stop,
    "reward": reward,
    "advantage": None,
    "advantage_white": None,
    "weight": 1.0,
  }


def _path(nodes, row) -> list[int]:
  return [] if row < 0 else [*_path(nodes, nodes[row]["parent"]), row]
