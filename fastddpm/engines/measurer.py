"""Measurer: how likely a trained network finds pictures that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from fastddpm.common.arguments import only_options
from fastddpm.common.progress import StepProgress
from fastddpm.engines.likelihood import LikelihoodLoop
from fastddpm.engines.stepper import Stepper
from fastddpm.pictures.batches import PictureBatches
from fastddpm.pictures.inputs import Pictures
from fastddpm.process.likelihood import Likelihood, joined
from fastddpm.process.method import Method
from fastddpm.process.noise import NoiseSource
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.step.request import Request, RunOptions, check_noise, make_request


class LikelihoodOptions(TypedDict, total=False):
    """The options of `Sampler.likelihood`, for type checkers."""

    class_labels: int | Sequence[int] | Tensor | None
    noise: NoiseSource | None
    seed: int
    sample_ids: Sequence[int] | Tensor | None
    batch_size: int | None
    progress: bool | None


class Measurer:
    """Bounds on the likelihood of pictures under a trained network. `fastddpm.Sampler` is one.

    Attributes:
        spec: the network's conventions.
        schedule: the noise schedule that it was trained with.
        device: where it runs.
        stepper: makes the steps.
    """

    spec: ModelSpec
    schedule: NoiseSchedule
    device: torch.device
    stepper: Stepper

    def likelihood(
        self,
        images: Pictures,
        *,
        steps: int | None = None,
        timesteps: str | Sequence[int] | Tensor | None = None,
        **options: Unpack[LikelihoodOptions],
    ) -> Likelihood:
        """The variational bound on pictures' likelihood in bits per dimension (Ho et al. 2020, eq. 5 and 13).

        Every term is estimated from one x_t ~ q(x_t | x_0), as OpenAI's `calc_bpd_loop` does. The model is the one that
        DDPM sampling draws from: with its variance, its clipping, and over some of the timesteps with the β_t of those
        (Nichol & Dhariwal 2021, eq. 19). A picture's bound depends on its seed and id alone, as a sample does; a
        self-conditioned network is told nothing of x_0.

        Options:

        - class_labels: one class or N of them; None asks without class, which needs a network trained for that.
        - noise: ε for each row instead of seeded noise, as in `sample`: a tensor [S, N, C, H, W] in the order of the
          timesteps, a function, or a torch.Generator.
        - seed: in [0, 2**64); 0 unless given. Its noise is another than that of sampling with the same seed.
        - sample_ids: N ids in [0, 2**64); None is 0 … N−1.
        - batch_size: pictures that run together, as in `sample`.
        - progress: whether to show a progress bar; None shows it on terminals.

        Args:
            images: N pictures of the network's size: image files, PIL images, arrays or tensors (uint8, or float in
                [0, 1]; arrays [N, H, W, C], tensors [N, C, H, W]). A list of files is read batch by batch.
            steps: S, at most T; None is T, or what the checkpoint says of ancestral sampling.
            timesteps: instead of `steps`, the training timesteps, descending, or OpenAI's respacing string.
            options: as above.

        Returns:
            The bound and its terms, on the sampler's device.

        Raises:
            TypeError: an argument has the wrong type, or an option is unknown.
            ValueError: an argument is out of range or does not fit the network.
            FloatingPointError: a term is NaN or infinite; says at which timestep.
        """
        return joined(list(self.stream_likelihood(images, steps=steps, timesteps=timesteps, **options)))

    def stream_likelihood(
        self,
        images: Pictures,
        *,
        steps: int | None = None,
        timesteps: str | Sequence[int] | Tensor | None = None,
        **options: Unpack[LikelihoodOptions],
    ) -> Iterator[Likelihood]:
        """As `likelihood`, arguments too, but batch by batch as they are finished; memory is that of one.

        All but the files after the first are checked before the first batch.

        Returns:
            An iterator over the batches, in the order of the pictures.

        Raises:
            TypeError: as in `likelihood`, and so are the others.
            ValueError: see there.
            FloatingPointError: see there; raised by the iterator.
        """
        only_options("likelihood", options, LikelihoodOptions)
        run, spec = RunOptions(**options), self.spec
        unit_range = spec.to_unit == "identity"
        pictures = PictureBatches(images, spec.shape, unit_range=unit_range, function="likelihood")
        with self.stepper.undisturbed():
            request = make_request(spec, self.device, len(pictures), run)
            table = Method("ddpm", steps, timesteps).likelihood_table(self.schedule, spec)
            check_noise(run.noise, table.S, len(pictures), spec.shape)
        loop = LikelihoodLoop(self.stepper, self.schedule, table, pictures, run.noise)
        return self._measured(loop, request, run.progress)

    def _measured(self, loop: LikelihoodLoop, request: Request, progress: bool | None) -> Iterator[Likelihood]:
        self.stepper.refresh()
        with StepProgress(loop.S * request.parts, len(request.ids), progress, doing="measuring") as bar:
            yield from loop.batches(request, bar)
