"""Drop-in schedulers for diffusers: the parents' interface and results, with a step that is a lookup and one update.

    pipe.scheduler = FastDDPMScheduler.from_config(pipe.scheduler.config)

`set_timesteps` makes a step table (`fastddpm.step_table`) in float64, rounded once to float32; `step` takes its row

    x̂_0     = clip(a_x · x_t + a_o · out, −bound, +bound)
    x_{t−1} = c_0 · x̂_0 + c_x · x_t + c_o · out + c_h · history + σ · z

with no `.item()`, no copy to a device and no wait for one. The noise is drawn as the parent draws it, in the same
order, so the same generator gives the same pictures. `timestep` may also be a tensor of one timestep per sample.

What the table does not hold is left to the parent's own `step`: options other than those of `fastddpm`'s solvers
(learned variance that is not a range, solver orders other than 2, SDE variants, Karras and other sigmas, limits of
thresholding below 1), timesteps that are not in the list, repeated or rising lists, float64 samples. A scheduler whose
betas, timesteps or options are replaced afterwards follows them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddpm.integrations.scheduler_tables import Row, Rows, ancestral_table, ddim_table, multistep_tables
from fastddpm.kernels._triton import runs_triton
from fastddpm.kernels.p_sample import p_sample, p_sample_reference
from fastddpm.kernels.q_sample import q_sample
from fastddpm.step_table import StepTable, dynamic_bound

try:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

    # A saved pipeline names this module, and to load it again diffusers looks here for SchedulerMixin.
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError(
        f"fastddpm's schedulers: diffusers must be installed, got {error}; install fastddpm[diffusers]"
    ) from error

__all__ = ["FastDDIMScheduler", "FastDDPMScheduler", "FastDPMSolverMultistepScheduler", "SchedulerMixin"]

Generator = torch.Generator | list[torch.Generator] | None
_MOST_TABLES = 16
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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


class _TableSteps:
    """What the three schedulers share; mixed in before the parent."""

    # The parent's.
    timesteps: Tensor
    alphas_cumprod: Tensor
    num_inference_steps: int | None
    _internal_dict: object

    _fast_made: _Made | None = None

    # ------------------------------------------------------------------ diffusers' own interface

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """The parent's compatible classes and the three of this module."""
        return [*super()._get_compatibles(), *_OURS]  # type: ignore[misc]

    # ------------------------------------------------------------------ tables

    def _make(self, timesteps: Tensor, *options: Any) -> tuple[StepTable, ...]:  # noqa: ANN401
        raise NotImplementedError

    def _watched(self) -> object:
        """What else the tables depend on; strings are compared, all else must be the same object."""
        return None

    def _fast(self) -> _Made:
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

    def _tables(self, *options: Any) -> tuple[Rows, ...] | None:  # noqa: ANN401
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

    def _set(self, device: torch.device | str | None, set_timesteps: Callable[[], None]) -> None:
        """Set the timesteps where the host can read them, make the tables, and move both."""
        self._fast_made = None
        set_timesteps()
        tables = self._tables()
        if device is None:
            return
        made = self._fast()
        moved = self.timesteps.to(device)
        self.timesteps = made.timesteps = moved
        made.versions = _version(moved), made.versions[1]
        for rows in tables or ():
            rows.on(moved.device)

    # ------------------------------------------------------------------ the update

    def _update(
        self, rows: Rows, at: int | Tensor, x: Tensor, out: Tensor, z: Tensor | None, history: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The new state and x̂_0 of all samples, in the dtype that the parent's arithmetic has."""
        dtype = x.dtype if x.dtype == out.dtype else torch.promote_types(x.dtype, out.dtype)
        differentiates = torch.is_grad_enabled() and (x.requires_grad or out.requires_grad)
        fused = not differentiates and runs_triton(x.device.type)
        if isinstance(at, int) and not (fused and rows.table.threshold is None):
            new, x0 = self._update_alike(rows, at, _float(x), _float(out), _float(z), _float(history))
        else:
            new, x0 = _update_each(rows, at, x, out, z, history, fused)
        return (new, x0) if dtype == torch.float32 else (new.to(dtype), x0.to(dtype))

    def _update_alike(
        self, rows: Rows, at: int, x: Tensor, out: Tensor, z: Tensor | None, history: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """All samples at one row, whose numbers the host knows: plain PyTorch, in as few operations as there are."""
        row = rows.host[at]
        variance = None
        if out.shape[1:2] != x.shape[1:2]:
            out, variance = out.chunk(2, dim=1)
        x0 = out if row.a_x == 0.0 and row.a_o == 1.0 else torch.mul(x, row.a_x).add_(out, alpha=row.a_o)
        if rows.table.threshold is not None:
            x0 = self._threshold_sample(x0)  # type: ignore[attr-defined]
        elif row.bound != math.inf:
            x0 = x0.clamp(-row.bound, row.bound) if x0 is out else x0.clamp_(-row.bound, row.bound)
        new = torch.mul(x0, row.c_0)
        if row.c_x:
            new.add_(x, alpha=row.c_x)
        if row.c_o:
            new.add_(out, alpha=row.c_o)
        if row.c_h and history is not None:
            new.add_(history, alpha=row.c_h)
        if row.sigma and z is not None:
            new.add_(z if variance is None else z * _spread(row, variance), alpha=row.sigma)
        return new, x0

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
                made.forward[scale.device] = tuple(  # type: ignore[assignment]
                    values.sqrt().float().to(scale.device) for values in (exact, 1.0 - exact)
                )
                signal, spread = made.forward[scale.device][:2]
                made.forward[scale.device] = signal, spread, -spread
        signal, spread, minus = made.forward[scale.device]
        t = timesteps.to(scale.device, torch.int64).expand(len(scale))
        return q_sample(scale, t, signal, spread if sign > 0 else minus, eps=other)[0]


class _WithForward(_TableSteps):
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
        if noised is not None:
            return noised
        found: Tensor = super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        return found

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
        if velocity is not None:
            return velocity
        found: Tensor = super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]
        return found


class FastDDPMScheduler(_WithForward, DDPMScheduler):  # type: ignore[misc]
    """diffusers' DDPMScheduler with a table for its steps: ancestral sampling (Ho et al. 2020, eq. 6–7 and 11).

    Takes the parent's arguments, configurations and files. Where the parent gives NaN (variance_type
    "fixed_large_log") this one gives what the name says, the large variance.
    """

    def _make(self, timesteps: Tensor, *options: Any) -> tuple[StepTable, ...]:  # noqa: ANN401
        if self.variance_type != self.config.variance_type:
            raise ValueError("the variance was replaced")
        strided = bool(self.custom_timesteps or self.num_inference_steps)
        return (ancestral_table(self, timesteps, None if strided else timesteps - 1),)

    def _watched(self) -> object:
        return f"{self.variance_type} {self.custom_timesteps}"

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps of a run and make its table; the parent says what the arguments mean.

        Raises:
            ValueError: as the parent.
        """
        parent = super().set_timesteps
        self._set(device, lambda: parent(num_inference_steps, None, timesteps))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_{t−1} from the network's output at x_t.

        Args:
            model_output: float [B, C, …], or [B, 2C, …] with a learned variance.
            timestep: t, as a number or a tensor of one entry, on any device; or int [B], each sample's own. On an
                accelerator, a timestep of a tensor that was not taken from `timesteps` and is not in it gives NaN;
                then, and for t per sample, noise is drawn even if all t are 0.
            sample: float [B, C, …], x_t.
            generator: of the noise, or one per sample, as in the parent.
            return_dict: whether to return a DDPMSchedulerOutput or a tuple.

        Returns:
            prev_sample and pred_original_sample, in the dtype that both inputs promote to.

        Raises:
            IndexError: the timestep is not in the run.
        """
        tables = self._tables()
        at = None if tables is None else tables[0].find(timestep, self.timesteps)
        if tables is None or at is None or not _fits(model_output, sample, tables[0].table):
            found = super().step(model_output, timestep, sample, generator, return_dict)
            return found
        z = None
        if not isinstance(at, int) or tables[0].timesteps[at] > 0:
            z = draw(sample.shape, generator, model_output)
        previous, x_start = self._update(tables[0], at, sample, model_output, z)
        if not return_dict:
            return previous, x_start
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x_start)


class FastDDIMScheduler(_WithForward, DDIMScheduler):  # type: ignore[misc]
    """diffusers' DDIMScheduler with a table for its steps (Song et al. 2021, eq. 12 and 16).

    Takes the parent's arguments, configurations and files. There is one table for each η and each value of
    `use_clipped_model_output`, made when first asked for.
    """

    def _make(self, timesteps: Tensor, *options: Any) -> tuple[StepTable, ...]:  # noqa: ANN401
        return (ddim_table(self, timesteps, *options),)

    def _watched(self) -> object:
        return self.final_alpha_cumprod

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run and make its table; the parent says what the arguments mean.

        Raises:
            ValueError: as the parent.
        """
        parent = super().set_timesteps
        self._set(device, lambda: parent(num_inference_steps, None))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_{t−Δ} from the network's output at x_t.

        Args:
            model_output: float [B, C, …].
            timestep: t, as a number or a tensor of one entry, on any device; or int [B], each sample's own. On an
                accelerator, a timestep of a tensor that was not taken from `timesteps` and is not in it gives NaN.
            sample: float [B, C, …], x_t.
            eta: η; 0 adds no noise, 1 is ancestral sampling.
            use_clipped_model_output: whether ε is taken from the clipped x̂_0.
            generator: of the noise, or one per sample, as in the parent.
            variance_noise: the noise itself, instead.
            return_dict: whether to return a DDIMSchedulerOutput or a tuple.

        Returns:
            prev_sample and pred_original_sample, in the dtype that both inputs promote to.

        Raises:
            IndexError: the timestep is not in the run.
            ValueError: the timesteps are not set, or both generator and variance_noise are given.
        """
        tables = None
        if isinstance(eta, (int, float)):
            plain = not eta and not use_clipped_model_output
            tables = self._tables() if plain else self._tables(eta, bool(use_clipped_model_output))
        at = None if tables is None else tables[0].find(timestep, self.timesteps)
        both = variance_noise is not None and generator is not None
        if tables is None or at is None or both or not _fits(model_output, sample, tables[0].table):
            found = super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
            return found
        z = None
        if eta > 0:
            z = draw(sample.shape, generator, model_output) if variance_noise is None else variance_noise
        previous, x_start = self._update(tables[0], at, sample, model_output, z)
        if not return_dict:
            return previous, x_start
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x_start)


class FastDPMSolverMultistepScheduler(_TableSteps, DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers' DPMSolverMultistepScheduler with a table for DPM-Solver++(2M), its default (Lu et al. 2022).

    Takes the parent's arguments, configurations and files, and keeps the parent's state between steps
    (`model_outputs`, `lower_order_nums`, `step_index`), so a run may be handed from one to the other.
    """

    # The parent's state.
    model_outputs: list[Any]
    lower_order_nums: int
    _step_index: int | None
    _begin_index: int | None

    def _make(self, timesteps: Tensor, *options: Any) -> tuple[StepTable, ...]:  # noqa: ANN401
        return multistep_tables(self, timesteps)

    def _watched(self) -> object:
        return self.sigmas

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps of a run and make its tables; the parent says what the arguments mean.

        Raises:
            ValueError: as the parent.
        """
        parent = super().set_timesteps
        given = {"mu": mu, "timesteps": timesteps}
        options = {name: value for name, value in given.items() if value is not None}
        self._set(device, lambda: parent(num_inference_steps, None, **options))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next x from the network's output at x_t and the step before.

        Args:
            model_output: float [B, C, …].
            timestep: t of the run's first step; afterwards the scheduler counts, as the parent does. Or int [B], each
                sample's own, in every step: a sample at the first timestep starts anew, and the others go on from
                the last step's x̂_0.
            sample: float [B, C, …], x_t.
            generator: for the parent's SDE variants.
            variance_noise: for the parent's SDE variants.
            return_dict: whether to return a SchedulerOutput or a tuple.

        Returns:
            prev_sample, in the dtype of the parent's.

        Raises:
            IndexError: a sample's own timestep is not in the run.
            ValueError: the timesteps are not set.
        """
        tables = self._tables()
        if tables is not None and self.config.variance_type in ("learned", "learned_range"):
            out = model_output[:, :3] if self.config.prediction_type == "epsilon" else model_output
        else:
            out = model_output
        at = None
        if tables is not None and _fits(out, sample, tables[0].table):
            at = self._at(tables[0], timestep)
        follows = self.lower_order_nums >= 1
        first = isinstance(at, int) and at == 0
        if tables is None or at is None or (follows and (first or self.model_outputs[-1] is None)):
            found = super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
            return found
        history = self.model_outputs[-1] if follows else None
        if history is not None and history.shape != sample.shape:
            history = history.expand_as(sample)
        previous, x_start = self._update(tables[1 if follows else 0], at, sample, out, None, history)
        self.model_outputs = [*self.model_outputs[1:], x_start]
        if self.lower_order_nums < self.config.solver_order:
            self.lower_order_nums += 1
        self._step_index = (self._step_index or 0) + 1
        if not return_dict:
            return (previous,)
        return SchedulerOutput(prev_sample=previous)

    def _at(self, rows: Rows, timestep: int | Tensor) -> int | Tensor | None:
        """The row of this step, counting like the parent."""
        each = isinstance(timestep, Tensor) and timestep.numel() > 1
        found: int | None = None
        if each or (self._step_index is None and self._begin_index is None):
            row = rows.find(timestep, self.timesteps)
            if isinstance(row, Tensor):
                if not each:
                    return None  # one timestep that only the device knows: the parent asks for it
                self._step_index = self._step_index or 0
                return row
            found = row
        at = self._step_index
        if at is None:
            at = found if self._begin_index is None else self._begin_index
        if at is None:
            self._init_step_index(timestep)  # not in the list, for which the parent has a rule
            at = self._step_index
        self._step_index = at
        return at if isinstance(at, int) and 0 <= at < len(rows.timesteps) else None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, in one pass, for timesteps of the run.

        Args:
            original_samples: float [B, …], x_0.
            noise: float [B, …], ε.
            timesteps: int [B] or [1]; one that is not in the run counts as the run's last, as in the parent.

        Returns:
            float [B, …], x_t.
        """
        tables = self._tables()
        noised = None
        if tables is not None and self.begin_index is None and isinstance(timesteps, Tensor) and timesteps.ndim == 1:
            noised = self._noised(original_samples, noise, self._nearest(tables[0], timesteps), 1)
        return super().add_noise(original_samples, noise, timesteps) if noised is None else noised

    def _nearest(self, rows: Rows, timesteps: Tensor) -> Tensor:
        """The timesteps, and the run's last for those that are not in it."""
        if timesteps.is_floating_point():
            return timesteps
        last = rows.timesteps[-1]
        if timesteps.device.type == "cpu":
            return torch.tensor([t if t in rows.index else last for t in timesteps.tolist()])
        row_of = rows.on(timesteps.device)[2]
        inside = (timesteps >= 0) & (timesteps < row_of.numel())
        found = row_of.index_select(0, torch.where(inside, timesteps, row_of.numel() - 1).long())
        return torch.where(found < len(rows.timesteps), timesteps, last)


_OURS = (FastDDPMScheduler, FastDDIMScheduler, FastDPMSolverMultistepScheduler)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; tensors of the inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _float(tensor: Any) -> Any:  # noqa: ANN401 - a tensor or None
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.float()


def _same(x: object, y: object) -> bool:
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.shape == y.shape
        and x.dtype == y.dtype
        and x.device == y.device
    )


def _fits(out: Tensor, x: Tensor, table: StepTable) -> bool:
    """Whether the tensors are what the table is for; the parent knows what to make of others."""
    if x.dtype not in _FLOATS or out.dtype not in _FLOATS or x.device != out.device or x.ndim < 2 or not x.numel():
        return False
    if table.variance == "learned_range":
        return out.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    return out.shape == x.shape


def draw(shape: torch.Size, generator: Generator, like: Tensor) -> Tensor:
    """Standard normals, drawn as diffusers draws them: by a CPU's generator on the CPU, by one per sample in turn.

    Args:
        shape: what to draw.
        generator: one, one per sample, or None for the device's own.
        like: its dtype and device count.

    Returns:
        Of `shape`, on the device of `like`, which is not waited for.

    Raises:
        ValueError: a generator of a GPU is to draw for another device.
    """
    device, dtype = like.device, like.dtype
    if generator is None or (isinstance(generator, torch.Generator) and generator.device.type == device.type):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)
    first = generator[0] if isinstance(generator, list) else generator
    drawn: Tensor
    if device.type == "cuda" and first.device.type == "cpu":
        drawn = randn_tensor(tuple(shape), generator=generator, dtype=dtype)
        return drawn.pin_memory().to(device, non_blocking=True)
    drawn = randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
    return drawn


def _spread(row: Row, v: Tensor) -> Tensor:
    """exp(½ (f log β + (1 − f) log β̃)), f = (v + 1)/2 (Nichol & Dhariwal 2021, eq. 15)."""
    middle, slope = 0.25 * (row.log_beta + row.log_beta_tilde), 0.25 * (row.log_beta - row.log_beta_tilde)
    return (v * slope).add_(middle).exp_()


def _update_each(
    rows: Rows, at: int | Tensor, x: Tensor, out: Tensor, z: Tensor | None, history: Tensor | None, fused: bool
) -> tuple[Tensor, Tensor]:
    """The update by the kernel, or by its reference where it must be differentiable: each sample at its own row."""
    batch, shape, device = len(x), x.shape, x.device
    table, times, _ = rows.on(device)
    if isinstance(at, int):
        step = rows.step(at, batch, device)
    elif at.numel() in (1, batch):
        step = at.to(device).expand(batch)
    else:
        raise ValueError(f"step: timestep must be one, or one for each of {batch} samples, got {at.numel()}; mend it")

    def flat(tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == 4 else tensor.reshape(batch, tensor.shape[1], -1, 1)

    x4, out4 = flat(x), flat(out)
    bound = None
    if rows.table.threshold is not None:
        bound = dynamic_bound(x4, out4, table.index_select(0, step), rows.table.threshold)
    noise = None if z is None else flat(z).float().expand(x4.shape).contiguous()[None]
    zeros = torch.zeros_like(step)
    if fused:
        new = x4.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        past = torch.empty_like(new) if history is None else flat(history).float().clone().reshape(new.shape)
        options: dict[str, Any] = {"noise": noise, "history": past, "bound": bound, "stochastic": z is not None}
        p_sample(new, out4, table, times, step, zeros, zeros, **options)
        x_start = past
    else:
        past4 = None if history is None else flat(history).float()
        new, x_start = p_sample_reference(
            x4.float(), out4, table, times, step, zeros, zeros, noise=noise, history=past4, bound=bound,
            stochastic=z is not None,
        )  # fmt: skip
    return new.reshape(shape), x_start.reshape(shape)
