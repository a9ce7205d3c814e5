"""Ahead-of-time compilation of one kernel for one GPU generation, and what the machine code needs. No GPU, no driver.

    from aot.aot_support import compile_kernel
    code = compile_kernel(kernel, {"q_ptr": "*bf16", "n": "i32", "scale": "fp32"}, {"BLOCK": 64}, sm=90, num_warps=8, num_stages=2)
    assert code.hgmma and not code.spills
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# bytes of shared memory that one thread block may have, and that an SM has
SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
SM_SHARED_BYTES = {80: 167_936, 89: 102_400, 90: 233_472, 100: 233_472}
SM_REGISTERS = 65_536


@dataclass(frozen=True)
class Code:
    """What one compiled kernel needs, and counts of its instructions."""

    sm: int
    num_warps: int
    registers: int      # per thread
    stack: int          # bytes per thread
    spills: int         # local loads and stores (LDL, STL)
    loop_spills: int    # those inside a loop; before and behind the loops they cost nothing that could be measured
    shared: int         # bytes per thread block, static and dynamic
    hgmma: int          # wgmma, Hopper
    hgmma_waits: int    # waits for wgmma
    hmma: int           # mma of warps, Ampere's
    utcmma: int         # tcgen05, Blackwell
    ldgsts: int         # cp.async
    utmaldg: int        # TMA loads
    ttgir: str = field(repr=False)
    sass: str = field(repr=False)

    @property
    def is_serialized(self) -> bool:
        """Whether wgmma instructions wait for one another: what ptxas does, silently here, where registers are short, even without a spill."""
        return self.hgmma > 0 and 2 * self.hgmma_waits > self.hgmma

    @property
    def blocks_per_sm(self) -> int:
        """Thread blocks that fit an SM together. The hardware allots registers in units of 8 per thread, and 1 KB of shared memory per block."""
        by_registers = SM_REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.num_warps)
        return min(by_registers, SM_SHARED_BYTES[self.sm] // (self.shared + 1024))


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    sm: int = 90,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
    aligned: Collection[str] | None = None,
) -> Code:
    """The machine code of a jit function on sm_80, sm_90 …; the same request is compiled once per session.

    signature: the type of every argument that is no constexpr, "*bf16", "i32", "fp32" …. constants: the constexpr arguments, and arguments
    fixed to a value (None for an absent pointer). aligned: names known to be multiples of 16; by default every pointer and every name that
    starts with "stride", which is what Triton finds at run time in tensors of good strides.
    """
    missing = set(kernel.arg_names) ^ (set(signature) | set(constants))
    if missing or set(signature) & set(constants):
        raise ValueError(f"every argument belongs into signature or constants, once; wrong or missing: {sorted(missing)}")
    if aligned is None:
        aligned = [name for name, kind in signature.items() if kind.startswith("*") or name.startswith("stride")]
    return _compile(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), sm, num_warps, num_stages, maxnreg
    )


@cache
def _compile(
    kernel: Any, signature: tuple[tuple[str, str], ...], constants: tuple[tuple[str, Any], ...], aligned: tuple[str, ...],
    sm: int, num_warps: int, num_stages: int, maxnreg: int | None,
) -> Code:
    place = {name: at for at, name in enumerate(kernel.arg_names)}
    kinds = {**dict(signature), **{name: "constexpr" for name, _ in constants}}
    source = ASTSource(
        fn=kernel,
        signature={name: kinds[name] for name in kernel.arg_names},
        constexprs={(place[name],): value for name, value in constants},
        attrs={(place[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    usage, sass = _dump(compiled.asm["cubin"])

    def used(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        assert found is not None, usage
        return int(found[1])

    def count(opcodes: str) -> int:
        return len(re.findall(rf"\b(?:{opcodes})\b", sass))

    # the driver is told the dynamic part, the file names the static one
    shared = max(used("SHARED"), int(compiled.metadata.shared))
    return Code(
        sm=sm, num_warps=num_warps, registers=used("REG"), stack=used("STACK"), spills=count("LDL|STL"), loop_spills=_loop_spills(sass),
        shared=shared,
        hgmma=count("HGMMA"), hgmma_waits=count(r"WARPGROUP\.DEPBAR"), hmma=count("HMMA"), utcmma=count("UTC[A-Z]*MMA"),
        ldgsts=count("LDGSTS"), utmaldg=count("UTMALDG"),
        ttgir=str(compiled.asm["ttgir"]), sass=sass,
    )


def _loop_spills(sass: str) -> int:
    """Local loads and stores between the target of a backward branch and the branch."""
    spills, loops = [], []
    for line in sass.splitlines():
        found = re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);", line)
        if found is None:
            continue
        at, opcode = int(found[1], 16), found[2].split(".")[0]
        if opcode in ("LDL", "STL"):
            spills.append(at)
        target = re.search(r"0x([0-9a-f]+)", found[3]) if opcode == "BRA" else None
        # the last branch of a program jumps to itself
        if target is not None and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    return sum(any(first <= at <= last for first, last in loops) for at in spills)


def _dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and disassembly of a cubin, by the cuobjdump inside the triton wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout for flag in ("-res-usage", "-sass")
        )
    return usage, sass
