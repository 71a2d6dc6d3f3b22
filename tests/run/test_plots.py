"""The pictures of a run show its curves, from one step on, and leave nothing behind."""

import matplotlib
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from treepo_jax.config import UserError
from treepo_jax.run import plots


def run(steps: int) -> list[dict]:
  """Metrics of a run with a last record that only has the evaluation after it."""
  records = [
    {
      "step": step,
      "reward/mean": step / 50 - 0.5,
      "rollout/tokens_decoded": 600.0,
      "rollout/tokens_path": 1000.0 + step,
      "rollout/decode_saving": 1 - 600 / (1000 + step),
      "update/token_saving": 0.3,
    }
    | ({"eval/accuracy": step / 100} if step % 10 == 0 else {})
    for step in range(steps)
  ]
  return [*records, {"step": steps, "eval/accuracy": 0.75}]


def inked(path, color: str) -> int:
  """Returns how many pixels have exactly this colour."""
  picture = matplotlib.image.imread(path)[..., :3]
  wanted = np.array(matplotlib.colors.to_rgb(color))
  return int((np.abs(picture - wanted).max(axis=-1) < 2 / 255).sum())


@pytest.mark.parametrize("steps", [1, 2, 60])
def test_every_curve_is_drawn(tmp_path, steps):
  plots.plot_learning(run(steps), tmp_path / "plots" / "learning.png")
  plots.plot_saving(run(steps), tmp_path / "plots" / "saving.png")
  for name, colors in (
    ("learning.png", (plots._BLUE, plots._ORANGE)),
    ("saving.png", (plots._BLUE, plots._GREY, plots._GREEN)),
  ):
    path = tmp_path / "plots" / name
    assert path.read_bytes().startswith(b"\x89PNG")
    for color in colors:
      legend = 60  # pixels that the legend alone would have
      assert inked(path, color) > legend
  assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["learning.png", "saving.png"]


def test_a_value_that_was_not_a_number_is_left_out(tmp_path):
  records = run(30)
  records[7]["reward/mean"] = None  # what NaN is in JSON
  plots.plot_learning(records, tmp_path / "learning.png")
  assert [*plots._series(records, "reward/mean")[0]] == [s for s in range(30) if s != 7]


def test_the_running_mean_is_over_a_tenth_of_the_run():
  axes = Figure().subplots()
  y = np.arange(40.0) ** 2
  plots._smooth(axes, np.arange(40), y, "", plots._BLUE)
  raw, smooth = (np.asarray(line.get_ydata()) for line in axes.lines)
  np.testing.assert_array_equal(raw, y)
  assert smooth[20] == np.mean(y[18:23]) and smooth[0] == np.mean(y[:3])


def test_global_settings_stay(tmp_path):
  before = dict(matplotlib.rcParams)
  plots.plot_saving(run(3), tmp_path / "saving.png")
  assert dict(matplotlib.rcParams) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"cannot write .*learning\.png"):
    plots.plot_learning(run(3), tmp_path / "file" / "learning.png")
