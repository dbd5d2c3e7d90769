"""Plans: what an edit runs, the table of its steps and the samples at their start."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fastddpm.common.arguments import whole
from fastddpm.editing.masks import Part, from_mask
from fastddpm.kernels.philox import START
from fastddpm.kernels.q_sample import Draw, q_sample
from fastddpm.pictures.inputs import Picture, Pictures, from_pictures
from fastddpm.process.inversion import inversion_table
from fastddpm.process.method import Method
from fastddpm.process.noise import seed_bits
from fastddpm.process.repaint import resampled
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import StepTable, check_choice
from fastddpm.process.tail import tail_table
from fastddpm.step.request import Request, RunOptions, make_request

Values = TypeVar("Values")
Fill = Literal["repaint", "replace"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        table: the steps.
        request: the samples at their start.
        run: the rest of what was asked for: noise of the caller's, callback, progress.
    """

    table: StepTable
    request: Request
    run: RunOptions


@dataclasses.dataclass(frozen=True)
class Planner:
    """Makes the plans of one edit with one network; `fastddpm.editing.editor.Editor` explains the arguments.

    Attributes:
        spec: the network's conventions.
        schedule: the noise schedule that it was trained with.
        device: where it runs.
        method: how to sample.
        run: the rest of what is asked for.
    """

    spec: ModelSpec
    schedule: NoiseSchedule
    device: torch.device
    method: Method
    run: RunOptions

    def img2img(self, images: Pictures, strength: float) -> Plan:
        """Pictures noised to x_t, t the first timestep visited that is at most strength · T, and the run from there.

        Raises:
            TypeError, ValueError, OSError: see `Editor.img2img`.
        """
        pictures = self._pictures("img2img", images)
        table = tail_table(self.method, self.schedule, self.spec, strength, function="img2img")
        return self._from_pictures(table, pictures)

    def inpaint(
        self, images: Pictures, mask: Picture | Part, fill: Fill, jump_length: int | None, resamplings: int
    ) -> Plan:
        """A run in which what is known is held at each row's level, with the jumps back up of RePaint.

        Raises:
            TypeError, ValueError, OSError: see `Editor.inpaint`.
        """
        check_choice("inpaint", "fill", fill, ("repaint", "replace"))
        pictures = self._pictures("inpaint", images)
        table = self.method.table(self.schedule, self.spec)
        if fill == "repaint":
            table = resampled(
                table, self.schedule, jump_length=jump_length, resamplings=resamplings, function="inpaint"
            )
        mask = from_mask(mask, len(pictures), self.spec.shape)
        request = dataclasses.replace(self._request(len(pictures)), known=pictures, mask=mask)
        return Plan(table, request, self.run)

    def invert(self, images: Pictures) -> Plan:
        """DDIM upwards to the method's first timestep.

        Raises:
            TypeError, ValueError, OSError: see `Editor.invert`.
        """
        return self._upwards("invert", self._pictures("invert", images), 1.0)

    def _upwards(self, function: str, pictures: Tensor, level: float) -> Plan:
        """DDIM upwards to the method's first timestep t ≤ level · T."""
        solver = self.method.solver
        if solver != "ddim":
            raise ValueError(f"{function}: solver must be ddim, got {solver}; only its way can be walked upwards")
        if self.run.x_T is not None:
            raise ValueError(f"{function}: x_T must be left out, got one; it follows from the pictures")
        table = self._tail(level, function)
        if table.uses_noise:
            raise ValueError(f"{function}: eta must be 0, got more; a way with noise cannot be walked upwards")
        upwards = inversion_table(
            self.schedule,
            table.timesteps[:-1],
            prediction=self.spec.prediction,
            final_alpha_to_one=self.spec.final_alpha_to_one,
        )
        return Plan(upwards, dataclasses.replace(self._request(len(pictures)), x_T=pictures), self.run)

    def between(self, a: Pictures, b: Pictures, n: int, level: float) -> Plan:
        """Pictures between two, all with the same noise at the first timestep t ≤ level · T, and the run from there.

        With one ε, (1−λ) x_t(a) + λ x_t(b) is x_t of (1−λ) a + λ b.

        Raises:
            TypeError, ValueError, OSError: see `Editor.interpolate`.
        """
        first, second = self.ends(a, b)
        weights = self.weights(n)
        one = self._sharing_noise(n)
        return one._from_pictures(one._tail(level), torch.lerp(first, second, weights))

    def inverted_ends(self, a: Pictures, b: Pictures, level: float) -> Plan:
        """Two pictures inverted, with the labels and scales of the first and the last of those between them.

        Raises:
            TypeError, ValueError, OSError: see `Editor.interpolate`.
        """
        labels, scales = _ends(self.run.class_labels), _ends(self.run.guidance_scale)
        both = dataclasses.replace(
            self.run, sample_ids=None, noise=None, callback=None, class_labels=labels, guidance_scale=scales
        )
        return dataclasses.replace(self, run=both)._upwards("interpolate", torch.cat(self.ends(a, b)), level)

    def along(self, latents: Tensor, n: int, level: float) -> Plan:
        """Runs down from n states on the great circle between two inverted pictures, [2, C, H, W].

        Raises:
            TypeError, ValueError: see `Editor.interpolate`.
        """
        table, one = self._tail(level), self._sharing_noise(n)
        x_T = slerp(latents[:1], latents[1:], self.weights(n))
        return Plan(table, dataclasses.replace(one._request(n), x_T=x_T), one.run)

    def ends(self, a: Pictures, b: Pictures) -> tuple[Tensor, Tensor]:
        """The two pictures of an interpolation, [1, C, H, W] each."""
        first, second = (self._pictures("interpolate", picture) for picture in (a, b))
        if len(first) != 1 or len(second) != 1:
            raise ValueError(
                f"interpolate: a and b must be one picture each, got {len(first)} and {len(second)}; "
                "call it for each pair"
            )
        return first, second

    def weights(self, n: int) -> Tensor:
        """λ of n pictures, from 0 to 1, float32 [n, 1, 1, 1]."""
        n = whole("interpolate", "n", n)
        if n < 2:
            raise ValueError(f"interpolate: n must be at least 2, got {n}; the first and the last are the ends")
        return torch.linspace(0, 1, n).reshape(-1, 1, 1, 1)

    def _pictures(self, function: str, images: Pictures) -> Tensor:
        unit_range = self.spec.to_unit == "identity"
        return from_pictures(images, self.spec.shape, unit_range=unit_range, function=function).cpu()

    def _sharing_noise(self, n: int) -> Planner:
        """Makes the plan where all of n samples have the noise of one.

        Raises:
            TypeError: the id is no integer.
            ValueError: more than one id is given, or x_T.
        """
        if self.run.x_T is not None:
            raise ValueError("interpolate: x_T must be left out, got one; it follows from the pictures")
        ids = [0] if self.run.sample_ids is None else list(self.run.sample_ids)
        if len(ids) != 1:
            raise ValueError(f"interpolate: sample_ids must be one id, whose noise all pictures share, got {len(ids)}")
        return dataclasses.replace(self, run=dataclasses.replace(self.run, sample_ids=[int(ids[0])] * n))

    def _tail(self, level: float, function: str = "interpolate") -> StepTable:
        """The method's rows from the first timestep t ≤ level · T on."""
        return tail_table(self.method, self.schedule, self.spec, level, function=function, name="level")

    def _request(self, n: int) -> Request:
        """The options of n samples, checked."""
        return make_request(self.spec, self.device, n, self.run)

    def _from_pictures(self, table: StepTable, pictures: Tensor) -> Plan:
        """A run that starts from pictures at the level of its first timestep."""
        n, run = len(pictures), self.run
        request = self._request(n)
        eps = request.x_T
        if eps is None and isinstance(run.noise, torch.Generator):
            eps = torch.randn(pictures.shape, generator=run.noise, device=run.noise.device)
        own = Draw(torch.full_like(request.ids, seed_bits(run.seed)), request.ids, START)
        noise = own if eps is None else eps.to("cpu", torch.float32)
        x_t, _ = q_sample(pictures, table.timesteps[:1].expand(n), self.schedule.levels(), noise)
        return Plan(table, dataclasses.replace(request, x_T=x_t), run)


def _ends(values: Values) -> Values:
    """The first and the last of what may be one for all."""
    if values is None or isinstance(values, (int, float)) or (isinstance(values, Tensor) and not values.ndim):
        return values
    return [values[0], values[-1]]  # type: ignore[return-value, index]


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985): (sin((1−λ)θ) a + sin(λθ) b)/sin θ, θ the angle between a and b.

    Args:
        a: float [1, C, H, W].
        b: float [1, C, H, W].
        weights: λ, float [n, 1, 1, 1] in [0, 1].

    Returns:
        float32 [n, C, H, W]; on a straight line where the two have one direction or opposite ones.
    """
    first, second, weights = a.double(), b.double(), weights.to(a.device, torch.float64)
    cosine = (first * second).sum() / (first.norm() * second.norm())
    angle = cosine.clamp(-1, 1).acos()
    if not bool(angle.sin() > 1e-6):
        return torch.lerp(first, second, weights).float()
    left, right = ((1 - weights) * angle).sin() / angle.sin(), (weights * angle).sin() / angle.sin()
    turned: Tensor = left * first + right * second
    return turned.float()
