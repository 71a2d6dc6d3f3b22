"""The strict policy as text: one spelling for each answer, exact numbers, words, boxes."""

from fractions import Fraction

import pytest

from treepo_jax.tasks import answers


@pytest.mark.parametrize(
  ("written", "value"),
  [
    ("7", 7),
    ("+7.", 7),
    ("-7.50", Fraction(-15, 2)),
    (".5", Fraction(1, 2)),
    ("−5", -5),
    ("1,234,567.5", Fraction(2469135, 2)),
    (r"10,\!080", 10080),
    (r"11,\! 111,\! 111,\! 100", 11111111100),
    ("10{,}000", 10000),
    ("14/4", Fraction(7, 2)),
    (r"-\frac{1}{2}", Fraction(-1, 2)),
    (r"\dfrac34", Fraction(3, 4)),
    (r"\frac 59", Fraction(5, 9)),
    (r"\frac{270}7\text{ degrees}", Fraction(270, 7)),
    ("1 1/2", Fraction(3, 2)),
    (r"1\frac12", Fraction(3, 2)),
    (r"-2 \frac{1}{4}", Fraction(-9, 4)),
    (r"137 \frac{1}{2}", Fraction(275, 2)),
    ("1.5e3", 1500),
    (r"1.2 \times 10^{-7}", Fraction(12, 10**8)),
    (r"3\cdot10^4", 30000),
    ("10^{4}", 10000),
    ("50 %", 50),
    (r"50\%", 50),
    (r"28 \text{ percent}", 28),
    ("28 pct", 28),
    (r"\$32,\!348", 32348),
    ("$18.90$", Fraction(189, 10)),
    (r"90^\circ", 90),
    (r"90^{\circ}", 90),
    ("45°", 45),
    (r"864 \mbox{ inches}^2", 864),
    (r"15\mbox{ cm}^2", 15),
    (r"5.4 \text{ cents}", Fraction(27, 5)),
    ("10 cm^2", 10),
    ("10 weeks", 10),
    ("3 square units", 3),
    (r"60 \text{ km}/\text{h}", 60),
    (r"3.5 \text{ million}", 3500000),
    (r"\(9\)", 9),
    (r"\left( 3 \right)", None),
    ("1,2", None),
    ("1,23", None),
    ("1/0", None),
    ("5m", None),
    ("10 xy", None),
    ("2 pi", None),
    ("52_8", None),
    ("12:30", None),
    ("1e9999", None),  # left to algebra: never written out
  ],
)
def test_numbers(written, value):
  assert answers.number(answers.tidy(written)) == value


@pytest.mark.parametrize(
  ("gold", "answer", "verdict"),
  [
    ("0.5", r"\frac12", True),
    ("1/3", "0.3333", False),
    ("50", r"50\%", True),
    ("0.5", r"50\%", False),
    (r"\text{(C)}", "C", True),
    ("C", r"\text{C}", True),
    ("C", "D", None),  # a letter may be a variable
    (r"\text{Evelyn}", "evelyn", True),
    (r"\text{east}", "seat", False),
    ("Monday", "dayMon", False),
    (r"\text{even}", "6", False),
    ("52_8", "52_{8}", True),
    ("52_8", "52", False),
    ("52_8", "52_9", False),
    (r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt{3}}{2}", True),
    (r"\sqrt{2}", "1.41421356", None),
    ("7", "", False),
    ("7", "  ", False),
    ("x", "y" * 3000, False),
    (r"3\sqrt{2}", r"2\sqrt{3}", False),
    (r"3\sqrt{2}", r"\sqrt{18}", None),  # values tell apart, they do not make equal
    ("5", "(1, 2)", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "3", False),
    ("5", "2k + 1", False),
    ("5", "p", False),
    ("5", "x", False),
    # These may be worth one value.
    ("5", "x = 5", None),
    ("5", r"\begin{vmatrix} 2 & 1 \\ 1 & 3 \end{vmatrix}", None),
    ("10", "C(5, 2)", None),
    ("10", "5C2", None),
    ("15", "3 x 5", None),
    ("4", r"\gcd(12, 8)", None),
    (r"2\sqrt{2}", r"\pm 2\sqrt{2}", None),
    ("1", r"\sin 90^\circ", None),
    ("1", "e^0", None),
  ],
)
def test_what_needs_no_algebra(gold, answer, verdict):
  assert answers.decide(gold, answer, 0.0) is verdict


def test_numbers_within_a_tolerance():
  assert answers.decide("1000", "1001", 0.001) is True
  assert answers.decide("1000", "1002", 0.001) is False
  assert answers.decide("0", "0.001", 0.5) is False


def test_boxes():
  text = r"\boxed{1}, \boxed{\frac{1}{2}} and then \boxed{3} \text{ or } $\boxed{4}$ \boxed{5"
  assert answers.boxes(text) == ["1", r"\frac{1}{2}", "3", "4"]
  assert answers.neighbouring_boxes(text[:-8]) == "3, 4"
  assert answers.neighbouring_boxes(r"\boxed{1}, \boxed{2}") == "1, 2"
  assert answers.neighbouring_boxes(r"\boxed{1} so \boxed{2}") == "2"
  assert answers.neighbouring_boxes("no box") is None


@pytest.mark.parametrize(
  ("text", "prose"),
  [
    ("1/2", False),
    ("$x=1$", False),
    (r"$(-6,6)$, $(2,6)$", False),
    (r"12 $ and $13", False),
    (r"164 \pi \mbox{ square feet}", False),
    (r"\text{no solution}", False),
    (r"\sin x + \cos x", False),
    ("28 percent", False),
    ("The answer is 4", True),
    ("Answer: 42", True),
    (r"Thus $x \le 2$ is our answer.", True),
  ],
)
def test_sentences(text, prose):
  assert answers.is_prose(text) is prose


@pytest.mark.parametrize("text", ["{" * 10**6, "}" * 10**6, r"\boxed{" * 10**5, "$" * 10**6])
def test_a_megabyte_of_braces_is_read_once(text):
  assert answers.boxes(text) == []
  assert answers.decide("7", text, 0.0) is False


@pytest.mark.parametrize(
  "piece", ["1 ", "{", "\\text{a", "1,", "a b", "$", "9 \\text", "^", "\\frac"]
)
def test_reading_takes_no_longer_than_its_text(piece):
  """No expression of this module looks back and back: the longest answer is read at once."""
  answers.decide("7", piece * (answers.LONGEST // len(piece)), 0.0)
