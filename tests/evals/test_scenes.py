"""Drawn scenes: the same for the same seed, apart between splits, and every answer follows from the picture."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from accel.errors import OptionError
from accel.evals.scenes import FAMILIES, GRID, PATCH, SIZE, Question, Scene, baselines, held_out, question, scene
from accel.evals.scenes.draw import COLORS, SHAPES, backgrounds, digit_masks, shape_masks
from accel.evals.scenes.questions import NUMBERS, vocabulary

SCENES = [scene("validation", i) for i in range(60)]


def answer_from_the_things(asked: Question, drawn: Scene) -> str:
    """The answer found by reading the question, written apart from the generator."""
    words = asked.text.removesuffix(" ?").split()
    things = drawn.things
    if asked.family == "exist":
        return "yes" if any((t.color, t.shape) == (words[3], words[4]) for t in things) else "no"
    if asked.family == "color":
        [thing] = [t for t in things if t.shape == words[4]]
        return thing.color
    if asked.family == "shape":
        [thing] = [t for t in things if t.color == words[3]]
        return thing.shape
    if asked.family == "count":
        return NUMBERS[sum(t.color == words[3] for t in things)]
    if asked.family == "relation":
        [a], [b] = ([t for t in things if t.shape == shape] for shape in (words[2], words[-1]))
        is_so = {"left": a.column < b.column, "right": a.column > b.column, "above": a.row < b.row, "below": a.row > b.row}[words[3]]
        return "yes" if is_so else "no"
    return " ".join(map(str, drawn.digits))


def test_the_same_number_gives_the_same_scene_and_another_number_another() -> None:
    again = scene("validation", 7)
    assert again.things == SCENES[7].things
    assert again.digits == SCENES[7].digits
    assert np.array_equal(again.image, SCENES[7].image)
    assert not np.array_equal(again.image, SCENES[8].image)
    assert scene("validation", 7, seed=1).things != again.things


def test_scenes_stay_what_the_model_was_trained_on() -> None:
    first = scene("test", 0)
    assert first.digits == (7, 3, 2)
    assert [(t.color, t.shape, t.cell) for t in first.things][:2] == [("yellow", "circle", 112), ("cyan", "square", 14)]
    assert abs(first.image.mean() - 150.8) < 0.5


def test_the_splits_share_neither_scenes_nor_backgrounds() -> None:
    found = {split: {(scene(split, i).things, scene(split, i).digits) for i in range(30)} for split in ("train", "validation", "test")}
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]
    assert not np.array_equal(backgrounds("train")[0], backgrounds("test")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_follows_from_the_picture(family: str) -> None:
    for item in held_out(family, "validation", 60):
        assert item.question.answer == answer_from_the_things(item.question, item.scene)
        assert item.question.answer in item.question.guesses or item.question.answer == "zero"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_is_in_the_vocabulary(family: str) -> None:
    words = {word for item in held_out(family, "validation", 60) for word in f"{item.question.text} {item.question.answer}".split()}
    assert words <= set(vocabulary())
    assert len(set(vocabulary())) == len(vocabulary())


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_questions_are_the_same_on_every_call(family: str) -> None:
    first, again = held_out(family, "test", 5), held_out(family, "test", 8)
    assert [item.question for item in first] == [item.question for item in again[:5]]


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_and_looks_lie_on_what_is_drawn(family: str) -> None:
    for item in held_out(family, "validation", 40):
        content = set(item.scene.content_cells)
        assert item.question.evidence
        assert set(item.question.evidence) <= content
        n_words = len(f"{item.question.text} {item.question.answer}".split())
        for at, groups in item.question.looks:
            assert at < n_words
            assert all(set(cells) <= content for cells in groups)


def test_nothing_touches_anything_else() -> None:
    for drawn in SCENES:
        places = [*((t.row, t.column, 1) for t in drawn.things), (drawn.sign_cell // GRID, drawn.sign_cell % GRID, 3)]
        for i, (row, column, width) in enumerate(places):
            assert column + width <= GRID
            for other_row, other_column, other_width in places[:i]:
                apart = abs(row - other_row) >= 2 or column >= other_column + other_width + 1 or other_column >= column + width + 1
                assert apart


def test_things_are_painted_inside_their_cells_and_in_their_colours() -> None:
    for drawn in SCENES[:20]:
        for thing in drawn.things:
            cell = drawn.image[thing.row * PATCH : (thing.row + 1) * PATCH, thing.column * PATCH : (thing.column + 1) * PATCH]
            far = np.abs(cell.astype(int) - np.asarray(COLORS[thing.color])).max(-1)
            # jitter moves a colour by at most 18
            assert (far <= 19).mean() > 0.08
    assert all(mask.shape == (PATCH, PATCH) for shape in SHAPES for mask in shape_masks(shape))
    assert all(0 < mask.mean() < 1 for digit in range(10) for mask in digit_masks(digit))


def test_shapes_and_digits_differ_from_each_other() -> None:
    middle = [shape_masks(shape)[4] for shape in SHAPES] + [digit_masks(digit)[4] for digit in range(10)]
    for i, one in enumerate(middle):
        for other in middle[:i]:
            assert np.abs(one - other).mean() > 0.03


def test_answers_are_balanced() -> None:
    for family, n_answers in (("exist", 2), ("relation", 2), ("count", 4)):
        answers = Counter(item.question.answer for item in held_out(family, "test", 400))
        assert len(answers) == n_answers
        # four standard errors of a fair draw
        allowed = 4 * (400 * (1 / n_answers) * (1 - 1 / n_answers)) ** 0.5
        assert all(abs(count - 400 / n_answers) < allowed for count in answers.values())


@pytest.mark.parametrize(
    "family, highest", [("exist", 0.6), ("color", 0.4), ("shape", 0.4), ("count", 0.4), ("relation", 0.6), ("word", 0.3)], ids=lambda v: str(v)
)
def test_neither_baseline_gives_a_family_away(family: str, highest: float) -> None:
    found = baselines(held_out(family, "test", 400))
    assert 0 <= found.no_image <= highest
    assert 0 < found.present <= highest


def test_questions_that_cannot_be_asked() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(OptionError, match=r"families|family"):
        question("weather", SCENES[0], rng)
    with pytest.raises(OptionError, match="train, validation, test"):
        scene("holdout", 0)
    with pytest.raises(OptionError, match="n ≥ 1"):
        held_out("color", "test", 0)
    assert SCENES[0].image.shape == (SIZE, SIZE, 3)
