"""The kernels on the matrix unit must be there wherever there is one: without it their own tests are skipped."""

import subprocess
import sys

import pytest

from fastddpm.kernels import amx_attention, amx_conv, native

MACROS = {"__AMX_TILE__", "__AMX_BF16__", "__AVX512BF16__", "__linux__"}
ASK = "import ctypes, sys; sys.exit(ctypes.CDLL(None).syscall(158, 0x1023, 18) != 0)"  # arch_prctl for the tiles' data


@pytest.mark.parametrize("kernel", [amx_conv, amx_attention], ids=["convolution", "attention"])
def test_they_are_there_where_compiler_processor_and_system_have_the_unit(kernel):
    compiler = native.compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    told = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c", "/dev/null"], capture_output=True, text=True, check=True
    )
    has = MACROS <= {line.split()[1] for line in told.stdout.splitlines()}
    lent = has and subprocess.run([sys.executable, "-c", ASK], check=False).returncode == 0
    assert kernel.is_there() == lent
