"""What the modules of kernels cost: Triton and the compilers are imported where a kernel is used, and not before."""

import os
import subprocess
import sys

import pytest

from fastddpm.kernels import dispatch

HEAVY = (
    "triton",
    "torch._inductor",
    "torch._dynamo",
    "sympy",
    "torch.onnx",
    "onnx",
    "diffusers",
    "matplotlib",
    "scipy",
)


def in_new_process(*arguments, cwd, **environment) -> str:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "way", ["compile", *(pytest.param(way, marks=pytest.mark.slow) for way in ("make_fx", "export"))]
)
def test_an_op_may_be_used_first_while_it_is_traced(way, request):
    pytest.importorskip("triton")
    in_new_process("-m", "tests.kernels.first_use", way, cwd=request.config.rootpath, TRITON_INTERPRET="0")


def test_an_op_may_be_used_first_on_the_interpreter(request):
    pytest.importorskip("triton")
    in_new_process("-m", "tests.kernels.first_use", "interpreter", cwd=request.config.rootpath, TRITON_INTERPRET="1")


RUN = """
import sys
import torch
by_torch = set(sys.modules)
import fastddpm.cli, fastddpm.engines.stepper, fastddpm.sampler, fastddpm.train.loop
from fastddpm import ModelSpec, NoiseSchedule, Sampler, UNet, UNetConfig
config = UNetConfig(sample_size=(8, 8), channels=(8,), layers=1, attention=(False,), norm_groups=2)
sampler = Sampler(UNet(config), NoiseSchedule.linear(10), ModelSpec(shape=(3, 8, 8)), engine="eager")
assert sampler.sample(2, steps=2).isfinite().all()
print(*(set(sys.modules) - by_torch))
"""


def test_sampling_on_the_cpu_imports_no_compiler(request):
    """Nor anything else that takes long to import, beyond what `import torch` brings."""
    imported = in_new_process("-c", RUN, cwd=request.config.rootpath, TRITON_INTERPRET="0").split()
    assert "fastddpm.kernels.p_sample" in imported
    assert [name for name in imported if name in HEAVY or name.endswith("_triton")] == []


WITHOUT = """
import sys
sys.modules["triton"] = None
import importlib, pkgutil
import fastddpm.kernels
names = [module.name for module in pkgutil.iter_modules(fastddpm.kernels.__path__)]
for name in names:
    if not name.endswith("_triton"):
        importlib.import_module(f"fastddpm.kernels.{name}")
assert not fastddpm.kernels.dispatch.HAS_TRITON and not fastddpm.kernels.dispatch.INTERPRETED
from tests.kernels.first_use import run_on_the_cpu
run_on_the_cpu()
from fastddpm.kernels import report
sys.exit(0 if report.main(["--target", "sm_90"]) == 2 else 1)
"""


def test_without_triton_everything_runs_but_the_kernels(request):
    in_new_process("-c", WITHOUT, cwd=request.config.rootpath, TRITON_INTERPRET="1")


def test_a_folder_named_triton_is_not_triton(tmp_path, request):
    (tmp_path / "triton").mkdir()
    code = "import sys; sys.path[:] = sys.argv[1:]; from importlib.util import find_spec; assert find_spec('triton')\n"
    code += "import runpy; assert not runpy.run_path('kernels/dispatch.py')['HAS_TRITON']"
    in_new_process("-S", "-c", code, *(str(tmp_path), os.path.dirname(os.__file__)), cwd=request.config.rootpath)


@pytest.mark.parametrize(
    "value", [None, "", "0", "1", "2", "true", "True", "ON", "off", "yes", "y", "no", "false", " 1"]
)
def test_the_environment_is_read_as_triton_reads_it(value, monkeypatch):
    triton = pytest.importorskip("triton")
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert dispatch.is_interpreted() is bool(triton.knobs.runtime.interpret)
