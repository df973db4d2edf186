"""A hook of mkdocs: formulas become MathML when the site is built, which browsers show without a script or a request."""

import re
from html import unescape

from latex2mathml.converter import convert


# what `pymdownx.arithmatex` leaves of $...$ and $$...$$
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **kwargs) -> str:
    """Called by mkdocs with each page."""
    return FORMULA.sub(_mathml, html)


def _mathml(found: re.Match) -> str:
    # browsers know the letters of \\mathcal only as characters of their own, which the converter writes where there are braces
    latex = re.sub(r"\\(mathcal|mathbb) ([A-Z])", r"\\\1{\2}", unescape(found[3]))
    maths = convert(latex, display="block" if found[2] == "[" else "inline")
    maths = maths.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # \\sim is an operator
    return f'<div style="overflow-x: auto">{maths}</div>' if found[2] == "[" else maths
