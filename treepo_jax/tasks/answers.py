r"""Answers as text: where they stand, what they are as exact numbers, and one spelling for each.

The strict policy, which README.md states as a table:

- what counts is the last complete `\boxed{...}`, and nothing after an end-of-sequence mark; an
  answer without one is wrong;
- numbers are compared exactly: `0.5`, `1/2`, `\frac12`, `50/100` are one number, `0.33` is not 1/3.
  A comma before three digits separates thousands, any other comma separates a list. `1 1/2` and
  `1\frac12` are mixed numbers; `1.5e3`, `1.5 \times 10^3` and `1.5 thousand` are 1500;
- a percent sign, a currency sign, a degree sign and a unit after a number are left out on both
  sides: `50\%` is 50 and not 0.5, `10 \text{ cm}` is 10. Degrees in a trigonometric function count;
- a list `1, 2`, with commas, semicolons, `and`, `or`, has no order, as a set `\{1, 2\}` has none,
  and what it repeats counts once; a tuple, a vector `(1, 2)`, `[1, 2]` or a column has one; an
  interval has its kinds of ends;
- `x = 5` and `x \in [0, 1]` are worth 5 and [0, 1]; another variable in the gold answer is wrong;
- a number with its base, `52_8`, is that number in that base and nothing else;
- formulas are equal where they are the same function of the same variables; `i` is the imaginary
  unit, `e` is Euler's number, letters have no case;
- words are compared as words, without case and `\text`; a choice is `C`, `(C)` or `\text{(C)}`.
"""

import dataclasses
import functools
import re
from fractions import Fraction

from treepo_jax.tasks import closed_form

# Written out by tokenizers that do not leave special tokens away: what follows is not the answer.
END = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text|eom_id)\|>|</s>|<eos>|<end_of_turn>")
LONGEST = 2000  # characters of an answer; a longer one is right only where its text is the gold's
DIGITS = 400  # of a number, and the largest power of ten that is written out

NUMBER = re.compile(r"[+-]?([0-9]{1,50}(\.[0-9]{0,50})?|\.[0-9]{1,50})(/[0-9]{1,50})?")
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}([^0-9]|$))")

_DECIMAL = r"(?:[0-9]{1,300}(?:\.[0-9]{0,300})?|\.[0-9]{1,300})"
_FRACTION = rf"\\frac(?:\{{([+-]?{_DECIMAL})\}}|([0-9]))(?:\{{({_DECIMAL})\}}|([0-9]))"
_PLAIN = re.compile(rf"([+-]?)({_DECIMAL})(?:/({_DECIMAL}))?")
_MIXED = re.compile(rf"([+-]?)([0-9]{{0,50}}) ?{_FRACTION}")
_MIXED_SLASH = re.compile(r"([+-]?)([0-9]{1,50}) ([0-9]{1,50})/([0-9]{1,50})")
_SCIENTIFIC = re.compile(
  rf"([+-]?{_DECIMAL})(?:[eE]| ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?)\{{?([+-]?[0-9]{{1,4}})\}}?"
)
_POWER_OF_TEN = re.compile(r"10 ?\^ ?(?:\{([+-]?[0-9]{1,4})\}|([0-9]))")

_SYMBOLS = {
  **{"−": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "π": r"\pi "},
  **{"∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge "},
  **{"≠": r"\ne ", "°": r"^\circ", "±": r"\pm ", "√": r"\sqrt", "²": "^2", "³": "^3", "％": "%"},
  **{"（": "(", "）": ")", "，": ",", "\u00a0": " ", "\n": " ", "\t": " "},
}
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
_NOTHING = re.compile(
  r"(?<!\\)\\[!,]\s*|\\displaystyle(?![a-zA-Z])|\\textstyle(?![a-zA-Z])"
  r"|\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\\\$"
)
_SPACE = re.compile(r"(?<!\\)\\[;:> ]|\\q?quad(?![a-zA-Z])|~|\\(?:h|v)space\{[^{}]*\}|\s+")
_FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SHORT_FRAC = re.compile(r"\\frac ?(?:([0-9])|(\{[^{}]*\})) ?(?:([0-9])|(\{[^{}]*\}))")
_SHORT_ROOT = re.compile(r"\\sqrt ?([0-9a-zA-Z])")
_TEXT = re.compile(
  r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|mathit|rm|operatorname)(?![a-z])"
)
_WORDS = re.compile(r"\\text ?\{([^{}]*)\}")
_JOINED = re.compile(r" ?,? ?\\text ?\{ ?,? ?(?:and|or) ?\} ?| ?,? (?:and|or) | ?; ?")
_DEGREE = re.compile(r" ?\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})|\\degree(?![a-zA-Z])")
_TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ANGLE = re.compile(rf"({_DECIMAL}) ?(?:\^ ?(?:\\circ(?![a-zA-Z])|\{{ ?\\circ ?\}})|\\degree)")
_PERCENT = re.compile(
  r" ?\\?%| ?\\text ?\{ ?(?:percent(?:age)?|pct) ?\}| (?:percent(?:age)?|pct)\b"
)
_CURRENCY = re.compile(r"^([+-]?) ?[$€£¥] ?(?=[0-9.])")
_SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(
  rf"(.*[0-9}}]) ?(?:\\text ?\{{ ?({'|'.join(_SCALE)}) ?\}}|({'|'.join(_SCALE)}))"
)
_UNIT = (
  r"(?:square |cubic |sq\.? |cu\.? )?(?:unit|point|degree|dollar|cent|cm|mm|km|kg|mg|ml|lb|ft|mi"
  r"|inch|inche|foot|feet|yard|mile|meter|metre|centimeter|centimetre|kilometer|kilometre"
  r"|millimeter|gram|kilogram|ounce|pound|ton|liter|litre|gallon|quart|pint|mph|kmph|hour|hr"
  r"|minute|min|second|sec|day|week|month|year|radian|people|student|way|time|digit|step|number)s?\.?"
)
_POWER = r"(?: ?\^ ?(?:[0-9]|\{ ?[0-9] ?\}))?"
_BARE_UNIT = re.compile(
  rf"(.*[0-9}}]) ?(?:{_UNIT}){_POWER}(?: ?/ ?(?:{_UNIT}){_POWER}| per [a-z]+)?"
)
_TEXT_UNIT = re.compile(
  rf"(.*[0-9a-zA-Z}})\]]) ?\\text ?\{{ ?[a-zA-Z°][a-zA-Z°. ,/^0-9-]* ?\}}{_POWER}"
  rf"(?: ?/ ?\\text ?\{{[a-zA-Z ]*\}}{_POWER})?"
)
_BASED = re.compile(r"[0-9][0-9A-Fa-f]* ?_ ?(?:[0-9]|\{ ?[0-9]{1,2} ?\})")
# A list, a matrix, or a letter by itself: no e, i, d, no C, P, A of combinatorics, no x in 3 x 5.
_MANY = re.compile(
  r"\{[bpB]?matrix\}|^(?:[^a-zA-Z]|\\(?:frac|sqrt|pi|infty|cdot)(?![a-z]))*,|(?<![A-Za-z\\])[abcf-hj-wyzBDF-HJ-OQ-Z](?![A-Za-z])"
  r"|(?<![A-Za-z\\0-9 ])x(?![A-Za-z])|^[0-9]* ?x(?![A-Za-z0-9 ])"
)
# What may be worth one value in spite of that; a comma after a letter may be of arguments.
_RELATION = re.compile(r"[=<>]|\\(?:pm|mp|in|to|approx|equiv|sim|[lg]eq?)(?![a-z])")
_BARE_WORD = re.compile(r"(?!infinity$)[A-Za-z]{4,}")
_CHOICE = re.compile(r"\(?([A-Z])\)?\.?")
_WORD = re.compile(r"[^\W\d_][^\W\d_'-]+(?: [^\W\d_'-]+)*")
_DELIMITER = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_FORMULA = re.compile(r"\$\$[^$]*\$\$|\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
_SEPARATOR = re.compile(r"\\[a-zA-Z]+|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_OUTSIDE = re.compile(r"[A-Za-z]{2,}")
_PROSE = re.compile(r"[A-Za-z]{2,}:|(?<![\\A-Za-z{])[A-Za-z]{2,}[,.]? +[A-Za-z]{2,}")
_FUNCTION = re.compile(r"^f ?\( ?x ?\) ?=")


def before_end(text: str) -> str:
  """Returns the text before its first end-of-sequence mark."""
  mark = END.search(text)
  return text[: mark.start()] if mark else text


def boxes(text: str) -> list[str]:
  r"""Returns what stands in the complete innermost `\boxed{...}` of a text, in order."""
  return [content for content, _, _ in _boxes(text)]


def neighbouring_boxes(text: str) -> str | None:
  r"""Returns the last complete boxes of a text that only separators part, as a list; or None.

  `\boxed{1} and \boxed{2}` is `1, 2`.
  """
  last: list[str] = []
  end = -1
  for content, begin, close in _boxes(text):
    between = _SEPARATOR.sub("", _DELIMITER.sub("", text[end:begin])) if last else ""
    last = [*last, content] if not between.strip(" ,;.{}\n") else [content]
    end = close
  return ", ".join(last) if last else None


def is_prose(text: str) -> bool:
  """Returns whether a text without a box is a sentence with an answer in it, not the answer."""
  text = _WORDS.sub("", _TEXT.sub(r"\\text", undelimited(without_percent(text))))
  if _DELIMITER.search(text):
    return bool(_OUTSIDE.search(_SEPARATOR.sub("", _FORMULA.sub("", text))))
  return bool(_PROSE.search(_SEPARATOR.sub("", text)))


def without_percent(text: str) -> str:
  r"""Returns a text without `%`, `\%`, `percent` and the like."""
  return _PERCENT.sub("", text)


def undelimited(text: str) -> str:
  r"""Returns a text without the `$...$`, `\(...\)` or `\[...\]` that hold all of it."""
  text = text.strip()
  while True:
    for begin, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
      inner = text[len(begin) : -len(end)]
      if len(text) > len(begin + end) and text.startswith(begin) and text.endswith(end):
        if begin not in inner and not inner.endswith("\\"):
          text = inner.strip()
          break
    else:
      return text


def normalise(answer: str) -> Fraction | str:
  """Returns what equal answers of the "number" grader share: exact numbers, else spaceless text.

  `7`, `07`, `+7`, `7.0`, `14/2`, `$7$` and `7.` are one number; `1,234` is 1234, `1,2` is text.
  """
  answer = answer.strip().strip("$").strip()
  answer = answer.removesuffix(".").replace("\\!", "").replace("\\,", "").replace("−", "-")
  number = THOUSANDS.sub("", answer).replace(" ", "")
  if NUMBER.fullmatch(number):
    top, _, bottom = number.partition("/")
    if not bottom or int(bottom):
      return Fraction(top) / int(bottom or 1)
  return "".join(answer.split())


def tidy(answer: str) -> str:
  """Returns an answer in the spelling that numbers are read from and math-verify understands."""
  text = _SYMBOL.sub(lambda m: _SYMBOLS[m.group()], answer)
  text = undelimited(without_percent(text).strip().rstrip("."))
  text = _SPACE.sub(" ", _NOTHING.sub("", text)).strip()
  text = _CURRENCY.sub(r"\1", _balanced(text).replace("{,}", ","))
  text = _DELIMITER.sub(" ", text).strip().rstrip(".").strip()
  text = _TEXT.sub(r"\\text", _FRAC.sub(r"\\frac", text))
  text = _SHORT_ROOT.sub(r"\\sqrt{\1}", _SHORT_FRAC.sub(_braced, text))
  text = _FUNCTION.sub("y =", without_percent(_JOINED.sub(", ", text)).strip())
  if _TRIGONOMETRIC.search(text):
    text = _ANGLE.sub(r"(\\frac{\1 \\pi}{180})", text)
  text = _DEGREE.sub("", text)
  scaled = _SCALED.fullmatch(text)
  if scaled and (value := number(scaled[1])) is not None:
    return _written(value * 10 ** _SCALE[scaled[2] or scaled[3]])
  for unit in (_TEXT_UNIT, _BARE_UNIT):
    measured = unit.fullmatch(text)
    if measured and measured[1].strip():
      text = measured[1].strip()
  mixed = _MIXED_SLASH.fullmatch(text)
  return rf"{mixed[1]}{mixed[2]}\frac{{{mixed[3]}}}{{{mixed[4]}}}" if mixed else text


def number(tidied: str) -> Fraction | None:
  """Returns the exact value of a tidied answer that is one number, else None."""
  text = THOUSANDS.sub("", tidied)
  text = re.sub(r"^([+-]) ", r"\1", text)
  if plain := _PLAIN.fullmatch(text.replace(" /", "/").replace("/ ", "/")):
    sign, top, bottom = plain.groups()
    return _ratio(sign, "0", top, bottom or "1")
  if mixed := _MIXED.fullmatch(text):
    sign, whole, top, top_digit, bottom, bottom_digit = mixed.groups()
    top, bottom = top or top_digit, bottom or bottom_digit
    return None if whole and not top.isdigit() else _ratio(sign, whole or "0", top, bottom)
  if scientific := _SCIENTIFIC.fullmatch(text):
    return _shifted(Fraction(scientific[1]), int(scientific[2]))
  if power := _POWER_OF_TEN.fullmatch(text):
    return _shifted(Fraction(1), int(power[1] or power[2]))
  return None


def key(tidied: str) -> Fraction | str:
  """Returns what answers that are surely equal share: an exact number, a word, or the text."""
  value = number(tidied)
  if value is not None:
    return value
  if _BASED.fullmatch(tidied):
    return re.sub(r"[{} ]", "", tidied)
  text = _WORDS.sub(r"\1", tidied).strip().rstrip(".")
  if choice := _CHOICE.fullmatch(text):
    return choice[1]
  return text.casefold() if _WORD.fullmatch(text) else "".join(tidied.split())


def decide(gold: str, answer: str, tolerance: float) -> bool | None:
  """Returns whether an answer is right where that needs no algebra, else None.

  tolerance: relative difference of numbers that are equal.
  """
  left, right = _read(gold), _read(answer)
  if not right.text:
    return False
  if left.key == right.key:
    return True
  if isinstance(left.key, Fraction) and isinstance(right.key, Fraction):
    return abs(left.key - right.key) <= Fraction(tolerance) * abs(left.key)
  apart = left.text_alone or right.text_alone or len(answer) > LONGEST
  if left.value is not None and right.value is not None:
    apart = apart or closed_form.apart(left.value, right.value, tolerance)
  elif left.value is not None or right.value is not None:
    apart = apart or left.many or right.many
  return False if apart else None


def share(answer: str) -> Fraction | str:
  """Returns what answers that are surely equal share: an exact number, a word, or the text."""
  return _read(answer).key


@dataclasses.dataclass(frozen=True)
class _Reading:
  """An answer as it is compared: in one spelling, and what can be told apart without algebra.

  text_alone: only the same text is equal. value: of a closed form. many: a list, a tuple, an
  interval, a matrix or a formula with a variable, which no single value is.
  """

  text: str
  key: Fraction | str
  text_alone: bool
  value: float | None = None
  many: bool = False


@functools.lru_cache(maxsize=4096)
def _read(answer: str) -> _Reading:
  if len(answer) > LONGEST:
    return _Reading(answer, "".join(answer.split()), text_alone=False)
  tidied = tidy(answer)
  based = bool(_BASED.fullmatch(tidied))
  exact = key(tidied)
  try:
    value = float(exact) if isinstance(exact, Fraction) else closed_form.value(tidied)
  except OverflowError:
    value = None
  many = (
    value is None and not _RELATION.search(tidied) and bool(_MANY.search(_WORDS.sub("", tidied)))
  )
  return _Reading(tidied, exact, based or is_word(tidied), value, many)


def is_word(tidied: str) -> bool:
  r"""Returns whether a tidied answer is words and no formula: `\text{east}`, `Monday`.

  As formulas they would be products of letters, and `east` would be `seat`.
  """
  whole = _WORDS.fullmatch(tidied)
  return bool(whole and _WORD.fullmatch(whole[1].strip()) or _BARE_WORD.fullmatch(tidied))


def _boxes(text: str) -> list[tuple[str, int, int]]:
  """Returns the complete innermost boxes: what stands in each, where it begins and ends."""
  found: list[tuple[str, int, int]] = []
  opened: list[tuple[int, int]] = []  # where an open box and its content begin; -1 for other braces
  for match in re.finditer(r"\\boxed ?{|[{}]", text):
    if match.group() != "}":
      opened.append((match.start(), -1 if match.group() == "{" else match.end()))
    elif opened:
      begin, content = opened.pop()
      if content >= 0 and not (found and found[-1][1] > begin):
        found.append((text[content : match.start()], begin, match.end()))
  return found


def _ratio(sign: str, whole: str, top: str, bottom: str) -> Fraction | None:
  below = Fraction(bottom)
  if not below:
    return None
  value = int(whole) + Fraction(top) / below
  return -value if sign == "-" else value


def _shifted(value: Fraction, power: int) -> Fraction | None:
  return value * Fraction(10) ** power if abs(power) <= DIGITS else None


def _written(value: Fraction) -> str:
  return str(value)


def _braced(match: re.Match) -> str:
  top, top_braced, bottom, bottom_braced = match.groups()
  return rf"\frac{top_braced or '{' + top + '}'}{bottom_braced or '{' + bottom + '}'}"


def _balanced(text: str) -> str:
  r"""Returns the text without closing braces that close nothing, as in `\end{pmatrix}}`."""
  if text.count("}") <= text.count("{"):
    return text
  kept, depth = [], 0
  for i, char in enumerate(text):
    escaped = i > 0 and text[i - 1] == "\\"
    depth += 0 if escaped else (char == "{") - (char == "}")
    if depth < 0:
      depth = 0
      continue
    kept.append(char)
  return "".join(kept)
