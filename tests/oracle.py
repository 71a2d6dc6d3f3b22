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


def paths(trajectories: list[str]) -> list[list[str]]:
  """Returns the nodes of each trajectory: its prompt, then the prefixes down to the whole key."""
  split = [key.split("#") for key in trajectories]
  return [["#".join(parts[: d + 1]) for d in range(len(parts))] for parts in split]


def families(trajectories: list[str]) -> dict[str, list[int]]:
  """Returns which trajectories pass through each node, a prompt being the node of all its own."""
  through: dict[str, list[int]] = {}
  for j, path in enumerate(paths(trajectories)):
    for node in path:
      through.setdefault(node, []).append(j)
  return through


def mean(values: list[float], weights: list[float]) -> float:
  """sum w x / sum w"""
  return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)


def unbiased_variance(values: list[float], weights: list[float]) -> float:
  """sum w (x - mean)^2 / (sum w - sum w^2 / sum w); n - 1 below the line for weights of one."""
  middle = mean(values, weights)
  squares = sum(w * (x - middle) ** 2 for w, x in zip(weights, values, strict=True))
  return squares / (sum(weights) - sum(w**2 for w in weights) / sum(weights))


def population_variance(values: list[float], weights: list[float]) -> float:
  """sum w (x - mean)^2 / sum w"""
  middle = mean(values, weights)
  return mean([(x - middle) ** 2 for x in values], weights)


def pick(values: list[float], indices: list[int]) -> list[float]:
  return [values[i] for i in indices]


def repeated(trajectories: list[str], values: list[float]) -> list[list[float]]:
  """Returns the number of each trajectory once for each of its segments."""
  return [[v] * key.count("#") for key, v in zip(trajectories, values, strict=True)]


def advantages(
  trajectories: list[str],
  rewards: list[float],
  weights: list[float] | None = None,
  *,
  aggregate: str = "average",
  reject: bool = False,
  repeat: bool = True,
  root: bool = True,
) -> list[float]:
  """TreePO's advantage before whitening (Eq 5; Eq 6 by `aggregate`, Eq 7 by `reject`).

  The groups are the trajectories through each node, from the prompt down to the leaf itself, which
  counts only if several trajectories ended in it. Without `root` the prompt's group, at whichever
  node it is met without `repeat`, is left out; who then has no group has no advantage.
  """
  weights = weights or [1.0] * len(rewards)
  through = families(trajectories)
  results = []
  for path, reward in zip(paths(trajectories), rewards, strict=True):
    terms, sizes, last = [], [], None
    for depth, node in enumerate(path):
      group = through[node]
      among = pick(rewards, group)
      if depth > 0 and (len(group) < 2 or (reject and max(among) == min(among))):
        continue
      if not repeat and group == last:
        continue
      last = group
      if depth == 0 and not root:
        continue
      terms.append(reward - (mean(among, pick(weights, group)) if len(group) > 1 else 0.0))
      sizes.append(sum(pick(weights, group)) if aggregate == "group_size" else 1.0)
    results.append(mean(terms, sizes) if terms else 0.0)
  return results


def treepo(trajectories, rewards, weights=None, **switches) -> list[list[float]]:
  """TreePO's advantage, one number for all segments of a trajectory."""
  return repeated(trajectories, advantages(trajectories, rewards, weights, **switches))


def centred(trajectories, rewards, weights=None) -> list[list[float]]:
  """R - mean of the prompt; alone, R."""
  weights = weights or [1.0] * len(rewards)
  through, results = families(trajectories), []
  for path, reward in zip(paths(trajectories), rewards, strict=True):
    group = through[path[0]]
    baseline = mean(pick(rewards, group), pick(weights, group)) if len(group) > 1 else 0.0
    results.append(reward - baseline)
  return repeated(trajectories, results)


def reward(trajectories, rewards, weights=None) -> list[list[float]]:
  """R"""
  del weights
  return repeated(trajectories, rewards)


def rloo(trajectories, rewards, weights=None) -> list[list[float]]:
  """R_i - mean of the prompt's others; alone, R."""
  weights = weights or [1.0] * len(rewards)
  through, results = families(trajectories), []
  for i, path in enumerate(paths(trajectories)):
    others = [j for j in through[path[0]] if j != i]
    results.append(
      rewards[i] - (mean(pick(rewards, others), pick(weights, others)) if others else 0.0)
    )
  return repeated(trajectories, results)


def remax(trajectories, rewards, weights=None, *, baselines: dict[str, float]) -> list[list[float]]:
  """R - the reward of the prompt's greedy answer."""
  del weights
  values = [r - baselines[p[0]] for p, r in zip(paths(trajectories), rewards, strict=True)]
  return repeated(trajectories, values)


def tree_grpo(trajectories, rewards, weights=None) -> list[list[float]]:
  """Sum of (R - mean) / (std + 1e-6) over the prompt and over those with the same first segment.

  arXiv 2509.21240. A group of one, or of equal rewards, adds nothing.
  """
  weights = weights or [1.0] * len(rewards)
  through, results = families(trajectories), []
  for path, own in zip(paths(trajectories), rewards, strict=True):
    total = 0.0
    for node in path[:2]:
      among, by = pick(rewards, through[node]), pick(weights, through[node])
      if len(among) > 1 and max(among) > min(among):
        total += (own - mean(among, by)) / (math.sqrt(unbiased_variance(among, by)) + 1e-6)
    results.append(total)
  return repeated(trajectories, results)


def children(trajectories: list[str]) -> dict[str, list[str]]:
  """Returns the distinct children of every node that has any."""
  below: dict[str, list[str]] = {}
  for node in families(trajectories):
    if "#" in node:
      below.setdefault(node.rpartition("#")[0], []).append(node)
  return below


def recursive_values(trajectories, leaf_rewards, weights) -> dict[str, float]:
  """V(leaf) = weighted mean of what ended there; V(node) = plain mean over distinct children."""
  below = children(trajectories)
  ended: dict[str, list[int]] = {}
  for j, key in enumerate(trajectories):
    ended.setdefault(key, []).append(j)

  def value(node: str) -> float:
    if node in below:
      return sum(value(child) for child in below[node]) / len(below[node])
    return mean(pick(leaf_rewards, ended[node]), pick(weights, ended[node]))

  return {node: value(node) for node in families(trajectories)}


def through_values(trajectories, rewards, weights) -> dict[str, float]:
  """V(node) = weighted mean reward of the trajectories through it."""
  return {
    node: mean(pick(rewards, group), pick(weights, group))
    for node, group in families(trajectories).items()
  }


def segment(trajectories, rewards, weights=None, *, eta: float = 0.0) -> list[list[float]]:
  """V(node) - eta^(n - i) V(parent) for segment i of a key of n parts, V(prompt) = 0.

  V is recursive from M_i = sum over prefixes |p| (R_i - mean_p) / sum |p|; eta <= 0 is off, a
  factor of one.
  """
  weights = weights or [1.0] * len(rewards)
  through, modified = families(trajectories), []
  for path, own in zip(paths(trajectories), rewards, strict=True):
    groups = [through[node] for node in path]
    sizes = [sum(pick(weights, group)) for group in groups]
    terms = [own - mean(pick(rewards, group), pick(weights, group)) for group in groups]
    modified.append(mean(terms, sizes))
  values = recursive_values(trajectories, modified, weights)
  results = []
  for path in paths(trajectories):
    n, row = len(path), []
    for i in range(1, n):
      above = values[path[i - 1]] if i > 1 else 0.0
      row.append(values[path[i]] - (eta ** (n - i) if eta > 0 else 1.0) * above)
    results.append(row)
  return results


def siblings_of(trajectories: list[str]) -> dict[str, list[str]]:
  """Returns the children of its parent for every node but the prompts, itself among them."""
  return {node: nodes for nodes in children(trajectories).values() for node in nodes}


def spo(trajectories, rewards, weights=None) -> list[list[float]]:
  """N(node) - N(parent), N = (V - mean) / std over siblings, V for an only child, 0 for a prompt.

  V is recursive from R; std is of the population, and where it is about 0 so is N.
  """
  weights = weights or [1.0] * len(rewards)
  values = recursive_values(trajectories, rewards, weights)
  normal = {}
  for node, siblings in siblings_of(trajectories).items():
    among, ones = [values[s] for s in siblings], [1.0] * len(siblings)
    std = math.sqrt(population_variance(among, ones))
    if len(siblings) == 1:
      normal[node] = values[node]
    else:
      normal[node] = (values[node] - mean(among, ones)) / std if std > 1e-6 else 0.0
  return [
    [normal[path[d]] - (normal[path[d - 1]] if d > 1 else 0.0) for d in range(1, len(path))]
    for path in paths(trajectories)
  ]


def treerl(trajectories, rewards, weights=None) -> list[list[float]]:
  """((V(n) - V(prompt)) + (V(n) - V(parent))) / sqrt(|n|), V over the trajectories through n."""
  weights = weights or [1.0] * len(rewards)
  values, through = through_values(trajectories, rewards, weights), families(trajectories)
  results = []
  for path in paths(trajectories):
    row = []
    for above, node in zip(path[:-1], path[1:], strict=True):
      whole, local = values[node] - values[path[0]], values[node] - values[above]
      row.append((whole + local) / math.sqrt(sum(pick(weights, through[node]))))
    results.append(row)
  return results


def treerpo(trajectories, rewards, weights=None) -> list[list[float]]:
  """(V(n) - mean) / (std + 1e-6) over siblings, recursive V from R, population std."""
  weights = weights or [1.0] * len(rewards)
  values, siblings = recursive_values(trajectories, rewards, weights), siblings_of(trajectories)
  results = []
  for path in paths(trajectories):
    row = []
    for node in path[1:]:
      among = [values[s] for s in siblings[node]]
      ones = [1.0] * len(among)
      std = math.sqrt(population_variance(among, ones))
      row.append((values[node] - mean(among, ones)) / (std + 1e-6) if len(among) > 1 else 0.0)
    results.append(row)
  return results


def vineppo(trajectories, rewards, weights=None) -> list[list[float]]:
  """V(n) - V(parent), V over the trajectories through n."""
  values = through_values(trajectories, rewards, weights or [1.0] * len(rewards))
  return [
    [values[node] - values[above] for above, node in zip(path[:-1], path[1:], strict=True)]
    for path in paths(trajectories)
  ]


# What is done to advantages afterwards: a number for each segment of each trajectory, and how many
# tokens the segment has.


def deviations(trajectories, rewards, weights=None) -> list[float]:
  """The unbiased standard deviation of rewards in the prompt of each trajectory; alone, 1."""
  weights = weights or [1.0] * len(rewards)
  through, results = families(trajectories), []
  for path in paths(trajectories):
    group = through[path[0]]
    results.append(
      math.sqrt(unbiased_variance(pick(rewards, group), pick(weights, group)))
      if len(group) > 1
      else 1.0
    )
  return results


def by_group(values, trajectories, rewards, weights=None) -> list[list[float]]:
  """A / (std of the prompt's rewards + 1e-6)"""
  stds = deviations(trajectories, rewards, weights)
  return [[v / (std + 1e-6) for v in row] for row, std in zip(values, stds, strict=True)]


def by_token(values, lengths, weights=None) -> list[list[float]]:
  """Whitens over tokens, each with its trajectory's weight; the variance is unbiased."""
  weights = weights or [1.0] * len(values)
  tokens, each = [], []
  for row, sizes, w in zip(values, lengths, weights, strict=True):
    tokens += [v for v, n in zip(row, sizes, strict=True) for _ in range(n)]
    each += [w] * sum(sizes)
  middle, variance = mean(tokens, each), unbiased_variance(tokens, each)
  return [[(v - middle) / math.sqrt(variance + 1e-8) for v in row] for row in values]


def by_leaf(values, lengths, weights=None) -> list[list[float]]:
  """Whitens over tokens that weigh w_i / tokens of trajectory i; the population's variance."""
  weights = weights or [1.0] * len(values)
  tokens, each = [], []
  for row, sizes, w in zip(values, lengths, weights, strict=True):
    tokens += [v for v, n in zip(row, sizes, strict=True) for _ in range(n)]
    each += [w / sum(sizes)] * sum(sizes)
  middle, variance = mean(tokens, each), population_variance(tokens, each)
  return [[(v - middle) / math.sqrt(variance + 1e-8) for v in row] for row in values]


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


# ------------------------------------------------------------------------------------------------
# Losses, token by token. A trajectory is a dict of lists of one number per token: "new" and "old"
# log-probabilities, "advantage", and where it is asked for "rollout", "reference" and "token", a
# name that the same token has in every trajectory through it.
# ------------------------------------------------------------------------------------------------


def clip(ratio: float, low: float, high: float) -> float:
  return min(max(ratio, 1 - low), 1 + high)


def ppo(trajectory, *, low: float = 0.2, high: float = 0.28, dual: float = 10.0) -> list[float]:
  """max(-A r, -A clip(r)), at most -A dual where A < 0; r = exp(new - old)."""
  return [
    token_loss(math.exp(new - old), a, low=low, high=high, dual=dual)
    for new, old, a in zip(
      trajectory["new"], trajectory["old"], trajectory["advantage"], strict=True
    )
  ]


def cispo(trajectory, *, low: float = 0.2, high: float = 0.28) -> list[tuple[float, float]]:
  """(-clip(r) A new, -clip(r) A): the loss, and its derivative by new with clip(r) a constant."""
  slopes = [
    -clip(math.exp(new - old), low, high) * a
    for new, old, a in zip(
      trajectory["new"], trajectory["old"], trajectory["advantage"], strict=True
    )
  ]
  return [(slope * new, slope) for slope, new in zip(slopes, trajectory["new"], strict=True)]


def reinforce(trajectory) -> list[tuple[float, float]]:
  """(-A new, -A): the loss and its derivative by new."""
  return [(-a * new, -a) for a, new in zip(trajectory["advantage"], trajectory["new"], strict=True)]


def gspo(trajectory, *, low: float = 0.2, high: float = 0.28) -> list[float]:
  """max(-A s, -A clip(s)) at every token; s = exp(mean of new - old) of the whole sequence."""
  gaps = [new - old for new, old in zip(trajectory["new"], trajectory["old"], strict=True)]
  s = math.exp(sum(gaps) / len(gaps))
  return [max(-a * s, -a * clip(s, low, high)) for a in trajectory["advantage"]]


def kl(trajectory, estimator: str) -> list[float]:
  """k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1; d = new - reference."""
  results = []
  for new, reference in zip(trajectory["new"], trajectory["reference"], strict=True):
    if estimator == "k1":
      results.append(new - reference)
    elif estimator == "k2":
      results.append(0.5 * (new - reference) ** 2)
    else:
      results.append(math.exp(reference - new) - (reference - new) - 1)
  return results


def importance(trajectory, level: str, cap: float) -> list[float]:
  """min(exp(old - rollout), cap) by token, or of the sums on every token by sequence."""
  gaps = [old - roll for old, roll in zip(trajectory["old"], trajectory["rollout"], strict=True)]
  if level == "token":
    return [min(math.exp(gap), cap) for gap in gaps]
  return [min(math.exp(sum(gaps)), cap)] * len(gaps)


def average(values: list[list[float]], over: str, max_length: int | None = None) -> float:
  """Means over tokens, over trajectories of their tokens' mean, or over n trajectories' room."""
  if over == "token":
    return sum(v for row in values for v in row) / sum(len(row) for row in values)
  if over == "sequence":
    return sum(sum(row) / len(row) for row in values) / len(values)
  assert over == "fixed" and max_length is not None
  return sum(v for row in values for v in row) / (len(values) * max_length)


def shared(trajectories, rule: str, loss=token_loss) -> dict[str, tuple[float, int]]:
  """Returns for each distinct token the sum of its losses and how many tokens it counts as.

  "leaf": sum of loss(r, A_i), as many as trajectories. "once": their mean, one token. "sum":
  loss(r, sum of A_i), as many as trajectories. A token has one r, the same in all of them.
  """
  ratios: dict[str, float] = {}
  credits: dict[str, list[float]] = {}
  for t in trajectories:
    for name, new, old, a in zip(t["token"], t["new"], t["old"], t["advantage"], strict=True):
      assert ratios.setdefault(name, math.exp(new - old)) == math.exp(new - old)
      credits.setdefault(name, []).append(a)
  results = {}
  for name, ratio in ratios.items():
    leaves = len(credits[name])
    if rule == "sum":
      results[name] = (loss(ratio, sum(credits[name])), leaves)
    else:
      total = sum(loss(ratio, a) for a in credits[name])
      results[name] = (total, leaves) if rule == "leaf" else (total / leaves, 1)
  return results


def overlong(
  length: int, *, max_length: int = 7168, buffer: int = 512, factor: float = 1.0
) -> float:
  """min(-(length - (max_length - buffer)) / buffer * factor, 0), added to the reward."""
  return min(-(length - (max_length - buffer)) / buffer * factor, 0.0)
