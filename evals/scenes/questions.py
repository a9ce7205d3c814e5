"""Questions about drawn scenes, in six families, with their answers and where in the picture these stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from accel.errors import OptionError
from accel.evals.scenes.draw import COLORS, SHAPES, SPLITS, Scene, Thing, scene

_ITEM_SEED = 17
_RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three")


@dataclass(frozen=True)
class Question:
    """text: words with spaces between them, the last one "?". answer: one word, or three for the sign.

    evidence: cells without which the answer cannot be known. looks: (word number, one or two groups of cells), where reading the picture after that
    word of `text + answer` would help; an empty group means that nothing fits.
    guesses: answers that name something present, for the guessing baseline.
    hint: for yes and no, how often the two parts of the question stand in the picture by themselves, as a share of chance.
    """

    family: str
    text: str
    answer: str
    evidence: tuple[int, ...]
    looks: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]
    guesses: tuple[str, ...] = field(default=())
    hint: float = 0.0


@dataclass(frozen=True, eq=False)
class Item:
    """One held-out question with its scene."""

    index: int
    scene: Scene
    question: Question


def question(family: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question of that family about the scene; None where the scene has none (two things too close for a relation)."""
    if family not in FAMILIES:
        raise OptionError(f"a family of questions is one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family](scene, rng)


def held_out(family: str, split: str, n: int, *, seed: int = 0) -> list[Item]:
    """n questions of one family, one per scene, the same on every call. Scenes without such a question are passed over."""
    if split not in SPLITS or n < 1:
        raise OptionError(f"held-out questions need a split ({', '.join(SPLITS)}) and n ≥ 1, got {split!r} and {n}")
    family_number = list(FAMILIES).index(family) if family in FAMILIES else 0
    found: list[Item] = []
    index = 0
    while len(found) < n:
        drawn = scene(split, index, seed=seed)
        asked = question(family, drawn, np.random.default_rng([SPLITS[split], seed, index, _ITEM_SEED, family_number]))
        if asked is not None:
            found.append(Item(index, drawn, asked))
        index += 1
    return found


def _exist(scene: Scene, rng: np.random.Generator) -> Question:
    """Yes and no alike, about a colour and a shape that are both there, in one thing or in different ones.

    Both kinds come from pairs whose colour and shape are equally frequent in the picture: who only counts them has to toss a coin.
    """
    colors, shapes = (Counter(getattr(t, part) for t in scene.things) for part in ("color", "shape"))
    present = {(t.color, t.shape) for t in scene.things}
    groups: dict[tuple[int, int], tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {}
    for color in sorted(colors):
        for shape in sorted(shapes):
            group = groups.setdefault((colors[color], shapes[shape]), ([], []))
            group[(color, shape) not in present].append((color, shape))
    fair = [group for group in groups.values() if all(group)] or [([*present], [pair for group in groups.values() for pair in group[1]])]
    weights = np.array([len(yes) + len(no) for yes, no in fair], float)
    group = fair[rng.choice(len(fair), p=weights / weights.sum())]
    is_there = bool(rng.integers(0, 2))
    pairs = sorted(group[not is_there])
    color, shape = pairs[rng.integers(0, len(pairs))]
    same_color = _cells(scene, lambda t: t.color == color)
    both = _cells(scene, lambda t: t.color == color and t.shape == shape)
    evidence = both or _cells(scene, lambda t: t.color == color or t.shape == shape)
    return Question(
        "exist", f"is there a {color} {shape} ?", "yes" if is_there else "no", evidence, ((3, (same_color,)), (4, (both,)), (5, (both,))),
        ("yes", "no"), colors[color] * shapes[shape] / len(scene.things),
    )  # fmt: skip


def _color(scene: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(_unique_shapes(scene), rng)
    cells, guesses = (thing.cell,), tuple(sorted({t.color for t in scene.things}))
    return Question("color", f"what color is the {thing.shape} ?", thing.color, cells, ((4, (cells,)), (5, (cells,))), guesses)


def _shape(scene: Scene, rng: np.random.Generator) -> Question:
    colors = Counter(t.color for t in scene.things)
    thing = _pick([t for t in scene.things if colors[t.color] == 1], rng)
    cells, guesses = (thing.cell,), tuple(sorted({t.shape for t in scene.things}))
    return Question("shape", f"what shape is {thing.color} ?", thing.shape, cells, ((3, (cells,)), (4, (cells,))), guesses)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    colors = Counter(t.color for t in scene.things)
    n = int(rng.integers(0, len(NUMBERS)))
    named = [c for c in COLORS if colors[c] == n]
    color = named[rng.integers(0, len(named))]
    cells = _cells(scene, lambda t: t.color == color)
    # zero rests on everything that is there
    evidence = cells or tuple(t.cell for t in scene.things)
    guesses = tuple(NUMBERS[n] for n in sorted(set(colors.values())))
    return Question("count", f"how many are {color} ?", NUMBERS[n], evidence, ((3, (cells,)), (4, (cells,))), guesses)


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Yes and no alike, between two things whose shapes stand once and that lie at least two cells apart in the direction asked for."""
    once = _unique_shapes(scene)
    a, b = (once[i] for i in rng.permutation(len(once))[:2])
    relation = _RELATIONS[rng.integers(0, 4)]
    distance = {"left of": b.column - a.column, "right of": a.column - b.column, "above": b.row - a.row, "below": a.row - b.row}[relation]
    if abs(distance) < 2:
        return None
    words = f"is the {a.shape} {relation} the {b.shape} ?"
    one, other, n_words = (a.cell,), (b.cell,), len(words.split())
    looks = ((2, (one,)), (n_words - 2, (other,)), (n_words - 1, (one, other)))
    return Question("relation", words, "yes" if distance > 0 else "no", one + other, looks, ("yes", "no"))


def _word(scene: Scene, _rng: np.random.Generator) -> Question:
    cells = scene.sign_cells
    looks = tuple((5 + i, ((cell,),)) for i, cell in enumerate(cells))
    # who sees the digits and not their places can only try their orders
    guesses = sorted({" ".join(map(str, order)) for order in permutations(scene.digits)})
    return Question("word", "what does the sign say ?", " ".join(map(str, scene.digits)), cells, looks, tuple(guesses))


FAMILIES: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "exist": _exist, "color": _color, "shape": _shape, "count": _count, "relation": _relation, "word": _word,
}  # fmt: skip


def _cells(scene: Scene, fits: Callable[[Thing], bool]) -> tuple[int, ...]:
    return tuple(t.cell for t in scene.things if fits(t))


def _unique_shapes(scene: Scene) -> list[Thing]:
    shapes = Counter(t.shape for t in scene.things)
    return [t for t in scene.things if shapes[t.shape] == 1]


def _pick(things: list[Thing], rng: np.random.Generator) -> Thing:
    return things[rng.integers(0, len(things))]


def vocabulary() -> list[str]:
    """Every word that a question or an answer can hold, in a fixed order."""
    fixed = "is there a what color the shape how many are left right of above below does sign say ? yes no"
    return [*fixed.split(), *NUMBERS, *COLORS, *SHAPES, *map(str, range(10))]
