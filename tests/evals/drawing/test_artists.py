"""Models that draw for exports: found by name or folder, drawing the same pictures in any batch, from classes or text features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import next_scale
import pytest
import torch

from accel.errors import AccelError, OptionError
from accel.evals.drawing.artists import check_fit, encoder_of, features_of, find_model, load_found, make_artist, save_features
from accel.evals.drawing.exports import Plan, Subject

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")

CLASSES = tuple(Subject(label=label) for label in (3, 5, 8))


@pytest.fixture(scope="module")
def small_var() -> Callable[[Sequence[Subject]], Any]:
    found = find_model("small-var")
    model = load_found(found, dtype="float32", device="cpu")
    return lambda subjects: make_artist(found, model, subjects, found.sampling({}), None)


def as_pixels(artist: Any, plan: Plan, splits: Sequence[int]) -> Any:
    pictures, found = list(plan), []
    for size in splits:
        found += artist.draw(pictures[:size])
        pictures = pictures[size:]
    return np.stack([np.asarray(image) for image in found])


def assert_same_but_for_rounding(one: Any, other: Any) -> None:
    # a batch of one is multiplied by other loops, and 8 bits are cut: one level, seen in 9 of 100 pictures in float32
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_any_split_into_batches_gives_the_same_pictures_but_for_rounding(small_var: Callable[[Sequence[Subject]], Any]) -> None:
    import accel

    plan = Plan(tuple(Subject(label=label) for label in range(10)), 1)
    artist = small_var(plan.subjects)
    dense = as_pixels(artist, plan, [10])
    with accel.apply(artist.model, "h2o", keep=0.3):
        sparse = as_pixels(artist, plan, [10])
        assert_same_but_for_rounding(sparse, as_pixels(artist, plan, [1, 4, 5]))
    for splits in ([1] * 10, [3, 7], [6, 1, 3]):
        assert_same_but_for_rounding(dense, as_pixels(artist, plan, splits))
    assert (np.abs(dense.astype(int) - sparse.astype(int)).reshape(10, -1).max(1) > 20).all()


def test_pictures_are_those_of_the_task_that_judges_them(small_var: Callable[[Sequence[Subject]], Any]) -> None:
    from accel.evals.models import LoadedImageModel, load_model
    from accel.evals.tasks.images import samples

    loaded = load_model("small-var")
    assert isinstance(loaded, LoadedImageModel)
    assert loaded.draw is not None
    plan = Plan(tuple(Subject(label=label) for label in range(10)), 2, seed=5)
    mine = small_var(plan.subjects).draw([plan.picture(13)])[0]
    [sample] = samples(14, 5)[13:]
    theirs = loaded.draw([sample.number % 10], seed=[sample.picture_seed]).mul(255).to(torch.uint8)[0].permute(1, 2, 0)
    assert_same_but_for_rounding(np.asarray(mine), theirs.numpy())


def test_a_model_takes_what_its_generate_knows(tmp_path: Path) -> None:
    found = find_model("small-var")
    assert found.sampling({}) == {"guidance_scale": 0.5, "top_k": 0, "top_p": 1.0}
    assert found.sampling({"top_k": 5, "guidance": None, "tau": None}) == {"guidance_scale": 0.5, "top_k": 5, "top_p": 1.0}
    with pytest.raises(OptionError, match="a VAR, which knows no tau"):
        found.sampling({"tau": 0.5})
    with pytest.raises(OptionError, match="top_p must lie"):
        found.sampling({"top_p": 2.0})
    next_scale.tiny_infinity().save_pretrained(tmp_path / "infinity")
    infinity = find_model(str(tmp_path / "infinity")).sampling({"tau": 0.5})
    expected = {"guidance_scale": 4.0, "top_k": 0, "top_p": 0.97, "temperature": 0.5, "size": None, "aspect_ratio": 1.0}
    assert infinity == expected


def test_a_model_that_cannot_draw_this_explains_itself(tmp_path: Path, small_var: Callable[[Sequence[Subject]], Any]) -> None:
    for name, message in (("smollm2", "draws no pictures"), ("nowhere/var.pth", "no such file or folder"), (str(tmp_path / "llama"), "'llama'")):
        (tmp_path / "llama").mkdir(exist_ok=True)
        (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(AccelError, match=message):
            find_model(name)
    with pytest.raises(OptionError, match="tokenizer inside"):
        find_model("small-var", tokenizer="vae.pth")
    with pytest.raises(OptionError, match=r"knows the labels 0-9, got 10, 12"):
        small_var([Subject(label=label) for label in (9, 10, 12)])
    next_scale.tiny_infinity().save_pretrained(tmp_path / "infinity")
    var, infinity, texts = find_model("small-var"), find_model(str(tmp_path / "infinity")), [Subject(text="a")]
    for found, subjects, encoder, features, message in (
        (var, texts, None, None, "draws classes: give it labels, not prompts"),
        (infinity, CLASSES, None, None, "draws texts: give it a prompts file"),
        (var, CLASSES, "t5", None, "reads no text"), (infinity, texts, None, None, "reads text features: name a text encoder"),
        (infinity, texts, "t5", "f.safetensors", "and not both"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            check_fit(found, subjects, text_encoder=encoder, features=features)


def test_what_a_model_draws_is_told_before_its_weights_are_read(tmp_path: Path) -> None:
    from accel.evals.drawing.exports import Drawn

    next_scale.tiny_var(num_classes=7).save_pretrained(tmp_path / "var")
    next_scale.tiny_infinity().save_pretrained(tmp_path / "infinity")
    # of an official file the keys by which its kind and sizes are told; one class stands for none
    torch.save({"class_emb.weight": torch.zeros(1001, 4), "pos_1LC": torch.zeros(1, 2240, 4)}, tmp_path / "var_d36.pth")
    torch.save({"cfg_uncond": torch.zeros(2, 4)}, tmp_path / "infinity.pth")
    found = {name: find_model(str(tmp_path / name)).drawn for name in ("var", "infinity", "var_d36.pth")}
    found |= {"infinity.pth": find_model(str(tmp_path / "infinity.pth"), tokenizer="vae.pth").drawn, "small-var": find_model("small-var").drawn}
    assert found == {
        "var": Drawn(7, 8), "infinity": Drawn(), "var_d36.pth": Drawn(1000, 512), "infinity.pth": Drawn(), "small-var": Drawn(10, 32)
    }  # fmt: skip
    with pytest.raises(AccelError, match=r"did you mean 'small-var'\?"):
        find_model("small-vra")


def test_features_are_those_of_these_prompts(tmp_path: Path) -> None:
    from accel.models.infinity import TextFeatures

    def encode(prompts: Sequence[str]) -> TextFeatures:
        return TextFeatures.of([torch.full((len(prompt), 24), float(len(prompt))) for prompt in prompts])

    texts = ["ab", "cdefg"]
    subjects = [Subject(text=text) for text in texts]
    path, plan = save_features(tmp_path / "f.safetensors", texts, encode), Plan(tuple(subjects), 2)
    found = features_of(path, subjects, width=24, most_tokens=8)([plan.picture(i) for i in (1, 2)])
    assert found.lengths == (5, 2)
    assert torch.equal(found.states[1, :2], torch.full((2, 24), 2.0))
    for wrong, sizes, message in (
        (subjects[::-1], (24, 8), "other prompts, or in another order"),
        (subjects, (32, 8), r"prompt 0 has features \(2, 24\); \(1-8, 32\) are needed"),
        (subjects, (24, 4), r"prompt 1 has features \(5, 24\)"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            features_of(path, wrong, width=sizes[0], most_tokens=sizes[1])
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for name in ("bad.safetensors", "none.safetensors"):
        with pytest.raises(OptionError, match="cannot read the features"):
            features_of(tmp_path / name, subjects, width=24, most_tokens=8)


def test_a_text_encoder_reads_each_prompt_alone(tmp_path: Path) -> None:
    from tiny_llama import byte_tokenizer
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(tmp_path / "t5")
    T5EncoderModel(T5Config(vocab_size=256, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    encode = encoder_of(str(tmp_path / "t5"), dtype=torch.float32, device="cpu")
    plan = Plan((Subject(text="a fox"), Subject(text="a hare in the snow")), 1)
    both, alone = encode(list(plan)), encode([plan.picture(0)])
    assert both.lengths == (5, 18)
    assert torch.equal(both.states[0, :5], alone.states[0])
    with pytest.raises(AccelError, match="cannot load the text encoder"):
        encoder_of(str(tmp_path / "none"), dtype=torch.float32, device="cpu")
