"""`fastddpm compile`."""

from __future__ import annotations

from typing import Annotated

import typer

from fastddpm.cli.engine_options import PrecisionOption
from fastddpm.cli.flags import FlagOption, parse_flags
from fastddpm.common.terminal import patience, say


def compile_model(
    model: Annotated[
        str, typer.Argument(help="A shipped checkpoint, a folder, a file of weights, or a name on the Hub.")
    ],
    batch_size: Annotated[
        list[int] | None,
        typer.Option(help="Pictures that run together, the same as when sampling. May be repeated. [default: 64]"),
    ] = None,
    guided: Annotated[bool, typer.Option(help="For runs with classifier-free guidance.")] = False,
    likelihood: Annotated[bool, typer.Option("--likelihood", help="For `fastddpm likelihood`.")] = False,
    precision: PrecisionOption = "fp32",
    flag: FlagOption = None,
) -> None:
    """Compile a network's step ahead of time, so that sampling starts with it at once.

    One package serves any number of steps and any solver but dpmpp_3m, whose own is compiled when sampling begins; each
    batch size, precision, and guidance or none has its own, and so has the step of likelihoods.
    On a GPU steps are compiled when sampling begins: this command is for CPUs.

    Examples:
    - `fastddpm compile mnist --batch-size 1 --batch-size 64`

    - `fastddpm compile mnist --guided --precision bf16`
    """
    import torch  # late, for --help: see `sample`

    from fastddpm.engines.devices import describe_choices
    from fastddpm.sampler import Sampler

    sampler = Sampler.from_pretrained(model, device="cpu", precision=precision, flags=parse_flags(flag))
    if guided and sampler.spec.null_class is None:
        raise ValueError(f"--guided must be left out, got it, but {model} has no label that stands for no class")
    if guided and likelihood:
        raise ValueError("--guided must be left out with --likelihood, got both; a bound knows no guidance")
    for size in batch_size or [64]:
        with patience(f"batch {size}: compiling the step, which takes a minute or more"):
            seconds = sampler.compile(size, guided=guided, likelihood=likelihood)
        say(f"batch {size}: " + ("was compiled already" if seconds is None else f"compiled in {seconds:.0f} s"))
    for label, choice in describe_choices(sampler.stepper.weights).items():
        say(f"{label}: {choice}")
    say(f"{torch.get_num_threads()} threads; with another number of threads steps are compiled anew")
