"""Sampler: from a trained network to pictures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor, nn

from fastddpm.checkpoints import Checkpoint, load_checkpoint
from fastddpm.common.progress import StepProgress
from fastddpm.engines.choose import Engine, EngineName
from fastddpm.engines.compare import CompileError
from fastddpm.engines.devices import pick_device
from fastddpm.engines.precision import Precision, check_precision
from fastddpm.engines.runner import Runner
from fastddpm.engines.stepper import Stepper
from fastddpm.images import Output, to_output
from fastddpm.kernels.p_sample import COLUMNS
from fastddpm.process.method import DEFAULT_STEPS, plan
from fastddpm.process.noise import NoiseFunction, NoiseSource, seed_bits
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.solvers import ClippedEps, DynamicThreshold, Solver
from fastddpm.process.spec import ModelSpec, Variance
from fastddpm.process.table import StepTable
from fastddpm.step.network import Foreign, Network
from fastddpm.step.request import Request, check_noise, make_request

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
            engine: how steps run: "auto", "eager", "compiled", "cuda_graph" or "onnx" (see `fastddpm.engines`). "auto"
                takes a compiled step where there is one or the run is long enough to earn the time to compile.
            precision: the network's arithmetic: "fp32", "bf16", and on GPUs "tf32" and "fp16"; the state and its
                update are float32 always.
            graph_steps: steps that a CUDA graph holds; None is `fastddpm.engines.gpu.GRAPH_STEPS`.

        Raises:
            ValueError: the device is not available, or it cannot do what engine or precision ask.
        """
        self.device = pick_device(device)
        check_precision(precision, self.device)
        self._made_of = (model, schedule, spec, self.device, engine, precision, graph_steps)
        self.precision = precision
        self.schedule, self.spec = schedule, spec
        self.checkpoint: Checkpoint | None = None
        if isinstance(model, nn.Module):
            # Convolutions run fastest on channels-last weights, on CPUs and GPUs alike.
            model = model.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if engine == "onnx":
            from fastddpm.export.engine_network import engine_network  # late: it needs optional packages

            model = engine_network(model, schedule, spec, self.device, precision)

        def make_engine(weights: Callable[[], str]) -> Engine:
            return Engine(engine, self.device, graph_steps=graph_steps, weights=weights)

        self.stepper = Stepper(model, spec, schedule.T, self.device, precision, make_engine)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are of what the sampler was made of; what it compiled and captured is made anew."""
        return _made_again, (type(self), self._made_of, self.checkpoint)

    @property
    def engine(self) -> Engine:
        """How steps run: what was `used` last, and `why`."""
        return self.stepper.engine

    @property
    def model(self) -> Callable[..., Tensor]:
        """The network in the sampler's precision: (x, t[, y]) → output."""
        network = self.stepper.network
        return network.model if isinstance(network, Foreign) and network.dtype is None else network

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
        with self.stepper.undisturbed():
            self.stepper.refresh()
            network = self.stepper.network
            return torch.as_tensor(network(x, t, **more) if y is None else network(x, t, y.to(self.device), **more))

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
        options = {"solver": solver, "steps": steps, "timesteps": timesteps, "prev_timesteps": prev_timesteps}
        return self._plan(
            **options, eta=eta, clip=clip, clipped_eps=clipped_eps, variance=variance
        ).to(self.device)  # fmt: skip

    def compile(self, batch_size: int, *, guided: bool = False) -> float | None:
        """Compile the step for batches of one size ahead of time; on a CPU it is kept on disk.

        Args:
            batch_size: samples that run together.
            guided: whether runs are guided.

        Returns:
            Seconds that it took, or None if it was there already.

        Raises:
            CompileError: the network does not compile, or its compiled form could not be told apart from others'.
            ValueError: there is no guidance for this network.
            OSError: the package cannot be written.
        """
        if self.engine.name == "onnx" or cast(Network, self.stepper.network).identity() is None:
            raise CompileError(
                "compile: the network must be a U-Net of fastddpm's own, got "
                f"{type(self.model).__name__}; it is compiled when sampling with engine='compiled'"
            )
        labels = None if self.spec.num_classes is None else torch.zeros(batch_size, dtype=torch.int64)
        scale = 2.0 if guided else 1.0
        request = make_request(self.spec, self.device, batch_size, None, labels, scale, None, None, batch_size)
        with self.stepper.undisturbed():
            self.stepper.refresh()
            return self.stepper.compile(self._plan(solver="ddpm", steps=min(4, self.schedule.T)), request)

    @overload
    def sample(
        self, n: int, *, output: Literal["unit", "raw", "uint8"] = ..., **options: Unpack[SampleOptions]
    ) -> Tensor: ...

    @overload
    def sample(self, n: int, *, output: Literal["pil"], **options: Unpack[SampleOptions]) -> list[Image]: ...

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
        rounding). Sample ids 0 … 49 on one machine and 50 … 99 on another are the same hundred pictures. With
        `batch_size` given, a sample is the same bit for bit on one machine, whatever its place and company.

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
            batch_size: samples that run together. A batch that would be shorter is filled up, at the price of a full
                one, so that each sample's arithmetic is that of `batch_size` samples and its picture the same bit for
                bit. None chooses by device and n, fills nothing, and promises equality up to rounding. A
                torch.Generator's draws go to one batch after the other: there None is all n.
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
        with self.stepper.undisturbed():
            if output not in ("unit", "raw", "uint8", "pil"):
                raise ValueError(f"sample: output must be unit, raw, uint8 or pil, got {output!r}; pick one")
            request = make_request(
                self.spec, self.device, n, sample_ids, class_labels, guidance_scale, x_T, noise, batch_size
            )
            seed_bits(seed)
            table = self._plan(
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
            drawn = self._run(table, request, seed, noise, callback, progress)
            return to_output(drawn, output, self.spec.to_bytes, self.spec.to_unit)

    def _run(
        self,
        table: StepTable,
        request: Request,
        seed: int,
        noise: NoiseSource | None,
        callback: Callable[[Preview], None] | None,
        progress: bool | None,
    ) -> Tensor:
        """The final states of all samples."""
        self.stepper.refresh()
        batches = list(request.batches())
        finished = []
        with StepProgress(table.S * len(batches), len(request.ids), progress) as bar:
            for batch in batches:
                finished.append(self._run_batch(table, batch, seed, noise, callback, bar))
        return torch.cat(finished)

    def _plan(self, **options: Any) -> StepTable:  # noqa: ANN401 - `table` and `sample` name and type them
        """The coefficients of a run, on the CPU."""
        return plan(self.schedule, self.spec, **options)

    def _run_batch(
        self,
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
        source = self._noise(table, batch, noise)
        with self.stepper.begin(
            table,
            batch.filled(),
            seed,
            x_T=self._drawn(batch, noise),
            noise=source is not None,
            previews=callback is not None,
            to_come=max(bar.remaining, table.S),
            on_compile=bar.compiling,
        ) as runner:
            for i, t in _drive(runner, table, source, one_by_one=callback is not None):
                state = runner.state
                if callback is not None and state.history is not None:
                    x, x_start = state.x[:n].clone(), state.history[:n].clone()
                    callback(Preview(i, table.S, t, state.sample_id[:n], x, x_start))
                bar.advance_to(i)
            final = runner.state.x[:n].clone()
        bar.batch_done()
        if not bool(torch.isfinite(final).all()):
            if isinstance(noise, torch.Generator) and rewind is not None:
                noise.set_state(rewind)
            self._explain_nan(table, batch, seed, noise)
        return final

    def _drawn(self, batch: Request, noise: NoiseSource | None) -> Tensor | None:
        """x_T of a filled batch where a generator draws it; None where it is the batch's own or seeded noise."""
        if batch.x_T is not None or not isinstance(noise, torch.Generator):
            return None
        shape = (len(batch.ids), *self.spec.shape)
        return _filled(torch.randn(shape, generator=noise, device=noise.device), batch)

    def _noise(self, table: StepTable, batch: Request, noise: NoiseSource | None) -> Callable[[int], Tensor] | None:
        """What gives z of a loop step, float32 [1, B, C, H, W] of a filled batch; None where it is seeded or unused."""
        if noise is None or not table.uses_noise:
            return None
        if isinstance(noise, Tensor):
            rows = batch.filled().noise
            return lambda i: torch.as_tensor(rows)[i : i + 1]
        adds_noise = (table.rows[:, COLUMNS.index("sigma")] != 0).tolist()
        timesteps, shape = table.timesteps.tolist(), (len(batch.ids), *self.spec.shape)

        def draw(i: int) -> Tensor:
            # Peers draw nothing where nothing is used, and so their generators stay in step with ours.
            z = self._draw(noise, i, timesteps[i], batch, shape) if adds_noise[i] else torch.zeros(shape)
            return _filled(z.to(self.device, torch.float32), batch).contiguous()[None]

        return draw

    def _draw(
        self, noise: NoiseFunction | torch.Generator, i: int, t: int, batch: Request, shape: tuple[int, ...]
    ) -> Tensor:
        """The caller's noise for loop step i, [B, C, H, W]."""
        if isinstance(noise, torch.Generator):
            return torch.randn(shape, generator=noise, device=noise.device)
        z = noise(i, t, batch.ids)
        if not isinstance(z, Tensor) or tuple(z.shape) != shape:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"sample: noise must return a tensor {shape}, got {got}")
        return z

    def _explain_nan(self, table: StepTable, batch: Request, seed: int, noise: NoiseSource | None) -> None:
        """Run the batch again, which noise as a pure function allows, and name the step where the trouble began."""
        source = self._noise(table, batch, noise)
        x_T = self._drawn(batch, noise)
        with self.stepper.begin(table, batch.filled(), seed, x_T=x_T, noise=source is not None, eager=True) as runner:
            for i, t in _drive(runner, table, source, one_by_one=True):
                bad = ~torch.isfinite(runner.state.x[: len(batch.ids)]).flatten(1).all(1)
                if bool(bad.any()):
                    ids = batch.ids[bad.cpu()].tolist()
                    raise FloatingPointError(
                        f"sample: the state must stay finite, got NaN or infinity from step {i} of {table.S} (t = {t}) "
                        f"in {len(ids)} samples, first id {ids[0]}; the weights or the supplied noise are not usable"
                    )
        raise FloatingPointError(
            "sample: the final state must be finite, got NaN or infinity that a second run does not show"
        )


def _drive(
    runner: Runner, table: StepTable, source: Callable[[int], Tensor] | None, *, one_by_one: bool
) -> Iterator[tuple[int, int]]:
    """Advance all samples to the end; yields (i, t) where i steps are done and the last one left timestep t."""
    timesteps = table.timesteps.tolist()
    i = 0
    while i < table.S:
        noise = None if source is None else source(i)
        i += runner.run(1 if one_by_one else table.S - i, noise)
        yield i, timesteps[i - 1]


def _filled(values: Tensor, batch: Request) -> Tensor:
    """The batch's values with the last one repeated, as `Request.filled` repeats its sample."""
    missing = batch.batch_size - len(values) if batch.fills else 0
    return values if missing <= 0 else torch.cat((values, values[-1:].expand(missing, *values.shape[1:])))


def _made_again(kind: type[Sampler], made_of: tuple[Any, ...], checkpoint: Checkpoint | None) -> Sampler:
    """A sampler of the same parts, for copies and pickles."""
    model, schedule, spec, device, engine, precision, graph_steps = made_of
    sampler = kind(model, schedule, spec, device=device, engine=engine, precision=precision, graph_steps=graph_steps)
    sampler.checkpoint = checkpoint
    return sampler
