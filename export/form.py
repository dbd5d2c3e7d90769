"""The form of an exported model: what its file holds, how precisely, for which batch; wishes that are checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, TypedDict, get_args

from fastddpm.export.model_file import Facts
from fastddpm.export.modules import EXAMPLE_BATCH
from fastddpm.export.tracing import DEFAULT_OPSET, check_opset
from fastddpm.process.spec import ModelSpec

What = Literal["network", "step", "chain"]
Precision = Literal["fp32", "fp16", "int8"]
NoisePlace = Literal["philox", "input"]
Range = Literal["unit", "raw"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote.

    Attributes:
        files: the model, and its weights where those lie in a file of their own.
        facts: the model's metadata.
    """

    files: tuple[Path, ...]
    facts: Facts


class FormOptions(TypedDict, total=False):
    """The fields of `Form` as keyword arguments, for type checkers."""

    what: What
    precision: Precision
    opset: int
    batch: int | None
    noise: NoisePlace
    guidance: bool | None
    output: Range
    tensorrt: bool
    inpaint: bool
    jump_length: int | None
    resamplings: int


@dataclasses.dataclass(frozen=True)
class Form:
    """The wishes of one export; see `export_onnx`, and `checked`.

    Attributes:
        what: the level.
        precision: of the network's weights.
        opset: version of ONNX's operators.
        batch: a fixed batch, or None.
        noise: where the noise comes from.
        guidance: whether the scale of classifier-free guidance is an input; None: where the network can do it.
        output: what a chain gives.
        tensorrt: whether TensorRT's parser must take it.
        inpaint: whether pictures of which a part is known, and the mask of the rest, are inputs.
        jump_length: with `inpaint`: how far RePaint's jumps go back.
        resamplings: with `inpaint`: how often each row is made.
    """

    what: What = "chain"
    precision: Precision = "fp32"
    opset: int = DEFAULT_OPSET
    batch: int | None = None
    noise: NoisePlace = "philox"
    guidance: bool | None = None
    output: Range = "unit"
    tensorrt: bool = False
    inpaint: bool = False
    jump_length: int | None = None
    resamplings: int = 1

    @property
    def guided(self) -> bool:
        """Whether the scale of classifier-free guidance is an input."""
        return bool(self.guidance)

    @property
    def dynamic(self) -> bool:
        """Whether the batch is open."""
        return self.batch is None

    @property
    def axis(self) -> int | str:
        """The batch as a dimension: its size or its name."""
        return "batch" if self.batch is None else self.batch

    @property
    def examples(self) -> int:
        """The batch of a traced example."""
        return self.batch or EXAMPLE_BATCH

    def checked(self, spec: ModelSpec) -> Form:
        """The same with all that was left open settled, if it is something that an export may be asked for.

        Raises:
            ValueError: one is out of range or does not fit the network.
        """
        check_opset(self.opset)
        what, noise, batch = self.what, self.noise, self.batch
        for name, value, kind in (
            ("what", what, What),
            ("precision", self.precision, Precision),
            ("noise", noise, NoisePlace),
            ("output", self.output, Range),
        ):
            if value not in get_args(kind):
                raise ValueError(f"export: {name} must be one of {', '.join(get_args(kind))}, got {value!r}; pick one")
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
            raise ValueError(f"export: batch must be a positive int or None, got {batch!r}; None leaves it open")
        if self.precision == "int8" and spec.condition_channels:
            raise ValueError(
                "export: precision must be fp32 or fp16 for a network with a condition, got 'int8', which is "
                "calibrated on runs that have none; export fp16"
            )
        if self.tensorrt and what == "chain":
            raise ValueError(
                "export: what must be network or step for TensorRT, got chain; its loops go one step too far"
            )
        if self.inpaint and what == "network":
            raise ValueError(
                "export: what must be step or chain for inpainting, got network; it knows nothing of a mask"
            )
        if not self.inpaint and (self.resamplings != 1 or self.jump_length is not None):
            raise ValueError("export: resamplings and jump_length must be left out, got one; they are for inpaint=True")
        if self.tensorrt:
            noise, batch = "input" if what == "step" else "philox", batch or 1
        if noise == "input" and what != "step":
            raise ValueError(f"export: noise must be philox for {what}, got 'input'; only a step can take its noise")
        possible = spec.num_classes is not None and spec.null_class is not None and what != "network"
        if self.guidance and not possible:
            why = "a network alone is asked once" if what == "network" else "the network has no label for no class"
            raise ValueError(f"export: guidance must be False here, got True: {why}")
        guidance = possible if self.guidance is None else self.guidance
        return dataclasses.replace(self, noise=noise, batch=batch, guidance=guidance)
