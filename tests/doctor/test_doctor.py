"""The doctor: well machines pass, what is broken on purpose is named, and GPUs that cannot be used are explained."""

import json
import types

import pytest
import torch

from fastddpm.doctor import checks, engines, installation, kernels
from fastddpm.doctor.checks import CHECKS, Check, examine
from fastddpm.doctor.surroundings import ProblemError, about_gpu, check_device
from fastddpm.engines import cache as packages
from fastddpm.engines import devices, no_gpu
from fastddpm.engines.no_gpu import why_no_gpu
from fastddpm.kernels import amx_attention, amx_conv, winograd
from tests.cache_folders import cache  # noqa: F401 - a fixture
from tests.command_line import good, refused

CPU = torch.device("cpu")
COMPILES = ("engine compiled", "engine openvino", "engine onnx", "one graph")
BY_NAME = {check.name: check for check in CHECKS}


def failed(*names):
    """The names of the checks that fail, of these."""
    leave_out = set(BY_NAME) - set(names)
    return [result.check for result in examine(CPU, leave_out=leave_out) if not result.ok]


def test_all_is_well_here(fastddpm, monkeypatch):
    """As JSON, without the checks that compile or trace, which have tests of their own."""
    monkeypatch.setattr(checks, "CHECKS", tuple(check for check in CHECKS if check.name not in COMPILES))
    found = json.loads(good(fastddpm("doctor", "--device", "cpu", "--json")))
    assert [one["check"] for one in found] == [
        "versions", "device", "compilers", "cache", "noise", "p_sample", "q_sample", "add_group_norm", "winograd",
        *(["amx_conv", "amx_attention"] if amx_conv.is_there() else []), "engine eager",
    ]  # fmt: skip
    assert all(set(one) == {"check", "ok", "seconds", "detail"} and one["ok"] and one["detail"] for one in found)


def boom(device):
    raise RuntimeError("driver error 7\nand more")


@pytest.mark.parametrize("columns", [120, 40], ids=["table", "lines"])
def test_a_check_that_raises_fails_and_the_others_go_on(fastddpm, monkeypatch, columns):
    monkeypatch.setattr(checks, "CHECKS", (Check("bad [one]", boom), Check("good", lambda device: "all [is] well")))
    monkeypatch.setenv("COLUMNS", str(columns))
    done = fastddpm("doctor")
    assert done.code == 1 and "1 of 2 checks failed: bad [one]" in done.out and done.err == ""
    assert "RuntimeError: driver error 7" in " ".join(done.out.split()) and "all [is] well" in done.out
    assert "and more" not in done.out


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "meta", "cpu:x"])
def test_unknown_devices_are_refused(fastddpm, device):
    assert refused(fastddpm("doctor", "--device", device), "device must be")


def test_why_there_is_no_gpu_is_said_where_one_is_asked_for(fastddpm, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(devices, "why_no_gpu", lambda: "its driver is too old")
    assert refused(fastddpm("doctor", "--device", "cuda"), "its driver is too old")


# --- broken on purpose ----------------------------------------------------------------------------


def changed(function, change):
    """The function with its first result changed."""

    def call(*args, **kwargs):
        out = function(*args, **kwargs)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return call


def test_the_clip_of_p_sample_is_looked_at(monkeypatch):
    import importlib

    module = importlib.import_module("fastddpm.kernels.p_sample")
    monkeypatch.setattr(module, "clip", lambda x, limit: x)
    assert failed("p_sample", "q_sample", "engine eager") == ["p_sample", "engine eager"]


@pytest.mark.parametrize("name", ["q_sample", "add_group_norm", "winograd", "amx_conv", "amx_attention"])
def test_a_broken_kernel_is_named(name, monkeypatch):
    if name.startswith("amx") and not amx_conv.is_there():
        pytest.skip("a processor without AMX")
    module, function = {
        "winograd": (winograd, "winograd_conv"), "amx_conv": (amx_conv, "amx_conv"),
        "amx_attention": (amx_attention, "amx_attention"),
    }.get(name, (kernels, name))  # fmt: skip
    part = 2.0**-6 if name.startswith("amx") else 1e-3  # of bfloat16's eight bits
    broken = changed(getattr(module, function), lambda x: x * (1 + part))
    if name == "add_group_norm":
        plain = kernels.add_group_norm
        broken = lambda *a, **k: (plain(*a, **k)[0], plain(*a, **k)[1] * 1.05)  # noqa: E731
    monkeypatch.setattr(module, function, broken)
    assert failed("p_sample", "q_sample", "add_group_norm", "winograd", "amx_conv", "amx_attention") == [name]


def test_a_broken_generator_is_named(monkeypatch):
    monkeypatch.setattr(kernels, "philox4x32_reference", lambda *words: words[:4])
    assert failed("noise") == ["noise"]


def test_nan_is_no_pass():
    with pytest.raises(ProblemError, match="off by"):
        kernels.worst_error(torch.full((2,), torch.nan), torch.zeros(2), torch.ones(2), "x")


def test_missing_compilers_are_named(monkeypatch):
    monkeypatch.setattr(installation.shutil, "which", lambda name: None)
    with pytest.raises(ProblemError, match="no compiler for C and C.*install gcc and g"):
        installation.check_compilers(CPU)


def test_a_damaged_package_is_named(cache):  # noqa: F811
    path = packages.find_or_make("some-key", lambda new: new.write_bytes(b"a package"))
    assert "1 files" in installation.check_cache(CPU)
    path.write_bytes(b"a pockage")
    with pytest.raises(ProblemError, match="1 of 1 files .* are damaged, some-key"):
        installation.check_cache(CPU)
    assert failed("cache") == ["cache"] and path.exists()


def test_a_cache_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDDPM_CACHE", str(tmp_path / "file"))
    assert failed("cache") == ["cache"]


class StubSteps:
    """In the place of ahead-of-time packages: eager steps, or those that a test breaks."""

    name = "compiled"

    def __init__(self, break_step=lambda x: x):
        self.break_step = break_step

    def prepare(self, call, on_compile):
        return None

    def formed(self, call):
        return call.formed(history=1, stochastic=True)

    def runner(self, call):
        from fastddpm.engines.runner import StepRunner

        def step(*arguments):
            x, *rest = call.step(*arguments)
            return (self.break_step(x), *rest)

        return StepRunner(step, call)


def compare(break_step):
    return engines.compare_runs(engines.small_sampler(CPU, "compiled", StubSteps(break_step)), "compiled")


def test_engines_are_compared_with_eager_steps():
    assert compare(lambda x: x) == "3 solvers as eager: 0.0e+00"
    with pytest.raises(ProblemError, match="pictures must be as eager steps draw with dpmpp_2m, got a difference of"):
        compare(lambda x: x + 0.003)
    with pytest.raises(ProblemError, match="the engine must be cuda_graph, got compiled"):
        engines.compare_runs(engines.small_sampler(CPU, "compiled", StubSteps()), "cuda_graph")


def test_a_package_that_does_not_load_is_named(cache):  # noqa: F811
    """Sealed as it should be, under the very key that the engine looks for."""
    sampler, keys = engines.small_sampler(CPU, "compiled"), []
    quick = sampler.engine.quick
    plain, quick.key = quick.key, lambda call: keys.append(plain(call)) or keys[-1]
    quick.prepare = lambda call, on_compile: quick.key(call) and (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        sampler.compile(engines.PICTURES)
    packages.find_or_make(keys[-1], lambda new: new.write_bytes(b"no package"))
    (result,) = examine(CPU, leave_out=set(BY_NAME) - {"engine compiled"})
    assert not result.ok and "the compiled step" in result.detail and "must load" in result.detail


@pytest.mark.slow
def test_the_gpus_step_is_one_graph():
    assert "3 solvers as eager" in engines.check_one_graph(CPU)


@pytest.mark.slow
def test_compiled_steps_are_kept_and_found(cache):  # noqa: F811
    assert "compiled in" in engines.check_compiled(CPU)
    assert "its package was in the cache" in engines.check_compiled(CPU)


# --- surroundings ---------------------------------------------------------------------------------


@pytest.fixture
def world(monkeypatch):
    """A function that pretends: which torch this is, what hardware there is, how a GPU starts and what it is like."""

    def pretend(*, cuda="13.0", hip=None, there=True, error=None, **gpu):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        paths = {"/dev/nvidia0": there and not hip, "/dev/kfd": there and bool(hip)}
        monkeypatch.setattr(no_gpu, "Path", lambda p: types.SimpleNamespace(exists=lambda: paths[p]))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: error is None and bool(gpu))

        def init():
            if error:
                raise RuntimeError(error)

        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        known = {"name": "NVIDIA H100", "capability": (9, 0), "memory": (70 << 30, 80 << 30), "count": 1} | gpu
        codes = known.pop("codes", ["sm_75", "sm_80", "sm_90", "compute_90"])

        def memory(_):
            if isinstance(known["memory"], str):
                raise RuntimeError(known["memory"])
            return known["memory"]

        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: known["name"])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: known["capability"])
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: known["count"])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: codes)

    return pretend


def test_no_gpu_is_no_fault(world):
    for cuda, error in ((None, None), ("13.0", "Found no NVIDIA driver on your system.")):
        world(cuda=cuda, there=False, error=error)
        assert why_no_gpu() == "" and "there is no GPU, sampling runs on the CPU" in check_device(CPU)


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
UNUSABLE = {
    "a build for CPUs": ({"cuda": None}, "is a build for CPUs; install one for CUDA"),
    "an old driver": ({"error": TOO_OLD}, "knows CUDA 11.4, is too old .*CUDA 13.0.*update the driver"),
    "no driver": ({"error": "Found no NVIDIA driver on your system."}, "does not start.*see that its driver"),
    "ROCm that does not start": ({"cuda": None, "hip": "6.4", "error": "No HIP GPUs"}, "an AMD GPU: it does not start"),
}


@pytest.mark.parametrize("pretended, says", UNUSABLE.values(), ids=UNUSABLE)
def test_a_gpu_that_cannot_be_used_is_a_fault(world, pretended, says):
    world(**pretended)
    with pytest.raises(ProblemError, match=says) as raised:
        check_device(CPU)
    assert "\n" not in str(raised.value)


def test_a_hidden_gpu_is_explained(world, monkeypatch):
    world(error="No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides it; unset that" in why_no_gpu()


WELL = {
    "an H100": ({}, "cuda:0 (NVIDIA H100, sm_90, CUDA 13.0), 75.2 of 85.9 GB free"),
    "two": ({"count": 2}, "2 GPUs: one is used, --device cuda:N says which"),
    "an old one": ({"name": "Tesla T4", "capability": (7, 5)}, "it has no bf16, use --precision fp32 or fp16"),
    "a newer one, by the driver": ({"capability": (12, 0)}, "sm_120"),
    "ROCm": ({"cuda": None, "hip": "6.4", "name": "MI300X", "capability": (9, 4)}, "MI300X, ROCm 6.4"),
}


@pytest.mark.parametrize("pretended, says", WELL.values(), ids=WELL)
def test_a_gpu_is_described(world, pretended, says):
    world(**{"name": "NVIDIA H100", **pretended})
    text = about_gpu(torch.device("cuda:0"))
    assert says in text and "\n" not in text
    assert ("bf16" in text) == ("T4" in text)


BAD = {
    "full": ({"memory": (1 << 30, 80 << 30)}, "is full: 1.1 of 85.9 GB are free; end what uses it"),
    "fuller": (
        {"memory": "CUDA error: out of memory\nmore"},
        r"its memory cannot be used \(CUDA error: out of memory\)",
    ),
    "too old for torch": ({"capability": (6, 1)}, r"has no code for NVIDIA H100 \(sm_61\)"),
    "too new for torch": ({"capability": (12, 0), "codes": ["sm_80", "sm_90"]}, "has no code"),
}


@pytest.mark.parametrize("pretended, says", BAD.values(), ids=BAD)
def test_a_gpu_that_is_not_fit_is_a_fault(world, pretended, says):
    world(**{"name": "NVIDIA H100", **pretended})
    with pytest.raises(ProblemError, match=says):
        check_device(torch.device("cuda:0"))


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_all_is_well_on_the_gpu():
    results = list(examine(torch.device("cuda:0")))
    assert [(r.check, r.detail) for r in results if not r.ok] == []
    assert {"engine cuda_graph", "no waiting", "launches", "copy", "speed of p_sample"} <= {r.check for r in results}
