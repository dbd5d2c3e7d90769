"""What a compiled kernel's machine code says: its instructions, its registers and how wide its memory accesses are."""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path


def read_cubin(cubin: bytes) -> tuple[list[str], int, int]:
    """Instructions up to the padding, registers and stack bytes of a CUDA binary."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        code = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"measure: cuobjdump must say REG and STACK, got {usage!r}; report it with Triton's version")
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*);", code, re.M)
    # Behind the last EXIT stand a branch to itself, which no thread reaches, and NOPs that fill the cache line.
    return _until_last(instructions, "EXIT"), int(found[1]), int(found[2])


def read_amdgcn(text: str) -> tuple[list[str], int, int]:
    """Instructions, vector registers and scratch bytes of an AMD kernel."""
    lines = (line.split(";")[0].strip() for line in text.splitlines())
    instructions = [line for line in lines if re.match(r"(s|v|global|buffer|flat|ds|scratch)_\w+", line)]
    fields = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    if len(fields) != 2:
        raise RuntimeError("measure: the AMD assembly must state vgpr_count and private_segment_fixed_size, got none")
    return _until_last(instructions, "s_endpgm"), fields["vgpr_count"], fields["private_segment_fixed_size"]


def _until_last(instructions: list[str], end: str) -> list[str]:
    """The instructions up to and with the last one that holds `end`."""
    last = max(index for index, line in enumerate(instructions) if end in line)
    return instructions[: last + 1]


def _first_bits(line: str, widths: Iterable[tuple[str, int]], default: int) -> int:
    return next((bits for pattern, bits in widths if re.search(pattern, line)), default)


def sass_bits(line: str) -> int:
    """Bits that one LDG or STG moves."""
    widths = (
        (r"\.256\b", 256),
        (r"\.128\b", 128),
        (r"\.64\b(?!\+|\])", 64),
        (r"\.[US]16\b", 16),
        (r"\.[US]8\b", 8),
    )
    return _first_bits(line.split("[")[0].split("desc")[0], widths, 32)


def amd_bits(line: str) -> int:
    """Bits that one global access moves."""
    widths = (("dwordx4", 128), ("dwordx3", 96), ("dwordx2", 64), ("short", 16), ("byte", 8))
    return _first_bits(line.split()[0], widths, 32)
