"""Algebra: what is equal and, as much, what is not."""

import pytest

from treepo_jax.tasks import verify


@pytest.mark.parametrize(
  ("gold", "answer"),
  [
    (r"3\sqrt{2}", r"\sqrt{18}"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
    (r"\frac{\pi}{2}", "1.5707963267948966"),
    (r"2^{10}", "1024"),
    ("(x+1)^2", "x^2+2x+1"),
    ("a^2+b^2", "b^2+a^2"),
    ("3+4i", "4i+3"),
    (r"e^{i\pi}", "-1"),
    (r"6.63 \times 10^{-34} \cdot 3", r"19.89 \times 10^{-34}"),
    ("1,2", "2,1"),
    (r"\{1,2\}", "2, 1"),
    (r"1 \text{ and } 2", "1; 2"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("f(x)=x+22", "x+22"),
    ("y = 2x + 3", "f(x) = 2x + 3"),
    ("y=2x+3", "3=y-2x"),
    ("2x+4y-3=0", "y=-x/2+3/4"),
    ("x>2", r"(2,\infty)"),
    (r"x \in [-2,7]", r"-2 \le x \le 7"),
    (r"x \in [-2, 5]", "x ∈ [-2,5]"),
    (r"[0,1)\cup(1,2]", r"(1,2]\cup[0,1)"),
    (r"\begin{pmatrix} 1\\2\end{pmatrix}", "(1,2)"),
    ("[0.5, 1]", r"\begin{matrix} \frac12 \\ 1 \end{matrix}"),
    (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"$\begin{pmatrix} 1 \\ -2 \end{pmatrix}}$"),
    (r"\begin{pmatrix} 1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1&2\\3&4\end{bmatrix}"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"\cos 60^{\circ} + 1", "3/2"),
  ],
)
def test_equal(gold, answer):
  assert verify.equal(gold, answer, False, "strict", 0.0)


@pytest.mark.parametrize(
  ("gold", "answer"),
  [
    ("(1,2)", "(2,1)"),
    ("1,2", "1"),
    ("2,3,5", "2,3"),
    ("(1,2),(3,4)", "(1,4),(3,2)"),
    ("[-3,2]", "(-3,2)"),
    (r"(-\infty, 0]", r"(-\infty, 0)"),
    (r"1 \le x \le 2", "1<x<2"),
    (r"x \geq 5", r"x \leq 5"),
    ("5m", "5"),  # a variable, not a unit
    ("2x+3d", "2x+3"),
    ("10 xy", "10"),
    ("x=1", "y=1"),
    ("11a+c=7", "11a+c"),
    ("y=2x+3", "y=2x+4"),
    (r"\frac{d x}{d t}=k x-a", r"m l \ddot{\theta}(t)-m g \sin \theta(t)=f(t)"),
    ("x^2", "x^3"),
    ("|x|", "x"),
    (r"\sqrt{x^2}", "x"),
    (r"n\pi", r"k\pi"),
    ("i", "-i"),
    (r"\pi", "3.14159265"),
    (r"\sqrt{2}", "1.41421356"),
    ("10^{-20}", "0"),  # rounding to decimals would call these equal
    (r"e^{-50}", "0"),
    (r"\frac{1}{10^{30}}", r"\frac{1}{10^{31}}"),
    (r"6.63 \times 10^{-34} \cdot 3", r"2 \times 10^{-34}"),
    (r"\infty", r"-\infty"),
    (r"\sin 30^\circ", r"\sin 30"),
    (r"\begin{pmatrix} 1\\2\end{pmatrix}", "(2,1)"),
    (r"\begin{pmatrix} 1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1&3\\2&4\end{pmatrix}"),
    (r"\sqrt{2}", ""),
    (r"\sqrt{2}", r"The answer is $\sqrt{2}$"),  # in a box a sentence is no answer
  ],
)
def test_not_equal(gold, answer):
  assert not verify.equal(gold, answer, False, "strict", 0.0)


def test_a_bare_answer_may_be_a_sentence():
  assert verify.equal("4", "The answer is 4", True, "strict", 0.0)
  assert verify.equal(r"x \le 2", "Thus $x <= 2$ is our answer.", True, "strict", 0.0)
  assert not verify.equal("4", "The answer is 5", True, "strict", 0.0)


def test_a_tolerance_is_relative():
  assert verify.equal(r"\sqrt{2}", "1.414", False, "strict", 1e-3)
  assert not verify.equal(r"\sqrt{2}", "1.41", False, "strict", 1e-3)


def test_the_engine_alone():
  """Lenient where the strict policy is not: six decimals, trailing letters as units."""
  assert verify.equal("1/3", "0.333333", False, "math_verify", 0.0)
  assert verify.equal("5", "5m", False, "math_verify", 0.0)
