"""denoising-diffusion-pytorch's GaussianDiffusion with its sampling loop replaced: `fastddpm.accelerate(diffusion)`."""

from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.lucidrains import FLAGS, PREDICTIONS, make_network
from fastddpm.checkpoints.lucidrains_schedule import BUFFERS, RoundedSchedule, read_schedule
from fastddpm.checkpoints.lucidrains_unet import structure, unseen
from fastddpm.engines.choose import EngineName
from fastddpm.nets.lucidrains import LucidrainsUNet
from fastddpm.process.spec import ModelSpec
from fastddpm.process.timesteps import spaced_timesteps
from fastddpm.sampler import Preview, Sampler

__all__ = ["AcceleratedGaussianDiffusion", "accelerate_gaussian_diffusion"]

_KINDS = ("GaussianDiffusion", "LearnedGaussianDiffusion")
# What our loop stands for; a subclass that changes one of them samples in a way of its own.
_LOOP = ("sample", "p_sample_loop", "ddim_sample", "p_sample", "p_mean_variance", "model_predictions", "q_posterior",
         "predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start")  # fmt: skip

_TOLERANCE = 1e-4  # of the largest output: of the same arithmetic in another order
NOISE_BYTES = 256 << 20
"""Up to this size the noise of all steps is drawn beforehand, so that the steps need nothing from the host."""

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class GaussianDiffusion(Protocol):
    """What is used of the package's class, which is a module."""

    model: nn.Module
    betas: Tensor
    channels: int
    image_size: int | tuple[int, int]
    num_timesteps: int
    sampling_timesteps: int
    ddim_sampling_eta: float
    is_ddim_sampling: bool
    objective: str
    self_condition: bool

    def model_predictions(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def unnormalize(self, x: Tensor, /) -> Tensor: ...
    def parameters(self) -> Iterator[Tensor]: ...
    def buffers(self) -> Iterator[Tensor]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def __call__(self, *arguments: object, **options: object) -> Tensor: ...


def accelerate_gaussian_diffusion(diffusion: object, engine: EngineName = "auto") -> AcceleratedGaussianDiffusion:
    """The same diffusion with a faster `sample`; see `AcceleratedGaussianDiffusion`.

    Args:
        diffusion: A GaussianDiffusion or LearnedGaussianDiffusion of denoising-diffusion-pytorch 1.0.2 or later. It is
            not changed.
        engine: How steps run, as in `fastddpm.Sampler`.

    Raises:
        TypeError: It is another class, or a subclass that has its own way of sampling.
    """
    if isinstance(diffusion, AcceleratedGaussianDiffusion):
        return diffusion
    kind = type(diffusion)
    expected = "accelerate: diffusion must be a GaussianDiffusion of denoising-diffusion-pytorch"
    if not hasattr(kind, "sample") or not any(base.__name__ in _KINDS for base in kind.__mro__):
        raise TypeError(f"{expected}, got {kind.__name__}; others of the package are not supported")
    parameters = list(inspect.signature(kind.sample).parameters)
    if parameters[1:] == ["batch_size"]:
        raise TypeError(f"{expected} 1.0.2 or later, got an older one; update the package, or sample with it directly")
    if "cond_fn" in parameters:
        raise TypeError(f"{expected}, got one with classifier guidance (cond_fn), which is not supported")
    if parameters[1:] != ["batch_size", "return_all_timesteps"]:
        raise TypeError(
            f"{expected}, without classes, masks or guidance, got {kind.__module__}.{kind.__name__} with "
            f"sample({', '.join(parameters[1:])}); load its checkpoint with fastddpm.Sampler.from_pretrained instead"
        )
    for name in _LOOP:
        owner = next((base.__name__ for base in kind.__mro__ if name in vars(base)), "nobody")
        if owner not in _KINDS or name in vars(diffusion):
            raise TypeError(
                f"{expected} with its own {name}, got {kind.__name__} with another; sample with it directly"
            )
    return AcceleratedGaussianDiffusion(cast(GaussianDiffusion, diffusion), engine)


class AcceleratedGaussianDiffusion:
    """A GaussianDiffusion that samples through fastddpm.

    `sample`, `p_sample_loop` and `ddim_sample` are called as before. From the same state of PyTorch's global generator
    they return the same pictures (to rounding) and leave the generator in the same state: x_T and each step's noise are
    drawn in the package's order, on the diffusion's device. All other attributes are the diffusion's own, to read and
    to set. The network is run in evaluation mode, as a copy that is made anew when its weights have changed, so it can
    be trained on; what `sampling_timesteps`, `ddim_sampling_eta` and `objective` say counts at each call. Calls from
    several threads run one after the other, so that each draws what it would draw alone.
    """

    _own = ("_diffusion", "_engine", "_made", "_lock")

    def __init__(self, diffusion: GaussianDiffusion, engine: EngineName = "auto") -> None:
        self._diffusion = diffusion
        self._engine = engine
        self._made: tuple[object, Sampler] | None = None
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the diffusion has
        if name in AcceleratedGaussianDiffusion._own:  # while it is copied or unpickled
            raise AttributeError(name)
        value = getattr(self._diffusion, name)
        return self._chained(value) if name in ("to", "cuda", "cpu", "eval", "train", "requires_grad_") else value

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._own:
            object.__setattr__(self, name, value)
        else:
            setattr(self._diffusion, name, value)

    def __call__(self, *arguments: object, **options: object) -> Tensor:
        """The diffusion's own call: its training loss."""
        return self._diffusion(*arguments, **options)

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles are of the diffusion alone; what was made of it is made anew."""
        return AcceleratedGaussianDiffusion, (self._diffusion, self._engine)

    def __repr__(self) -> str:
        return f"AcceleratedGaussianDiffusion({self._diffusion!r})"

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False) -> Tensor:
        """Draw samples: ancestral, or by DDIM where the diffusion has fewer `sampling_timesteps` than timesteps.

        Args:
            batch_size: How many.
            return_all_timesteps: Whether to return x_T and the state after each step too.

        Returns:
            float32 [B, C, H, W], or [B, S+1, C, H, W] with all states, in the range of the diffusion's training data.

        Raises:
            ValueError: The diffusion's settings are out of range, or it cannot sample so itself.
            FloatingPointError: The samples ran into NaN or infinity.
        """
        size = self._diffusion.image_size
        height, width = (size, size) if isinstance(size, int) else size  # an integer in 1.x
        run = self.ddim_sample if self._diffusion.is_ddim_sampling else self.p_sample_loop
        return run((batch_size, self._diffusion.channels, height, width), return_all_timesteps=return_all_timesteps)

    def p_sample_loop(self, shape: tuple[int, int, int, int], return_all_timesteps: bool = False) -> Tensor:
        """Ancestral sampling over all timesteps (Ho et al. 2020, Algorithm 2); arguments as in the package."""
        steps = range(self._diffusion.num_timesteps - 1, -1, -1)
        return self._run(shape, return_all_timesteps, torch.tensor(steps), eta=None)

    def ddim_sample(self, shape: tuple[int, int, int, int], return_all_timesteps: bool = False) -> Tensor:
        """DDIM with the diffusion's `sampling_timesteps` and `ddim_sampling_eta` (Song et al. 2021, eq. 12)."""
        steps = spaced_timesteps(self._diffusion.num_timesteps, self._diffusion.sampling_timesteps, "linspace_x0")
        if _is_learned(self._diffusion):
            raise ValueError(
                "accelerate: sampling_timesteps must be all of LearnedGaussianDiffusion's, got "
                f"{self._diffusion.sampling_timesteps}; its own DDIM does not run either: load the checkpoint with "
                "fastddpm.Sampler.from_pretrained"
            )
        eta = float(self._diffusion.ddim_sampling_eta)
        return self._run(shape, return_all_timesteps, steps, eta=eta)

    def _run(
        self, shape: tuple[int, int, int, int], keeps_all: bool, timesteps: Tensor, *, eta: float | None
    ) -> Tensor:
        """A run over these timesteps: DDIM with `eta`, ancestral without."""
        with self._lock, torch.no_grad():
            sampler = self._refreshed((shape[1], shape[2], shape[3]))
            return _sample(self._diffusion, sampler, shape, keeps_all, timesteps, eta)

    def _refreshed(self, shape: tuple[int, int, int]) -> Sampler:
        """The sampler of the network as it is now."""
        diffusion = self._diffusion
        tensors = [*diffusion.parameters(), *diffusion.buffers()]
        # What is made in inference mode counts no versions, and cannot be changed outside it.
        counts = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        versions = tuple(zip(map(id, tensors), (tensor.data_ptr() for tensor in tensors), counts, strict=True))
        device = diffusion.betas.device
        key = (shape, diffusion.objective, diffusion.self_condition, device, versions)
        if self._made is None or key != self._made[0]:
            network = _network(diffusion, shape)
            schedule, spec = _schedule(diffusion), _spec(diffusion, shape)
            self._made = key, Sampler(network, schedule, spec, device=device, engine=self._engine)
        return self._made[1]

    def _chained(self, method: Callable[_Given, _Result]) -> Callable[_Given, _Result | AcceleratedGaussianDiffusion]:
        """A method that returns its object returns this one."""

        def call(*arguments: _Given.args, **options: _Given.kwargs) -> _Result | AcceleratedGaussianDiffusion:
            result = method(*arguments, **options)
            return self if result is self._diffusion else result

        return call


def _sample(
    diffusion: GaussianDiffusion,
    sampler: Sampler,
    shape: tuple[int, int, int, int],
    keeps_all: bool,
    timesteps: Tensor,
    eta: float | None,
) -> Tensor:
    """Draw pictures with the noise that the package draws; see `AcceleratedGaussianDiffusion._run`."""
    steps = len(timesteps)
    device = diffusion.betas.device
    x_T = torch.randn(shape, device=device)
    states = [x_T]
    # The network draws nothing, so neither does it matter when noise is drawn, only in which order.
    z: Tensor | None = None
    if eta != 0.0 and steps * x_T.nbytes <= NOISE_BYTES:
        z = torch.zeros((steps, *shape), device=device)
        for row in z[:-1]:  # the last step adds none
            torch.randn(shape, out=row)

    def keep(preview: Preview) -> None:
        states.append(preview.x)

    def draw(i: int, t: int, sample_ids: Tensor) -> Tensor:
        return torch.randn(shape, device=device)

    final = sampler.sample(
        shape[0],
        solver="ddpm" if eta is None else "ddim",
        timesteps=timesteps,
        eta=eta,
        x_T=x_T,
        noise=draw if z is None else z,
        batch_size=shape[0],
        output="raw",
        callback=keep if keeps_all else None,
    )
    if eta == 0.0:
        for _ in range(steps - 1):  # the package draws here, for nothing; who draws next must not notice
            torch.randn(shape, device=device)
    pictures = torch.stack(states, dim=1) if keeps_all else final
    # Before 1.1 nothing but [−1, 1] was known.
    return diffusion.unnormalize(pictures) if hasattr(diffusion, "unnormalize") else (pictures + 1) * 0.5


def _network(diffusion: GaussianDiffusion, shape: tuple[int, int, int]) -> nn.Module:
    """The diffusion's network as it is now: as one of ours if it is known to be the package's U-Net, or as its copy."""
    model = copy.deepcopy(diffusion.model).eval()
    theirs = _Network(model, _is_learned(diffusion))
    kind = type(model)
    if kind.__name__ != "Unet" or not kind.__module__.endswith("denoising_diffusion_pytorch"):
        return theirs
    try:
        theta = getattr(model.get_submodule("time_mlp.0"), "theta", None)  # 10000, unless it says so
        flags = Flags("accelerate", {} if theta is None else {"sinusoidal_pos_emb_theta": theta}, FLAGS)
        weights = model.state_dict()
        arguments = structure(weights, flags)
        ours = make_network(arguments | unseen(weights, flags, arguments), weights, "accelerate")
    except CheckpointError:  # of an older version of the package, or somebody has changed its parts
        return theirs
    return ours if _agree(ours, theirs, diffusion, shape) else theirs


def _agree(ours: LucidrainsUNet, theirs: nn.Module, diffusion: GaussianDiffusion, shape: tuple[int, int, int]) -> bool:
    """Whether the networks return the same: hooks and exchanged parts do not show in weights."""
    if (ours.config.channels, ours.config.self_condition) != (shape[0], bool(diffusion.self_condition)):
        return False
    device = diffusion.betas.device
    x = torch.linspace(-1, 1, math.prod(shape), device=device).reshape(1, *shape)
    t = torch.full((1,), diffusion.num_timesteps // 2, device=device)
    more = {"x_self_cond": x.flip(-1)} if diffusion.self_condition else {}
    expected, found = theirs(x, t, **more), ours(x, t, **more)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


class _Network(nn.Module):
    """The diffusion's network behind the call that samplers make."""

    def __init__(self, model: nn.Module, is_learned: bool) -> None:
        super().__init__()
        self.model, self.is_learned = model, is_learned

    def forward(self, x: Tensor, t: Tensor, *, x_self_cond: Tensor | None = None) -> Tensor:
        """The output, the arguments passed on as the package passes them."""
        out: Tensor = self.model(x, t) if self.is_learned else self.model(x, t, x_self_cond)
        return out


def _is_learned(diffusion: GaussianDiffusion) -> bool:
    return any(base.__name__ == "LearnedGaussianDiffusion" for base in type(diffusion).__mro__)


def _schedule(diffusion: GaussianDiffusion) -> RoundedSchedule:
    buffers = {name: value.detach() for name, value in diffusion.named_buffers() if name in BUFFERS}
    try:
        return read_schedule(buffers, None, {}, "accelerate")
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def _spec(diffusion: GaussianDiffusion, shape: tuple[int, int, int]) -> ModelSpec:
    is_learned = _is_learned(diffusion)
    prediction = "eps" if is_learned else PREDICTIONS[diffusion.objective]
    # Older versions of the package keep the network's ε beside a clipped x_0.
    rederives = "rederive_pred_noise" in inspect.signature(diffusion.model_predictions).parameters
    return ModelSpec(
        shape,
        prediction=prediction,
        variance="learned_range" if is_learned else "fixed_small",
        clipped_eps="rederive" if rederives or prediction != "eps" else "raw",
        self_condition=bool(diffusion.self_condition),
    )
