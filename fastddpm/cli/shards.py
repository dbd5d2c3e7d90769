"""`fastddpm shards verify | gather | status`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastddpm.common.terminal import say

if TYPE_CHECKING:
    from fastddpm.shards.shard_set import Finding, ShardSet

shards_app = typer.Typer(name="shards", help="Look after shards that `fastddpm sample --shards` draws.")
OutArgument = Annotated[str, typer.Argument(help="The folder or URL of the shards.")]
_FAILED = 1


@shards_app.callback(invoke_without_command=True)
def help_without_command(context: typer.Context) -> None:
    """Look after shards that `fastddpm sample --shards` draws."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@shards_app.command()
def verify(out: OutArgument) -> None:
    """Read every byte of every shard, and list what is missing or damaged; then the exit code is 1.

    The command that draws them makes missing and damaged ones again.

    Examples:
    - `fastddpm shards verify digits`

    - `fastddpm shards verify s3://bucket/digits`
    """
    shards = _open(out)
    wrong = [finding for finding in shards.verify() if not finding]
    for finding in wrong:
        say(_line(finding))
    whole = len(shards.plan) - len(wrong)
    say(f"{out}: {whole:,} of {len(shards.plan):,} shards are whole")
    if wrong:
        raise typer.Exit(_FAILED)


@shards_app.command()
def gather(
    out: OutArgument,
    npz: Annotated[Path, typer.Argument(help="The archive to write (.npz): arr_0 uint8 [n, H, W, C], arr_1 classes.")],
) -> None:
    """Put all pictures into one archive as OpenAI's evaluation code reads it, in the order of their ids.

    Shards are read one after the other, so memory does not grow with their number. Where some are missing or damaged
    nothing is written, and they are listed; then the exit code is 1.

    Examples:
    - `fastddpm shards gather digits digits.npz`
    """
    from fastddpm.files import check_replaceable, check_writable
    from fastddpm.shards.gathering import gather_npz

    if npz.suffix.lower() != ".npz":
        raise ValueError(f"{npz}: the name must end in .npz, got {npz.suffix or 'no suffix'!r}; rename it")
    shards = _open(out)
    check_replaceable(npz)
    check_writable(npz.parent)
    wrong = gather_npz(shards, npz)
    for finding in wrong:
        say(_line(finding))
    if wrong:
        say(f"wrote nothing: {len(wrong):,} of {len(shards.plan):,} shards are not whole")
        raise typer.Exit(_FAILED)
    say(f"wrote {npz} ({shards.run.n:,} pictures)")


@shards_app.command()
def status(out: OutArgument) -> None:
    """Say how far a set of shards is, by a look at the names of its files.

    Examples:
    - `fastddpm shards status digits`
    """
    from fastddpm.shards.claims import standing

    shards = _open(out)
    there = shards.recorded()
    pictures = sum(shards.plan[number].count for number in there)
    say(f"{out}: {len(there):,} of {len(shards.plan):,} shards, {pictures:,} of {shards.run.n:,} pictures")
    for name, drawn in standing(shards.store).items():
        say(f"{name} is claimed ({drawn:,} pictures drawn when it last told)")


def _open(out: str) -> ShardSet:
    from fastddpm.shards.shard_set import ShardSet
    from fastddpm.shards.store import Store

    return ShardSet.open(Store(out))


def _line(finding: Finding) -> str:
    return f"{finding.shard.name} is {finding.state}" + (f": {finding.why}" if finding.why else "")
