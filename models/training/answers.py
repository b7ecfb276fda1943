"""Final answers: found in a solution, and compared.

GSM8K (Cobbe et al. 2021) ends a solution in `#### N`; MATH (Hendrycks et al. 2021) puts the answer into `\\boxed{}`.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

MARK = re.compile(r"####[ \t]*([^\n]*)")
GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")


def final_answer(text: str) -> str | None:
    """What stands behind the last `####`, else in the last `\\boxed{}`; None where there is neither, or nothing in it.

    >>> final_answer("She makes 9 * 2 = $18.\\n#### 18")
    '18'
    >>> final_answer("so $x = \\\\boxed{\\\\frac{1}{2}}$.")
    '\\\\frac{1}{2}'
    """
    marked = MARK.findall(text)
    if marked:
        return marked[-1].strip() or None
    return boxed(text)


def boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{...}` or `\\fbox{...}`, braces balanced; None where it is not closed."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    inside = text.index("{", start) + 1
    depth = 1
    for place in range(inside, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[inside:place].strip() or None
    return None


def normalise(answer: str) -> str:
    """One form for equal answers: without units of money, thousands separators, spaces and LaTeX's dress.

    Numbers lose what does not change them: 18.00 and 018 are 18. Fractions become a/b; nothing is computed, so 1/2
    and 0.5 stay different, as in the data sets' own comparison.
    """
    text = TEXT.sub(r"\1", answer.strip())
    for token in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\ ", "$", "\\%", "%", "^\\circ", "^{\\circ}"):
        text = text.replace(token, "")
    text = FRACTION.sub(r"\1/\2", text)
    text = "".join(GROUPED.sub("", text).split()).rstrip(".").removeprefix("+")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text.lower()
    if not number.is_finite():
        return text.lower()
    number = number.normalize()
    return f"{number:f}" if number else "0"


def is_match(predicted: str, gold: str) -> bool:
    """Whether the text that a model wrote gives this answer. No marked answer is no match."""
    found = final_answer(predicted)
    return found is not None and normalise(found) == normalise(gold)
