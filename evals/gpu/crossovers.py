"""From which length a method pays on the GPU of a visit, read from its rows. `scripts/ship_crossovers.py` puts the answers into the library."""

from __future__ import annotations

from collections.abc import Sequence

from accel.crossover import DEFAULT_TOKENS, WIDE_HEAD_DIM, WIDE_HEAD_TOKENS
from accel.evals.gpu.bars import Row, best_dense

# Share by which a method must be faster here, where one kind of prompt speaks for everybody's: some are denser. `accel tune crossover`, which
# measures a user's own prompts, asks for less.
MARGIN = 0.15
# a visit may end early: of a method with fewer lengths nothing is said
FEWEST_LENGTHS = 3


def crossovers(rows: Sequence[Row], *, sm: str) -> dict[str, int]:
    """Tokens by `accel.crossover.crossover_key`, of every method and head size that was measured beside dense attention.

    rows: of one visit; those that have a `method` count. sm: "9.0", or empty where no GPU was measured.
    The smallest measured length from which the method stays faster than the best dense attention of the same benchmark; where it is slower at
    the longest one, that length plus one, since nothing was measured beyond, and no less than the default.
    """
    if not sm:
        return {}
    pays: dict[str, dict[int, bool]] = {}
    head_dims: dict[str, int] = {}
    for row in rows:
        dense = best_dense(rows, row["bench"])
        if "method" in row and "ms" in row and dense is not None:
            key = f"{row['method']}/sm_{sm.replace('.', '')}/{row['dtype']}/d{row['head_dim']}"
            head_dims[key] = row["head_dim"]
            pays.setdefault(key, {})[row["tokens"]] = row["ms"] * (1 + MARGIN) <= dense
    return {
        key: _first_that_stays(by_length, WIDE_HEAD_TOKENS if head_dims[key] > WIDE_HEAD_DIM else DEFAULT_TOKENS["cuda"])
        for key, by_length in sorted(pays.items())
        if len(by_length) >= FEWEST_LENGTHS
    }


def _first_that_stays(pays: dict[int, bool], default: int) -> int:
    first = max(max(pays) + 1, default)
    for tokens in sorted(pays, reverse=True):
        if not pays[tokens]:
            break
        first = tokens
    return first


def crossovers_section(found: dict[str, int]) -> list[str]:
    """The answers as a markdown table."""
    about = f"Selection included, at least {MARGIN:.0%} faster than the best dense attention of the same benchmark: the shortest measured length."
    table = [f"| {key} | {tokens} |" for key, tokens in found.items()]
    head = ["| method / architecture / dtype / head size | tokens |", "|---|---|"]
    return ["## From which length it pays", "", about, "", *([*head, *table] if found else ["not measured"]), ""]
