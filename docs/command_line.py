"""A hook of mkdocs: puts every command, its arguments and its options where a page says `<!-- commands -->`.

They are read off the functions that Typer runs, so the page says what the command line says.
"""

from __future__ import annotations

import inspect
import typing
from typing import Any, Literal

import typer.models

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """What mkdocs calls with the text of each page."""
    return markdown.replace(MARK, reference()) if MARK in markdown else markdown


def reference() -> str:
    """All commands, as Markdown."""
    from fastddpm.cli import app

    commands = [_command(info) for info in app.registered_commands]
    for group in app.registered_groups:
        inner = group.typer_instance
        if inner is not None:
            commands += [_command(info, f"{inner.info.name} ") for info in inner.registered_commands]
    return "\n\n".join(commands)


def _command(info: typer.models.CommandInfo, group: str = "") -> str:
    function: Any = info.callback
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = [_Parameter(p, hints[p.name]) for p in inspect.signature(function).parameters.values()]
    arguments = [p for p in parameters if p.is_argument]
    name = f"fastddpm {group}{info.name or function.__name__}"
    usage = " ".join([name, *(p.spelling for p in arguments), "[OPTIONS]"])
    # As rich reads it; Markdown proper wants an empty line before a list.
    text = (inspect.getdoc(function) or "").replace("Examples:\n-", "Examples:\n\n-")
    lines = [f"## {name}", "", f"```text\n{usage}\n```", "", text, "", "| | | default |", "|---|---|---|"]
    return "\n".join(lines + [p.row() for p in (*arguments, *(p for p in parameters if not p.is_argument))])


class _Parameter:
    """One argument or option of a command."""

    def __init__(self, parameter: inspect.Parameter, hint: Any) -> None:  # noqa: ANN401 - an annotation
        kind, self.info = typing.get_args(hint)[:2]
        self.name, self.kind, self.default = parameter.name, kind, parameter.default
        self.is_argument = isinstance(self.info, typer.models.ArgumentInfo)

    @property
    def spelling(self) -> str:
        """As it is typed."""
        if self.is_argument:
            name = str(self.info.metavar or self.name).upper()
            return name if self.default is inspect.Parameter.empty else f"[{name}]"
        own = f"--{self.name.replace('_', '-')}"
        # In an annotation the first name stands where a default would.
        decls = [name for name in (self.info.default, *(self.info.param_decls or ())) if isinstance(name, str)]
        return ", ".join(decls or [f"{own}/--no-{own[2:]}" if self.kind is bool else own])

    @property
    def values(self) -> str:
        """What it takes."""
        if self.is_argument or self.kind is bool:
            return ""
        kinds = [k for k in typing.get_args(self.kind) or (self.kind,) if k is not type(None)]
        if typing.get_origin(self.kind) is Literal:
            return f"`{'`, `'.join(kinds)}`. "
        return f"{self.info.metavar}. " if self.info.metavar else ""

    def row(self) -> str:
        """Its line in the table."""
        text = f"{self.values}{self.info.help or ''}".replace("|", "\\|")
        is_given = not any(self.default is nothing for nothing in (inspect.Parameter.empty, None, False, ""))
        return f"| `{self.spelling}` | {text} | {f'`{self.default}`' if is_given else ''} |"
