"""The static bars: every variant compiled for every target, and its machine code read."""

import functools
import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from fastddpm.kernels import aot
from fastddpm.kernels.aot import TARGETS, VARIANTS, Variant, compile_variant, measure, missed_bars
from fastddpm.kernels.machine_code import read_cubin, sass_bits

measured = functools.cache(measure)
compiled = functools.cache(compile_variant)
read = functools.cache(read_cubin)


@pytest.fixture(autouse=True, scope="module")
def once():
    """What was compiled and disassembled to be measured is looked at by other tests too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "compile_variant", compiled)
        patch.setattr(aot, "read_cubin", read)
        yield


def instructions(variant):
    """Its machine code on sm_90."""
    return read(compiled(variant, "sm_90").asm["cubin"])[0]


NAMES = [f"{variant.kernel} {variant.name}" for variant in VARIANTS]
BY_NAME = dict(zip(NAMES, VARIANTS, strict=True))
README = [*(f"p_sample bf16, noise {noise}" for noise in ("made", "supplied", "none")), "q_sample u8, noise made"]
"""Their figures stand there, so they are compiled for all targets."""


LARGEST = "p_sample bf16, noise made, learned, guidance, history, history2, bound"
"""The one that takes the most registers."""


def quick(target, name=""):
    """Marks of a case: H100 stands for the others, but where the README speaks of all; MI300 has the largest too."""
    named = name in README or (target == "gfx942" and name in ("", LARGEST))
    return () if target == "sm_90" or named else pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "target"),
    [
        pytest.param(variant, target, marks=quick(target, name), id=f"{name}-{target}")
        for name, variant in BY_NAME.items()
        for target in TARGETS
    ],
)
def test_bars(variant, target):
    got = measured(variant, target)
    assert missed_bars(variant, got) == []
    assert got.spill_bytes == got.shared_bytes == 0
    assert got.vector_bits >= {"u8": 32, "bf16": 64, "fp16": 64, "fp32": 128}[variant.dtype]
    assert got.bytes_per_element == variant.minimum_bytes


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("p_sample bf16, noise made", 56),
        ("p_sample bf16, noise supplied", 28),
        ("p_sample bf16, noise none", 28),
    ],
)
def test_instructions_per_element_on_sm_90(name, most):
    assert 0 < measured(BY_NAME[name], "sm_90").sass_per_element <= most


def test_nothing_runs_twice():
    """No branch but the one behind the last EXIT: then the static count is the executed one."""
    for variant in VARIANTS:
        lines = instructions(variant)
        assert not [line for line in lines if re.search(r"\b(BRA|BRX|CALL|JMP)\b", line)], variant
        assert "EXIT" in lines[-1]


def test_one_philox_call_makes_four_normals():
    lines = instructions(Variant("p_sample", "bf16", "made"))
    sines = sum("MUFU.SIN" in line for line in lines)
    logarithms = sum("MUFU.LG2" in line for line in lines)
    assert (sines, logarithms) == (2, 2), "four normals are two pairs"
    # Ten rounds of two products make a quad; a few products more are for the addresses.
    assert sum(line.startswith("IMAD.WIDE.U32") for line in lines) <= 20 + 6


def test_the_clip_passes_nan_on():
    for target, instruction in (("sm_80", "NaN"), ("sm_90", "NaN"), ("sm_100", "NaN")):
        ptx = compiled(Variant("p_sample", "bf16", "none"), target).asm["ptx"]
        clips = [line for line in ptx.splitlines() if re.search(r"\b(min|max)\.\S*f32", line)]
        assert clips and all(instruction in line for line in clips)


@pytest.mark.parametrize("target", [pytest.param(target, marks=quick(target)) for target in TARGETS])
@pytest.mark.parametrize(
    ("variant", "ones"),
    [
        (Variant("p_sample", "bf16", "made", ("learned", "history")), ("numel",)),
        (Variant("p_sample", "fp32", "supplied"), ("noise_rows",)),
        (Variant("q_sample", "u8", "made"), ("numel", "steps")),
        (Variant("q_sample", "fp32", "supplied"), ("numel",)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else value.kernel,
)
def test_arguments_that_are_one_compile(variant, ones, target):
    """The launcher turns an integer 1 into a constant, which must not change what the kernel accepts."""
    code = compile_variant(variant, target, ones=ones, aligned=False).asm
    assert "cubin" in code or "hsaco" in code


@pytest.mark.parametrize("variant", [BY_NAME["p_sample bf16, noise made"], BY_NAME["q_sample u8, noise made"]])
def test_odd_sizes_compile_without_spills(variant):
    _, _, spill = read_cubin(compile_variant(variant, "sm_90", aligned=False).asm["cubin"])
    assert spill == 0


def test_a_missed_bar_is_named():
    variant = BY_NAME["p_sample bf16, noise made"]
    got = measured(variant, "sm_90")
    worse = replace(got, sass_per_element=56.1, spill_bytes=8, shared_bytes=16, vector_bits=32, bytes_per_element=11.0)
    lines = missed_bars(variant, worse)
    assert len(lines) == 5
    for name in ("sass_per_element", "spill_bytes", "shared_bytes", "vector_bits", "bytes_per_element"):
        assert sum(f": {name} must be at " in line for line in lines) == 1


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match=r"^measure: target must be one of sm_80, .*, got sm_70; "):
        measure(VARIANTS[0], "sm_70")


@pytest.mark.parametrize(
    ("line", "bits"),
    [
        ("LDG.E.128 R4, desc[UR10][R22.64]", 128),
        ("@!P4 LDG.E.128 R4, [R8.64]", 128),
        ("LDG.E.64 R2, desc[UR10][R2.64]", 64),
        ("LDG.E R12, desc[UR10][R30.64+0x10]", 32),
        ("LDG.E.U16 R1, [R8.64]", 16),
        ("STG.E.U8 [R8.64], R1", 8),
        ("STG.E [R8.64], R1", 32),
        ("@P1 STG.E.128 [R20.64], R4", 128),
        ("LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64]", 256),
    ],
)
def test_widths_of_accesses_are_read(line, bits):
    assert sass_bits(line) == bits
