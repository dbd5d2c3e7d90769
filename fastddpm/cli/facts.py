"""Facts: named values for people, as a table, or as lines on narrow terminals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.box import ROUNDED
from rich.markup import escape
from rich.table import Table

from fastddpm.common.terminal import clean


def facts_lines(values: Mapping[str, object]) -> Iterator[str]:
    """The facts without a table, a line each."""
    for name, value in values.items():
        if isinstance(value, dict) and value.keys() == {"value", "from"}:
            yield f"- {name}: {fact_text(value['value'])} ({value['from']})"
        else:
            yield f"- {name}: {fact_text(value)}"


def facts_table(title: str, values: Mapping[str, object]) -> Table:
    """The facts as a table of two columns."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=ROUNDED)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(escape(clean(name)), escape(clean(fact_text(value))))
    return table


def fact_text(value: object) -> str:
    """A value in words."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {fact_text(v)}".rstrip() for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
