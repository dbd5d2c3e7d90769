"""What `fastddpm likelihood` writes: numbers as JSON, plots, and the strip of progressive generations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastddpm.cli.drawing import GIF_FRAMES, Animation
from fastddpm.common.terminal import tell
from fastddpm.files import atomic_path, write_json
from fastddpm.images import make_grid, save_gif, save_image
from fastddpm.process.method import Method
from fastddpm.process.rate_distortion import LikelihoodSums
from fastddpm.sampler import Sampler
from fastddpm.step.request import Preview

STRIP_SAMPLES, STRIP_STEPS = 6, 12
_NO_PLOTS = "plots need the package matplotlib, which is not installed; the numbers are in the JSON files"


@dataclasses.dataclass(frozen=True)
class LikelihoodReport:
    """The files of a run.

    Args:
        folder: Where.
        sums: What was found.
        about: What the numbers are of, as JSON-ready values.
        levels: Of 255, in one unit of the network's range.
    """

    folder: Path
    sums: LikelihoodSums
    about: Mapping[str, object]
    levels: float

    def write(self, *, rate_distortion: bool) -> list[Path]:
        """Write the numbers and, where matplotlib is installed, the plots.

        Returns:
            The files.

        Raises:
            OSError: If a file cannot be written.
        """
        written = [self._json("likelihood.json", self._bound())]
        plots: dict[str, Callable[[Any], None]] = {"likelihood.png": self._plot_bound}
        if rate_distortion:
            written.append(self._json("rate_distortion.json", self._curve()))
            plots["rate_distortion.png"] = self._plot_curve
        try:
            from matplotlib.figure import Figure
        except ImportError:
            tell(_NO_PLOTS)
            return written
        for name, draw in plots.items():
            figure = Figure(figsize=(9.6, 3.6), layout="constrained")
            draw(figure)
            for panel in figure.axes:
                panel.spines[["top", "right"]].set_visible(False)
            with atomic_path(self.folder / name) as temporary:
                figure.savefig(temporary, dpi=100)
            written.append(self.folder / name)
        return written

    def _json(self, name: str, values: Mapping[str, object]) -> Path:
        write_json(self.folder / name, {**self.about, **values})
        return self.folder / name

    def _bound(self) -> dict[str, object]:
        sums = self.sums
        rows = {name: (getattr(sums, name) / sums.n).tolist() for name in ("vlb", "x_start_mse", "eps_mse")}
        return {
            "pictures": sums.n,
            "bits_per_dim": sums.bits_per_dim,
            "standard_error": sums.standard_error,
            "prior_bits_per_dim": float(sums.prior_bpd / sums.n),
            "decoder_bits_per_dim": float(sums.vlb[-1] / sums.n),
            "timesteps": sums.timesteps.tolist(),
            **rows,
            "bits_per_dim_of_each": [round(bits, 6) for bits in sums.total_bpd.tolist()],
        }

    def _curve(self) -> dict[str, object]:
        sums = self.sums
        return {
            "pictures": sums.n,
            "timesteps": sums.timesteps.tolist(),
            "rate_bits_per_dim": sums.rates().tolist(),
            "distortion_rmse_of_255": sums.distortions(self.levels).tolist(),
            "lossless_bits_per_dim": sums.bits_per_dim,
        }

    def _plot_bound(self, figure: Any) -> None:  # noqa: ANN401 - matplotlib's own
        left, right = figure.subplots(1, 2)
        sums, t = self.sums, self.sums.timesteps.tolist()
        left.plot(t, (sums.vlb / sums.n).tolist(), color="C0")
        left.set(xlabel="timestep t", ylabel="bits per dimension", yscale="log", title="terms of the bound")
        for name, label in (("x_start_mse", "of x̂₀"), ("eps_mse", "of ε̂")):
            right.plot(t, (getattr(sums, name) / sums.n).tolist(), label=label)
        right.set(xlabel="timestep t", ylabel="mean square", yscale="log", title="what the network misses")
        right.legend()

    def _plot_curve(self, figure: Any) -> None:  # noqa: ANN401 - matplotlib's own
        panels = figure.subplots(1, 3)
        sums = self.sums
        t, rates, distortions = sums.timesteps.tolist(), sums.rates().tolist(), sums.distortions(self.levels).tolist()
        done = [sums.timesteps[0].item() - step for step in t]
        panels[0].plot(done, distortions)
        panels[0].set(xlabel="timesteps that are behind", ylabel="distortion (RMSE of 255)")
        panels[1].plot(done, rates)
        panels[1].set(xlabel="timesteps that are behind", ylabel="rate (bits per dimension)")
        panels[2].plot(rates, distortions)
        panels[2].set(xlabel="rate (bits per dimension)", ylabel="distortion (RMSE of 255)")


def draw_progressive(sampler: Sampler, method: Method, folder: Path, *, seed: int, quiet: bool) -> list[Path]:
    """Draw samples and show what the model takes for x̂_0 on the way (Ho et al. 2020, Fig. 6): a strip, and a GIF.

    Args:
        sampler: Whose.
        method: The run, with noise in each step.
        folder: Where the files go.
        seed: Of the samples.
        quiet: Whether no progress bar is shown.

    Returns:
        progressive.png, a row a sample, and progressive.gif.

    Raises:
        OSError: If a file cannot be written.
    """
    spec = sampler.spec
    strip, film = (Animation(spec, frames=frames, estimates=True) for frames in (STRIP_STEPS, GIF_FRAMES))

    def look(preview: Preview) -> None:
        strip(preview)
        film(preview)

    labels = None if spec.num_classes is None else [i % spec.num_classes for i in range(STRIP_SAMPLES)]
    sampler.sample(
        STRIP_SAMPLES, method=method, seed=seed, class_labels=labels, callback=look, progress=False if quiet else None
    )
    columns = strip.frames()
    in_rows = [column[i] for i in range(STRIP_SAMPLES) for column in columns]
    save_image(folder / "progressive.png", make_grid(torch.stack(in_rows), columns=len(columns), min_side=480))
    save_gif(folder / "progressive.gif", [make_grid(frame, min_side=240) for frame in film.frames()])
    return [folder / "progressive.png", folder / "progressive.gif"]
