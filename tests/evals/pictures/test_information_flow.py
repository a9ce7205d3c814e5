"""The visual information flow: what survives of the last token's state, on whose pictures, and what cannot be measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import accel
from accel.errors import AccelError, OptionError
from accel.evals.models import LoadedModel, LoadedVisionModel, load_model
from accel.evals.pictures import information_flow as flow
from accel.evals.pictures.information_flow import FlowSamples, information_flow, last_state, prepare
from accel.evals.scenes import FAMILIES, scene
from accel.registry import build, method_class, method_names

Image = pytest.importorskip("PIL.Image")
N = 6


@pytest.fixture(scope="module")
def loaded() -> LoadedVisionModel:
    found = load_model("small-vlm")
    assert isinstance(found, LoadedVisionModel)
    return found


@pytest.fixture(scope="module")
def samples(loaded: LoadedVisionModel) -> FlowSamples:
    return prepare(loaded, "scenes", n=N)


# --- the score ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vflowopt", "fastervlm", "random_tokens"])
def test_keeping_everything_gives_the_number_of_samples_and_dropping_gives_less(name: str, loaded: LoadedVisionModel, samples: FlowSamples) -> None:
    assert information_flow(build(name, {"keep": 1.0}), loaded.model, samples) == pytest.approx(N, abs=1e-4)
    assert information_flow(build(name, {"keep": 0.02}), loaded.model, samples) < N - 0.01


def test_hiding_nothing_through_the_whole_machinery_gives_the_number_of_samples(loaded: LoadedVisionModel, samples: FlowSamples) -> None:
    # 0.999 · 144 rounds to all tokens, but stages, scores and the trimmed prompt run
    assert build("vflowopt", {"keep": 0.999}).keeps_all is False    # type: ignore[attr-defined]
    score = information_flow(build("vflowopt", {"keep": 0.999}), loaded.model, samples)
    assert score == pytest.approx(N, abs=1e-4)
    assert score <= N


def test_score_is_the_sum_of_cosines_behind_the_final_norm(loaded: LoadedVisionModel, samples: FlowSamples) -> None:
    method = build("vflowopt", {"keep": 0.1})

    def states() -> list[Tensor]:
        with torch.no_grad():
            return [loaded.model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1].double() for inputs in samples.inputs]

    whole = states()
    with accel.apply(loaded.model, method):
        pruned = states()
    expected = sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(whole, pruned, strict=True))
    assert information_flow(method, loaded.model, samples) == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        logits = loaded.model(**samples.inputs[0]).logits[0, -1]
    torch.testing.assert_close(loaded.model.get_output_embeddings()(samples.full[0].float()), logits, rtol=1e-4, atol=1e-4)


def test_score_is_the_same_twice_and_leaves_the_model_as_it_was(loaded: LoadedVisionModel, samples: FlowSamples) -> None:
    method = build("vflowopt", {"keep": 0.2, "r1_factor": 1.3, "alpha": 0.5})
    assert information_flow(method, loaded.model, samples) == information_flow(method, loaded.model, samples)
    assert torch.equal(last_state(loaded.model, samples.inputs[0]), samples.full[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_state_that_is_no_number_counts_as_nothing(
    value: float, loaded: LoadedVisionModel, samples: FlowSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = samples.inputs[2]
    right = last_state
    monkeypatch.setattr(flow, "last_state", lambda model, inputs: right(model, inputs) * (value if inputs is broken else 1))
    assert information_flow(build("vflowopt", {"keep": 1.0}), loaded.model, samples) == pytest.approx(N - 1, abs=1e-4)


def test_a_model_that_is_broken_without_pruning_is_refused(loaded: LoadedVisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "last_state", lambda model, inputs: torch.full((4,), float("nan")))
    with pytest.raises(AccelError, match="small-vlm without pruning gives hidden states that are not finite"):
        prepare(loaded, "scenes", n=2)


def test_the_whole_picture_is_looked_at_once_and_refused_options_never(loaded: LoadedVisionModel, samples: FlowSamples) -> None:
    calls: list[int] = []
    hook = loaded.model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for _ in range(3):
            information_flow(build("vflowopt"), loaded.model, samples)
        assert len(calls) == 3 * N
        calls.clear()
        with pytest.raises(OptionError, match="keep more over"):
            information_flow(build("vflowopt", {"keep": 0.1, "r1": 1.0}), loaded.model, samples)
        assert not calls
    finally:
        hook.remove()


def test_every_pruning_method_has_the_objective_and_no_other_method_has() -> None:
    for name in method_names():
        is_pruning = method_class(name).kind == "token_pruning"
        assert ("information_flow" in method_class(name).objectives()) == is_pruning


# --- the data -----------------------------------------------------------------------------------------------------------------


def test_scenes_are_those_of_the_validation_split_with_all_families_in_turn(loaded: LoadedVisionModel, samples: FlowSamples) -> None:
    pictures = [inputs["pixel_values"] for inputs in samples.inputs]
    # the fifth family, relation, passes over scenes without such a question
    for i in (0, 1, 2, 3, 5):
        drawn = loaded.processor(images=Image.fromarray(scene("validation", i).image), text="<image> ?", return_tensors="pt")["pixel_values"]
        assert torch.equal(pictures[i], drawn)
    first_words = [loaded.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True).split()[:2] for inputs in samples.inputs]
    assert len(first_words) == len(FAMILIES)
    assert first_words == [["is", "there"], ["what", "color"], ["what", "shape"], ["how", "many"], ["is", "the"], ["what", "does"]]


def picture(file: Path, shade: int) -> str:
    Image.new("RGB", (40, 30), (shade, 90, 200)).save(file)
    return file.name


def test_a_folder_gives_its_pictures_and_the_seed_draws_where_there_are_too_many(loaded: LoadedVisionModel, tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / f"{i}.{'PNG' if i else 'jpg'}", 40 * i)
    (tmp_path / "notes.txt").write_text("no picture")
    assert len(prepare(loaded, str(tmp_path))) == 5
    first, again, other = (str(prepare(loaded, str(tmp_path), seed, n=2)) for seed in (0, 0, 3))
    assert first == again != other
    assert first.startswith("2 samples ")


def test_lines_give_pictures_beside_the_file_with_their_questions(loaded: LoadedVisionModel, tmp_path: Path) -> None:
    rows = [{"image": picture(tmp_path / f"{i}.png", 60 * i), "text": text} for i, text in enumerate(("how many are red ?", "what shape is red ?"))]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    samples = prepare(loaded, str(file))
    assert [loaded.tokenizer.decode(i["input_ids"][0], skip_special_tokens=True).strip() for i in samples.inputs] == [row["text"] for row in rows]
    file.write_text("\n".join(map(json.dumps, [rows[0], {**rows[1], "text": "what shape is blue ?"}])))
    assert str(prepare(loaded, str(file))) != str(samples), "a search must notice that its data changed"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"), ('{"image": "0.png"}', 'line 2: expected {"image"'), ("[1]", "line 2: expected"),
        ('{"image": "gone.png", "text": "?"}', "line 2: there is no picture .*gone.png"),
        ('{"image": "bad.png", "text": "?"}', "cannot read the picture .*bad.png"),
    ],
    ids=["no_json", "no_text", "no_mapping", "no_picture", "no_image_file"],
)  # fmt: skip
def test_a_wrong_line_is_named(line: str, message: str, loaded: LoadedVisionModel, tmp_path: Path) -> None:
    good = json.dumps({"image": picture(tmp_path / "0.png", 1), "text": "?"})
    (tmp_path / "bad.png").write_text("not a picture")
    (tmp_path / "asked.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(OptionError, match=message):
        prepare(loaded, str(tmp_path / "asked.jsonl"))


def test_data_that_is_not_there_is_refused_with_what_can_be_given(loaded: LoadedVisionModel, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "none").mkdir()
    for data, message in (
        (None, "name what to tune on: --data scenes"), (str(tmp_path / "gone"), "there is no '.*gone' to tune on"),
        (str(tmp_path / "gone.jsonl"), r"there is no '.*gone\.jsonl' to tune on"), (str(tmp_path / "none"), r"holds no pictures \(\.png"),
        (str(tmp_path / "empty.jsonl"), "is empty"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            prepare(loaded, data)


def test_a_model_that_reads_no_pictures_is_refused(loaded: LoadedVisionModel) -> None:
    with pytest.raises(OptionError, match="small-vlm cannot be asked about pictures: it came without a processor"):
        prepare(replace(loaded, processor=None), "scenes")
    with pytest.raises(OptionError, match="words cannot be asked about pictures: it is a text model"):
        prepare(LoadedModel(loaded.model, loaded.tokenizer, name="words"), "scenes")


def test_pictures_are_turned_the_way_their_camera_says(tmp_path: Path) -> None:
    from PIL import Image

    from accel.evals.pictures.information_flow import _asked

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    [(picture, _)] = _asked(str(tmp_path), 1, 0)
    assert picture().size == (4, 6)
