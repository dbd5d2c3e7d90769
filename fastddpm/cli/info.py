"""`fastddpm info`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import ROUNDED
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastddpm.cli.facts import fact_text, facts_lines, facts_table
from fastddpm.cli.flags import FlagOption, parse_flags
from fastddpm.common.terminal import NARROW, clean, say

if TYPE_CHECKING:
    from fastddpm.checkpoints import Checkpoint
    from fastddpm.process.spec import ModelSpec


def info(
    model: Annotated[
        str | None, typer.Argument(help="A shipped checkpoint, a folder, a file of weights, or a name on the Hub.")
    ] = None,
    flag: FlagOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a checkpoint is, what told so, and what this machine would use to sample from it.

    Without a checkpoint: the machine, and the checkpoints that ship with the package.
    """
    from fastddpm.checkpoints import SHIPPED, load_checkpoint  # late, for --help: see `sample`
    from fastddpm.engines.devices import describe_choices, describe_machine
    from fastddpm.engines.weights import weights_hash

    machine = dataclasses.asdict(describe_machine())
    facts: dict[str, Mapping[str, object] | list[str]] = {"machine": machine, "shipped checkpoints": list(SHIPPED)}
    checkpoint = None if model is None else load_checkpoint(model, **parse_flags(flag))
    if checkpoint is not None:
        facts = {"checkpoint": checkpoint_facts(checkpoint), "settings": settings_facts(checkpoint), "machine": machine}
        facts["engine"] = describe_choices(weights_hash(checkpoint.network)) or {
            "auto": "nothing measured yet; compiles in runs that earn it, or by `fastddpm compile`"
        }
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
        return
    console = Console(highlight=False)
    for title, values in facts.items():
        if isinstance(values, list):
            say(f"{title}: {', '.join(values)}")
        elif values and console.width < NARROW:
            say("\n".join((f"{title}:", *facts_lines(values))))
        elif values:
            settings = None if checkpoint is None or title != "settings" else checkpoint.settings
            console.print(facts_table(title, values) if settings is None else _settings_table(settings), "")


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, object]:
    """What a person wants to know about a checkpoint, in reading order."""
    spec, schedule = checkpoint.spec, checkpoint.schedule
    config = schedule.to_config()
    config.pop("betas", None)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.dialect,
        "recognised by": checkpoint.reason,
        "size": f"{_bytes(checkpoint) / 1e6:.2f} MB",
        "parameters": f"{sum(p.numel() for p in checkpoint.network.parameters()):,}",
        "picture": "{} × {} × {} (channels, height, width)".format(*spec.shape),
        "predicts": spec.prediction,
        "variance": spec.variance,
        "clipping": "none" if spec.clip is None else f"estimates of x_0 to ±{spec.clip:g}",
        "conventions": _conventions(spec),
        "schedule": config,
        "classes": "none" if spec.num_classes is None else f"{spec.num_classes}",
        "class names": list(spec.class_names) if spec.class_names else "none",
        "guidance": _guidance(spec, checkpoint.network.kind),
        "training": dict(checkpoint.training) or "not recorded",
    }


def settings_facts(checkpoint: Checkpoint) -> dict[str, dict[str, object]]:
    """Each option of the checkpoint's own project, its value, and what set it: file, flag, preset or default."""
    return {name: {"value": value, "from": origin} for name, (value, origin) in checkpoint.settings.items()}


def _guidance(spec: ModelSpec, kind: str) -> str:
    if spec.num_classes is None:
        return "not possible without classes"
    if spec.null_class is None:
        return "not possible: no label is known to stand for no class (--flag null_class=N says which does)"
    form = ""
    if kind == "lucidrains":
        form = "; out_u + w (out_c - out_u) alone, without the package's projection and rescaling of it"
    return f"possible: label {spec.null_class} stands for no class{form}"


def _conventions(spec: ModelSpec) -> dict[str, object]:
    """The conventions that are not those of most checkpoints; the others have lines of their own."""
    told = ("shape", "prediction", "variance", "clip", "num_classes", "null_class", "class_names")
    fields = [field for field in dataclasses.fields(spec) if field.name not in told]
    values = {field.name: getattr(spec, field.name) for field in fields}
    return {field.name: values[field.name] for field in fields if values[field.name] != field.default} or {"usual": ""}


def _bytes(checkpoint: Checkpoint) -> int:
    """What the files of weights take on disk."""
    from fastddpm.checkpoints.diffusers_weights import shard_names
    from fastddpm.checkpoints.native import WEIGHTS_NAME, read_json

    if not checkpoint.path.is_dir():
        return checkpoint.path.stat().st_size
    file = checkpoint.path / str(checkpoint.settings.get("weights", (WEIGHTS_NAME, ""))[0])
    if file.suffix == ".json":
        return sum((file.parent / name).stat().st_size for name in shard_names(read_json(file).get("weight_map")))
    return file.stat().st_size


def _settings_table(settings: Mapping[str, tuple[object, str]]) -> Table:
    table = Table(title="settings", title_justify="left", title_style="bold", box=ROUNDED)
    table.add_column("option", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", no_wrap=True)
    for name, (value, origin) in settings.items():
        style = {"file": "", "default": "dim"}.get(origin, "cyan")
        table.add_row(*(escape(clean(part)) for part in (name, fact_text(value), origin)), style=style)
    return table
