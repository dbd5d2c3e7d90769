"""Drop-in schedulers for diffusers: the parents' interface and results, with a step that is a lookup and one update.

    pipe.scheduler = FastDDPMScheduler.from_config(pipe.scheduler.config)

`set_timesteps` makes a step table (`fastddpm.process.table`) in float64, rounded once to float32; `step` takes its row

    x̂_0     = clip(a_x · x_t + a_o · out, −bound, +bound)
    x_{t−1} = c_0 · x̂_0 + c_x · x_t + c_o · out + c_h · history + c_h2 · history2 + σ · z

with no `.item()`, no copy to a device and no wait for one. The noise is drawn as the parent draws it, in the same
order, so the same generator gives the same pictures. `timestep` may also be a tensor of one timestep per sample.

What the table does not hold is left to the parent's own `step`: options other than those of `fastddpm`'s solvers
(learned variance that is not a range, solver order 1, SDE variants, Karras and other sigmas, limits of
thresholding below 1), timesteps that are not in the list, repeated or rising lists, float64 samples. A scheduler whose
betas, timesteps or options are replaced afterwards follows them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.integrations.diffusers_noise import Generator, draw
from fastddpm.integrations.scheduler_base import ForwardSteps, TableSteps
from fastddpm.integrations.scheduler_rows import Rows
from fastddpm.integrations.scheduler_tables import ancestral_table, ddim_table, multistep_tables
from fastddpm.integrations.scheduler_update import fits, update
from fastddpm.process.table import StepTable

try:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

    # A saved pipeline names this module, and to load it again diffusers looks here for SchedulerMixin.
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError(
        f"fastddpm's schedulers: diffusers must be installed, got {error}; install fastddpm[diffusers]"
    ) from error

__all__ = ["FastDDIMScheduler", "FastDDPMScheduler", "FastDPMSolverMultistepScheduler", "SchedulerMixin"]


class _Compatible:
    """Lets each of the three be made from the configuration of any other; mixed in before the parent."""

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [*super()._get_compatibles(), *OURS]  # type: ignore[misc]


class FastDDPMScheduler(_Compatible, ForwardSteps, DDPMScheduler):  # type: ignore[misc]
    """diffusers' DDPMScheduler with a table for its steps: ancestral sampling (Ho et al. 2020, eq. 6–7 and 11).

    Takes the parent's arguments, configurations and files. Where the parent gives NaN (variance_type
    "fixed_large_log") this one gives what the name says, the large variance.
    """

    def _make(self, timesteps: Tensor, *options: float) -> tuple[StepTable, ...]:
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
        found = self._row(timestep, model_output, sample)
        if found is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        rows, at = found
        z = None
        if not isinstance(at, int) or rows.timesteps[at] > 0:
            z = draw(sample.shape, generator, model_output)
        previous, x_start = update(found, sample, model_output, z, self._threshold_sample)
        if not return_dict:
            return previous, x_start
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x_start)


class FastDDIMScheduler(_Compatible, ForwardSteps, DDIMScheduler):  # type: ignore[misc]
    """diffusers' DDIMScheduler with a table for its steps (Song et al. 2021, eq. 12 and 16).

    Takes the parent's arguments, configurations and files. There is one table for each η and each value of
    `use_clipped_model_output`, made when first asked for.
    """

    def _make(self, timesteps: Tensor, *options: float) -> tuple[StepTable, ...]:
        eta, clips = options or (0.0, False)
        return (ddim_table(self, timesteps, eta, bool(clips)),)

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
        found = None
        if isinstance(eta, (int, float)) and (variance_noise is None or generator is None):
            options = (eta, bool(use_clipped_model_output)) if eta or use_clipped_model_output else ()
            found = self._row(timestep, model_output, sample, *options)
        if found is None:
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        z = None
        if eta > 0:
            z = draw(sample.shape, generator, model_output) if variance_noise is None else variance_noise
        previous, x_start = update(found, sample, model_output, z, self._threshold_sample)
        if not return_dict:
            return previous, x_start
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x_start)


class FastDPMSolverMultistepScheduler(_Compatible, TableSteps, DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers' DPMSolverMultistepScheduler with a table for DPM-Solver++(2M), its default, or (3M) (Lu et al. 2022).

    Takes the parent's arguments, configurations and files, and keeps the parent's state between steps
    (`model_outputs`, `lower_order_nums`, `step_index`), so a run may be handed from one to the other.
    """

    # The parent's state.
    model_outputs: list[Tensor | None]
    lower_order_nums: int
    _step_index: int | None
    _begin_index: int | None

    def _make(self, timesteps: Tensor, *options: float) -> tuple[StepTable, ...]:
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
        """The next x from the network's output at x_t and the steps before.

        Args:
            model_output: float [B, C, …].
            timestep: t of the run's first step; afterwards the scheduler counts, as the parent does. Or int [B], each
                sample's own, in every step: a sample at the first timestep starts anew, and the others go on from
                the last steps' x̂_0.
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
        tables, at = self.tables(), None
        out = model_output[:, : sample.shape[1]] if self._learns_variance() else model_output
        if tables is not None and fits(out, sample, tables[0].table):
            at = self._at(tables[0], timestep)
        # How many steps this one looks back at; a row that has not as many before it is the parent's affair.
        depth = min(self.lower_order_nums, self.config.solver_order - 1)
        past = [x_start for x_start in self.model_outputs[::-1][:depth] if x_start is not None]
        early = isinstance(at, int) and at < depth
        if tables is None or at is None or early or len(past) < depth:
            return super().step(out, timestep, sample, generator, variance_noise, return_dict)
        history, history2, *_ = (*(x_start.expand_as(sample) for x_start in past), None, None)
        place = tables[depth], at
        previous, x_start = update(place, sample, out, None, self._threshold_sample, (history, history2))
        self.model_outputs = [*self.model_outputs[1:], x_start]
        if self.lower_order_nums < self.config.solver_order:
            self.lower_order_nums += 1
        self._step_index = (self._step_index or 0) + 1
        if not return_dict:
            return (previous,)
        return SchedulerOutput(prev_sample=previous)

    def convert_model_output(
        self,
        model_output: Tensor,
        *args: object,
        sample: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """x̂_0 or ε from the network's output, as the parent; of a learned variance's channels the first half is taken.

        Args:
            model_output: float [B, C, …], or [B, 2C, …] with a learned variance, of which the parent takes 3 channels.
            args: the parent's older arguments.
            sample: float [B, C, …], x_t.
            kwargs: the parent's older arguments.

        Returns:
            float [B, C, …]: x̂_0 for DPM-Solver++, ε for DPM-Solver.
        """
        if sample is None or not self._learns_variance() or self.config.prediction_type != "epsilon":
            converted: Tensor = super().convert_model_output(model_output, *args, sample=sample, **kwargs)
            return converted
        eps = model_output[:, : sample.shape[1]]
        alpha_t, sigma_t = self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index])
        x_start: Tensor = (sample - sigma_t * eps) / alpha_t
        if self.config.thresholding:
            x_start = self._threshold_sample(x_start)
        if self.config.algorithm_type.endswith("++"):
            return x_start
        return (sample - alpha_t * x_start) / sigma_t if self.config.thresholding else eps

    def _learns_variance(self) -> bool:
        return self.config.variance_type in ("learned", "learned_range")

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
        tables = self.tables()
        noised = None
        if tables is not None and self.begin_index is None and isinstance(timesteps, Tensor) and timesteps.ndim == 1:
            in_run = timesteps if timesteps.is_floating_point() else tables[0].or_last(timesteps)
            noised = self._noised(original_samples, noise, in_run, 1)
        return super().add_noise(original_samples, noise, timesteps) if noised is None else noised


OURS = (FastDDPMScheduler, FastDDIMScheduler, FastDPMSolverMultistepScheduler)
