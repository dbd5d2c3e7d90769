"""Editor: what a sampler can do with pictures that are there."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Literal, Unpack, cast

import torch
from torch import Tensor

from fastddpm.editing.masks import Part
from fastddpm.editing.plans import Fill, Plan, Planner
from fastddpm.engines.options import SampleOptions, split_options
from fastddpm.images import Output, check_output
from fastddpm.pictures.inputs import Picture, Pictures, from_pictures
from fastddpm.process.method import Method
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import check_choice
from fastddpm.step.request import RunOptions

if TYPE_CHECKING:
    from PIL.Image import Image

Path = Literal["noise", "slerp"]


class Editor(abc.ABC):
    """Edits of pictures by a trained network. `Sampler` is one.

    Pictures are image files, PIL images, arrays (uint8 or float in [0, 1], [H, W], [H, W, C] or [N, H, W, C]) or
    tensors ([C, H, W] or [N, C, H, W]), one or a list of them, of the network's size; gray becomes colour and colour
    gray where it wants that. All methods take the options of `Sampler.sample`; there is a sample for each picture.

    Attributes:
        spec: the network's conventions.
        schedule: the noise schedule that it was trained with.
        device: where it runs.
    """

    spec: ModelSpec
    schedule: NoiseSchedule
    device: torch.device

    @abc.abstractmethod
    def drawn(self, plan: Plan, output: Output) -> Tensor | list[Image]:
        """What comes of a plan."""

    def pictures(self, images: Pictures) -> Tensor:
        """Pictures as the edits take them, in [0, 1].

        Args:
            images: n pictures.

        Returns:
            float32 [n, C, H, W] on the CPU.

        Raises:
            TypeError: something is no picture, or of another dtype.
            ValueError: size, channels or values do not fit, or there is none.
            OSError: a file cannot be opened.
        """
        return from_pictures(images, self.spec.shape, unit_range=True, function="pictures").cpu()

    def img2img(
        self, images: Pictures, strength: float = 0.5, *, output: Output = "unit", **options: Unpack[SampleOptions]
    ) -> Tensor | list[Image]:
        """Draw pictures anew from a noised form of theirs (SDEdit, Meng et al. 2022, Algorithm 1).

        x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, t the first timestep of the method that is at most strength · T, and the run goes
        on from there. ε is seeded noise of a domain of its own, the option x_T, or the first draw of a torch.Generator.

        Args:
            images: n pictures.
            strength: in (0, 1]: how much is drawn anew; at 1 hardly anything of a picture is left.
            output: as in `Sampler.sample`, and so are the options; `noise` has a row for each step that is made.
            options: as there.

        Returns:
            The pictures, n of them.

        Raises:
            TypeError: an argument has the wrong type, or an option is unknown.
            ValueError: an argument is out of range or does not fit the network, or no timestep visited is so low.
            OSError: a file cannot be opened.
            FloatingPointError: the samples ran into NaN or infinity.
        """
        check_output(output)
        return self.drawn(self.planner(*split_options(options)).img2img(images, strength), output)

    def inpaint(
        self,
        images: Pictures,
        mask: Picture | Part,
        *,
        fill: Fill = "repaint",
        jump_length: int | None = None,
        resamplings: int = 10,
        output: Output = "unit",
        **options: Unpack[SampleOptions],
    ) -> Tensor | list[Image]:
        """Draw a part of pictures anew, to fit the rest (RePaint, Lugmayr et al. 2022, Algorithm 1).

        In each step what is known is √ᾱ x_0 + √(1−ᾱ) z of the level where the step lands, and the rest is drawn. For
        the two to come to agree, "repaint" goes back up in noise every `jump_length` steps and makes them again, in all
        `resamplings` times, which takes about so many times as long. "replace" does not (Song et al. 2021, "Score-based
        generative modeling", appendix I.2). What is known comes out as it went in.

        Args:
            images: n pictures.
            mask: what is to be drawn anew, white (1, True) where it is, black (0) where the picture stays: one mask or
                n, in any form that pictures have, bool too; or "middle", "left", "right", "top" or "bottom". Gray
                mixes.
            fill: "repaint" or "replace".
            jump_length: steps that a jump goes back, 1 … S−1; None is a fifth of the steps, and 10 at the most.
            resamplings: how often each step is made, 1 … 128; with 1 "repaint" is "replace". Solvers that look back at
                the steps before (DPM-Solver++) take no more.
            output: as in `Sampler.sample`, and so are the options; `noise` has a row for each step that is made.
            options: as there.

        Returns:
            The pictures, n of them.

        Raises:
            TypeError: an argument has the wrong type, or an option is unknown.
            ValueError: an argument is out of range or does not fit the network, the pictures or the solver.
            OSError: a file cannot be opened.
            FloatingPointError: the samples ran into NaN or infinity.
        """
        check_output(output)
        planner = self.planner(*split_options(options))
        return self.drawn(planner.inpaint(images, mask, fill, jump_length, resamplings), output)

    def invert(self, images: Pictures, **options: Unpack[SampleOptions]) -> Tensor:
        """The noise x_T from which DDIM draws given pictures (Song et al. 2021, sec. 4.3): its steps, walked upwards.

        `Sampler.sample(n, x_T=…, clip=None)` with the same steps, timesteps and labels gives the pictures back, the
        closer the more steps there are: the error falls as 1/S. Clipping helps with few steps and hurts with many;
        guidance makes the error larger.

        Args:
            images: n pictures.
            options: as in `Sampler.sample`; the solver is ddim with η = 0, and nothing is clipped.

        Returns:
            float32 [n, C, H, W], the states at the first timestep of the method, on the sampler's device.

        Raises:
            TypeError: an argument has the wrong type, or an option is unknown.
            ValueError: an argument is out of range or does not fit the network, or the method is no plain DDIM.
            OSError: a file cannot be opened.
            FloatingPointError: the samples ran into NaN or infinity.
        """
        return cast(Tensor, self.drawn(self.planner(*split_options(options)).invert(images), "raw"))

    def interpolate(
        self,
        a: Pictures,
        b: Pictures,
        n: int = 10,
        *,
        path: Path = "noise",
        level: float | None = None,
        output: Output = "unit",
        **options: Unpack[SampleOptions],
    ) -> Tensor | list[Image]:
        """Draw pictures between two, the first and the last of them what the two themselves become.

        - path "noise": (1−λ) x_t(a) + λ x_t(b) with the same noise in all (Ho et al. 2020, sec. 4.4 and fig. 8), and
          the run from there. The lower the level, the more it is a blend of the two; the higher, the freer.
        - path "slerp": both are inverted, and the run begins on the great circle between the two states (Song et al.
          2021, sec. 5.3). That takes plain DDIM.

        Args:
            a: a picture.
            b: another.
            n: how many pictures, at least 2; λ goes from 0 to 1.
            path: "noise" or "slerp".
            level: in (0, 1]: the run starts from the first timestep that is at most level · T. None is 0.5 for "noise"
                and 1 for "slerp".
            output: as in `Sampler.sample`, and so are the options.
            options: as there, but that x_T must be left out, and `sample_ids` is one id, whose noise all pictures
                share.

        Returns:
            The pictures, n of them.

        Raises:
            TypeError: an argument has the wrong type, or an option is unknown.
            ValueError: an argument is out of range or does not fit the network or the method.
            OSError: a file cannot be opened.
            FloatingPointError: the samples ran into NaN or infinity.
        """
        check_output(output)
        check_choice("interpolate", "path", path, ("noise", "slerp"))
        planner = self.planner(*split_options(options))
        if path == "noise":
            return self.drawn(planner.between(a, b, n, 0.5 if level is None else level), output)
        level = 1.0 if level is None else level
        inverted = self.drawn(planner.inverted_ends(a, b, level), "raw")
        return self.drawn(planner.along(cast(Tensor, inverted), n, level), output)

    def planner(self, method: Method, run: RunOptions) -> Planner:
        """Makes the plans of one edit."""
        return Planner(self.spec, self.schedule, self.device, method, run)
