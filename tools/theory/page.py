"""docs/theory.md from docs/theory/page.md and the numbers.

In the template, {{name}} stands for a number, {{name:.3f}} for one in that format, {{name%}} for a percentage, and
{{table:name}} for a table of `tables`.
"""

import re
from typing import Any

from .files import TEMPLATE
from .tables import TABLES, percent

_FIELD = re.compile(r"\{\{(?P<name>\w+)(?P<kind>[:%]?)(?P<spec>[^}]*)\}\}")


def page(numbers: dict[str, Any]) -> str:
    """The text of docs/theory.md."""

    def filled(field: re.Match[str]) -> str:
        name, kind, spec = field["name"], field["kind"], field["spec"]
        if name == "table":
            return TABLES[spec](numbers)
        if kind == "%":
            return percent(numbers[name])
        return format(numbers[name], spec)

    text = _FIELD.sub(filled, TEMPLATE.read_text(encoding="utf-8"))
    return f"<!-- Made from docs/theory/page.md by python -m tools.theory: edit that file, not this one. -->\n\n{text}"
