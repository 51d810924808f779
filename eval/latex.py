"""Whether two short answers in LaTeX are the same, as ``\\frac{1}{2}``, ``\\dfrac12`` and ``0.5`` are.

Answers are brought to one spelling and compared as text; what still differs is read as an expression and evaluated,
exactly where fractions suffice. Letters, pi among them, are unknowns: two expressions are equal when they agree at
three points. Nothing is rounded: ``3.14`` is not pi.
"""

from __future__ import annotations

import cmath
import math
import re
from fractions import Fraction

_LONGEST = 300  # characters; what is longer is compared as text only
_DEEPEST = 40  # brackets within brackets
_LARGEST = 64  # exponents that are worked out exactly
_DIGITS = 2000  # of a number, above which nothing is worked out
_POINTS = (Fraction(7, 5), Fraction(-13, 9), Fraction(29, 11))
_GONE = ("\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\ ", "~", "\\$", "$", "\\displaystyle", "\\limits")
_SAME = (
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"),
    ("\\mbox", "\\text"),
    ("\\textbf", "\\text"),
    ("\\mathrm", "\\text"),
    ("\\textrm", "\\text"),
    ("\\mathbf", "\\text"),
    ("\\leq", "\\le"),
    ("\\geq", "\\ge"),
    ("\\neq", "\\ne"),
    ("\\times", "\\cdot"),
    ("\\lbrace", "\\{"),
    ("\\rbrace", "\\}"),
    ("\\degree", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\circ", ""),
    ("°", ""),
    ("\\%", ""),
    ("%", ""),
    ("\u2212", "-"),
    ("\u03c0", "\\pi"),
    ("\u221e", "\\infty"),
)
_LETTERS = ("\\pi", "\\alpha", "\\beta", "\\gamma", "\\theta", "\\lambda", "\\mu", "\\phi", "\\omega", "\\infty")
_UNITS = (
    r"\\text\{\s*(?:square |cubic )?(?:units?|dollars?|cents?|degrees?|percent|points?|inch(?:es)?|feet|foot|miles?|"
    r"yards?|hours?|minutes?|seconds?|days?|years?|cm|mm|m|km|kg|g|in|ft|mph|sq|people|ways)\b[^{}]*\}(?:\^\{?\d\}?)?$"
)


def boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` (or ``\\fbox``, or ``\\boxed 5``); None where there is none."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("ed" if text.startswith("\\boxed", start) else "box")[2]
    if not rest.lstrip().startswith("{"):
        found = re.match(r"\s*([^\s$.,]+)", rest)
        return found[1] if found and rest[:1].isspace() else None
    rest, depth = rest.lstrip(), 0
    for at, letter in enumerate(rest):
        if letter in "{}" and (at == 0 or rest[at - 1] != "\\"):
            depth += 1 if letter == "{" else -1
            if depth == 0:
                return rest[1:at].strip() or None
    return None  # never closed: the answer was cut off


def same_answer(first: str, second: str) -> bool:
    """Whether two answers say the same."""
    one, two = normal(first), normal(second)
    if not one or not two:
        return False
    return one == two or one.lower() == two.lower() and _is_text(first, second) or _equal(one, two)


def normal(answer: str) -> str:
    """An answer in the spelling in which answers are compared."""
    text = answer.strip().rstrip(".").strip()
    for name in _GONE:
        # \left goes, \leftarrow stays; so does the space behind a matrix's \\.
        text = re.sub(r"(?<!\\)" + _whole(name), "", text)
    for name, other in _SAME:
        text = re.sub(_whole(name), other.replace("\\", "\\\\"), text)
    bare = re.sub(_UNITS, "", text.strip())
    text = bare if bare.strip() else text
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*(\d)\s+(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)  # 1 1 is not 11
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"^[a-zA-Z]\\in", "", text)
    if re.fullmatch(r"[a-zA-Z](?:\([a-zA-Z]\))?=[^=]+", text):
        text = text.partition("=")[2]
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"\(([A-Za-z])\)", text):
        text = text[1:-1]
    return text


def _whole(name: str) -> str:
    """A pattern for a command, not for the beginning of a longer one."""
    return re.escape(name) + (r"(?![a-zA-Z])" if name[-1].isalpha() else "")


def _is_text(*answers: str) -> bool:
    """At least one is marked as words, whose capitals do not matter."""
    return any("\\text" in one or re.search(r"[A-Za-z]{3}", one.replace("\\", " \\")) for one in answers)


def _equal(one: str, two: str) -> bool:
    if len(one) > _LONGEST or len(two) > _LONGEST:
        return False
    for mark in ("\\cup", "\\cap"):
        if mark in one or mark in two:
            return _all_equal(one.split(mark), two.split(mark))
    if _pair(one) and _pair(one) == _pair(two):  # a point, an interval, a set
        width = 2 if one.startswith("\\") else 1
        inner, other = _commas(one[width:-width]), _commas(two[width:-width])
        if len(inner) > 1 or len(other) > 1:
            return _all_equal(inner, other, ordered=not _pair(one).startswith("\\"))
    left, right = _commas(one), _commas(two)
    if len(left) > 1 or len(right) > 1:
        return _all_equal(left, right, ordered=False)
    if matrix := _matrix(one):
        return _matrix(two) is not None and _all_equal(matrix, _matrix(two) or [])
    for mark in ("\\le", "\\ge", "<", ">", "="):
        if one.count(mark) == 1 and two.count(mark) == 1:
            return _all_equal(one.split(mark), two.split(mark))
    return _same_value(one, two)


def _all_equal(first: list[str], second: list[str], ordered: bool = True) -> bool:
    if len(first) != len(second):
        return False
    if ordered:
        return all(a == b or _same_value(a, b) for a, b in zip(first, second, strict=True))
    left = list(second)
    for one in first:
        found = next((at for at, two in enumerate(left) if one == two or _same_value(one, two)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _pair(text: str) -> str:
    """The brackets around all of a text; ``[0,1)`` and ``(0,1]`` count as pairs, too."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return "\\{}"
    return text[0] + text[-1] if len(text) > 2 and text[0] in "([" and text[-1] in ")]" else ""


def _commas(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _matrix(text: str) -> list[str] | None:
    """Entries of a matrix, each with its row; None where it is none."""
    found = re.fullmatch(r"\\begin\{[pbvBV]?(?:matrix|array)\}(.*)\\end\{[pbvBV]?(?:matrix|array)\}", text)
    if found is None:
        return None
    rows = [row.split("&") for row in found[1].strip("\\").split("\\\\")]
    return [f"{len(row)}" for row in rows] + [entry for row in rows for entry in row]


def _same_value(one: str, two: str) -> bool:
    try:
        return all(_close(_Reader(one, point).value(), _Reader(two, point).value()) for point in _POINTS)
    except (ValueError, ArithmeticError, RecursionError):
        return False  # no expression that is understood here: they were unequal as texts


def _close(one: Number, two: Number) -> bool:
    if isinstance(one, Fraction) or isinstance(two, Fraction):
        return type(one) is type(two) and one == two
    return abs(one - two) <= 1e-10 * max(1.0, abs(one), abs(two)) and cmath.isfinite(one)


Number = Fraction | complex
_TOKEN = re.compile(r"\d+\.\d+|\.\d+|\d+|\\[a-zA-Z]+|[a-zA-Z]|[-+*/^(){}\[\]]")


class _Reader:
    """An expression, read from left to right and evaluated at one point."""

    def __init__(self, text: str, point: Fraction) -> None:
        self.tokens = _TOKEN.findall(text)
        if "".join(self.tokens) != text:
            raise ValueError("a sign that is not understood")
        self.point, self.at, self.depth = point, 0, 0

    def value(self) -> Number:
        found = self._sum()
        if self.at < len(self.tokens):
            raise ValueError("the expression ends early")
        return found

    def _next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self, token: str) -> bool:
        if self._next() != token:
            return False
        self.at += 1
        return True

    def _sum(self) -> Number:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError("nested too deeply")
        found = self._product()
        while self._next() in ("+", "-"):
            minus = self._take("-") or not self._take("+")
            found = _plus(found, _times(Fraction(-1), self._product()) if minus else self._product())
        self.depth -= 1
        return found

    def _product(self) -> Number:
        minus = False
        while self._next() in ("+", "-"):
            minus ^= self._next() == "-"
            self.at += 1
        found = self._power()
        while True:
            if self._take("*") or self._take("\\cdot"):
                found = _times(found, self._power())
            elif self._take("/") or self._take("\\div"):
                found = _over(found, self._power())
            elif re.match(r"[\w.({]|\\(?:frac|sqrt|pi|[a-zA-Z]+$)", self._next()):
                if re.match(r"[\d.]", self._next()):
                    raise ValueError("two numbers side by side")
                mixed = self._next() == "\\frac" and self.at and re.fullmatch(r"\d+", self.tokens[self.at - 1])
                follower = self._power()
                found = _plus(found, follower) if mixed else _times(found, follower)  # 3\frac12 is a mixed number
            else:
                return _times(Fraction(-1), found) if minus else found

    def _power(self) -> Number:
        base = self._atom()
        if self._take("^"):
            if self._take("{"):
                exponent = self._sum()
                self._need("}")
            else:
                exponent = self._atom()
            return _raised(base, exponent)
        return base

    def _atom(self) -> Number:
        token = self._next()
        self.at += 1
        if re.match(r"[\d.]", token):
            return Fraction(token)
        if token in ("(", "[", "{"):
            found = self._sum()
            self._need({"(": ")", "[": "]", "{": "}"}[token])
            return found
        if token == "\\frac":
            above = self._group()
            return _over(above, self._group())
        if token == "\\sqrt":
            root = Fraction(2)
            if self._next() == "[":
                given = self._group("[", "]")
                if not isinstance(given, Fraction) or given.denominator != 1 or not 2 <= given <= _LARGEST:
                    raise ValueError("a root that is not understood")
                root = given
            return _root(self._group(), int(root))
        if re.fullmatch(r"[a-zA-Z]", token) or token in _LETTERS:
            return _unknown(token, self.point)
        raise ValueError(f"not understood: {token!r}")

    def _group(self, left: str = "{", right: str = "}") -> Number:
        if not self._take(left):
            return self._atom()
        found = self._sum()
        self._need(right)
        return found

    def _need(self, token: str) -> None:
        if not self._take(token):
            raise ValueError(f"{token} is missing")


def _unknown(name: str, point: Fraction) -> Fraction:
    """A value of its own for every letter, far from those of the others."""
    number = _LETTERS.index(name) + 60 if name in _LETTERS else ord(name) - ord("A")
    return point + Fraction(1009 * (number + 3), 101 + number * number)


def _plus(one: Number, two: Number) -> Number:
    return (
        _bounded(one + two) if isinstance(one, Fraction) and isinstance(two, Fraction) else complex(one) + complex(two)
    )


def _times(one: Number, two: Number) -> Number:
    return (
        _bounded(one * two) if isinstance(one, Fraction) and isinstance(two, Fraction) else complex(one) * complex(two)
    )


def _over(one: Number, two: Number) -> Number:
    return (
        _bounded(one / two) if isinstance(one, Fraction) and isinstance(two, Fraction) else complex(one) / complex(two)
    )


def _raised(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) <= _LARGEST:
        return _bounded(base ** int(exponent)) if isinstance(base, Fraction) else base ** int(exponent)
    return complex(base) ** complex(exponent)


def _root(value: Number, degree: int) -> Number:
    if isinstance(value, Fraction) and value >= 0:
        above, below = _whole_root(value.numerator, degree), _whole_root(value.denominator, degree)
        if above is not None and below is not None:
            return Fraction(above, below)
    return complex(value) ** (1 / degree)


def _whole_root(number: int, degree: int) -> int | None:
    near = math.isqrt(number) if degree == 2 else round(float(number) ** (1 / degree))
    return next((one for one in (near - 1, near, near + 1) if one >= 0 and one**degree == number), None)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 4 * _DIGITS:
        raise ValueError("a number too long to be worked out")
    return value
