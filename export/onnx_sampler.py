"""OnnxSampler: an exported model with the Sampler's interface."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from fastddpm.common.progress import StepProgress
from fastddpm.export.session import OnnxSession, Provider
from fastddpm.export.step_loop import StepLoop
from fastddpm.images import Output, ToBytes, to_output
from fastddpm.process.noise import NoiseSource, initial_noise, normals, seed_bits
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.sampler import Preview, SampleOptions, Sampler
from fastddpm.step.request import Request, check_noise, make_request

if TYPE_CHECKING:
    from PIL.Image import Image

_FREE = frozenset(
    ("seed", "sample_ids", "class_labels", "guidance_scale", "batch_size", "x_T", "noise", "callback", "progress")
)
"""Options of `Sampler.sample` that a step and a chain leave open; the others were settled when the file was written."""


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

    def __init__(self, path: str | os.PathLike[str], provider: Provider = "auto", **options: Any) -> None:  # noqa: ANN401
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
        self.facts: Mapping[str, Any] = self.session.facts
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

    @torch.no_grad()
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
            FloatingPointError: the samples ran into NaN or infinity.
        """
        unknown = sorted(set(options) - set(SampleOptions.__annotations__))
        if unknown:
            raise TypeError(f"sample: options must be those of Sampler.sample, got {', '.join(unknown)}; mend the name")
        if output not in ("unit", "raw", "uint8", "pil"):
            raise ValueError(f"sample: output must be unit, raw, uint8 or pil, got {output!r}; pick one")
        if self.facts["what"] == "network":
            sampler = Sampler(self.network, self.schedule, self.spec, device="cpu")
            drawn: Tensor | list[Image] = sampler.sample(n, output=output, **options)
            return drawn
        return self._sample(n, output, options)

    def _sample(self, n: int, output: Output, options: Mapping[str, Any]) -> Tensor | list[Image]:
        settled = {name: value for name, value in options.items() if name not in _FREE}
        for name, value in settled.items():
            have = self.facts.get(name)
            if value is not None and value != have:
                raise ValueError(
                    f"sample: {name} must be left out for a {self.facts['what']}, got {value!r}: "
                    "it was settled when the file was written; export it anew"
                )
        noise, seed = options.get("noise"), options.get("seed", 0)
        request = make_request(
            self.spec,
            self.device,
            n,
            options.get("sample_ids"),
            options.get("class_labels"),
            options.get("guidance_scale", 1.0),
            options.get("x_T"),
            noise,
            options.get("batch_size") or self.session.batch,
        )
        seed_bits(seed)
        self._check(request, noise, options.get("callback"), output, n)
        batches = list(request.batches())
        steps = int(self.facts["steps"]) if self.facts["what"] == "step" else 1
        done = []
        with StepProgress(steps * len(batches), n, options.get("progress")) as bar:
            for batch in batches:
                if self.facts["what"] == "chain":
                    done.append(self._chain(batch, seed))
                    bar.step()
                    continue
                for x in self._steps(batch, seed, noise, options.get("callback")):
                    last = x
                    bar.step()
                done.append(last)
        drawn = torch.cat(done)
        if not bool(torch.isfinite(drawn).all()):
            raise FloatingPointError(
                "sample: the pictures must be finite, got NaN or infinity; the weights are at fault"
            )
        if self.facts["what"] == "chain" and self.facts["output"] == "unit":
            return _from_unit(drawn, output, self.spec.to_bytes)
        return to_output(drawn, output, self.spec.to_bytes, self.spec.to_unit)

    def _check(self, request: Request, noise: NoiseSource | None, callback: object, output: Output, n: int) -> None:
        """Refuse what the file cannot do.

        Raises:
            TypeError: the noise has the wrong type.
            ValueError: something was asked for that the file cannot do.
        """
        facts, fixed = self.facts, self.session.batch
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
        check_noise(noise, int(facts["steps"]), n, self.spec.shape)

    def _feeds(self, batch: Request, seed: int) -> dict[str, np.ndarray]:
        """What a batch is, as arrays, padded to the file's batch: names that the file does not take are left out."""
        n = len(batch.ids)
        feeds = {"sample_id": batch.ids.numpy(), "seed": np.full(n, seed_bits(seed), dtype=np.int64)}
        if batch.labels is not None:
            feeds["y"] = batch.labels.numpy()
        if self.facts["guidance"]:
            scales = np.ones(n, dtype=np.float32) if batch.guidance is None else batch.guidance.numpy()
            feeds["guidance"] = scales
        kept = {name: value for name, value in feeds.items() if name in self.session.inputs}
        return {name: _pad(value, self.session.batch) for name, value in kept.items()}

    def _chain(self, batch: Request, seed: int) -> Tensor:
        pictures = self.session.run(self._feeds(batch, seed))["pictures"]
        return torch.from_numpy(pictures[: len(batch.ids)])

    def _steps(self, batch: Request, seed: int, noise: NoiseSource | None, callback: Any) -> Iterator[Tensor]:  # noqa: ANN401
        """The state after each step of a batch."""
        n = len(batch.ids)
        feeds = self._feeds(batch, seed)
        seeds = torch.full_like(batch.ids, seed_bits(seed))
        x_T = batch.x_T
        if x_T is None:
            if isinstance(noise, torch.Generator):
                x_T = torch.randn((n, *self.spec.shape), generator=noise, device=noise.device)
            else:
                x_T = initial_noise(seeds, batch.ids, self.spec.shape)
        size = self.session.batch or n
        loop = self._loops.get(size) or StepLoop(self.session, size)
        self._loops = {size: loop}
        loop.begin(_pad(x_T.cpu().float().contiguous().numpy(), size), feeds)
        timesteps, noisy = self.facts["timesteps"], set(self.facts["noisy_rows"])
        for i, t in enumerate(timesteps):
            if "noise" in self.session.inputs and i in noisy:
                loop.write("noise", _pad(self._draw(noise, batch, seeds, i, t).numpy(), size))
            loop.step()
            last = i + 1 == len(timesteps)
            x = torch.from_numpy(loop.read("x")[:n].copy()) if last or callback else x_T
            if callback is not None:
                x_start = torch.from_numpy(loop.read("history")[:n].copy())
                callback(Preview(i + 1, len(timesteps), t, batch.ids, x, x_start))
            yield x

    def _draw(self, noise: NoiseSource | None, batch: Request, seeds: Tensor, i: int, t: int) -> Tensor:
        """The noise of loop step i, float32 [B, C, H, W] on the CPU."""
        shape = (len(batch.ids), *self.spec.shape)
        if noise is None:
            return normals(seeds, batch.ids, torch.full_like(batch.ids, t), self.spec.shape)
        if isinstance(noise, Tensor):
            z: Tensor = noise[i] if batch.noise is None else batch.noise[i]
        elif isinstance(noise, torch.Generator):
            z = torch.randn(shape, generator=noise, device=noise.device)
        else:
            z = noise(i, t, batch.ids)
        if not isinstance(z, Tensor) or tuple(z.shape) != shape:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"sample: noise must return a tensor {shape}, got {got}")
        return z.detach().to("cpu", torch.float32).contiguous()


def _pad(value: np.ndarray, size: int | None) -> np.ndarray:
    """An array with its last entry repeated up to `size`: a fixed batch is always full."""
    missing = 0 if size is None else size - len(value)
    return value if missing <= 0 else np.concatenate((value, np.repeat(value[-1:], missing, axis=0)))


def _in_batches(session: OnnxSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run, or, with a fixed batch, as many as it takes."""
    size = session.batch
    if size is None:
        return session.run(feeds)
    n = len(feeds["x"])
    parts = [
        session.run({name: _pad(value[i : i + size], size) for name, value in feeds.items()}) for i in range(0, n, size)
    ]
    return {name: np.concatenate([part[name] for part in parts])[:n] for name in session.outputs}


def _from_unit(pictures: Tensor, output: Output, to_bytes: ToBytes) -> Tensor | list[Image]:
    """Pictures in [0, 1] in the form that the caller asked for."""
    if output == "unit":
        return pictures
    return to_output(2 * pictures - 1, output, to_bytes)
