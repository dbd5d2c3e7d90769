"""`fastddpm info`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastddpm.cli.flags import FlagOption, parse_flags

if TYPE_CHECKING:
    from fastddpm.checkpoints import Checkpoint


def info(
    model: Annotated[
        str | None, typer.Argument(help="A shipped checkpoint, a checkpoint folder, or a file of weights.")
    ] = None,
    flag: FlagOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a checkpoint is, and what this machine would use to sample from it.

    Without a checkpoint: the machine, and the checkpoints that ship with the package.
    """
    from fastddpm.checkpoints import SHIPPED, load_checkpoint  # late, for --help: see `sample`
    from fastddpm.engine import describe_machine

    machine = dataclasses.asdict(describe_machine())
    facts: dict[str, Any] = {"machine": machine, "shipped checkpoints": list(SHIPPED)}
    if model is not None:
        facts = {"checkpoint": checkpoint_facts(load_checkpoint(model, **parse_flags(flag))), "machine": machine}
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
        return
    console = Console(highlight=False)
    for title, values in facts.items():
        console.print(title, style="bold underline")
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in values.items() if isinstance(values, dict) else [(name, "") for name in values]:
            table.add_row(escape(str(name)), escape(_text(value)))
        console.print(table, "")


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a person wants to know about a checkpoint, in reading order."""
    from fastddpm.checkpoints.native import WEIGHTS_NAME

    spec, schedule = checkpoint.spec, checkpoint.schedule
    config = schedule.to_config()
    config.pop("betas", None)
    weights = checkpoint.path / WEIGHTS_NAME if checkpoint.path.is_dir() else checkpoint.path
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.dialect,
        "size": f"{weights.stat().st_size / 1e6:.2f} MB",
        "parameters": f"{sum(p.numel() for p in checkpoint.network.parameters()):,}",
        "picture": "{} × {} × {} (channels, height, width)".format(*spec.shape),
        "predicts": spec.prediction,
        "variance": spec.variance,
        "clipping": "none" if spec.clip is None else f"|x̂_0| ≤ {spec.clip:g}",
        "schedule": config,
        "classes": "none" if spec.num_classes is None else f"{spec.num_classes}",
        "class names": list(spec.class_names) if spec.class_names else "none",
        "guidance": "possible" if spec.null_class is not None else "not trained for it",
        "training": dict(checkpoint.training) or "not recorded",
    }


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
