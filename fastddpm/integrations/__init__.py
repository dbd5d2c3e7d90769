"""Drop-ins for the libraries that people already use.

`accelerate` takes a pipeline or a diffusion object of another library and returns one that is called in the same way.
For diffusers there are also schedulers, in `fastddpm.integrations.diffusers_schedulers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastddpm.engines.choose import EngineName

__all__ = ["accelerate"]


def accelerate(target: object, *, engine: EngineName = "auto") -> Any:  # noqa: ANN401 - the kind depends on the target
    """The same sampler, faster: the same call, and for the same generator the same pictures.

    Args:
        target: diffusers' DDPMPipeline, DDIMPipeline or LDMPipeline (unconditional), or the GaussianDiffusion of
            denoising-diffusion-pytorch. It is not changed.
        engine: how steps run, as in `fastddpm.Sampler`: "auto" compiles in runs that are long enough to earn that.

    Returns:
        An object that is called like `target` and hands everything else on to it. What is accelerated already comes
        back as it is.

    Raises:
        TypeError: it is of another kind, or a subclass with a sampling loop of its own.
        ValueError: it is of a supported kind, but with a network that its own loop could not run either.
        ImportError: its library is not installed.
    """
    packages = {base.__module__.partition(".")[0] for base in type(target).__mro__}
    names = {base.__name__ for base in type(target).__mro__}
    if "denoising_diffusion_pytorch" in packages or names & {"GaussianDiffusion", "AcceleratedGaussianDiffusion"}:
        from fastddpm.integrations.lucidrains import accelerate_gaussian_diffusion

        return accelerate_gaussian_diffusion(target, engine)
    if "diffusers" in packages or hasattr(type(target), "accelerates_diffusers"):
        from fastddpm.integrations.diffusers_pipelines import accelerate_pipeline

        return accelerate_pipeline(target, engine)
    raise TypeError(
        "accelerate: target must be diffusers' DDPMPipeline, DDIMPipeline or LDMPipeline, or denoising-diffusion-"
        f"pytorch's GaussianDiffusion, got {type(target).__name__}; for other networks make a fastddpm.Sampler"
    )
