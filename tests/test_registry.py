"""Methods are found by name, and a wrong name or option explains itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from outsider import write_toy_package

import accel
from accel import registry
from accel.errors import OptionError


@pytest.fixture
def clear_registry() -> Iterator[Callable[[], None]]:
    def clear() -> None:
        registry.method_names.cache_clear()
        registry.method_class.cache_clear()
        sys.modules.pop("toy", None)
        sys.modules.pop("misnamed", None)

    yield clear
    clear()


def test_every_file_in_patches_is_a_method_of_that_name() -> None:
    folder = Path(accel.__file__).parent / "patches"
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert {"flexprefill", "powerattention", "dense", "streaming", "random_blocks"} <= files <= set(registry.method_names())
    for name in files:
        assert registry.method_class(name).method_name() == name
        assert registry.method_class(name).__name__.lower() == name.replace("_", "")


def test_every_method_is_an_attribute_of_accel() -> None:
    for name in registry.method_names():
        cls = registry.method_class(name)
        assert getattr(accel, cls.__name__) is cls
        assert cls.__name__ in dir(accel)


@pytest.mark.parametrize("attribute", ["flexprefill", "Flexprefill", "FlexPrefil", "__wrapped__"])
def test_accel_has_no_attribute_that_is_not_spelled_like_the_class(attribute: str) -> None:
    with pytest.raises(AttributeError, match=attribute):
        getattr(accel, attribute)


def test_unknown_method_is_refused_with_the_closest_name() -> None:
    with pytest.raises(OptionError, match=r"no method is called 'flexprefil'; did you mean 'flexprefill'\?.*powerattention"):
        registry.build("flexprefil")


def test_unknown_option_is_refused_with_the_closest_one() -> None:
    with pytest.raises(OptionError, match=r"flexprefill has no option 'gama'; did you mean 'gamma'\? It has: .*tau"):
        registry.build("flexprefill", {"gama": 0.9})


def test_method_of_another_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clear_registry: Callable[[], None]) -> None:
    write_toy_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    clear_registry()
    assert "toy" in registry.method_names()
    assert registry.build("toy", {"weight": 0.5}).options()["weight"] == 0.5


def test_method_of_another_package_cannot_replace_one_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clear_registry: Callable[[], None]
) -> None:
    write_toy_package(tmp_path, name="flexprefill")
    monkeypatch.syspath_prepend(tmp_path)
    clear_registry()
    with pytest.raises(OptionError, match="several methods are called 'flexprefill'"):
        registry.method_class("flexprefill")


def test_method_in_a_file_of_another_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clear_registry: Callable[[], None]
) -> None:
    write_toy_package(tmp_path, module="misnamed")
    monkeypatch.syspath_prepend(tmp_path)
    clear_registry()
    with pytest.raises(OptionError, match=r"the file toy\.py must hold a method class"):
        registry.method_class("toy")
