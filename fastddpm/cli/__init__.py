"""The command line, a module a command: `fastddpm --help` lists them."""

from __future__ import annotations

import shutil
import sys
import warnings
from typing import Annotated

import typer

from fastddpm import __version__
from fastddpm.cli.bench import bench
from fastddpm.cli.compile import compile_model
from fastddpm.cli.convert import convert
from fastddpm.cli.doctor import doctor
from fastddpm.cli.edit import edit
from fastddpm.cli.errors import INTERRUPTED, report
from fastddpm.cli.evaluate import evaluate
from fastddpm.cli.export import export
from fastddpm.cli.info import info
from fastddpm.cli.likelihood import likelihood
from fastddpm.cli.sample import sample
from fastddpm.cli.shards import shards_app
from fastddpm.cli.train import train
from fastddpm.common.terminal import NARROW, say, settle_streams, tell

app = typer.Typer(
    name="fastddpm",
    help="Sample from trained DDPM checkpoints, fast and reproducibly. Each picture is a function of (seed, id).",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"fastddpm {__version__}")
        raise typer.Exit


@app.callback()
def help_without_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Explain the commands to whoever names none."""
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command()(sample)
app.add_typer(edit)
app.command()(likelihood)
app.command()(evaluate)
app.add_typer(shards_app)
app.command()(train)
app.command()(convert)
app.command()(export)
app.command("compile")(compile_model)
app.command()(bench)
app.command()(info)
app.command()(doctor)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """One line on standard error, without the place in the code that only its authors care about."""
    if issubclass(category, UserWarning):
        tell(f"fastddpm: warning: {' '.join(str(message).split())}")


def main() -> None:
    """Run the command line; exits with 2 and one line on standard error where the input is at fault."""
    settle_streams()
    narrow = shutil.get_terminal_size().columns < NARROW
    app.rich_markup_mode = None if narrow else "markdown"  # the columns of a table would be cut off
    warnings.showwarning = _show_warning
    try:
        code = app(standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        code = report(error)
    else:
        if code == INTERRUPTED:  # by Ctrl-C where no command had anything to say about it
            report(KeyboardInterrupt())
    sys.exit(code if isinstance(code, int) else 0)
