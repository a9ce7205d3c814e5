"""The numbers that the GPU kernels are to reach, and how they are read from the rows of a visit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
DENSE = ("sdpa flash", "sdpa cudnn", "flex attention", "flash-attn 2", "flash-attn 3", "flash_attn.cute", "ours dense")


@dataclass(frozen=True)
class Bar:
    """A number the release promises. `reach` returns it from the rows, None where a part of it was not measured."""

    name: str
    wanted: float
    unit: str
    reach: Callable[[Sequence[Row]], float | None]
    is_at_most: bool = False

    def judge(self, rows: Sequence[Row]) -> Row:
        reached = self.reach(rows)
        met = None if reached is None else (reached <= self.wanted if self.is_at_most else reached >= self.wanted)
        return {"bar": self.name, "wanted": self.wanted, "unit": self.unit, "at_most": self.is_at_most, "reached": reached, "met": met}


def find(rows: Iterable[Row], **facts: Any) -> Row | None:
    """The last row with these facts that has a time."""
    found = [r for r in rows if "ms" in r and all(r.get(name) == value for name, value in facts.items())]
    return found[-1] if found else None


def best_dense(rows: Iterable[Row], bench: str) -> float | None:
    """Milliseconds of the fastest dense attention in one benchmark."""
    ms = [r["ms"] for r in rows if r["bench"] == bench and r["what"] in DENSE and "ms" in r]
    return min(ms, default=None)


def _value(bench: str, what: str, name: str) -> Callable[[Sequence[Row]], float | None]:
    def reach(rows: Sequence[Row]) -> float | None:
        row = find(rows, bench=bench, what=what)
        return None if row is None else row.get(name)

    return reach


def dense_ms(rows: Sequence[Row], bench: str, against: str | None) -> float | None:
    if against is None:
        return best_dense(rows, bench)
    row = find(rows, bench=bench, what=against)
    return None if row is None else row["ms"]


def _speedup(bench: str, what: str, against: str | None, *, times_density: bool = False) -> Callable[[Sequence[Row]], float | None]:
    """How many times faster than one dense attention, or than the best of them; times the density, 1 where time falls exactly with it."""

    def reach(rows: Sequence[Row]) -> float | None:
        row, dense = find(rows, bench=bench, what=what), dense_ms(rows, bench, against)
        return None if row is None or dense is None else dense / row["ms"] * (row["density"] if times_density else 1.0)

    return reach


def _share(bench: str, what: str) -> Callable[[Sequence[Row]], float | None]:
    """Time as a share of the best dense attention's."""

    def reach(rows: Sequence[Row]) -> float | None:
        row, dense = find(rows, bench=bench, what=what), best_dense(rows, bench)
        return None if row is None or dense is None else row["ms"] / dense

    return reach


def _overhead(rows: Sequence[Row]) -> float | None:
    """The slowest launch of a layer in prefill or decoding, µs."""
    found = [r["host_us"] for r in rows if r["bench"] == "launch" and r.get("is_layer")]
    return max(found, default=None)


def bench_name(kind: str, tokens: int, head_dim: int) -> str:
    """"prefill 32K D128": how benchmarks are called here and in `bench`."""
    return f"{kind} {tokens / 1024:g}K D{head_dim}"


_K32, _K32_64, _K128 = bench_name("prefill", 32768, 128), bench_name("prefill", 32768, 64), bench_name("prefill", 131072, 128)
_FLEX = [(f"{n}K", bench_name("flexprefill", n * 1024, 128)) for n in (32, 128)]

BARS = (
    Bar("kernel, lists at 25 %, 32K, D 128", 380, "TFLOP/s", _value(_K32, "lists 25 %", "tflops")),
    Bar("kernel, lists at 25 %, 32K, D 64", 280, "TFLOP/s", _value(_K32_64, "lists 25 %", "tflops")),
    Bar("PowerAttention at 128K against SDPA flash", 15, "×", _speedup(_K128, "power", "sdpa flash")),
    Bar("PowerAttention at 128K against the best dense", 12, "×", _speedup(_K128, "power", None)),
    *(
        Bar(f"FlexPrefill's kernel at {size}, speed-up × density, against {name}", wanted, "", _speedup(bench, "kernel", dense, times_density=True))
        for size, bench in _FLEX
        for wanted, name, dense in ((0.75, "SDPA flash", "sdpa flash"), (0.55, "the best dense", None))
    ),
    *(
        Bar(f"selection at {size}, share of the best dense", wanted, "", _share(bench, "selection"), is_at_most=True)
        for wanted, (size, bench) in zip((0.10, 0.02), _FLEX, strict=True)
    ),
    *(
        Bar(f"decode, PowerAttention, batch {batch}, share of copy bandwidth", 0.70, "", _value(f"decode {batch}", "power", "of_copy"))
        for batch in (16, 64)
    ),
    Bar("launch of one layer on the host", 100, "µs", _overhead, is_at_most=True),
)


def bars(rows: Sequence[Row]) -> list[Row]:
    """Every bar: wanted, reached, met; None where nothing was measured."""
    return [bar.judge(rows) for bar in BARS]


def bars_table(judged: Sequence[Row]) -> list[str]:
    """The bars as a markdown table."""
    lines = ["| bar | wanted | reached | met |", "|---|---|---|---|"]
    for bar in judged:
        wanted = f"{'≤' if bar['at_most'] else '≥'} {bar['wanted']:g} {bar['unit']}".strip()
        reached = "not measured" if bar["reached"] is None else f"{bar['reached']:.3g} {bar['unit']}".strip()
        met = {None: "–", True: "yes", False: "**no**"}[bar["met"]]
        lines.append(f"| {bar['bar']} | {wanted} | {reached} | {met} |")
    return lines
