"""Recipes come back as they were written, and a wrong file says where it is wrong."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import accel
from accel import FlexPrefill, OptionError, Recipe
from accel.protocols import RunDense, SparseAttention
from accel.registry import build, method_names

flexprefill = st.builds(
    FlexPrefill,
    gamma=st.floats(0.01, 1.0),
    tau=st.floats(0.0, 1.0) | st.just(1e-5),
    min_budget=st.integers(0, 10**6),
    min_seq_len=st.none() | st.integers(0, 10**9),
    dense_layers=st.lists(st.integers(0, 99), unique=True, max_size=5).map(tuple),
    dense_kernel=st.sampled_from(["original", "accel"]),
    coverage=st.sampled_from(["block", "token"]),
)
# any text but control characters and lone surrogates, which no YAML file may hold
notes = st.text(st.characters(exclude_categories=("Cs", "Cc")))


@given(methods=st.lists(flexprefill, min_size=1, max_size=3).map(tuple), note=notes, suffix=st.sampled_from([".yaml", ".yml", ".json"]))
def test_recipe_comes_back_as_it_was_written(methods: tuple[FlexPrefill, ...], note: str, suffix: str) -> None:
    recipe = Recipe(methods, note)
    with tempfile.TemporaryDirectory() as folder:
        path = recipe.save(Path(folder) / f"r{suffix}")
        assert Recipe.load(path) == recipe
    assert Recipe.from_dict(recipe.as_dict()) == recipe


def test_every_method_with_its_defaults_is_one_word(tmp_path: Path) -> None:
    recipe = Recipe.of(*method_names())
    assert recipe.as_dict() == {"schema": 1, "methods": method_names()}
    assert Recipe.load(recipe.save(tmp_path / "new folder" / "r.yaml")) == recipe


def test_file_written_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    head = ["# ours", "schema: 1", "methods:"]
    lines = [*head, "- flexprefill: {gamma: 0.9, tau: 1e-1, dense_layers: [0, 2]}", "- powerattention:", "- streaming"]
    path.write_text("\n".join(lines))
    assert Recipe.load(path) == Recipe.of(FlexPrefill(gamma=0.9, tau=0.1, dense_layers=(0, 2)), "powerattention", "streaming")


def test_preset_is_written_with_what_it_changes(tmp_path: Path) -> None:
    recipe = Recipe.of(FlexPrefill.reference())
    assert recipe.as_dict()["methods"] != ["flexprefill"]
    assert Recipe.load(recipe.save(tmp_path / "r.json")) == recipe


WRONG: dict[str, tuple[str, str]] = {
    "unknown_method": ("schema: 1\nmethods: [flexprefil]", r"methods\[0\].*did you mean 'flexprefill'"),
    "unknown_option": ("schema: 1\nmethods: [dense, {flexprefill: {gama: 0.9}}]", r"methods\[1\].*did you mean 'gamma'"),
    "value_out_of_range": ("schema: 1\nmethods: [{flexprefill: {gamma: 9}}]", r"methods\[0\].*gamma"),
    "text_for_a_number": ("schema: 1\nmethods: [{flexprefill: {gamma: high}}]", r"methods\[0\].*flexprefill"),
    "two_methods_in_one_entry": ("schema: 1\nmethods: [{flexprefill: {}, dense: {}}]", r"methods\[0\].*one name"),
    "options_as_list": ("schema: 1\nmethods: [{flexprefill: [gamma]}]", r"methods\[0\].*must be a mapping"),
    "number_as_method": ("schema: 1\nmethods: [3]", r"methods\[0\].*expected a method name"),
    "no_methods": ("schema: 1\nmethods: []", "at least one method, got an empty list"),
    "methods_missing": ("schema: 1", "at least one method, got nothing"),
    "methods_as_text": ("schema: 1\nmethods: flexprefill", "must be a list"),
    "schema_missing": ("methods: [flexprefill]", "schema is None"),
    "schema_of_the_future": ("schema: 2\nmethods: [flexprefill]", "schema is 2"),
    "schema_true": ("schema: true\nmethods: [flexprefill]", "schema is True"),
    "unknown_key": ("schema: 1\nmethod: [flexprefill]", "unknown key 'method'"),
    "note_as_number": ("schema: 1\nmethods: [flexprefill]\nnote: 3", "note must be text"),
    "option_twice": ("schema: 1\nmethods: [{flexprefill: {gamma: 0.9, gamma: 0.8}}]", "line 2.*'gamma' appears twice"),
    "list_as_key": ("? [1]\n: 2", "cannot be a key"),
    "not_yaml": ("schema: [1", "is not YAML"),
    "runs_code": ("schema: !!python/object/apply:os.getpid []", "is not YAML"),
    "empty": ("", "expected `schema: 1`"),
    "just_text": ("flexprefill", "expected `schema: 1`.*got text"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_file_is_refused_with_its_name_and_the_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=rf"(?s)mine\.yaml.*{message}"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", b'{"schema": 1, "schema": 1}', "'schema' appears twice"),
        ("r.json", b"{", "is not JSON"),
        ("r.toml", b"", "is a .yaml, .yml, .json file"),
        ("r.yaml", b"\xff", "not a text file"),
        ("missing/r.yaml", None, "cannot read the recipe"),
    ],
    ids=["key_twice", "not_json", "suffix", "not_text", "missing"],
)
def test_unreadable_file_is_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=message):
        Recipe.load(tmp_path / name)


def test_unknown_suffix_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"r\.txt"):
        Recipe.of("flexprefill").save(tmp_path / "r.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("methods", [(), ("flexprefill",), (FlexPrefill,)], ids=["none", "name", "class"])
def test_recipe_of_no_methods_is_refused(methods: tuple[Any, ...]) -> None:
    with pytest.raises(OptionError):
        Recipe(methods)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Homemade(SparseAttention):
    """A method that no registry knows."""

    def plan(self, q: Any, keys: Any, ctx: Any) -> RunDense:
        return RunDense("test")


def test_method_that_no_name_finds_cannot_be_written() -> None:
    with pytest.raises(OptionError, match="Homemade cannot be written"):
        Recipe.of(Homemade()).as_dict()


def test_recipe_is_what_apply_resolves() -> None:
    from accel.patching import resolve

    assert resolve(Recipe.of("flexprefill"), "dense") == [build("flexprefill"), build("dense")]
    assert accel.Recipe is Recipe


@pytest.mark.parametrize("method", ["flexprefill", FlexPrefill()], ids=["name", "object"])
def test_a_single_method_is_no_list_of_methods(method: Any) -> None:
    with pytest.raises(OptionError, match="a recipe holds a list of methods"):
        Recipe(method)
