"""Sampler: from a trained network to pictures."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

import torch
from torch import Tensor, nn

from fastddpm.checkpoints import Checkpoint, load_checkpoint
from fastddpm.common.progress import StepProgress
from fastddpm.editing.editor import Editor
from fastddpm.editing.plans import Plan
from fastddpm.engines.choose import Engine, EngineName, Settled
from fastddpm.engines.compare import CompileError
from fastddpm.engines.devices import pick_device
from fastddpm.engines.loop import Course, Loop
from fastddpm.engines.measurer import Measurer
from fastddpm.engines.options import SampleOptions, split_options
from fastddpm.engines.precision import Precision, check_precision
from fastddpm.engines.stepper import Stepper
from fastddpm.export.library import engine_of
from fastddpm.images import Output, check_output, to_output
from fastddpm.process.method import Method, MethodOptions
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import StepTable
from fastddpm.step.guided import GuidedStep, guides_of
from fastddpm.step.network import Network, as_network
from fastddpm.step.request import Preview, RunOptions, check_noise, make_request

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Batch", "Preview", "Run", "SampleOptions", "Sampler"]


@dataclasses.dataclass(frozen=True)
class Run:
    """How a batch was drawn.

    Attributes:
        engine: what made its steps.
        why: why that one.
        seconds: what they took, with compiling where that was done.
        steps: S.
    """

    engine: str
    why: str
    seconds: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures that are finished.

    Attributes:
        ids: int64 [B], the samples' ids, as 64-bit patterns.
        pictures: [B, C, H, W] in the form that was asked for, or a list of B PIL images.
        run: how they were drawn.
    """

    ids: Tensor
    pictures: Tensor | list[Image]
    run: Run


class Sampler(Editor, Measurer):
    """Samples from a trained network; see `from_pretrained` and `sample`.

    What it can do with pictures that are there stands in `Editor` and `Measurer`.
    """

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
            engine: how steps run: "auto", "eager", "compiled", "cuda_graph", "onnx" or "openvino" (see
                `fastddpm.engines.choose`). "auto" takes the quickest that is there, or that the run is long enough to
                earn the time for.
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
        # Convolutions run fastest on channels-last weights, on CPUs and GPUs alike.
        network = as_network(model).eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        make_engine = functools.partial(engine_of, engine, self.device, precision, graph_steps=graph_steps)
        self.stepper = Stepper(network, spec, schedule.T, self.device, precision, make_engine)

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
        given, network = self._made_of[0], self.stepper.network
        return given if network is self.stepper.source else network

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        engine: EngineName = "auto",
        precision: Precision = "fp32",
        graph_steps: int | None = None,
        flags: Mapping[str, object] | None = None,
        **more: object,
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
            more: flags as keyword arguments, instead.

        Returns:
            A sampler.

        Raises:
            CheckpointError: there is no such checkpoint, it cannot be read, or a flag is missing, unknown or wrong.
            TypeError: flags are given in both forms.
            ValueError: the device is not available.
        """
        target = pick_device(device)
        if flags and more:
            raise TypeError(f"from_pretrained: {', '.join(more)} must be among the flags, got both; put them there")
        checkpoint = load_checkpoint(name_or_path, **(flags or more))
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
            x: float [B, C, H, W], with the condition's channels behind its own where the network takes one.
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

    def table(self, method: Method | None = None, **options: Unpack[MethodOptions]) -> StepTable:
        """The coefficients of a run.

        Args:
            method: how to sample; or, instead of it,
            options: the attributes of one.

        Raises:
            TypeError: timesteps are not integers, or both are given.
            ValueError: an argument is out of range.
        """
        chosen, _ = split_options({"method": method, **options})
        return chosen.table(self.schedule, self.spec).to(self.device)

    def compile(self, batch_size: int, *, guided: bool = False, likelihood: bool = False) -> float | None:
        """Compile the step for batches of one size ahead of time; on a CPU it is kept on disk.

        Args:
            batch_size: samples that run together.
            guided: whether runs are guided.
            likelihood: the step of `likelihood` instead of that of `sample`.

        Returns:
            Seconds that it took, or None if it was there already.

        Raises:
            CompileError: the network does not compile, or its compiled form could not be told apart from others'.
            ValueError: there is no guidance for this network.
            OSError: the package cannot be written.
        """
        if cast(Network, self.stepper.network).identity() is None:
            raise CompileError(
                "compile: the network must be a U-Net of fastddpm's own, got "
                f"{type(self.model).__name__}; it is compiled when sampling with engine='compiled'"
            )
        labels = None if self.spec.num_classes is None else torch.zeros(batch_size, dtype=torch.int64)
        scale = 2.0 if guided else 1.0
        channels = self.spec.condition_channels
        condition = torch.zeros(channels, *self.spec.shape[1:]) if channels else None
        run = RunOptions(class_labels=labels, guidance_scale=scale, batch_size=batch_size, condition=condition)
        request = make_request(self.spec, self.device, batch_size, run)
        with self.stepper.undisturbed():
            self.stepper.refresh()
            method = Method("ddpm", min(4, self.schedule.T))
            make = method.likelihood_table if likelihood else method.table
            return self.stepper.compile(make(self.schedule, self.spec), request)

    @overload
    def sample(
        self, n: int, *, output: Literal["unit", "raw", "uint8"] = ..., **options: Unpack[SampleOptions]
    ) -> Tensor: ...

    @overload
    def sample(self, n: int, *, output: Literal["pil"], **options: Unpack[SampleOptions]) -> list[Image]: ...

    def sample(self, n: int, *, output: Output = "unit", **options: Unpack[SampleOptions]) -> Tensor | list[Image]:
        """Draw n samples.

        A sample depends on its seed and id alone: not on n, the batch size, the other samples or the device (beyond
        rounding). Sample ids 0 … 49 on one machine and 50 … 99 on another are the same hundred pictures. With
        `batch_size` given, a sample is the same bit for bit on one machine and engine, whatever its place and company.

        Options, besides those of `Method` (solver, steps, timesteps, prev_timesteps, eta, clip, clipped_eps, variance),
        which may also be given as one, `method=`:

        - seed: in [0, 2**64); 0 unless given.
        - sample_ids: n ids in [0, 2**64); None is 0 … n−1.
        - class_labels: one class or n of them; None asks for no class, which needs a network trained for that.
        - guidance_scale: w in ε_∅ + w (ε_y − ε_∅) (Ho & Salimans 2022), one or n of them; 1 is no guidance. A learned
          variance is the one with the label, as in GLIDE and DiT.
        - batch_size: samples that run together. A batch that would be shorter is filled up, at the price of a full one,
          so that each sample's arithmetic is that of `batch_size` samples and its picture the same bit for bit. "auto"
          then chooses the engine before the first step and keeps it to the last; another run may choose another one,
          whose pictures differ by rounding: `engine.used` says which it was. None chooses by device and n, fills
          nothing, and promises equality up to rounding. A torch.Generator's draws go to
          one batch after the other: there None is all n.
        - x_T: float [n, C, H, W] to start from instead of seeded noise.
        - noise: z for each step instead of seeded noise: a tensor [S, n, C, H, W] in loop order, a function
          (i, t, sample_ids) → [B, C, H, W] that answers alike when asked again, or a torch.Generator (which then draws
          x_T too, if none is given).
        - callback: called with a `Preview` after each step of each batch.
        - progress: whether to show a progress bar; None shows it on terminals.
        - cond_fn: (x, t, y) → ∇ log p(y|x), a classifier's gradient (Dhariwal & Nichol 2021): x float32 [B, C, H, W]
          and the result alike, t [B] as the network is fed it, y int64 [B], the class_labels, or None where none are
          given. Here they may be given for networks without classes too. ddpm moves the mean by Σ g (Algorithm 1), ddim
          takes ε − √(1−ᾱ) g (Algorithm 2), DPM-Solver++ x̂_0 + (1−ᾱ)/√ᾱ g; x̂_0 is not clipped again. Such steps run
          eagerly. `fastddpm.load_classifier(path).cond_fn(scale)` is one.
        - condition: what networks with more input than output channels see behind x, one or n of them: a float tensor
          [n, C', H, W] as the network takes it, or pictures (paths, PIL images, arrays, uint8 tensors), which are
          brought into its range; for networks that enlarge, of the small size too.

        Args:
            n: how many, at least 1.
            output: "unit": float32 in [0, 1] (an unclipped run may leave it where the checkpoint's own project does not
                clamp); "raw": the final state, as the network has it; "uint8": bytes; all three [n, C, H, W].
                "pil": a list of n PIL images.
            options: as above.

        Returns:
            The pictures, on the sampler's device.

        Raises:
            TypeError: an argument has the wrong type, or an option is unknown.
            ValueError: an argument is out of range or does not fit the network.
            FloatingPointError: the samples ran into NaN or infinity; says at which step.
        """
        check_output(output)
        return self.drawn(self._plan(n, options), output)

    def stream(self, n: int, *, output: Output = "unit", **options: Unpack[SampleOptions]) -> Iterator[Batch]:
        """Draw n samples and hand them over batch by batch, as they are finished; arguments as in `sample`.

        All is checked before the first batch. One table, one compiled step and, on GPUs, one captured graph serve all
        batches; memory is that of one.

        Returns:
            An iterator over the batches, in the order of the ids; what is not asked for is not drawn.

        Raises:
            TypeError: as in `sample`, and so are the others.
            ValueError: see there.
            FloatingPointError: see there; raised by the iterator.
        """
        check_output(output)
        return self._streamed(self._plan(n, options), output)

    def _plan(self, n: int, options: Mapping[str, Any]) -> Plan:
        """What `sample` runs, checked."""
        method, run = split_options(options)
        with self.stepper.settings_aside():
            request = make_request(self.spec, self.device, n, run)
            table = method.table(self.schedule, self.spec)
            check_noise(run.noise, table.S, n, self.spec.shape)
        if run.cond_fn is not None:
            self.engine.check_eager("cond_fn", GuidedStep.eager_because)
            guides_of(table)
        return Plan(table, request, run)

    def drawn(self, plan: Plan, output: Output) -> Tensor | list[Image]:
        """The pictures of a plan, as `sample` has them."""
        check_noise(plan.run.noise, plan.table.S, len(plan.request.ids), self.spec.shape)
        drawn = [batch.pictures for batch in self._streamed(plan, "raw")]
        with self.stepper.settings_aside():
            return to_output(torch.cat(cast(list[Tensor], drawn)), output, self.spec.to_bytes, self.spec.to_unit)

    def _streamed(self, plan: Plan, output: Output) -> Iterator[Batch]:
        table, request, run = plan.table, plan.request, plan.run
        # Where short batches are filled up, a picture must not depend on when a quicker engine gets ready.
        settled = Settled() if request.fills else None
        begin = functools.partial(self.stepper.begin, table, settled=settled)
        course, around = Course.of(table, masked=request.mask is not None), self.stepper.undisturbed
        loop = Loop(begin, course, self.spec.shape, self.device, run.noise, run.callback, around)
        self.stepper.refresh()
        with StepProgress(course.S * request.parts, len(request.ids), run.progress) as bar:
            for batch, final, seconds in loop.batches(request, bar):
                with self.stepper.settings_aside():
                    pictures = to_output(final, output, self.spec.to_bytes, self.spec.to_unit)
                how = Run(self.engine.used, self.engine.why, seconds, course.S)
                yield Batch(batch.ids, pictures, how)


def _made_again(kind: type[Sampler], made_of: tuple[Any, ...], checkpoint: Checkpoint | None) -> Sampler:
    """A sampler of the same parts, for copies and pickles."""
    model, schedule, spec, device, engine, precision, graph_steps = made_of
    sampler = kind(model, schedule, spec, device=device, engine=engine, precision=precision, graph_steps=graph_steps)
    sampler.checkpoint = checkpoint
    return sampler
