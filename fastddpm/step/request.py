"""What is asked of a run, sample by sample: checked once, then cut into batches."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastddpm.common.arguments import integers, numbers, whole
from fastddpm.process.noise import NoiseSource, id_bits, seed_bits
from fastddpm.process.spec import ModelSpec
from fastddpm.step.condition import Condition, condition_of
from fastddpm.step.guided import ConditionFunction


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


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What is asked of a run besides the method; `Sampler.sample` explains the attributes."""

    seed: int = 0
    sample_ids: Sequence[int] | Tensor | None = None
    class_labels: int | Sequence[int] | Tensor | None = None
    guidance_scale: float | Sequence[float] | Tensor = 1.0
    batch_size: int | None = None
    x_T: Tensor | None = None
    noise: NoiseSource | None = None
    callback: Callable[[Preview], None] | None = None
    progress: bool | None = None
    cond_fn: ConditionFunction | None = None
    condition: Condition | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """The validated arguments of a run that are per sample; `batches` cuts it up.

    Attributes:
        ids: int64 [n], 64-bit patterns.
        labels: int64 [n], classes, or None.
        guidance: float32 [n], scales, or None where all are 1.
        x_T: float [n, C, H, W] to start from, or None.
        noise: float32 [S, n, C, H, W], z of each step, or None.
        batch_size: samples that run together.
        fills: whether short batches are filled up, so that the arithmetic is always that of `batch_size` samples.
        seed: of the run, in [0, 2**64).
        known: float32 [n, C, H, W], pictures of which a part is known, or None.
        mask: float32 [n, C, H, W], with `known`: 1 where they are to be drawn.
        cond_fn: a classifier's gradient that guides the samples, or None.
        classifier_labels: int64 [n], what it is told as y, or None.
        condition: float32 [n, C', H, W], what the network sees behind x, or None.
        previews: whether somebody wants to see x̂_0 of each step.
    """

    ids: Tensor
    labels: Tensor | None
    guidance: Tensor | None
    x_T: Tensor | None
    noise: Tensor | None
    batch_size: int
    fills: bool = False
    seed: int = 0
    known: Tensor | None = None
    mask: Tensor | None = None
    cond_fn: ConditionFunction | None = None
    classifier_labels: Tensor | None = None
    condition: Tensor | None = None
    previews: bool = False

    def filled(self) -> Request:
        """A batch with its last sample repeated up to `batch_size`, if that was asked for; otherwise as it is."""
        if len(self.ids) >= self.batch_size or not self.fills:
            return self
        return self._each(self.fill)

    def fill(self, values: Tensor, axis: int = 0) -> Tensor:
        """A tensor of this batch as it is in the `filled` one: its last entry along an axis repeated."""
        n = len(self.ids)
        if n >= self.batch_size or not self.fills:
            return values
        index = torch.arange(self.batch_size, device=values.device).clamp(max=n - 1)
        return values.index_select(axis, index)

    @property
    def parts(self) -> int:
        """How many batches there are."""
        return -(-len(self.ids) // self.batch_size)

    def batches(self) -> Iterator[Request]:
        """The request in pieces of `batch_size` samples, in order."""
        for first in range(0, len(self.ids), self.batch_size):
            index = torch.arange(first, min(first + self.batch_size, len(self.ids)), device=self.ids.device)
            yield self._each(functools.partial(_taken, index))

    def _each(self, change: Callable[[Tensor, int], Tensor]) -> Request:
        """The request with each of its tensors changed; `change` is told the axis of the samples."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                object.__setattr__(new, name, change(value, int(name == "noise")))
        return new


def _taken(index: Tensor, values: Tensor, axis: int) -> Tensor:
    return values.index_select(axis, index.to(values.device))


def in_turn(classes: Sequence[int] | None, ids: Iterable[int]) -> list[int] | None:
    """The class of each id where ids go through classes in turn; None for none.

    It is a function of the id alone, so that it does not matter how a run is cut.
    """
    return None if classes is None else [classes[i % len(classes)] for i in ids]


def default_batch_size(device: torch.device) -> int:
    """How many samples run together unless the caller says otherwise."""
    return 64 if device.type == "cpu" else 256


def make_request(spec: ModelSpec, device: torch.device, n: int, run: RunOptions) -> Request:
    """Check what is asked of a run, sample by sample, and bring it into one form.

    Args:
        spec: the network's conventions.
        device: where supplied noise goes.
        n: samples.
        run: the rest, as in `Sampler.sample`. Of the noise only a tensor is kept, cut to batches with the rest. With a
            batch size short batches are filled up; without one, all n run together with a torch.Generator, and
            otherwise parts of like size, of at most 64 samples on the CPU and 256 on a GPU.

    Returns:
        The request.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range or does not fit the network.
    """
    n = whole("sample", "n", n)
    if not 1 <= n < 2**63:
        raise ValueError(f"sample: n must be at least 1 and below 2**63, got {n}; ask for at least one picture")
    ids = torch.arange(n) if run.sample_ids is None else id_bits(run.sample_ids)
    if len(ids) != n:
        raise ValueError(f"sample: sample_ids must have n = {n} entries, got {len(ids)}; make the two agree")
    batch_size = None if run.batch_size is None else whole("sample", "batch_size", run.batch_size)
    if batch_size is not None and batch_size < 1:
        raise ValueError(
            f"sample: batch_size must be a positive int, got {batch_size}; leave it out to choose by device"
        )
    for_classifier = _classifier_labels(n, run)
    labels = _labels(spec, n, None if for_classifier is not None and spec.num_classes is None else run.class_labels)
    guidance = _guidance(spec, n, run.guidance_scale, run.class_labels is not None)
    x_T, noise = run.x_T, run.noise
    if x_T is not None and (not isinstance(x_T, Tensor) or tuple(x_T.shape) != (n, *spec.shape)):
        got = tuple(x_T.shape) if isinstance(x_T, Tensor) else type(x_T).__name__
        raise ValueError(f"sample: x_T must be a tensor {(n, *spec.shape)}, got {got}; it is the state to start from")
    parts = 1 if isinstance(noise, torch.Generator) else -(-n // default_batch_size(device))
    size = batch_size or -(-n // parts)
    supplied = noise.to(device, torch.float32) if isinstance(noise, Tensor) else None
    if supplied is not None and (supplied.ndim != 5 or supplied.shape[1] != n):
        supplied = None  # `check_noise` says what is wrong with it
    seed_bits(run.seed)
    condition = condition_of(spec, n, run.condition)
    return Request(
        ids, labels, guidance, x_T, supplied, size, batch_size is not None, whole("sample", "seed", run.seed),
        cond_fn=run.cond_fn, classifier_labels=for_classifier, condition=condition,
        previews=run.callback is not None,
    )  # fmt: skip


def _classifier_labels(n: int, run: RunOptions) -> Tensor | None:
    """The labels that a classifier is told, of which the network need not know; None where there are none."""
    if run.cond_fn is None:
        return None
    if not callable(run.cond_fn):
        raise TypeError(
            f"sample: cond_fn must be a function (x, t, y) → gradient, got {type(run.cond_fn).__name__}; pass one"
        )
    return None if run.class_labels is None else _one_each(n, run.class_labels)


def _one_each(n: int, class_labels: int | Sequence[int] | Tensor) -> Tensor:
    """One label for each of n samples, int64 [n]."""
    labels = integers("sample", "class_labels", class_labels)
    if labels.ndim == 0:
        labels = labels.expand(n).clone()
    if labels.shape != (n,):
        raise ValueError(f"sample: class_labels must be one label or n = {n}, got shape {tuple(labels.shape)}")
    return labels


def _labels(spec: ModelSpec, n: int, class_labels: int | Sequence[int] | Tensor | None) -> Tensor | None:
    if spec.num_classes is None:
        if class_labels is not None:
            raise ValueError(
                "sample: class_labels must be None, got labels, but the network has no classes; leave them out"
            )
        return None
    if class_labels is None:
        if spec.null_class is None:
            raise ValueError(
                f"sample: class_labels must be given (0 … {spec.num_classes - 1}), got None, and no label "
                "is known to stand for no class; if one does, load the checkpoint with null_class=N"
            )
        return torch.full((n,), spec.null_class, dtype=torch.int64)
    labels = _one_each(n, class_labels)
    wrong = labels[
        (labels < 0)
        | ((labels >= spec.num_classes) & (labels != (spec.null_class if spec.null_class is not None else -1)))
    ]
    if len(wrong):
        raise ValueError(
            f"sample: class_labels must be in 0 … {spec.num_classes - 1}, got {int(wrong[0])}; pick a class it knows"
        )
    return labels


def _guidance(
    spec: ModelSpec, n: int, guidance_scale: float | Sequence[float] | Tensor, has_labels: bool
) -> Tensor | None:
    scale = numbers("sample", "guidance_scale", guidance_scale)
    if scale.ndim == 0:
        scale = scale.expand(n).clone()
    if scale.shape != (n,) or not bool(torch.isfinite(scale).all()):
        raise ValueError(f"sample: guidance_scale must be one finite number or n = {n}, got {guidance_scale!r}")
    if bool((scale == 1.0).all()):
        return None
    if spec.null_class is None or not has_labels:
        why = "no class_labels are given"
        if spec.num_classes is None:
            why = "the network has no classes"
        elif spec.null_class is None:
            why = "it was trained without dropping labels, as far as is known; if a label stands for no class, load it "
            why += "with null_class=N"
        got = float(scale[scale != 1.0][0])
        raise ValueError(f"sample: guidance_scale must be 1 for this request, got {got:g}: {why}")
    return scale


def check_noise(noise: NoiseSource | None, S: int, n: int, shape: tuple[int, int, int]) -> None:
    """Check that supplied noise fits a run of S steps and n samples.

    Raises:
        TypeError: it is not a tensor, a function or a generator.
        ValueError: a tensor has the wrong shape.
    """
    if noise is None or isinstance(noise, torch.Generator):
        return
    if isinstance(noise, Tensor):
        if tuple(noise.shape) != (S, n, *shape):
            raise ValueError(
                f"sample: noise must have shape {(S, n, *shape)} (steps, n, C, H, W), got {tuple(noise.shape)}"
            )
    elif not callable(noise):
        raise TypeError(f"sample: noise must be a tensor, a function or a torch.Generator, got {type(noise).__name__}")
