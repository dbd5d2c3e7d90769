"""Sampler: from a trained network to pictures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from fastddpm.checkpoints import Checkpoint, load_checkpoint
from fastddpm.compiled import CompileError
from fastddpm.denoiser import Denoiser, bind
from fastddpm.engine import Engine, EngineName, Runner
from fastddpm.images import Output, to_output
from fastddpm.kernels.p_sample import COLUMNS
from fastddpm.machine import pick_device
from fastddpm.noise import NoiseFunction, NoiseSource, seed_bits
from fastddpm.plan import DEFAULT_STEPS, plan
from fastddpm.precision import Precision, check_precision, float32_kernels, in_precision
from fastddpm.progress import StepProgress
from fastddpm.request import Request, check_noise, make_request
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers import ClippedEps, DynamicThreshold, Solver
from fastddpm.spec import ModelSpec, Variance
from fastddpm.state import State, advance
from fastddpm.step_call import StepCall
from fastddpm.step_table import StepTable
from fastddpm.unet import UNet

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DEFAULT_STEPS", "Preview", "SampleOptions", "Sampler"]


@dataclasses.dataclass(frozen=True)
class Preview:
    """What a callback sees after a step.

    Attributes:
        step: steps done, 1 … steps.
        steps: steps of the run.
        timestep: the training timestep that was just left.
        sample_ids: int64 [B], the samples of this batch.
        x: float32 [B, C, H, W], the state, in the network's value range.
        x_start: float32 [B, C, H, W], the estimate x̂_0 of this step.
    """

    step: int
    steps: int
    timestep: int
    sample_ids: Tensor
    x: Tensor
    x_start: Tensor


class SampleOptions(TypedDict, total=False):
    """The keyword arguments of `Sampler.sample`, for type checkers; `Sampler.sample` explains them."""

    seed: int
    sample_ids: Sequence[int] | Tensor | None
    solver: Solver
    steps: int | None
    timesteps: str | Sequence[int] | Tensor | None
    prev_timesteps: Sequence[int] | Tensor | None
    eta: float | None
    clip: float | DynamicThreshold | Literal["spec"] | None
    clipped_eps: ClippedEps | Literal["spec"]
    variance: Variance | Literal["spec"]
    class_labels: int | Sequence[int] | Tensor | None
    guidance_scale: float | Sequence[float] | Tensor
    batch_size: int | None
    x_T: Tensor | None
    noise: NoiseSource | None
    callback: Callable[[Preview], None] | None
    progress: bool | None


class Sampler:
    """Samples from a trained network; see `from_pretrained` and `sample`."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Tensor],
        schedule: NoiseSchedule,
        spec: ModelSpec,
        *,
        device: torch.device | str | None = None,
        engine: EngineName = "auto",
        precision: Precision = "fp32",
        graph_steps: int | None = None,
    ) -> None:
        """Wrap a network.

        Args:
            model: (x, t[, y]) → output; x float32 [B, C, H, W], t [B], y int64 [B] where the spec has classes.
            schedule: the noise schedule it was trained with.
            spec: the conventions it was trained with.
            device: where to sample; None takes the GPU if there is one. A module is moved there, laid
                out channels-last and put in evaluation mode.
            engine: how steps run: "auto", "eager", "compiled", "cuda_graph" or "onnx" (see `fastddpm.engine`). "auto"
                takes a compiled step where there is one or the run is long enough to earn the time to compile.
            precision: the network's arithmetic: "fp32", "bf16", and on GPUs "tf32" and "fp16"; the state and its
                update are float32 always.
            graph_steps: steps that a CUDA graph holds; None is all of runs of up to 64, and 50 of longer ones.

        Raises:
            ValueError: the device is not available, or it cannot do what engine or precision ask.
        """
        self.device = pick_device(device)
        check_precision(precision, self.device)
        self.engine = Engine(engine, self.device, graph_steps=graph_steps)
        self.precision = precision
        self.schedule, self.spec = schedule, spec
        self.checkpoint: Checkpoint | None = None
        if isinstance(model, nn.Module):
            # Convolutions run fastest on channels-last weights, on CPUs and GPUs alike.
            model = model.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = in_precision(model, precision, self.device)
        if engine == "onnx":
            from fastddpm.export.engine_network import engine_network  # late: it needs optional packages

            self.model = engine_network(self.model, schedule, spec, self.device, precision)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        engine: EngineName = "auto",
        precision: Precision = "fp32",
        graph_steps: int | None = None,
        **flags: object,
    ) -> Sampler:
        """Load a checkpoint that ships with the package ("mnist"), one on disk, or one on the Hugging Face Hub.

        Args:
            name_or_path: a shipped name, a checkpoint folder, another project's file of weights, or a name on the Hub
                ("google/ddpm-cifar10-32"), where there is nothing of that path.
            device: where to sample; None takes the GPU if there is one.
            engine: as in `Sampler`, and so are precision and graph_steps.
            precision: the network's arithmetic.
            graph_steps: steps that a CUDA graph holds.
            flags: what the file does not determine, under its project's own names; see `load_checkpoint`.

        Returns:
            A sampler.

        Raises:
            CheckpointError: there is no such checkpoint, it cannot be read, or a flag is missing, unknown or wrong.
            ValueError: the device is not available.
        """
        target = pick_device(device)
        checkpoint = load_checkpoint(name_or_path, **flags)
        sampler = cls(
            checkpoint.network,
            checkpoint.schedule,
            checkpoint.spec,
            device=target,
            engine=engine,
            precision=precision,
            graph_steps=graph_steps,
        )
        sampler.checkpoint = checkpoint
        return sampler

    @torch.no_grad()
    def network(self, x: Tensor, t: Tensor, y: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        """The network's raw output.

        Args:
            x: float [B, C, H, W].
            t: [B], as the network is fed (a training step times `spec.time_scale`).
            y: int64 [B], classes, for networks that have them.
            x_self_cond: float [B, C, H, W], an estimate of x_0, for networks with self-conditioning; None is zeros.

        Returns:
            float [B, C or 2C, H, W] on the sampler's device.

        Raises:
            ValueError: x_self_cond is given for a network without self-conditioning.
        """
        x, t = x.to(self.device), t.to(self.device)
        more = {}
        if self.spec.self_condition:
            more["x_self_cond"] = torch.zeros_like(x) if x_self_cond is None else x_self_cond.to(self.device)
        elif x_self_cond is not None:
            raise ValueError(
                "network: x_self_cond must be None, got a tensor, but the network takes none; leave it out"
            )
        return self.model(x, t, **more) if y is None else self.model(x, t, y.to(self.device), **more)

    def table(
        self,
        *,
        solver: Solver = "ddim",
        steps: int | None = None,
        timesteps: str | Sequence[int] | Tensor | None = None,
        prev_timesteps: Sequence[int] | Tensor | None = None,
        eta: float | None = None,
        clip: float | DynamicThreshold | Literal["spec"] | None = "spec",
        clipped_eps: ClippedEps | Literal["spec"] = "spec",
        variance: Variance | Literal["spec"] = "spec",
    ) -> StepTable:
        """The coefficients of a run; `sample` explains the arguments.

        Raises:
            TypeError: timesteps are not integers.
            ValueError: an argument is out of range.
        """
        return plan(
            self.schedule,
            self.spec,
            solver=solver,
            steps=steps,
            timesteps=timesteps,
            prev_timesteps=prev_timesteps,
            eta=eta,
            clip=clip,
            clipped_eps=clipped_eps,
            variance=variance,
        ).to(self.device)

    @torch.no_grad()
    def compile(self, batch_size: int, *, guided: bool = False) -> float | None:
        """Compile the step for batches of one size ahead of time and keep it on disk (CPU).

        Args:
            batch_size: samples that run together.
            guided: whether runs are guided.

        Returns:
            Seconds that it took, or None if it was there already.

        Raises:
            CompileError: the network does not compile, or its compiled form could not be told apart from others'.
            ValueError: the device is no CPU, or there is no guidance for this network.
            OSError: the package cannot be written.
        """
        if self.device.type != "cpu" or not isinstance(self.model, UNet):
            raise CompileError(
                "compile: the network must be a U-Net of fastddpm's own on a CPU, got "
                f"{type(self.model).__name__} on {self.device}; it is compiled when sampling with engine='compiled'"
            )
        classes = self.spec.num_classes
        labels = None if classes is None else torch.zeros(batch_size, dtype=torch.int64)
        scale = 2.0 if guided else 1.0
        request = make_request(self.spec, self.device, batch_size, None, labels, scale, None, None, batch_size)
        table = self.table(solver="ddpm", steps=min(4, self.schedule.T))
        denoiser = bind(self.model, self.spec, table, request.labels, guided)
        return self.engine.compile(StepCall(denoiser, table, self._start(table, request, 0, None)))

    @overload
    def sample(
        self, n: int, *, output: Literal["unit", "raw", "uint8"] = ..., **options: Unpack[SampleOptions]
    ) -> Tensor: ...

    @overload
    def sample(self, n: int, *, output: Literal["pil"], **options: Unpack[SampleOptions]) -> list[Image]: ...

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        solver: Solver = "ddim",
        steps: int | None = None,
        timesteps: str | Sequence[int] | Tensor | None = None,
        prev_timesteps: Sequence[int] | Tensor | None = None,
        eta: float | None = None,
        clip: float | DynamicThreshold | Literal["spec"] | None = "spec",
        clipped_eps: ClippedEps | Literal["spec"] = "spec",
        variance: Variance | Literal["spec"] = "spec",
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float | Sequence[float] | Tensor = 1.0,
        batch_size: int | None = None,
        x_T: Tensor | None = None,
        noise: NoiseSource | None = None,
        output: Output = "unit",
        callback: Callable[[Preview], None] | None = None,
        progress: bool | None = None,
    ) -> Tensor | list[Image]:
        """Draw n samples.

        A sample depends on its seed and id alone: not on n, the batch size, the other samples or the device (beyond
        rounding). Sample ids 0 … 49 on one machine and 50 … 99 on another are the same hundred pictures.

        Args:
            n: how many, at least 1.
            seed: in [0, 2**64).
            sample_ids: n ids in [0, 2**64); None is 0 … n−1.
            solver: "ddpm" (ancestral, Ho et al. 2020), "ddim" (Song et al. 2021) or "dpmpp_2m" (Lu et al. 2022).
            steps: S, at most T; None is T for ddpm, 50 for ddim, 20 for dpmpp_2m.
            timesteps: instead of `steps`, the training timesteps to visit, descending, or OpenAI's respacing
                string: "250", "ddim25", "10,15,20".
            prev_timesteps: where the steps lead, each to a lower timestep or to −1, which is x_0. None is what the
                checkpoint's own project does: mostly the next timestep, and x_0 after the last.
            eta: DDIM's η in [0, 1]; 0 (the default) draws no noise, 1 is ancestral sampling.
            clip: bound of |x̂_0|, None for none, a DynamicThreshold; "spec" is what the checkpoint says.
            clipped_eps: DDIM: take ε from the clipped x̂_0 ("rederive") or as the network has it ("raw").
            variance: ddpm: "fixed_small" or "fixed_large" instead of what the checkpoint says.
            class_labels: one class or n of them; None asks for no class, which needs a network trained for that.
            guidance_scale: w in ε_∅ + w (ε_y − ε_∅) (Ho & Salimans 2022), one or n of them; 1 is no guidance. A
                learned variance is the one with the label, as in GLIDE and DiT.
            batch_size: samples that run together; None chooses by device. It does not change the pictures, except
                with a torch.Generator, whose draws go to one batch after the other: there None is all n.
            x_T: float [n, C, H, W] to start from instead of seeded noise.
            noise: z for each step instead of seeded noise: a tensor [S, n, C, H, W] in loop order, a function
                (i, t, sample_ids) → [B, C, H, W] that answers alike when asked again, or a torch.Generator (which
                then draws x_T too, if none is given).
            output: "unit": float32 in [0, 1] (an unclipped run may leave it where the checkpoint's own project does not
                clamp); "raw": the final state, as the network has it; "uint8": bytes; all three [n, C, H, W].
                "pil": a list of n PIL images.
            callback: called with a `Preview` after each step of each batch.
            progress: whether to show a progress bar; None shows it on terminals.

        Returns:
            The pictures, on the sampler's device.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range or does not fit the network.
            FloatingPointError: the samples ran into NaN or infinity; says at which step.
        """
        request = make_request(
            self.spec, self.device, n, sample_ids, class_labels, guidance_scale, x_T, noise, batch_size
        )
        if output not in ("unit", "raw", "uint8", "pil"):
            raise ValueError(f"sample: output must be unit, raw, uint8 or pil, got {output!r}; pick one")
        seed_bits(seed)
        table = self.table(
            solver=solver,
            steps=steps,
            timesteps=timesteps,
            prev_timesteps=prev_timesteps,
            eta=eta,
            clip=clip,
            clipped_eps=clipped_eps,
            variance=variance,
        )
        check_noise(noise, table.S, n, self.spec.shape)
        denoiser = bind(self.model, self.spec, table, request.labels, request.guidance is not None)
        batches = list(request.batches())
        finished = []
        with StepProgress(table.S * len(batches), n, progress) as bar, float32_kernels(self.precision, self.device):
            for batch in batches:
                finished.append(self._run_batch(denoiser, table, batch, seed, noise, callback, bar))
        return to_output(torch.cat(finished), output, self.spec.to_bytes, self.spec.to_unit)

    def _run_batch(
        self,
        denoiser: Denoiser,
        table: StepTable,
        batch: Request,
        seed: int,
        noise: NoiseSource | None,
        callback: Callable[[Preview], None] | None,
        bar: StepProgress,
    ) -> Tensor:
        """The final states of one batch."""
        rewind = noise.get_state() if isinstance(noise, torch.Generator) else None
        n = len(batch.ids)
        if noise is None or isinstance(noise, Tensor):
            batch = batch.padded(self.engine.padded(n, batch.batch_size))
        state = self._start(table, batch, seed, noise)
        runner = self.engine.runner(
            denoiser,
            table,
            state,
            self._example(table, batch, noise, state),
            to_come=max(bar.remaining, table.S),
            on_compile=bar.compiling,
        )
        state = runner.state
        for i, t in self._drive(runner, table, batch, noise, one_by_one=callback is not None):
            if callback is not None and state.history is not None:
                callback(Preview(i, table.S, t, state.sample_id[:n], state.x[:n].clone(), state.history[:n].clone()))
            bar.advance_to(i)
        bar.batch_done()
        if not bool(torch.isfinite(state.x).all()):
            if isinstance(noise, torch.Generator) and rewind is not None:
                noise.set_state(rewind)
            self._explain_nan(denoiser, table, batch, seed, noise)
        return state.x[:n].clone()

    def _drive(
        self, runner: Runner, table: StepTable, batch: Request, noise: NoiseSource | None, *, one_by_one: bool = True
    ) -> Iterator[tuple[int, int]]:
        """Advance all samples to the end; yields (i, t) where i steps are done and the last one left timestep t."""
        drawn = table.uses_noise and noise is not None and not isinstance(noise, Tensor)
        adds_noise = (table.rows[:, COLUMNS.index("sigma")] != 0).tolist()
        timesteps = table.timesteps.tolist()
        i = 0
        while i < table.S:
            supplied = batch.noise if table.uses_noise else None
            if drawn and noise is not None and not isinstance(noise, Tensor):
                # Peers draw nothing where nothing is used, and so their generators stay in step with ours.
                x = runner.state.x
                supplied = self._draw(noise, i, timesteps[i], batch, x) if adds_noise[i] else torch.zeros_like(x)[None]
            i += runner.run(1 if one_by_one or drawn else table.S - i, supplied)
            yield i, timesteps[i - 1]

    def _example(self, table: StepTable, batch: Request, noise: NoiseSource | None, state: State) -> Tensor | None:
        """Noise of the form that each step will be given."""
        if noise is None or not table.uses_noise:
            return None
        return batch.noise if isinstance(noise, Tensor) else torch.zeros_like(state.x)[None]

    def _start(self, table: StepTable, batch: Request, seed: int, noise: NoiseSource | None) -> State:
        x_T = batch.x_T
        if x_T is None and isinstance(noise, torch.Generator):
            x_T = torch.randn((len(batch.ids), *self.spec.shape), generator=noise, device=noise.device)
        return State.create(
            self.spec.shape,
            batch.ids,
            seed,
            device=self.device,
            x_T=x_T,
            labels=batch.labels,
            guidance=batch.guidance,
            history=True,
        )

    def _draw(self, noise: NoiseFunction | torch.Generator, i: int, t: int, batch: Request, x: Tensor) -> Tensor:
        """The caller's noise for loop step i, [1, B, C, H, W]."""
        if isinstance(noise, torch.Generator):
            z = torch.randn(x.shape, generator=noise, device=noise.device)
        else:
            z = noise(i, t, batch.ids)
            if not isinstance(z, Tensor) or z.shape != x.shape:
                got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"sample: noise must return a tensor {tuple(x.shape)}, got {got}")
        return z.to(self.device, torch.float32).contiguous()[None]

    def _explain_nan(
        self, denoiser: Denoiser, table: StepTable, batch: Request, seed: int, noise: NoiseSource | None
    ) -> None:
        """Run the batch again, which noise as a pure function allows, and name the step where the trouble began."""
        state = self._start(table, batch, seed, noise)
        runner = Runner(state, lambda z: advance(denoiser, table, state, noise=z))
        for i, t in self._drive(runner, table, batch, noise):
            bad = ~torch.isfinite(state.x).flatten(1).all(1)
            if bool(bad.any()):
                ids = state.sample_id[bad].tolist()
                raise FloatingPointError(
                    f"sample: the state must stay finite, got NaN or infinity from step {i} of {table.S} (t = {t}) "
                    f"in {len(ids)} samples, first id {ids[0]}; the weights or the supplied noise are not usable"
                )
        raise FloatingPointError(
            "sample: the final state must be finite, got NaN or infinity that a second run does not show"
        )
