"""The kernels compiled ahead of time, on any machine, and what their machine code says.

Triton's wheel carries the assembler and disassemblers it needs, so no GPU takes part. What is read is exact; what it
means for time is a bound (see `report`), because nothing here has run.
"""

import re
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .dispatch import HAS_TRITON, INTERPRETED
from .machine_code import amd_bits, read_amdgcn, read_cubin, sass_bits
from .philox import TRAINING

if TYPE_CHECKING:
    from triton import JITFunction
    from triton.compiler import CompiledKernel

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""The GPUs that every kernel is compiled for: A100, H100 and H200, B200, MI300."""

ELEMENTS_PER_THREAD = 4
"""A quad."""

MAX_SASS_WITH_NOISE = 56.0
"""Bar on sm_90: instructions per element of a bfloat16 `p_sample` without options that makes its noise.

At `report.DEFAULT_ISSUE_RATE` they take 1.9 µs a million elements, and the memory that they move 3.3 µs.
"""

MAX_SASS_WITHOUT_NOISE = 28.0
"""Bar on sm_90: likewise, where the noise is supplied and where there is none."""

_COMPILING = threading.Lock()  # the compiler is not known to stand several threads
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "u8": 1}
_POINTERS = {
    "x": "*fp32",
    "table": "*fp32",
    "timesteps": "*i64",
    "step": "*i64",
    "end": "*i64",
    "sample_id": "*i64",
    "seed": "*i64",
    "noise": "*fp32",
    "guidance": "*fp32",
    "history": "*fp32",
    "history2": "*fp32",
    "bound": "*fp32",
    "known": "*fp32",
    "mask": "*fp32",
    "t": "*i64",
    "signals": "*fp32",
    "spreads": "*fp32",
    "eps": "*fp32",
    "x_t": "*fp32",
    "eps_out": "*fp32",
}


@dataclass(frozen=True)
class Variant:
    """One way to call a kernel.

    Attributes:
        kernel: "p_sample" or "q_sample".
        dtype: of the network's output, or of x₀: "fp32", "bf16", "fp16" or "u8".
        noise: "made" in the kernel, "supplied" by the caller, or "none" (only p_sample).
        options: what p_sample is given besides: "learned", "guidance", "history", "history2", "bound", "known".
    """

    kernel: str
    dtype: str
    noise: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the report writes it: `bf16, noise made, guidance`."""
        return ", ".join((self.dtype, f"noise {self.noise}", *self.options))

    @property
    def quad_bits(self) -> int:
        """Of a thread's narrowest access: its elements in one."""
        return 8 * _BYTES[self.dtype] * ELEMENTS_PER_THREAD

    @property
    def minimum_bytes(self) -> float:
        """Bytes per element that any implementation must move: each operand once."""
        size = _BYTES[self.dtype]
        if self.kernel == "q_sample":
            return size + 4 + 4
        per_option = {"guidance": size, "history": 8, "history2": 8, "learned": size, "bound": 0, "known": 8}
        noise = 4 if self.noise == "supplied" else 0
        return 4 + 4 + size + noise + sum(per_option[option] for option in self.options)


VARIANTS = (
    *(
        Variant("p_sample", dtype, noise)
        for noise in ("made", "supplied", "none")
        for dtype in ("bf16", "fp16", "fp32")
    ),
    Variant("p_sample", "bf16", "made", ("guidance",)),
    Variant("p_sample", "bf16", "made", ("learned",)),
    Variant("p_sample", "bf16", "made", ("bound",)),
    Variant("p_sample", "bf16", "none", ("history",)),
    Variant("p_sample", "bf16", "none", ("history", "history2")),
    Variant("p_sample", "bf16", "made", ("learned", "guidance", "history", "bound")),
    Variant("p_sample", "bf16", "made", ("learned", "guidance", "history", "history2", "bound")),
    Variant("p_sample", "bf16", "made", ("known",)),
    Variant("p_sample", "bf16", "supplied", ("known",)),
    *(Variant("q_sample", dtype, noise) for dtype in ("fp32", "u8") for noise in ("made", "supplied")),
)
"""What the report and the tests look at."""


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel is made of.

    Attributes:
        kernel: the op.
        variant: `Variant.name`.
        target: one of `TARGETS`.
        sass_per_element: machine instructions of one thread per element it owns, with everything a thread does
            once (addresses, coefficients, the key schedule) included and the padding behind the last exit left
            out. There are no loops: no instruction runs twice. On gfx942 they are AMDGCN instructions.
        registers: per thread; vector registers on gfx942.
        spill_bytes: stack or scratch memory per thread.
        shared_bytes: shared memory (LDS) per program.
        vector_bits: the narrowest access to global memory among those made for every element.
        bytes_per_element: bytes those accesses move per element.
    """

    kernel: str
    variant: str
    target: str
    sass_per_element: float
    registers: int
    spill_bytes: int
    shared_bytes: int
    vector_bits: int
    bytes_per_element: float

    def as_dict(self) -> dict[str, str | float | int]:
        """The fields in their order, for JSON."""
        return asdict(self)


def measure(variant: Variant, target: str) -> Compiled:
    """Compile one variant for one target and read its machine code.

    Args:
        variant: the kernel and its options.
        target: one of `TARGETS`.

    Returns:
        What was read.

    Raises:
        ValueError: the target is unknown.
        RuntimeError: Triton is missing, is interpreting, or its disassembler says what cannot be understood.
    """
    if target not in TARGETS:
        raise ValueError(f"measure: target must be one of {', '.join(TARGETS)}, got {target}; choose one of these")
    compiled = compile_variant(variant, target)
    if target.startswith("sm_"):
        instructions, registers, spill = read_cubin(compiled.asm["cubin"])
        widths = [sass_bits(line) for line in instructions if re.search(r"\b(LDG|STG)\b", line)]
    else:
        instructions, registers, spill = read_amdgcn(compiled.asm["amdgcn"])
        widths = [amd_bits(line) for line in instructions if re.match(r"(global|buffer|flat)_(load|store)", line)]
    # Triton's IR tells of which types a thread reads and writes a quad, and how many numbers of a sample (clock, seed,
    # coefficients) it reads, which are once for all lanes of a warp. What is beyond both is a quad in pieces.
    ir = compiled.asm["ttgir"]
    types = re.findall(r"tt\.(?:load|store) .*x!tt\.ptr<[a-z]+(\d+)>", ir)
    whole = Counter(widths) & Counter(ELEMENTS_PER_THREAD * int(bits) for bits in types)
    pieces = sorted((Counter(widths) - whole).elements())[len(re.findall(r"tt\.load .* : !tt\.ptr<", ir)) :]
    each = [*whole.elements(), *pieces]
    return Compiled(
        kernel=variant.kernel,
        variant=variant.name,
        target=target,
        sass_per_element=len(instructions) / ELEMENTS_PER_THREAD,
        registers=registers,
        spill_bytes=spill,
        shared_bytes=compiled.metadata.shared,
        vector_bits=min(each),
        bytes_per_element=sum(each) / 8 / ELEMENTS_PER_THREAD,
    )


def missed_bars(variant: Variant, measured: Compiled) -> list[str]:
    """The static bars that one compiled variant misses, a line each; empty when it meets them all."""
    bars = [
        ("spill_bytes", measured.spill_bytes, 0),
        ("shared_bytes", measured.shared_bytes, 0),
        ("bytes_per_element", measured.bytes_per_element, variant.minimum_bytes),
    ]
    if variant.kernel == "p_sample" and measured.target == "sm_90" and variant.dtype == "bf16":
        bar = MAX_SASS_WITH_NOISE if variant.noise == "made" else MAX_SASS_WITHOUT_NOISE
        if not variant.options:
            bars.append(("sass_per_element", measured.sass_per_element, bar))
    where = f"{variant.kernel} {variant.name} on {measured.target}"
    missed = [f"{where}: {name} must be at most {bar:g}, got {have:g}" for name, have, bar in bars if have > bar]
    if measured.vector_bits < variant.quad_bits:
        missed.append(f"{where}: vector_bits must be at least {variant.quad_bits}, got {measured.vector_bits}")
    return missed


def _arguments(variant: Variant) -> tuple["JITFunction", dict[str, str], dict[str, object]]:
    """The kernel, its pointer and integer arguments' types, and its constants but for the target's."""
    from .p_sample_triton import p_sample_kernel
    from .q_sample_triton import q_sample_kernel

    if variant.kernel == "p_sample":
        types = _POINTERS | {"out": f"*{variant.dtype}", "numel": "i32", "noise_rows": "i32"}
        constants: dict[str, object] = {
            "LEARNED": "learned" in variant.options,
            "STOCHASTIC": variant.noise != "none",
        }
        given = {"history", "history2", "bound"} & set(variant.options)
        given |= {"out_uncond", "guidance"} if "guidance" in variant.options else set()
        given |= {"known", "mask"} if "known" in variant.options else set()
        given |= {"noise"} if variant.noise == "supplied" else set()
        types["out_uncond"] = types["out"]
        optional = {"noise", "out_uncond", "guidance", "history", "history2", "bound", "known", "mask"}
        return p_sample_kernel, types, constants | dict.fromkeys(optional - given)
    types = _POINTERS | {"x_start": f"*{variant.dtype}", "numel": "i32", "steps": "i32"}
    unused = ("eps",) if variant.noise == "made" else ("seed", "sample_id")
    return q_sample_kernel, types, {"DOMAIN": TRAINING} | dict.fromkeys(unused)


def compile_variant(
    variant: Variant, target: str, *, ones: Iterable[str] = (), aligned: bool = True
) -> "CompiledKernel":
    """Compile one variant for one target, as the launcher would.

    Args:
        variant: the kernel and its options.
        target: one of `TARGETS`.
        ones: integer arguments that are 1: the launcher makes them constants.
        aligned: whether storage is aligned to 16 bytes and the number of elements divisible by 16.

    Returns:
        Triton's compiled kernel.

    Raises:
        RuntimeError: Triton is missing or interpreting.
    """
    if not HAS_TRITON or INTERPRETED:
        why = "TRITON_INTERPRET is set; unset it" if HAS_TRITON else "it is not installed; pip install triton"
        raise RuntimeError(f"measure: triton must be able to compile, but {why}")
    import triton
    from triton.backends.compiler import GPUTarget

    from .common_triton import QUADS

    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    kernel, types, constants = _arguments(variant)
    constants |= {"APPROX": cuda, "QUADS": QUADS} | dict.fromkeys(ones, 1)
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if aligned and (signature[name].startswith("*") or (name == "numel" and name not in ones))
    }
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    # Without contraction the count cannot lean on a default that differs between Triton's versions.
    options = {"num_warps": QUADS // gpu.warp_size, "enable_fp_fusion": False}
    with _COMPILING:
        return triton.compile(source, target=gpu, options=options)
