"""`fastddpm.accelerate` on diffusers' pipelines: the same call, the same pictures, no waiting in the loop."""

import copy
import inspect
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LDMPipeline,
    PNDMPipeline,
    PNDMScheduler,
    UNet2DModel,
    VQModel,
)

import fastddpm
from fastddpm import FastDDIMScheduler, FastDDPMScheduler, FastDPMSolverMultistepScheduler, accelerate
from fastddpm.integrations import diffusers_pipelines, pipeline_run
from fastddpm.nets.unet import UNet
from tests.helpers import oracle, peers_dir
from tests.syncs import NoSync

TOLERANCE = 1e-4
SMALL = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip


def small_unet(**options):
    torch.manual_seed(0)
    unet = UNet2DModel(**{**SMALL, **options})
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return unet.eval()


def small_decoder():
    torch.manual_seed(1)
    return VQModel(
        block_out_channels=(8,), latent_channels=3, num_vq_embeddings=16, norm_num_groups=4, sample_size=8
    ).eval()


def pipeline(kind, scheduler=None, **options):
    scheduler = DDPMScheduler() if scheduler is None else scheduler
    parts = {"unet": small_unet(**options), "scheduler": scheduler}
    if kind is LDMPipeline:
        parts["vqvae"] = small_decoder()
    pipe = kind(**parts)
    if type(pipe.scheduler) is not type(scheduler):  # DDIMPipeline makes a DDIMScheduler of any
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, generator="one", *, batch_size=2, steps=5, **options):
    """The pictures and the last state of the generators."""
    torch.manual_seed(11)
    if generator == "one":
        generator = torch.Generator().manual_seed(3)
    elif generator == "list":
        generator = [torch.Generator().manual_seed(i) for i in range(batch_size)]
    options = {"output_type": "np", **options}
    images = pipe(batch_size=batch_size, generator=generator, num_inference_steps=steps, **options).images
    used = generator if isinstance(generator, list) else [] if generator is None else [generator]
    return images, [*(g.get_state() for g in used), torch.get_rng_state()]


def check_alike(pipe, **options):
    fast = accelerate(pipe)
    theirs, their_states = draw(pipe, **options)
    ours, our_states = draw(fast, **options)
    assert type(ours) is type(theirs) and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= TOLERANCE
    assert 0.01 < float(np.asarray(theirs).std())
    for a, b in zip(our_states, their_states, strict=True):
        assert torch.equal(a, b)
    return fast


V = {"prediction_type": "v_prediction"}  # an ε-network of random weights multiplies rounding by some hundred
RUNS = {
    "ddpm": (DDPMPipeline, DDPMScheduler(), {}),
    "ddpm_v_large": (DDPMPipeline, DDPMScheduler(variance_type="fixed_large", **V), {}),
    "ddpm_threshold": (DDPMPipeline, DDPMScheduler(thresholding=True, sample_max_value=2.0, **V), {}),
    "ddpm_trailing": (DDPMPipeline, DDPMScheduler(timestep_spacing="trailing", **V), {}),
    "ddpm_all": (DDPMPipeline, DDPMScheduler(num_train_timesteps=30, **V), {"steps": 30}),
    "ddpm_one": (DDPMPipeline, DDPMScheduler(**V), {"steps": 1}),
    "ddpm_with_ddim": (DDPMPipeline, DDIMScheduler(**V), {}),
    "ddpm_with_dpm_solver": (DDPMPipeline, DPMSolverMultistepScheduler(**V), {"steps": 8}),
    "ddpm_with_long_dpm_solver": (DDPMPipeline, DPMSolverMultistepScheduler(**V, final_sigmas_type="sigma_min"),
                                  {"steps": 16}),
    "ddpm_with_third_order": (DDPMPipeline, DPMSolverMultistepScheduler(**V, solver_order=3), {"steps": 8}),
    "ddpm_with_long_third_order": (DDPMPipeline, DPMSolverMultistepScheduler(**V, solver_order=3), {"steps": 18}),
    "ddpm_with_third_order_to_sigma_min": (
        DDPMPipeline, DPMSolverMultistepScheduler(**V, solver_order=3, final_sigmas_type="sigma_min"), {"steps": 16},
    ),
    "ddpm_with_karras": (DDPMPipeline, DPMSolverMultistepScheduler(**V, use_karras_sigmas=True), {}),
    "ddpm_with_sde": (DDPMPipeline, DPMSolverMultistepScheduler(**V, algorithm_type="sde-dpmsolver++"), {}),
    "ddpm_with_ours": (DDPMPipeline, FastDDPMScheduler(**V), {}),
    "ddpm_learned": (DDPMPipeline, DDPMScheduler(variance_type="learned_range", **V), {"out_channels": 6}),
    "ddim": (DDIMPipeline, DDIMScheduler(**V), {}),
    "ddim_eta": (DDIMPipeline, DDIMScheduler(**V), {"eta": 0.5}),
    "ddim_eta_one_step": (DDIMPipeline, DDIMScheduler(**V), {"eta": 0.5, "steps": 1}),
    "ddim_clipped": (DDIMPipeline, DDIMScheduler(**V), {"eta": 1.0, "use_clipped_model_output": True}),
    "ddim_with_ours": (DDIMPipeline, FastDDIMScheduler(**V), {"eta": 0.5}),
    "ddim_offset": (DDIMPipeline, DDIMScheduler(steps_offset=1, set_alpha_to_one=False, **V), {}),
    "ddim_zero_snr": (DDIMPipeline, DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", **V), {}),
    "ldm": (LDMPipeline, DDIMScheduler(**V, clip_sample=False), {}),
    "ldm_eta": (LDMPipeline, DDIMScheduler(**V, clip_sample=False), {"eta": 0.7}),
    "ldm_ddpm": (LDMPipeline, DDPMScheduler(**V), {}),
}  # fmt: skip


GENERATORS = ("one", "list", None)
PAIRS = [(name, GENERATORS[i % 3]) for i, name in enumerate(RUNS)]
PAIRS += [(name, kind) for name in ("ddim_eta", "ddpm_learned") for kind in GENERATORS if (name, kind) not in PAIRS]


@pytest.mark.parametrize(("name", "generator"), PAIRS)
def test_the_same_pictures(name, generator):
    kind, scheduler, options = RUNS[name]
    options = dict(options)
    unet = {"out_channels": options.pop("out_channels")} if "out_channels" in options else {}
    fast = check_alike(pipeline(kind, copy.deepcopy(scheduler), **unet), generator=generator, **options)
    assert isinstance(fast.network.stepper.network, UNet)


@pytest.mark.parametrize("mode", ["ancestral", "ancestral_small_trailing", "ddim", "ddim_eta", "dpmpp_2m"])
def test_the_library_s_own_pictures(mode, monkeypatch):
    """The stored runs of diffusers, from the stored start and noise, through the pipeline."""
    folder = peers_dir() / "diffusers_cifar_like"
    data = oracle("diffusers_cifar_like")
    kind = DDIMPipeline if mode.startswith("ddim") else DDPMPipeline
    scheduler = {"d": DPMSolverMultistepScheduler, "a": DDPMScheduler}[mode[0]]
    scheduler = DDIMScheduler if mode.startswith("ddim") else scheduler
    pipe = kind.from_pretrained(folder, low_cpu_mem_usage=False)
    pipe.scheduler = scheduler.from_pretrained(folder / "schedulers" / mode)
    pipe.set_progress_bar_config(disable=True)
    noise = iter(data.get(f"{mode}/z", torch.zeros(0)))
    monkeypatch.setattr(diffusers_pipelines, "randn_tensor", lambda *_, **__: data[f"{mode}/x_T"].float())
    monkeypatch.setattr(pipeline_run, "draw", lambda *_: next(noise).float())
    options = {"eta": 0.6} if mode == "ddim_eta" else {}
    steps = len(data[f"{mode}/t"])
    images = accelerate(pipe)(batch_size=2, num_inference_steps=steps, output_type="np", **options).images
    growth, _ = json.loads((folder / "meta.json").read_text())["amplification_and_max_abs_final"][mode]
    assert np.abs(images - data[f"{mode}/mapped"].numpy()).max() <= max(TOLERANCE, 5e-6 * growth)


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline, LDMPipeline])
def test_the_call_is_the_pipeline_s(kind):
    theirs, ours = inspect.signature(kind.__call__), inspect.signature(type(accelerate(pipeline(kind))).__call__)
    assert [(p.name, p.default, p.kind) for p in theirs.parameters.values()] == [
        (p.name, p.default, p.kind) for p in ours.parameters.values()
    ]


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline, LDMPipeline])
@pytest.mark.parametrize("output_type", ["pil", "np", "numpy", "pt", None])
def test_forms_of_output(kind, output_type):
    pipe = pipeline(kind, DDIMScheduler(**V))
    results = []
    for each in (pipe, accelerate(pipe)):
        generator = torch.Generator().manual_seed(0)
        both = [
            each(2, generator.manual_seed(0), num_inference_steps=2, output_type=output_type, return_dict=return_dict)
            for return_dict in (True, False)
        ]
        assert isinstance(both[1], tuple) and len(both[1]) == 1
        results.append((both[0].images, both[1][0], type(both[0])))
    (a, a_tuple, a_type), (b, b_tuple, b_type) = results
    assert a_type is b_type and type(a) is type(b) is type(a_tuple) is type(b_tuple)
    if output_type == "pil":
        a, b = (np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255 for images in (a, b))
        assert np.abs(a - b).max() <= 1.01 / 255
    else:
        assert a.shape == b.shape and float(abs(a - b).max()) <= TOLERANCE


def test_everything_else_is_the_pipeline_s(tmp_path):
    pipe = pipeline(DDPMPipeline)
    fast = accelerate(pipe)
    assert fast.unet is pipe.unet and fast.scheduler is pipe.scheduler and fast.config == pipe.config
    assert fast.device == pipe.device and fast.components == pipe.components
    assert fast.to("cpu") is fast and accelerate(fast) is fast
    fast.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler is fast.scheduler
    assert "DDPMPipeline" in repr(fast)
    with pytest.raises(AttributeError):
        fast.no_such_thing  # noqa: B018
    fast.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert type(again.scheduler) is FastDDIMScheduler
    again.set_progress_bar_config(disable=True)
    assert np.abs(draw(again)[0] - draw(fast)[0]).max() <= TOLERANCE
    assert fastddpm.Sampler.from_pretrained(tmp_path, device="cpu").spec.clipped_eps == "raw"
    assert np.abs(draw(copy.deepcopy(fast))[0] - draw(fast)[0]).max() <= TOLERANCE


def test_a_scheduler_may_be_swapped_between_calls():
    pipe = pipeline(DDIMPipeline, DDIMScheduler(**V))
    fast = accelerate(pipe)
    config = pipe.scheduler.config
    for scheduler in (DDIMScheduler, FastDDIMScheduler, DDIMScheduler):
        fast.scheduler = scheduler.from_config(config, clip_sample_range=0.5)
        assert np.abs(draw(pipe)[0] - draw(fast)[0]).max() <= TOLERANCE
    other = pipeline(DDPMPipeline, DPMSolverMultistepScheduler(**V))
    fast.scheduler = FastDPMSolverMultistepScheduler.from_config(config)  # DDIMPipeline itself would pass it an η
    other.scheduler = DPMSolverMultistepScheduler.from_config(config)
    assert np.abs(draw(other)[0] - draw(fast)[0]).max() <= TOLERANCE


def test_changed_weights_are_seen():
    pipe = pipeline(DDPMPipeline, DDIMScheduler(**V))
    fast = accelerate(pipe)
    before = draw(fast)[0]
    stepper = fast.network.stepper
    draw(fast)
    assert fast.network.stepper is stepper
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2)
    after = draw(fast)[0]
    assert np.abs(after - before).max() > 0.01 and np.abs(after - draw(pipe)[0]).max() <= TOLERANCE
    pipe.unet = small_unet(layers_per_block=2)
    assert np.abs(draw(fast)[0] - draw(pipe)[0]).max() <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"time_embedding_type": "learned", "num_train_timesteps": 1000},
        {"act_fn": "gelu"},
        {"time_embedding_type": "fourier"},
    ],
    ids=["learned_times", "gelu", "fourier"],
)
def test_a_network_that_ours_cannot_be_runs_as_it_is(options):
    fast = check_alike(pipeline(DDPMPipeline, DDIMScheduler(steps_offset=1, **V), **options))  # log 0 for "fourier"
    assert not isinstance(fast.network.stepper.network, UNet)


def test_hooks_and_foreign_attention_run_as_they_are():
    pipe = pipeline(DDPMPipeline, DDIMScheduler(**V))
    handle = pipe.unet.conv_out.register_forward_hook(lambda module, args, out: out * 0.5)
    fast = check_alike(pipe)
    assert fast.network.stepper is None
    handle.remove()
    assert isinstance(check_alike(pipe).network.stepper.network, UNet)


def test_half_precision_keeps_its_dtype():
    pipe = pipeline(DDPMPipeline, DDIMScheduler(**V)).to(torch.bfloat16)
    theirs, ours = draw(pipe, output_type="pt")[0], draw(accelerate(pipe), output_type="pt")[0]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert float((ours - theirs).abs().float().mean()) < 0.02


@pytest.mark.parametrize("name", ["ddpm", "ddpm_with_dpm_solver", "ddim_eta", "ddpm_threshold"])
def test_the_loop_never_waits(name, monkeypatch):
    """From the first step to the last: what stands before and after may."""
    kind, scheduler, options = RUNS[name]
    pipe = pipeline(kind, copy.deepcopy(scheduler))
    watches = []

    def watched(iterable):
        watch = NoSync()
        watches.append(watch)
        with watch:
            yield from iterable

    pipe.progress_bar = watched
    draw(accelerate(pipe), **options)
    assert len(watches) == 1 and len(watches[0].calls) > 100


def test_threads_with_other_settings_do_not_mix():
    """All share the pipeline and its scheduler; each gets the pictures of its own steps."""
    fast = accelerate(pipeline(DDPMPipeline))
    asked = [(steps, seed) for seed in range(3) for steps in (3, 5, 8, 13)]

    def one(steps, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.as_tensor(
            fast(batch_size=1, num_inference_steps=steps, generator=generator, output_type="np").images
        )

    expected = [one(*settings) for settings in asked]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            got = list(pool.map(lambda settings: one(*settings), asked))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_progress_bar_is_the_pipeline_s(capsys):
    pipe = pipeline(DDPMPipeline)
    pipe.set_progress_bar_config(disable=False)
    draw(accelerate(pipe), steps=7)
    assert "7/7" in capsys.readouterr().err


def test_what_is_not_supported_is_named():
    with pytest.raises(TypeError, match="DDPMPipeline, DDIMPipeline, LDMPipeline.*got PNDMPipeline"):
        accelerate(PNDMPipeline(small_unet(), PNDMScheduler()))
    with pytest.raises(TypeError, match="scheduler must be DDPMScheduler, .* got EulerDiscreteScheduler; make one"):
        accelerate(DDPMPipeline(small_unet(), EulerDiscreteScheduler()))
    with pytest.raises(TypeError, match="target must be diffusers' DDPMPipeline, .*got int"):
        accelerate(3)
    with pytest.raises(ValueError, match="must be unconditional"):
        accelerate(DDPMPipeline(small_unet(num_class_embeds=4), DDPMScheduler()))
    fast = accelerate(pipeline(DDPMPipeline))
    fast.scheduler = PNDMScheduler()
    with pytest.raises(TypeError, match="got PNDMScheduler"):
        fast()
    fast.scheduler = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="must return 6 channels for this scheduler, got 3"):
        fast(num_inference_steps=2)
    with pytest.raises(ValueError, match="one for each of 2 pictures, got a list of 3"):
        accelerate(pipeline(DDIMPipeline))(2, [torch.Generator()] * 3)

    class Own(DDPMPipeline):
        def __call__(self):
            return None

    with pytest.raises(TypeError, match="with its own call, got Own"):
        accelerate(Own(small_unet(), DDPMScheduler()))


def test_subclasses_without_a_call_of_their_own_are_welcome():
    class Renamed(DDPMPipeline):
        pass

    check_alike(pipeline(Renamed, DDIMScheduler(**V)))
