"""What the drop-in schedulers share: their step tables, and the forward process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm.integrations.scheduler_rows import Rows
from fastddpm.integrations.scheduler_update import Place, fits
from fastddpm.kernels.q_sample import Levels, q_sample
from fastddpm.process.table import StepTable

_MOST_TABLES = 16


@dataclasses.dataclass
class _Made:
    """The tables that were made, and of what: when that is replaced, they are made anew."""

    timesteps: Tensor
    alphas_cumprod: Tensor
    config: object
    steps: int | None
    rest: object
    versions: tuple[int, int]
    tables: dict[tuple[object, ...], tuple[Rows, ...] | None] = dataclasses.field(default_factory=dict)
    forward: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=dict)


class TableSteps:
    """What the drop-in schedulers share; mixed in before the parent, a scheduler of diffusers."""

    # The parent's.
    timesteps: Tensor
    alphas_cumprod: Tensor
    num_inference_steps: int | None
    _internal_dict: object

    _fast_made: _Made | None = None

    # ------------------------------------------------------------------ tables

    def _make(self, timesteps: Tensor, *options: float) -> tuple[StepTable, ...]:
        raise NotImplementedError

    def _watched(self) -> object:
        """What else the tables depend on; strings are compared, all else must be the same object."""
        return None

    def _fast(self) -> _Made:
        """What is made of the scheduler as it is now."""
        made = self._fast_made
        timesteps, alphas_cumprod = self.timesteps, self.alphas_cumprod
        config, steps = self._internal_dict, self.num_inference_steps
        versions = _version(timesteps), _version(alphas_cumprod)
        rest = self._watched()
        if (
            made is None
            or made.timesteps is not timesteps
            or made.alphas_cumprod is not alphas_cumprod
            or made.config is not config
            or made.steps != steps
            or (made.rest is not rest and not (isinstance(rest, str) and made.rest == rest))
            or made.versions != versions
        ):
            made = _Made(timesteps, alphas_cumprod, config, steps, rest, versions)
            self._fast_made = made
        return made

    def tables(self, *options: float) -> tuple[Rows, ...] | None:
        """The tables of a run with these options of `step`, or None where the parent must do it."""
        made = self._fast()
        if options in made.tables:
            return made.tables[options]
        if len(made.tables) >= _MOST_TABLES:  # η that changes with every step
            made.tables.clear()
        with torch.inference_mode(False), torch.no_grad():
            try:
                made.tables[options] = tuple(Rows(table) for table in self._make(made.timesteps.cpu(), *options))
            except (ValueError, TypeError, NotImplementedError):
                made.tables[options] = None
        return made.tables[options]

    def _row(self, timestep: int | Tensor, out: Tensor, x: Tensor, *options: float) -> Place | None:
        """The table and the row, or each sample's row, of this step; None where the parent must do it."""
        tables = self.tables(*options)
        at = None if tables is None else tables[0].find(timestep, self.timesteps)
        if tables is None or at is None or not fits(out, x, tables[0].table):
            return None
        return tables[0], at

    def _set(self, device: torch.device | str | None, set_timesteps: Callable[[], None]) -> None:
        """Set the timesteps where the host can read them, make the tables, and move both."""
        self._fast_made = None
        set_timesteps()
        tables = self.tables()
        if device is None:
            return
        made = self._fast()
        moved = self.timesteps.to(device)
        self.timesteps = made.timesteps = moved
        made.versions = _version(moved), made.versions[1]
        for rows in tables or ():
            rows.on(moved.device)

    # ------------------------------------------------------------------ the forward process

    def _noised(self, scale: Tensor, other: Tensor, timesteps: Tensor, sign: int) -> Tensor | None:
        """√ᾱ_t · scale ± √(1 − ᾱ_t) · other by `q_sample`, or None where that is not for it."""
        made = self._fast()
        if not _same(scale, other) or scale.dtype != torch.float32 or scale.ndim != 4 or not scale.numel():
            return None
        if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or len(timesteps) not in (1, len(scale)):
            return None
        if timesteps.is_floating_point() or timesteps.dtype in (torch.bool, torch.uint8):
            return None
        if scale.device not in made.forward:
            with torch.inference_mode(False), torch.no_grad():
                exact = made.alphas_cumprod.double()
                signal, spread = (values.sqrt().float().to(scale.device) for values in (exact, 1.0 - exact))
                made.forward[scale.device] = signal, spread, -spread
        signal, spread, minus = made.forward[scale.device]
        t = timesteps.to(scale.device, torch.int64).expand(len(scale))
        return q_sample(scale, t, Levels(signal, spread if sign > 0 else minus), other)[0]


class ForwardSteps(TableSteps):
    """The forward process of DDPMScheduler and DDIMScheduler."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Ho et al. 2020, eq. 4), in one pass.

        Args:
            original_samples: float [B, …], x_0.
            noise: float [B, …], ε.
            timesteps: int [B] or [1].

        Returns:
            float [B, …], x_t.
        """
        noised = self._noised(original_samples, noise, timesteps, 1)
        return super().add_noise(original_samples, noise, timesteps) if noised is None else noised  # type: ignore[misc]

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans & Ho 2022, sec. 4), in one pass.

        Args:
            sample: float [B, …], x_0.
            noise: float [B, …], ε.
            timesteps: int [B] or [1].

        Returns:
            float [B, …], v.
        """
        velocity = self._noised(noise, sample, timesteps, -1)
        return super().get_velocity(sample, noise, timesteps) if velocity is None else velocity  # type: ignore[misc]


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; tensors of the inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _same(x: object, y: object) -> bool:
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.shape == y.shape
        and x.dtype == y.dtype
        and x.device == y.device
    )
