"""The command line: `fastddpm sample | train | info`."""

from __future__ import annotations

import sys

import typer

from fastddpm.cli.errors import report
from fastddpm.cli.info import info
from fastddpm.cli.sample import sample
from fastddpm.cli.train import train

app = typer.Typer(
    name="fastddpm",
    help="Sample from trained DDPM checkpoints, fast and reproducibly. Each picture is a function of (seed, id).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(sample)
app.command()(train)
app.command()(info)


def main() -> None:
    """Run the command line; exits with 2 and one line on standard error where the input is at fault."""
    try:
        code = app(standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        code = report(error)
    sys.exit(code if isinstance(code, int) else 0)
