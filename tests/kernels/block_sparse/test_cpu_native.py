"""The compiled kernel against the definition in fp64, query block by query block, and what happens where it cannot be compiled."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import assert_error_bounded

from accel.kernels.block_sparse import ContiguousKeys, ImplicitPlan, PagedKeys, cpu_native
from accel.kernels.block_sparse.cpu_native import build, native_attention, why_no_build, why_unavailable

BLOCK = 32
BF16 = torch.bfloat16

native = pytest.mark.skipif(why_unavailable() is not None, reason=f"no compiled kernel: {why_unavailable()}")


def check(one, plan, *, block=BLOCK):
    """Output per query block and LSE against fp64, at the tolerance of accurate bf16; returns the output."""
    exact, exact_lse = one.exact(plan)
    out, lse = one.run(plan, "native")
    assert_error_bounded(out, exact, one.naive(plan if plan is not None else ImplicitPlan.dense(block)), block=block, floor=1e-3)
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    # fp32 sums of exact products: the LSE does not see the rounding of the inputs
    assert (lse[seen] - exact_lse[seen]).abs().max() <= 2e-5
    return out


@native
@pytest.mark.parametrize("L", [17, 63, 129, 1009])
@pytest.mark.parametrize("heads", ["shared", "per_head"])
def test_any_number_of_rows(case, L, heads):
    one = case([L], Hq=3, Hkv=1, dtype=BF16)
    check(one, one.random_plan(BLOCK, heads=1 if heads == "shared" else None))


@native
@pytest.mark.parametrize("D, Dv", [(2, 2), (16, 48), (64, 64), (80, 80), (96, 20), (128, 128), (256, 256)])
def test_any_head_dim(case, D, Dv):
    one = case([129], D=D, Dv=Dv, dtype=BF16)
    check(one, one.random_plan(BLOCK))


@native
@pytest.mark.parametrize("block", [16, 24, 64, 100, 128, 256])
def test_any_block_size(case, block):
    one = case([300], [420], Hq=2, dtype=BF16)
    check(one, one.random_plan(block), block=block)


@native
@pytest.mark.parametrize("Hq, Hkv", [(2, 2), (3, 1), (8, 1), (16, 2)], ids=["G1", "G3", "G8", "two_groups_of_8"])
@pytest.mark.parametrize("heads", ["shared", "per_head"])
def test_any_group_size(case, Hq, Hkv, heads):
    one = case([200], Hq=Hq, Hkv=Hkv, dtype=BF16)
    check(one, one.random_plan(BLOCK, heads=1 if heads == "shared" else None))


@native
@pytest.mark.parametrize("L, N", [(17, 100), (40, 257), (64, 320), (129, 1009)])
def test_a_cached_prefix_of_any_length(case, L, N):
    one = case([L], [N], Hq=4, Hkv=2, dtype=BF16)
    check(one, one.random_plan(BLOCK))


@native
@pytest.mark.parametrize("L, N", [(129, 129), (100, 301)])
def test_without_a_plan_it_is_dense(case, L, N):
    one = case([L], [N], Hq=6, Hkv=2, dtype=BF16)
    check(one, None)


@native
def test_rows_without_their_own_block_and_rows_without_any(case):
    one = case([70], [170], Hq=4, Hkv=2, dtype=BF16)
    plan = one.random_plan(16, 0.15, diagonal=False)
    assert (plan.block_mask(next(one.lens.rows())).sum(-1) == 0).any(), "the plan must hold a row of nothing"
    out = check(one, plan, block=16)
    lse = one.run(plan, "native")[1]
    assert torch.isneginf(lse).any()
    assert (out.transpose(0, 1)[torch.isneginf(lse)] == 0).all()


@native
def test_sharp_heads_keep_their_scores(case):
    # logits of spread ~12: scores rounded to bf16 would be off by 3e-2 there
    one = case([150], [201], D=64, dtype=BF16, sharpness=12.0)
    check(one, one.random_plan(BLOCK))


@native
@pytest.mark.parametrize("softcap", [1.5, 50.0])
def test_softcap(case, softcap):
    one = case([150], [201], Hq=4, Hkv=2, softcap=softcap, sharpness=4.0, dtype=BF16)
    plan = one.random_plan(BLOCK)
    check(one, plan)
    if softcap < 2:
        assert (one.run(plan, "native")[0] - replace(one, softcap=None).run(plan, "native")[0]).abs().max() > 0.05


@native
def test_gaps_between_sequences_become_zero(case):
    one = case([70, 33, 0, 129], [70, 90, 40, 129], Hq=4, Hkv=2, gap=5, dtype=BF16)
    plan = one.random_plan(BLOCK)
    out, lse = one.run(plan, "native")
    real = one.real_rows()
    assert (out[~real] == 0).all()
    assert torch.isneginf(lse[:, ~real]).all()
    assert_error_bounded(out[real], one.exact(plan)[0][real], one.naive(plan)[real], block=BLOCK)


@native
def test_paged_keys_and_strided_tensors_give_the_same(case):
    one = case([100], [150], Hq=4, Hkv=2, dtype=BF16)
    plan = one.random_plan(BLOCK)
    want, _ = one.run(plan, "native")
    pages = [torch.cat([t, t.new_full((10, *t.shape[1:]), torch.nan)]).view(10, 16, 2, -1)[torch.arange(9, -1, -1)] for t in (one.keys.k, one.keys.v)]
    paged = PagedKeys(*pages, torch.arange(9, -1, -1, dtype=torch.int32)[None], one.lens.kv_len)
    # vLLM's CPU cache keeps K transposed inside a page
    transposed = replace(paged, k_pages=paged.k_pages.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    wide = torch.full((100, 6, 20), torch.nan, dtype=BF16)
    wide[:, 1:5, 2:18] = one.q
    interleaved = ContiguousKeys(*(torch.stack([t, t * torch.nan], 1).flatten(0, 1)[::2] for t in (one.keys.k, one.keys.v)), *vars_of(one.keys))
    for other in (replace(one, keys=paged), replace(one, keys=transposed), replace(one, q=wide[:, 1:5, 2:18]), replace(one, keys=interleaved)):
        assert torch.equal(other.run(plan, "native")[0], want)


def vars_of(keys):
    return keys.start, keys.kv_len


@native
@pytest.mark.parametrize("heads", ["shared", "per_head"])
def test_many_kv_heads_are_packed_in_turn(case, monkeypatch, heads):
    one = case([150], Hq=10, Hkv=5, dtype=BF16)
    plan = one.random_plan(BLOCK, heads=1 if heads == "shared" else None)
    whole = one.run(plan, "native")[0]
    monkeypatch.setattr(cpu_native, "PACK_BYTES", 2 * 2 * 160 * (16 + 32))
    assert torch.equal(check(one, plan), whole)


@native
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_the_number_of_threads_changes_nothing(case, threads):
    one = case([200], Hq=4, Hkv=2, dtype=BF16)
    plan = one.random_plan(BLOCK)
    want = one.run(plan, "native")[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(one.run(plan, "native")[0], want)
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("side", ["q", "k", "v"])
def test_a_nan_reaches_the_rows_that_see_it_and_no_other_block(case, side):
    one = case([128], Hq=1, Hkv=1, dtype=BF16)
    rows = next(one.lens.rows())
    # block 1 is read by its own rows and by those of block 3
    plan = one.random_plan(BLOCK, 0.0)
    plan.full_index[0, 0, 3, 1] = 1
    plan.full_count[0, 0, 3] = 2
    assert plan.block_mask(rows)[0, 3].tolist() == [True, True, False, True]
    spoilt = {"q": one.q, "k": one.keys.k, "v": one.keys.v}[side]
    spoilt[40] = torch.nan
    out, _ = one.run(plan, "native")
    is_nan = out[:, 0].isnan().any(-1)
    if side == "q":
        assert is_nan.nonzero().flatten().tolist() == [40]
        return
    assert is_nan[40:64].all()
    assert is_nan[96:].all()
    assert not is_nan[:32].any()
    assert not is_nan[64:96].any()
    if side == "k":
        assert not is_nan[32:40].any()


@native
def test_infinite_scores_do_not_spread(case):
    one = case([96], Hq=1, Hkv=1, dtype=BF16)
    one.q[50] = torch.inf
    out, _ = one.run(one.random_plan(BLOCK), "native")
    assert out[:, 0].isnan().any(-1).nonzero().flatten().tolist() == [50]


@native
def test_the_library_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    first, is_fresh = build()
    assert is_fresh
    made = first.stat().st_mtime_ns
    assert build() == (first, False)
    assert first.stat().st_mtime_ns == made
    assert list(first.parent.iterdir()) == [first]
    assert first.parent.parent == tmp_path
    # writable for the group, as files are under umask 002: anybody there may have put it in place
    first.chmod(0o770)
    assert build() == (first, True)
    assert first.stat().st_mode & 0o777 == 0o700


@native
def test_a_library_that_does_not_load_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    compiled = build()[0].read_bytes()
    builds = []

    def copy(command, **options):
        builds.append(command)
        Path(command[-1]).write_bytes(compiled)

    monkeypatch.setattr(cpu_native.subprocess, "run", copy)
    build()[0].write_bytes(b"no library")
    assert cpu_native._open().accel_attend
    assert len(builds) == 1


@native
def test_two_processes_may_replace_a_library_that_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    path, _ = build()
    load, failed = cpu_native._load, []

    def fail_once(found):
        if failed:
            return load(found)
        failed.append(found)
        # the other process was faster
        found.unlink()
        raise OSError("damaged")

    monkeypatch.setattr(cpu_native, "_load", fail_once)
    assert cpu_native._open().accel_attend
    assert failed == [path]


@native
@pytest.mark.parametrize(
    "change",
    [
        lambda o: {"v": o["v"][:, :-1]}, lambda o: {"v": o["v"].float()}, lambda o: {"v": o["v"].repeat(2, 1, 1)},
        lambda o: {"k": o["k"][:, :20], "v": o["v"][:, :20]}, lambda o: {"k": o["k"][..., :8]}, lambda o: {"q": o["q"].half()},
        lambda o: {"q": o["q"].flip(-1).transpose(1, 2)}, lambda o: {"mask": o["mask"][..., :-1]}, lambda o: {"mask": o["mask"].int()},
        lambda o: {"mask": o["mask"][:, :-1]}, lambda o: {"mask": o["mask"][:1].repeat(3, 1, 1)},
    ],
    ids=[
        "fewer_values", "fp32_values", "more_value_heads", "fewer_keys_than_queries", "narrow_keys", "fp16_queries", "strided_queries",
        "narrow_mask", "int_mask", "short_mask", "mask_of_other_heads",
    ],
)  # fmt: skip
def test_what_does_not_fit_raises_instead_of_reading_other_memory(change):
    whole = {
        "q": torch.ones(40, 2, 16, dtype=BF16), "k": torch.ones(1, 100, 16, dtype=BF16), "v": torch.ones(1, 100, 16, dtype=BF16),
        "mask": torch.ones(2, 3, 4, dtype=torch.bool),
    }  # fmt: skip

    def run(q, k, v, mask):
        out = torch.full((40, 2, 16), torch.nan, dtype=BF16)
        native_attention(q, k, v, mask, block_size=BLOCK, scale=1.0, softcap=None, out=out, lse=None)
        return out

    assert (run(**whole) == 1).all()
    with pytest.raises(ValueError, match=r"kernel needs|mask must"):
        run(**{**whole, **change(whole)})


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library loaded yet, an empty cache, and a processor that could run it."""
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_native, "_cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(cpu_native.platform, "machine", lambda: "x86_64")
    cpu_native._library.cache_clear()
    yield tmp_path
    cpu_native._library.cache_clear()


def test_without_a_compiler_the_reason_is_told(fresh, monkeypatch):
    monkeypatch.setattr(cpu_native.shutil, "which", lambda name: None)
    assert "no C++ compiler" in why_unavailable()
    one = torch.zeros(4, 1, 2, dtype=BF16)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        native_attention(one, one.transpose(0, 1), one.transpose(0, 1), None, block_size=16, scale=1.0, softcap=None, out=one, lse=None)


def test_a_processor_without_the_instructions_is_not_asked_to_compile(fresh, monkeypatch):
    monkeypatch.setattr(cpu_native, "_cpu_flags", lambda: frozenset({"avx2"}))
    assert "AVX512-BF16" in why_no_build()
    assert "AVX512-BF16" in why_unavailable()


def test_a_failing_compiler_leaves_matrix_products_and_a_warning(fresh, monkeypatch, caplog):
    def fail(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr="first line\nerror: no such instruction\n")

    monkeypatch.setattr(cpu_native.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(cpu_native.subprocess, "run", fail)
    assert why_unavailable() == "the compiler failed: error: no such instruction"
    assert "matrix products are used instead" in caplog.text
    assert why_unavailable(), "asked once, told again"
    assert len(caplog.records) == 1
    [folder] = fresh.iterdir()
    assert not list(folder.iterdir())


def test_a_cache_that_cannot_be_written_is_a_reason_too(fresh, monkeypatch):
    monkeypatch.setattr(cpu_native.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("ACCEL_CACHE", str(fresh / "file"))
    (fresh / "file").write_text("a file where the folder should be")
    assert why_unavailable().startswith("the compiled kernel cannot be kept or loaded: ")


def test_a_folder_that_others_can_write_is_not_loaded_from(fresh, monkeypatch):
    monkeypatch.setattr(cpu_native.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(cpu_native.subprocess, "run", lambda *_, **__: pytest.fail("compiled into a folder that is not ours"))
    folder = fresh / f"native-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o775)
    assert "others may write there; set ACCEL_CACHE" in why_unavailable()


def test_a_folder_of_somebody_else_is_not_loaded_from(fresh, monkeypatch):
    monkeypatch.setattr(cpu_native.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(cpu_native, "_is_ours", lambda path: False)
    assert "belongs to somebody else" in why_unavailable()


@pytest.mark.parametrize(
    "uid, mode, is_ours", [(7, 0o700, True), (0, 0o755, True), (8, 0o700, False), (7, 0o720, False), (7, 0o702, False), (0, 0o777, False)]
)
def test_only_this_user_and_root_are_trusted(monkeypatch, uid, mode, is_ours):
    monkeypatch.setattr(cpu_native.os, "getuid", lambda: 7)
    monkeypatch.setattr(Path, "stat", lambda self: SimpleNamespace(st_uid=uid, st_mode=mode))
    assert cpu_native._is_ours(Path("library.so")) is is_ours


@pytest.mark.parametrize(
    "said, told",
    [
        ("k.cpp:1: error: no such instruction\n   |  ^~~~\n", "k.cpp:1: error: no such instruction"),
        ("one\nlast\n", "last"), (b"caf\xe9 error\n", "caf\ufffd error"), (None, "Command 'c++' returned non-zero exit status 1."),
    ],
    ids=["caret", "no_error_line", "bytes", "silence"],
)  # fmt: skip
def test_the_line_with_the_compilers_error_is_told(fresh, monkeypatch, said, told):
    def fail(command, **options):
        raise subprocess.CalledProcessError(1, "c++", stderr=said)

    monkeypatch.setattr(cpu_native.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(cpu_native.subprocess, "run", fail)
    assert why_unavailable() == f"the compiler failed: {told}"


def test_a_compiler_may_say_anything_in_any_encoding(fresh, monkeypatch):
    script = fresh / "compiler"
    script.write_text("#!/bin/sh\nprintf 'error: \\377\\376' >&2\nexit 1\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    assert why_unavailable() == "the compiler failed: error: \ufffd\ufffd"


def test_cxx_may_hold_arguments_and_is_the_last_word(monkeypatch):
    monkeypatch.setattr(cpu_native, "_cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(cpu_native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_native.shutil, "which", lambda name: None if name == "missing" else f"/bin/{name}")
    monkeypatch.setenv("CXX", "ccache 'g++ 12' -m64")
    assert cpu_native.compiler() == ("/bin/ccache", "g++ 12", "-m64")
    monkeypatch.delenv("CXX")
    assert cpu_native.compiler() == ("/bin/c++",)
    for wrong in ("missing", "'never closed"):
        monkeypatch.setenv("CXX", wrong)
        assert why_no_build() == f"no C++ compiler found (looked for CXX={wrong})"
