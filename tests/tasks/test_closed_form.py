r"""Values that tell forms apart: right where there is one, none where readers differ."""

import math

import pytest

from treepo_jax.tasks import closed_form


@pytest.mark.parametrize(
  ("form", "value"),
  [
    ("7", 7),
    ("-2.5", -2.5),
    (r"\frac{3\sqrt{2}}{4} + 2\pi", 3 * math.sqrt(2) / 4 + 2 * math.pi),
    (r"\sqrt[3]{7}", 7 ** (1 / 3)),
    (r"2^{10} \cdot 3", 3072),
    (r"(1+\sqrt{5})/2", (1 + math.sqrt(5)) / 2),
    (r"-3^2", -9),
    (r"2 (3 + 4)(5)", 70),
    (r"10^{1/100}", 10**0.01),
    (r"\frac{\frac{1}{2}}{3}", 1 / 6),
    (r"6/2*3", 9),
    (r"2\frac{1}{2}", None),  # mixed, or a product
    (r"1/2\pi", None),
    ("2^31", None),
    ("2 3", None),
    ("x", None),
    ("6!", None),
    ("1,2", None),
    ("1/0", None),
    (r"\sqrt{-1}", None),
    (r"(-1)^{1/2}", None),
    ("9^{9^{9}}", None),
    (r"\sqrt{3}\sqrt{3}-3", None),  # 4e-16: the terms cancel
    ("(" * 1000, None),
    ("", None),
  ],
)
def test_values(form, value):
  found = closed_form.value(form)
  assert found is None if value is None else found == pytest.approx(value, rel=1e-12)


def test_apart():
  assert closed_form.apart(1.0, 1.001, 0.0)
  assert not closed_form.apart(1.0, 1.0 + 1e-9, 0.0)
  assert not closed_form.apart(1.0, 1.001, 1e-3)
  assert closed_form.apart(0.0, 1e-20, 0.0)
