"""OnnxSampler: an exported model with the Sampler's interface."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from fastddpm.common.progress import StepProgress
from fastddpm.editing.masks import Part, from_mask
from fastddpm.engines.loop import Begin, Course, Loop
from fastddpm.engines.options import SampleOptions, split_options
from fastddpm.engines.runner import Runner
from fastddpm.engines.stepper import Stepper
from fastddpm.export.session import OnnxSession, Provider, SessionOptions
from fastddpm.export.step_loop import ChainRunner, OnnxRunner, StepLoop
from fastddpm.images import Output, ToBytes, check_output, to_output
from fastddpm.pictures.inputs import Picture, Pictures, from_pictures
from fastddpm.process.method import Method
from fastddpm.process.noise import NoiseSource, seed_bits
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.step.request import Request, check_noise, make_request
from fastddpm.step.state import Places, State

if TYPE_CHECKING:
    from PIL.Image import Image


class OnnxSampler:
    """Samples from a model that `export_onnx` wrote; needs no network in PyTorch.

    A network takes every option of `Sampler.sample`. In a step and a chain the solver and its steps are part of the
    file, and a chain, which runs as one call, takes neither x_T nor noise nor a callback.

    Attributes:
        session: the open model.
        spec: the conventions of the network.
        schedule: the noise schedule it was trained with.
        facts: the file's metadata.
    """

    def __init__(
        self, path: str | os.PathLike[str], provider: Provider = "auto", **options: Unpack[SessionOptions]
    ) -> None:
        """Open a model; `options` are those of `OnnxSession`.

        Args:
            path: the .onnx file.
            provider: "auto", "cpu", "cuda" or "tensorrt"; see `OnnxSession`.
            options: device_id, threads, cuda_graph, fp16, cache.

        Raises:
            CheckpointError: there is no such file, it is damaged, or it is another program's.
            TypeError: an option is unknown.
            ValueError: the provider is missing, or an option does not fit.
        """
        self.session = OnnxSession(path, provider, **options)
        self.facts = self.session.facts
        self.device = torch.device("cpu")
        self.spec = ModelSpec.from_dict(self.facts["spec"])
        self.schedule = NoiseSchedule.from_config(self.facts["schedule"])
        self._loops: dict[int, StepLoop] = {}

    @torch.no_grad()
    def network(self, x: Tensor, t: Tensor, y: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        """The network's raw output; arguments as in `Sampler.network`.

        Raises:
            TypeError: an argument has another dtype.
            ValueError: the file is a step or a chain, or an argument is missing or of another shape.
        """
        if self.facts["what"] != "network":
            raise ValueError(f"network: the file must be a network, got a {self.facts['what']}; export that level")
        feeds: dict[str, Tensor] = {"x": x.float(), "t": t}
        dtype = self.session.inputs["t"][0]
        feeds["t"] = t.to(torch.int64 if dtype is np.int64 else torch.float32)
        if feeds["t"].dtype == torch.int64 and t.is_floating_point() and bool((t != t.round()).any()):
            raise ValueError(
                "network: t must be whole numbers for this file, got fractions; it was traced with integers"
            )
        if y is not None:
            feeds["y"] = y
        if "x_self_cond" in self.session.inputs:
            feeds["x_self_cond"] = torch.zeros_like(x) if x_self_cond is None else x_self_cond
        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in feeds.items()}
        return torch.from_numpy(_in_batches(self.session, arrays)["out"])

    @overload
    def sample(
        self, n: int, *, output: Literal["unit", "raw", "uint8"] = ..., **options: Unpack[SampleOptions]
    ) -> Tensor: ...

    @overload
    def sample(self, n: int, *, output: Literal["pil"], **options: Unpack[SampleOptions]) -> list[Image]: ...

    def sample(self, n: int, *, output: Output = "unit", **options: Unpack[SampleOptions]) -> Tensor | list[Image]:
        """Draw n samples; the same pictures as `Sampler.sample` draws for the same seed and ids, up to rounding.

        Args:
            n: how many, at least 1.
            output: as in `Sampler.sample`, and so are the options.
            options: a step and a chain leave out what their file settles: solver, steps, timesteps and so on.

        Returns:
            The pictures, on the CPU.

        Raises:
            TypeError: an argument has the wrong type, or an option is unknown.
            ValueError: an argument is out of range, or does not fit the network or the file.
            FloatingPointError: the samples ran into NaN or infinity; says at which step.
        """
        return self._sampled(n, output, options)

    def inpaint(
        self, images: Pictures, mask: Picture | Part, *, output: Output = "unit", **options: Unpack[SampleOptions]
    ) -> Tensor | list[Image]:
        """Draw a part of pictures anew by a step or a chain that was exported for that; as `Sampler.inpaint`.

        Args:
            images: n pictures.
            mask: white (1, True) where they are to be drawn anew; or "middle", "left", "right", "top" or "bottom".
            output: as in `sample`.
            options: likewise; jumps and resamplings are settled by the file.

        Returns:
            The pictures, on the CPU.

        Raises:
            TypeError: an argument has the wrong type, or an option is unknown.
            ValueError: an argument does not fit, or the file was not exported with `inpaint=True`.
            FloatingPointError: the samples ran into NaN or infinity.
        """
        if not self.facts.get("inpaint"):
            raise ValueError("inpaint: the file must take a mask, got one that does not; export it with inpaint=True")
        unit_range = self.spec.to_unit == "identity"
        known = from_pictures(images, self.spec.shape, unit_range=unit_range, function="inpaint").cpu()
        masks = from_mask(mask, len(known), self.spec.shape)
        return self._sampled(len(known), output, options, known, masks)

    def _sampled(
        self,
        n: int,
        output: Output,
        options: Mapping[str, object],
        known: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | list[Image]:
        """What `sample` and `inpaint` give."""
        method, run = split_options(options)
        check_output(output)
        what = self.facts["what"]
        if what != "network":
            self._check_settled(options)
        if what != "network" and run.batch_size is None:
            run = dataclasses.replace(run, batch_size=self.session.batch)
        request = dataclasses.replace(make_request(self.spec, self.device, n, run), known=known, mask=mask)
        if what != "network":
            self._check(request, run.noise, run.callback, output, n)
        course, begin = self._course(method)
        check_noise(run.noise, course.S, n, self.spec.shape)
        around = self._stepper.undisturbed if what == "network" else torch.no_grad
        loop = Loop(begin, course, self.spec.shape, self.device, run.noise, run.callback, around)
        with StepProgress(course.S * request.parts, n, run.progress) as bar:
            drawn = torch.cat([final for _, final, _ in loop.batches(request, bar)])
        if what == "chain" and self.facts["output"] == "unit":
            return _from_unit(drawn, output, self.spec.to_bytes)
        return to_output(drawn, output, self.spec.to_bytes, self.spec.to_unit)

    @functools.cached_property
    def _stepper(self) -> Stepper:
        """What makes the steps around a file that is a network."""
        return Stepper.eager(self.network, self.spec, self.schedule.T)

    def _course(self, method: Method) -> tuple[Course, Begin]:
        """The steps of a run, and what starts a batch of it."""
        if self.facts["what"] == "network":
            table = method.table(self.schedule, self.spec)
            return Course.of(table), functools.partial(self._stepper.begin, table)
        timesteps, noisy = self.facts["timesteps"], set(self.facts["noisy_rows"])
        takes = "noise" in self.session.inputs
        draws = [takes and i in noisy for i in range(len(timesteps))]
        course = Course(timesteps, draws, takes, self.facts.get("counters", timesteps))
        return course, functools.partial(self._begin, course)

    @contextlib.contextmanager
    def _begin(self, course: Course, batch: Request, **_: object) -> Iterator[Runner]:
        """A batch of a step's or a chain's file at its start; see `Stepper.begin`."""
        state, feeds = self._start(batch), self._feeds(batch)
        if self.facts["what"] == "chain":
            yield ChainRunner(self.session, state, feeds)
            return
        size = len(batch.ids)
        loop = self._loops.get(size) or StepLoop(self.session, size)
        self._loops = {size: loop}
        yield OnnxRunner(loop, state, feeds, course)

    def _start(self, batch: Request) -> State:
        """The samples of a batch before their first step."""
        clock = torch.zeros_like(batch.ids)
        places = Places(clock, clock + len(self.facts["timesteps"]))
        return State.create(self.spec.shape, batch.ids, batch.seed, places, x_T=batch.x_T)

    def _check_settled(self, options: Mapping[str, object]) -> None:
        """Refuse what was settled when the file was written."""
        settled, facts = {field.name for field in dataclasses.fields(Method)} | {"method"}, dict(self.facts)
        for name, value in options.items():
            if name in settled and value is not None and value != facts.get(name):
                raise ValueError(
                    f"sample: {name} must be left out for a {self.facts['what']}, got {value!r}: "
                    "it was settled when the file was written; export it anew"
                )

    def _check(self, request: Request, noise: NoiseSource | None, callback: object, output: Output, n: int) -> None:
        """Refuse what the file cannot do.

        Raises:
            TypeError: the noise has the wrong type.
            ValueError: something was asked for that the file cannot do.
        """
        facts, fixed = self.facts, self.session.batch
        if request.cond_fn is not None:
            raise ValueError(
                f"sample: cond_fn must be left out for a {facts['what']}, got one, which no file holds; export a "
                "network, whose steps a classifier can guide"
            )
        if fixed is not None and request.batch_size != fixed:
            raise ValueError(f"sample: batch_size must be the file's, {fixed}, got {request.batch_size}; leave it out")
        if request.guidance is not None and not facts["guidance"]:
            raise ValueError("sample: guidance_scale must be 1 for this file, got another; export it with guidance")
        if facts["what"] == "chain":
            for name, value in (("x_T", request.x_T), ("noise", noise), ("callback", callback)):
                if value is not None:
                    raise ValueError(f"sample: {name} must be left out for a chain, got one; export a step for that")
            if output == "raw" and facts["output"] == "unit":
                raise ValueError("sample: output must not be raw for this file, got raw; export it with output='raw'")
            return
        if noise is not None and facts["noise"] != "input":
            raise ValueError("sample: noise must be left out for this file, got one; export it with noise='input'")
        if callback is not None and not facts["keeps_history"]:
            raise ValueError(
                "sample: callback must be left out, got one: this step does not give x̂_0; export a network"
            )

    def _feeds(self, batch: Request) -> dict[str, np.ndarray]:
        """What a batch is, as arrays; names that the file does not take are left out."""
        n = len(batch.ids)
        feeds = {"sample_id": batch.ids.numpy(), "seed": np.full(n, seed_bits(batch.seed), dtype=np.int64)}
        if batch.labels is not None:
            feeds["y"] = batch.labels.numpy()
        if self.facts["guidance"]:
            scales = np.ones(n, dtype=np.float32) if batch.guidance is None else batch.guidance.numpy()
            feeds["guidance"] = scales
        if self.facts.get("inpaint"):  # without a mask all is drawn
            shape = (n, *self.spec.shape)
            feeds["known"] = np.zeros(shape, np.float32) if batch.known is None else batch.known.numpy()
            feeds["mask"] = np.ones(shape, np.float32) if batch.mask is None else batch.mask.numpy()
        if batch.condition is not None:
            feeds["condition"] = batch.condition.cpu().contiguous().numpy()
        return {name: value for name, value in feeds.items() if name in self.session.inputs}


def _in_batches(session: OnnxSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run, or, with a fixed batch, as many as it takes."""
    size = session.batch
    if size is None:
        return session.run(feeds)
    n = len(feeds["x"])
    parts = [
        session.run({name: _full(value[i : i + size], size) for name, value in feeds.items()})
        for i in range(0, n, size)
    ]
    return {name: np.concatenate([part[name] for part in parts])[:n] for name in session.outputs}


def _full(value: np.ndarray, size: int) -> np.ndarray:
    """An array with its last entry repeated up to `size`: a fixed batch is always full."""
    missing = size - len(value)
    return value if missing <= 0 else np.concatenate((value, np.repeat(value[-1:], missing, axis=0)))


def _from_unit(pictures: Tensor, output: Output, to_bytes: ToBytes) -> Tensor | list[Image]:
    """Pictures in [0, 1] in the form that the caller asked for."""
    if output == "unit":
        return pictures
    return to_output(2 * pictures - 1, output, to_bytes)
