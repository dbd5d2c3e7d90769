"""`fastddpm evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastddpm.cli.engine_options import DeviceOption, EngineOption, PrecisionOption, SolverName
from fastddpm.cli.facts import facts_lines, facts_table
from fastddpm.cli.flags import FlagOption, parse_flags
from fastddpm.common.terminal import NARROW, say, tell

if TYPE_CHECKING:
    from fastddpm.evaluate import Evaluation

WHAT, HOW, SAMPLING, RUN = "What to compare", "What to measure", "How to sample (with --n)", "Running"


def evaluate(
    generated: Annotated[
        str,
        typer.Argument(help="Pictures: a folder, an .npz, an idx file, a folder of .npz. With --n: a checkpoint."),
    ],
    reference: Annotated[
        str, typer.Argument(help="The same, or an .npz with mu and sigma, as pytorch-fid, OpenAI and EDM write them.")
    ],
    features: Annotated[
        str,
        typer.Option(
            metavar="inception|FILE|module:Class",
            help="`inception`: the network of the FID. A TorchScript file: runs no Python. `module:Class`: imports and "
            "runs the code that you name, from the working folder too. Both take uint8 [B, C, H, W] and return [B, D].",
            rich_help_panel=HOW,
        ),
    ] = "inception",
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Inception's file of weights; its SHA-256 is checked. [default: PyTorch's cache, or downloaded]",
            rich_help_panel=HOW,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Some of `fd,kid,prdc`. [default: all; fd where a side is only statistics]", rich_help_panel=HOW
        ),
    ] = None,
    k: Annotated[
        int, typer.Option("--k", help="The neighbour that counts for precision … coverage.", rich_help_panel=HOW)
    ] = 5,
    size: Annotated[
        int | None,
        typer.Option(
            help="Crop the centre square of the pictures in folders and resize it (Lanczos).", rich_help_panel=WHAT
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            help="1 or 3, that the features see. [default: 3 for inception, else as the pictures]", rich_help_panel=WHAT
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", "-n", help="Draw so many pictures from a checkpoint first.", rich_help_panel=SAMPLING),
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(
            help="So many times n, with seeds that follow; the lowest distance is reported.", rich_help_panel=SAMPLING
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the first n.", rich_help_panel=SAMPLING)] = 0,
    classes: Annotated[
        str,
        typer.Option(
            "--class-labels", help="As in `fastddpm sample`, and so are the next six.", rich_help_panel=SAMPLING
        ),
    ] = "all",
    guidance: Annotated[
        float, typer.Option("--guidance-scale", help="Scale of classifier-free guidance.", rich_help_panel=SAMPLING)
    ] = 1.0,
    solver: Annotated[
        SolverName,
        typer.Option(help="How the steps are made.", rich_help_panel=SAMPLING),
    ] = "ddim",
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", rich_help_panel=SAMPLING)] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Instead of --steps: `250`, `ddim25` or `10,15,20`.", rich_help_panel=SAMPLING)
    ] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's η, 0 … 1.", rich_help_panel=SAMPLING)] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Dynamic thresholding at this quantile.", rich_help_panel=SAMPLING)
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Also write the numbers, and all they depend on.", rich_help_panel=RUN)
    ] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option(help="Write the reference's mu and sigma (.npz), a REFERENCE for next time.", rich_help_panel=RUN),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures in memory at a time. [default: 64; on a GPU 256]", rich_help_panel=RUN)
    ] = None,
    device: DeviceOption = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "fp32",
    flag: FlagOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.", rich_help_panel=RUN)] = False,
) -> None:
    """Measure how near pictures are to a reference: Fréchet distance, KID, precision, recall, density, coverage.

    The Fréchet distance is called FID with inception's features, FD with any others. Without --n nothing is sampled.

    Examples:
    - `fastddpm evaluate samples.npz cifar10/` with the network of the FID

    - `fastddpm evaluate mnist digits/ --n 10000 --repeats 3 --features judge.pt`

    - `fastddpm evaluate samples.npz cifar10-32x32.npz --metrics fd --json fid.json`
    """
    from fastddpm.cli.measuring import Measuring, Sampling  # late, for --help: see `sample`

    sampling = None
    if n is not None:
        method = {"solver": solver, "steps": steps, "timesteps": timesteps, "eta": eta, "threshold": threshold}
        run = {"classes": classes, "guidance": guidance, "engine": engine, "precision": precision}
        sampling = Sampling(generated, n, repeats, seed, method, run, parse_flags(flag))
    elif repeats != 1 or flag or any(value is not None for value in (steps, timesteps, eta, threshold)):
        raise ValueError("--n must be given with options of sampling, got them without; say how many to draw")
    chosen = None if metrics is None else [part.strip() for part in metrics.split(",")]
    measuring = Measuring(
        generated, reference, features, weights, chosen, k, size, channels, batch_size, device, quiet, sampling
    )
    evaluations, best = measuring.run(json, save_statistics)
    _show(evaluations, best)


def _show(evaluations: list[Evaluation], best: Evaluation) -> None:
    """The numbers as a table, and what should be known about them on standard error."""
    for note in best.notes:
        tell(f"fastddpm: warning: {note}")
    console = Console(highlight=False)
    for title, values in (("numbers", _numbers(evaluations, best)), ("what was measured", _basis(best))):
        if console.width < NARROW:
            say("\n".join((f"{title}:", *facts_lines(values))))
        else:
            console.print(facts_table(title, values), "")


def _numbers(evaluations: list[Evaluation], best: Evaluation) -> dict[str, object]:
    numbers: dict[str, object] = {}
    if best.fd is not None:
        numbers[best.distance] = f"{best.fd:.6g}"
        if len(evaluations) > 1:
            each = ", ".join(f"{evaluation.fd:.6g}" for evaluation in evaluations)
            numbers[best.distance] = f"{best.fd:.6g}, the lowest of {each}"
    if best.kid is not None:
        name = "KID" if best.distance == "FID" else best.distance.replace("FD", "KD", 1)
        numbers[name] = f"{best.kid.mean:.6g} ± {best.kid.std:.2g} (over subsets of {best.kid.subset_size:,})"
    if best.prdc is not None:
        for name in ("precision", "recall", "density", "coverage"):
            numbers[f"{name} (k = {best.prdc.k})"] = f"{getattr(best.prdc, name):.4f}"
    return numbers


def _basis(best: Evaluation) -> dict[str, object]:
    def of_pictures(source: str, n: int | None) -> str:
        return f"{source} ({'statistics of an unknown number of' if n is None else f'{n:,}'} pictures)"

    return {
        "generated": of_pictures(best.generated, best.generated_n),
        "reference": of_pictures(best.reference, best.reference_n),
        "features": f"{best.features}, SHA-256 {best.digest[:16] + '…' if best.digest else 'not recorded'}",
        "pictures as": best.preprocessing,
    }
