"""What a GPU would be told to do for a step, read from the code that is generated for a pretended H100."""

import re
from unittest import mock

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap

pytest.importorskip("triton")

from fastddpm.engines.gpu import Gpu
from fastddpm.kernels.machine_code import read_cubin
from fastddpm.nets.unet import UNet, UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.sampler import Sampler
from tests.networks import tiny_sampler
from tests.pretend import CUDA, Fakes, Generated, compiled_kernels, cuda_code
from tests.steps import begin

CIFAR = UNetConfig(downsample_padding="asymmetric")
"""google/ddpm-cifar10-32, 35.7 M parameters."""
SMALL = UNetConfig(
    sample_size=(16, 16), channels=(32, 64), layers=1, attention=(False, True), norm_groups=8,
    downsample_padding="asymmetric",
)  # fmt: skip
MOST_LAUNCHES = 150
"""Bar for a step of CIFAR's network; without the fused norm it is 233."""
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "_assert_async", "equal")
"""Operations whose result, or its size, the host must wait for."""


def engines_call(config: UNetConfig, batch: int, device: str = "cpu"):
    """What the GPU's engine is handed by a sampler of a network in bfloat16, and compiles."""
    spec = ModelSpec(shape=(config.in_channels, *config.sample_size))
    network = UNet(config).to(torch.bfloat16) if device == "cpu" else UNet(config)
    sampler = Sampler(network, NoiseSchedule.linear(1000), spec, device=device, engine="eager", precision="bf16")
    call = begin(sampler, sampler.table(solver="ddpm"), range(batch))
    return Gpu(graphs=True).formed(call)


def step_code(config: UNetConfig, batch: int) -> Generated:
    """The code of the engine's own step, with a float32 state and the noise made in the kernel."""
    call, fakes = engines_call(config, batch), Fakes()
    weights = {name: fakes.like(value) for name, value in call.step.state_dict().items()}
    arguments = [fakes.like(value) for value in call.arguments()]
    with mock.patch.object(triton_kernel_wrap.log, "warning") as warned:
        generated = cuda_code(lambda step, *tensors: step(*tensors), call.step, weights, arguments)
    assert not warned.called, "PyTorch cannot read which tensors a kernel writes, and takes it that it writes all"
    return generated


@pytest.fixture(scope="module")
def small() -> Generated:
    return step_code(SMALL, batch=2)


@pytest.fixture(scope="module")
def cifar() -> Generated:
    generated = step_code(CIFAR, batch=16)
    print(f"\nlaunches of a step: {sum(generated.launches().values())} {generated.by_kind()}")
    return generated


def check_update(generated: Generated) -> None:
    """The update is one launch, of our kernel, and so is each norm; no random numbers are made by anything else."""
    launches = generated.launches()
    assert launches["p_sample_kernel"] == 1
    assert not [name for name in launches if re.search("rand|philox|native_group_norm", name)]


def check_nothing_waits(generated: Generated) -> None:
    """Neither the graph nor the code holds a tensor outside the GPU, or anything that the host would wait for."""
    tensors = 0
    for node in generated.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        assert name not in WAITS, node.format_node()
        assert "cpu" not in str(node.kwargs.get("device", "")), node.format_node()
        values = node.meta.get("val", ())
        for value in values if isinstance(values, (list, tuple)) else (values,):
            if isinstance(value, torch.Tensor):
                assert value.device == CUDA, node.format_node()
                tensors += 1
    assert tensors > 50
    for word in (".item(", ".cpu(", "_cpu(", "'cpu'", "synchronize", "cpp_fused", ".tolist(", "copy_to_host"):
        assert word not in generated.call, word


def check_kernels(generated: Generated) -> None:
    """Every generated kernel compiles to sm_90, and none spills."""
    cubins = compiled_kernels(generated)
    names = {name for name in generated.launches() if not name.startswith(("extern_kernels", "torch.ops"))}
    assert {re.sub(r"_\d+$", "", name) for name, _ in cubins} == names
    spilled = {name: spill for name, cubin in cubins if (spill := read_cubin(cubin)[2])}
    assert not spilled, f"bytes on the stack: {spilled}"


class TestSmall:
    def test_launches(self, small):
        # 8 blocks, 5 of which change their width, and 4 attentions.
        assert small.launches()["add_group_norm_kernel"] == 2 * 8 + 4 + 1
        assert small.by_kind() == {
            # Besides the norms: cast, pad, sum of a skip, double, output's bias, update, clocks.
            "triton": 21 + 7,
            "attention": 4,
            "convolution": 2 * 8 + 2 + 2,
            "matrix product": 2 * 4 + 5,
            "other": 0,
        }

    def test_the_update_is_one_launch(self, small):
        check_update(small)

    def test_nothing_waits_for_the_host(self, small):
        check_nothing_waits(small)

    @pytest.mark.slow
    def test_kernels_compile_without_spills(self, small):
        check_kernels(small)


@pytest.mark.slow
class TestCifar:
    def test_launches(self, cifar):
        kinds = cifar.by_kind()
        assert kinds["other"] == 0
        assert sum(kinds.values()) <= MOST_LAUNCHES

    def test_the_update_is_one_launch(self, cifar):
        check_update(cifar)

    def test_nothing_waits_for_the_host(self, cifar):
        check_nothing_waits(cifar)

    def test_kernels_compile_without_spills(self, cifar):
        check_kernels(cifar)


# --- on a real one ---


@pytest.mark.gpu
@torch.no_grad()
def test_a_run_on_the_gpu_gives_the_cpus_pictures():
    plain = tiny_sampler()
    on_gpu = Sampler(plain.model, plain.schedule, plain.spec, device="cuda", engine="eager")
    asked = {"class_labels": [0, 1, 2, 0, 1], "solver": "ddpm", "steps": 12, "output": "raw"}
    got = on_gpu.sample(5, **asked).cpu()
    torch.testing.assert_close(got, tiny_sampler().sample(5, **asked), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
@torch.no_grad()
def test_launches_on_the_gpu_are_those_that_were_counted(cifar):
    """The profiler's count of kernels of a compiled step against the count from the code."""
    call = engines_call(CIFAR, 16, "cuda")
    quick = Gpu(graphs=False)
    quick.prepare(call, lambda _: None)
    runner = quick.runner(call)
    for _ in range(3):
        runner.run(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        quick.runner(call).run(1)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert not [name for name in kernels if "Memcpy DtoH" in name or "Memcpy HtoD" in name]
    assert sum("p_sample" in name for name in kernels) == 1
    # Libraries may split a product or re-order a weight, which the code does not show.
    assert len(kernels) <= 2 * sum(cifar.launches().values()) + 40, len(kernels)
