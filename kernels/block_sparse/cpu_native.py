"""Prefill in bf16 through a compiled kernel, where the processor has AVX512-BF16 and the machine a C++ compiler.

Batched products reach a third of what such a processor can do: their scores leave the caches, and torch has no product of bf16 matrices with
an fp32 result, so that accurate scores are computed from fp32 copies. `cpu_native.cpp` keeps fp32 scores in registers and the first cache. It is
compiled once per machine, in seconds, into the cache folder; without a compiler everything works as before, through matrix products.

The kernel reads and writes raw memory, so that shapes and dtypes are checked here, and loading a library runs what is in it, so that it is
loaded only from a folder that nobody else can write.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.settings import cache_folder

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w")
COMPILERS = ("c++", "g++", "clang++")
# packed keys and values held at a time, unless one head takes more
PACK_BYTES = 16 << 20
# a compiler that hangs must not hang the user
COMPILE_SECONDS = 120

_log = logging.getLogger(__name__)


class _Attention(ctypes.Structure):
    """`struct Attention` of the source; the fields' meanings stand there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "out", "lse", "keys", "values", "mask")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "out_row", "out_head", "lse_head", "mask_head", "q_len", "kv_len", "block")),
        *((name, ctypes.c_int32) for name in ("heads", "group", "dim", "value_dim", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


class _Probe(ctypes.Structure):
    """`struct Probe` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "keys", "by_key", "by_distance")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "rows", "split", "kv_len", "block")),
        *((name, ctypes.c_int32) for name in ("heads", "group", "dim", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


def why_unavailable() -> str | None:
    """Why the compiled kernel cannot run here, or None. The first call of a machine compiles it."""
    return _library()[1]


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel computes inputs like these: bf16 heads of an even size."""
    return dtype == torch.bfloat16 and head_dim % 2 == 0


def native_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, block_size: int, scale: float, softcap: float | None, out: Tensor, lse: Tensor | None,
    threads: int | None = None,
) -> None:
    """Writes causal attention of one sequence into `out` (L, Hq, Dv) and, where given, `lse` (Hq, L) fp32.

    q: (L, Hq, D) the last L of N tokens; k: (Hkv, N, D), v: (Hkv, N, Dv); all bf16 with last stride 1, except k and v, which are copied where
    it is not. mask: (Hq or 1, nq, nk) bool, the key blocks of each query block; None lists all. threads: by default as many as torch uses.
    Beyond the outputs it holds at most `PACK_BYTES` of packed keys and values, or one head's. Raises MemoryError where the machine has no
    memory left, ValueError where the tensors do not fit each other.
    """
    library = _loaded()
    _check_fit(q, k, v)
    if mask is not None:
        first, nk = (k.shape[1] - q.shape[0]) // block_size, -(-k.shape[1] // block_size)
        if mask.dtype != torch.bool or mask.shape[0] not in (1, q.shape[1]) or mask.shape[1:] != (nk - first, nk):
            raise ValueError(f"the mask must be bool, ({q.shape[1]} or 1, {nk - first}, {nk}), got {mask.dtype}, {tuple(mask.shape)}")
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    (n_kv, n, dim), value_dim, group = k.shape, v.shape[2], q.shape[1] // k.shape[0]
    threads = threads or torch.get_num_threads()
    sizes = library.accel_packed_keys(n, block_size, dim), library.accel_packed_values(n, block_size, value_dim)
    mask = mask if mask is None else mask.contiguous()
    for heads in _in_turn(n_kv, 2 * sum(sizes)):
        keys = _packed(library.accel_pack_keys, k, heads, block_size, sizes[0], threads)
        values = _packed(library.accel_pack_values, v, heads, block_size, sizes[1], threads)
        own = slice(heads.start * group, heads.stop * group)
        queries, results = q[:, own], out[:, own]
        masks = mask if mask is None or mask.shape[0] == 1 else mask[own]
        lses = None if lse is None else lse[own]
        job = _Attention(
            q=queries.data_ptr(), q_row=q.stride(0), q_head=q.stride(1), out=results.data_ptr(), out_row=out.stride(0), out_head=out.stride(1),
            lse=None if lses is None else lses.data_ptr(), lse_head=0 if lses is None else lses.stride(0),
            mask=None if masks is None else masks.data_ptr(), mask_head=0 if masks is None or masks.shape[0] == 1 else masks.stride(0),
            keys=keys.data_ptr(), values=values.data_ptr(), q_len=q.shape[0], kv_len=n, block=block_size,
            heads=queries.shape[1], group=group, dim=dim, value_dim=value_dim, threads=threads, scale=scale, softcap=softcap or 0.0,
        )  # fmt: skip
        _check(library.accel_attend(ctypes.byref(job)))


def native_probe(
    q: Tensor, k: Tensor, *, block_size: int, split: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Sums of the attention of the last rows, by key (Hq, 2, N) and by token distance (Hq, N), both fp32.

    q: (ℓ, Hq, D), the last rows of a sequence; k: (Hkv, N, D); bf16. By key the first `split` rows and the others are summed apart.
    A NaN or an infinite score spoils the sums of its head.
    """
    library = _loaded()
    _check_fit(q, k, k)
    k = k if k.stride(-1) == 1 else k.contiguous()
    (n_kv, n, dim), group = k.shape, q.shape[1] // k.shape[0]
    size = library.accel_packed_keys(n, block_size, dim)
    # the dtype and the device are what the kernel writes, whatever a user has made the default of new tensors
    by_key, by_distance = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((q.shape[1], 2, n), (q.shape[1], n)))
    for heads in _in_turn(n_kv, 2 * size):
        keys = _packed(library.accel_pack_keys, k, heads, block_size, size, torch.get_num_threads())
        own = slice(heads.start * group, heads.stop * group)
        queries = q[:, own]
        job = _Probe(
            q=queries.data_ptr(), q_row=q.stride(0), q_head=q.stride(1), keys=keys.data_ptr(), by_key=by_key[own].data_ptr(),
            by_distance=by_distance[own].data_ptr(), rows=q.shape[0], split=split, kv_len=n, block=block_size, heads=queries.shape[1],
            group=group, dim=dim, threads=torch.get_num_threads(), scale=scale, softcap=softcap or 0.0,
        )  # fmt: skip
        _check(library.accel_probe(ctypes.byref(job)))
    return by_key, by_distance


def _check_fit(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q (L, Hq, D), k (Hkv, N, D) and v (Hkv, N, Dv) are what the kernel takes for granted."""
    fits = k.shape[:2] == v.shape[:2] and k.shape[2] == q.shape[2] and q.shape[1] % k.shape[0] == 0 and 0 < q.shape[0] <= k.shape[1]
    if not fits or any(t.dtype != torch.bfloat16 or t.device.type != "cpu" for t in (q, k, v)) or q.stride(-1) != 1:
        found = "; ".join(f"{name} {tuple(t.shape)} {t.dtype} on {t.device}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"the compiled kernel needs bf16 q (L, Hq, D), k (Hkv, N, D), v (Hkv, N, Dv) with 1 ≤ L ≤ N on the CPU, got {found}")


def _in_turn(n_heads: int, head_bytes: int) -> Iterator[range]:
    """KV heads, as many at a time as `PACK_BYTES` hold."""
    at_once = max(1, PACK_BYTES // head_bytes)
    return (range(first, min(first + at_once, n_heads)) for first in range(0, n_heads, at_once))


def _packed(pack: Any, source: Tensor, heads: range, block_size: int, size: int, threads: int) -> Tensor:
    """Keys or values of some heads as the kernel reads them; `size`: elements of one head."""
    part = source[heads.start : heads.stop]
    packed = torch.empty(len(heads) * size, dtype=torch.bfloat16, device="cpu")
    n, dim = part.shape[1:]
    _check(pack(part.data_ptr(), part.stride(0), part.stride(1), len(heads), n, block_size, dim, packed.data_ptr(), threads))
    return packed


def _check(code: int) -> None:
    if code:
        raise MemoryError("the attention kernel found no memory for its tiles")


def _loaded() -> ctypes.CDLL:
    library, reason = _library()
    if library is None:
        raise RuntimeError(f"the compiled kernel is not available: {reason}")
    return library


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled kernel, or the reason why there is none; decided once per process."""
    reason = why_no_build()
    if reason is None:
        try:
            return _open(), None
        except subprocess.SubprocessError as error:
            reason = f"the compiler failed: {_complaint(error)}"
        except OSError as error:
            reason = f"the compiled kernel cannot be kept or loaded: {error}"
        _log.warning("no compiled CPU kernel, matrix products are used instead: %s", reason)
    return None, reason


def _open() -> ctypes.CDLL:
    """The library, compiled anew where the one in the cache does not load: it may be damaged, or made on a system with newer libraries."""
    path, is_fresh = build()
    try:
        return _load(path)
    except OSError:
        if is_fresh:
            raise
    # another process may have been here first
    path.unlink(missing_ok=True)
    return _load(build()[0])


def _complaint(error: subprocess.SubprocessError) -> str:
    """The line in which a compiler says what is wrong, or its last one: after the error it may draw carets."""
    # bytes after a timeout, even where text was asked for
    said = getattr(error, "stderr", None) or ""
    lines = (said.decode(errors="replace") if isinstance(said, bytes) else said).strip().splitlines() or [str(error)]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()


def why_no_build() -> str | None:
    """Why this machine cannot build the kernel, before anything is tried."""
    if platform.machine() not in ("x86_64", "AMD64") or "avx512_bf16" not in _cpu_flags():
        return "this processor has no AVX512-BF16"
    if compiler():
        return None
    asked = os.environ.get("CXX")
    return f"no C++ compiler found (looked for {f'CXX={asked}' if asked else ', '.join(COMPILERS)})"


def compiler() -> tuple[str, ...] | None:
    """The C++ compiler and its arguments: `CXX`, such as "ccache g++", or the first of the usual names."""
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError:
        # a quotation mark that nothing closes
        return None
    for name, *arguments in [asked] if asked else [[name] for name in COMPILERS]:
        if path := shutil.which(name):
            return path, *arguments
    return None


def build() -> tuple[Path, bool]:
    """The compiled library in the cache folder, and whether it was built now. Processes that build at once do not disturb each other."""
    chosen = compiler()
    assert chosen is not None
    # a cache folder may be shared between machines and compilers; users have folders of their own in it
    facts = "\0".join([SOURCE.read_text(encoding="utf-8"), *chosen, *FLAGS, *sorted(_cpu_flags())])
    target = cache_folder() / f"native-{os.getuid()}" / f"attention-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(target.parent):
        raise PermissionError(f"{target.parent} belongs to somebody else or others may write there; set ACCEL_CACHE to a folder of your own")
    if target.exists() and _is_ours(target):
        return target, False
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fresh = Path(folder) / target.name
        # in English and in any encoding: what it says is searched and shown
        subprocess.run(
            [*chosen, *FLAGS, str(SOURCE), "-o", str(fresh)], check=True, capture_output=True, encoding="utf-8", errors="replace",
            env={**os.environ, "LC_ALL": "C"}, timeout=COMPILE_SECONDS,
        )  # fmt: skip
        fresh.chmod(0o700)
        fresh.replace(target)
    return target, True


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user and root can have written it."""
    found = path.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in ("accel_packed_keys", "accel_packed_values"):
        function = getattr(library, name)
        function.argtypes, function.restype = (number, number, number), number
    for name in ("accel_pack_keys", "accel_pack_values"):
        getattr(library, name).argtypes = (pointer, number, number, number, number, number, number, pointer, ctypes.c_int)
    library.accel_attend.argtypes = library.accel_probe.argtypes = (pointer,)
    return library


@cache
def _cpu_flags() -> frozenset[str]:
    """What the processor says that it can do; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
