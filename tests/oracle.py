"""TreePO again, in plain Python on keys and lists: what the arrays are compared with.

Nothing here is fast, and nothing is shared with the package.
"""

import math

# ------------------------------------------------------------------------------------------------
# Learning. A trajectory is a key such as "q#a#b": its prompt, then its segments from the first on.
# ------------------------------------------------------------------------------------------------


def keys(prompt: str, parent: list[int], leaves: list[int]) -> list[str]:
  """Returns the key of each leaf; a segment is named by its row, row 0 is the prompt."""
  names = []
  for row in leaves:
    name = ""
    while row > 0:
      name = f"#{row}{name}"
      row = parent[row]
    names.append(prompt + name)
  return names


def advantages(
  trajectories: list[str],
  rewards: list[float],
  *,
  aggregate: str = "average",
  reject: bool = False,
  repeat: bool = True,
) -> list[float]:
  """TreePO's advantage before whitening (Eq 5; Eq 6 by `aggregate`, Eq 7 by `reject`)."""
  split = [key.split("#") for key in trajectories]
  depths = max(len(parts) for parts in split) - 1
  results = []
  for parts, reward in zip(split, rewards, strict=True):
    terms, sizes, last = [], [], None
    for depth in range(depths):
      if len(parts) - 1 < depth:
        continue
      group = [j for j, other in enumerate(split) if other[: depth + 1] == parts[: depth + 1]]
      among = [rewards[j] for j in group]
      if depth > 0 and (len(group) < 2 or (reject and max(among) == min(among))):
        continue
      if not repeat and group == last:
        continue
      last = group
      terms.append(reward - (sum(among) / len(among) if len(among) > 1 else 0.0))
      sizes.append(len(group) if aggregate == "group_size" else 1)
    results.append(sum(t * s for t, s in zip(terms, sizes, strict=True)) / sum(sizes))
  return results


def grpo(trajectories: list[str], rewards: list[float]) -> list[float]:
  """GRPO's advantage (Eq 2): the prompt's mean and unbiased standard deviation."""
  results = []
  for key, reward in zip(trajectories, rewards, strict=True):
    prompt = key.split("#")[0]
    group = [r for k, r in zip(trajectories, rewards, strict=True) if k.split("#")[0] == prompt]
    if len(group) == 1:
      results.append(reward / (1 + 1e-6))
      continue
    mean = sum(group) / len(group)
    std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
    results.append((reward - mean) / (std + 1e-6))
  return results


def whiten(values: list[float], lengths: list[int]) -> list[float]:
  """Whitens over tokens: every value stands as often as its trajectory has tokens."""
  tokens = [v for v, n in zip(values, lengths, strict=True) for _ in range(n)]
  mean = sum(tokens) / len(tokens)
  variance = sum((t - mean) ** 2 for t in tokens) / (len(tokens) - 1)
  return [(v - mean) / math.sqrt(variance + 1e-8) for v in values]


def token_loss(
  ratio: float, advantage: float, *, low: float = 0.2, high: float = 0.28, dual: float = 10.0
) -> float:
  """The clipped loss of one token of one trajectory, with the dual clip."""
  plain = -advantage * ratio
  clipped = -advantage * min(max(ratio, 1 - low), 1 + high)
  loss = max(plain, clipped)
  return min(loss, -advantage * dual) if advantage < 0 else loss


def policy(
  trajectories: list[tuple[list[float], list[float], float]],
  *,
  low: float = 0.2,
  high: float = 0.28,
  dual: float = 10.0,
) -> dict[str, float]:
  """Means over the tokens of (log_probs, old_log_probs, advantage), trajectory by trajectory."""
  loss = clipped = lower = kl = 0.0
  tokens = 0
  for log_probs, old_log_probs, a in trajectories:
    for new, old in zip(log_probs, old_log_probs, strict=True):
      r = math.exp(new - old)
      tokens += 1
      loss += token_loss(r, a, low=low, high=high, dual=dual)
      clipped += -a * min(max(r, 1 - low), 1 + high) > -a * r
      lower += a < 0 and max(r, 1 - low) > dual
      kl += old - new
  return {
    "loss/policy": loss / tokens,
    "loss/clip_fraction": clipped / tokens,
    "loss/dual_clip_fraction": lower / tokens,
    "loss/kl_old": kl / tokens,
  }
