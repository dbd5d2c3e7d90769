"""The kernels beside what they replace: all contenders are compared first, then timed in turn."""

from collections.abc import Callable

import pytest

from benchmarks.conftest import device_of
from benchmarks.tape import TAPE
from fastddpm.bench import cases
from fastddpm.bench.kernels import makers
from fastddpm.bench.peaks import Peaks

pytestmark = pytest.mark.benchmark(group="kernels", timer=TAPE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of the device at hand."""
    found = makers(device_of(metafunc.config))
    metafunc.parametrize("make", found.values(), ids=found.keys())


@pytest.fixture(scope="module")
def copy_gb_s(request: pytest.FixtureRequest) -> float:
    """What this machine's memory gives to a copy far larger than its caches, measured in this run."""
    return Peaks(device_of(request.config)).copy()


def test_kernel(make: Callable[[], cases.Case], device: str, copy_gb_s: float, record: Callable[..., None]) -> None:
    """Assert that all compute the same, then time them."""
    result = cases.measure(make(), device, cases.Effort.of(device, False), copy_gb_s)
    ours = result["contenders"][0]
    record([ms / 1e3 for ms in ours["samples_ms"]], copy_gb_s=copy_gb_s, **result)
