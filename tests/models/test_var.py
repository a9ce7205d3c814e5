"""VAR: sizes, the published arithmetic against a second implementation, cached against teacher-forced, guidance, batches, files, errors."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from accel.errors import AccelError, OptionError
from accel.models.cache import ScaleCache, Schedule
from accel.models.var import VAR, CheckpointError, VARConfig
from accel.models.var import model as var_model

TINY_FILE = {"depth": 2, "width": 32, "heads": 4, "sides": [1, 2, 3], "codes": 16, "code": 8, "classes": 6}
TINY_TOKENIZER = {"ch": 32, "mult": (1, 2), "codes": 16, "code": 8}


@pytest.mark.parametrize(
    ("depth", "parameters"), [(16, 310_283_520), (20, 600_917_136), (24, 1_033_399_360), (30, 2_010_020_356), (36, 2_353_893_904)], ids=str
)
def test_parameter_counts_of_the_published_models(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        model = VAR(VARConfig.official(depth))
    assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tokenizer.")) == parameters
    assert not list(model.buffers())


def test_schedules_of_the_published_models() -> None:
    assert VARConfig.official(30).scales().total == 680
    assert VARConfig.official(36).scales().total == 2240
    assert VARConfig.official(36).scales().sizes[-1] == (32, 32)
    with pytest.raises(OptionError, match="16, 20, 24, 30, 36"):
        VARConfig.official(17)


# --- a second implementation, straight from specification §6.4 and an official state dict, in fp64 and without a cache


def plain_var(state: dict[str, Tensor], labels: Tensor, codes: list[Tensor], sides: list[int], *, depth: int, heads: int) -> Tensor:
    """Logits (b, T_K, codes) under the block mask; codes: inputs of the scales from the second on, each (b, n_k, code width)."""
    s = {key: value.double() for key, value in state.items()}
    scale_of = torch.tensor([k for k, side in enumerate(sides) for _ in range(side * side)])
    condition = s["class_emb.weight"][labels]
    words = [code.double() @ s["word_embed.weight"].T + s["word_embed.bias"] for code in codes]
    x = torch.cat([condition[:, None] + s["pos_start"], *words], 1) + s["lvl_embed.weight"][scale_of] + s["pos_1LC"]
    hidden = scale_of[None, :] > scale_of[:, None]

    def normed(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def vectors(name: str, count: int) -> tuple[Tensor, ...]:
        silu = condition / (1 + (-condition).exp())
        return (silu @ s[f"{name}.weight"].T + s[f"{name}.bias"])[:, None].chunk(count, -1)

    for i in range(depth):
        b = f"blocks.{i}"
        if "shared_ada_lin.1.weight" in s:
            six = [one + own for one, own in zip(vectors("shared_ada_lin.1", 6), s[f"{b}.ada_gss"][0, 0], strict=True)]
        else:
            six = list(vectors(f"{b}.ada_lin.1", 6))
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six
        y = normed(x) * (1 + scale1) + shift1
        weight = s[f"{b}.attn.mat_qkv.weight"].chunk(3)
        out = []
        q, k, v = y @ weight[0].T + s[f"{b}.attn.q_bias"], y @ weight[1].T, y @ weight[2].T + s[f"{b}.attn.v_bias"]
        for h, columns in enumerate(torch.arange(q.shape[-1]).chunk(heads)):
            qh, kh = (t[..., columns] / t[..., columns].norm(dim=-1, keepdim=True) for t in (q, k))
            temperature = s[f"{b}.attn.scale_mul_1H11"].flatten()[h].clamp(max=math.log(100)).exp()
            scores = (qh * temperature) @ kh.transpose(1, 2)
            out.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[..., columns])
        x = x + gamma1 * (torch.cat(out, -1) @ s[f"{b}.attn.proj.weight"].T + s[f"{b}.attn.proj.bias"])
        y = (normed(x) * (1 + scale2) + shift2) @ s[f"{b}.ffn.fc1.weight"].T + s[f"{b}.ffn.fc1.bias"]
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + gamma2 * (y @ s[f"{b}.ffn.fc2.weight"].T + s[f"{b}.ffn.fc2.bias"])
    scale, shift = vectors("head_nm.ada_lin.1", 2)
    return (normed(x) * (1 + scale) + shift) @ s["head.weight"].T + s["head.bias"]


def inputs_of(model: VAR, codes: list[Tensor]) -> list[Tensor]:
    """The input codes of every scale but the first."""
    f, inputs = None, []
    for scale, ids in enumerate(codes):
        f, x = model.tokenizer(ids, f, scale, model.schedule)
        inputs += [] if x is None else [x]
    return inputs


def random_codes(model: VAR, rows: int) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randint(model.config.codebook_size, (rows, n)) for n in model.schedule.tokens]


@pytest.mark.parametrize("shared", [False, True], ids=["ada per block", "shared ada"])
def test_official_weights_give_the_published_arithmetic(official_var: Any, official_var_tokenizer: Any, shared: bool) -> None:
    state = official_var(**TINY_FILE, shared=shared)
    # one temperature above the limit of ln 100, which must be clamped
    state["blocks.0.attn.scale_mul_1H11"][0, 1] = 5.0
    model = VAR.from_original(state, official_var_tokenizer(**TINY_TOKENIZER), schedule=[1, 2, 3])
    labels, codes = torch.tensor([2, 5]), random_codes(model, 2)
    exact = plain_var(state, labels, inputs_of(model, codes), [1, 2, 3], depth=2, heads=4)
    got = model.forward(labels, codes)
    assert (got.logits - exact).abs().max() < 2e-5 * exact.abs().max()
    loss = F.cross_entropy(exact.flatten(0, 1), torch.cat(codes, 1).flatten())
    assert abs(got.loss - loss) < 1e-4


def cached_logits(model: VAR, labels: Tensor, codes: list[Tensor]) -> Tensor:
    """Logits of all scales, computed scale by scale with a cache."""
    condition, shared = model._condition(labels)
    cache, inputs = ScaleCache(model.schedule), [None, *inputs_of(model, codes)]
    return torch.cat([model._scale_logits(x, scale, condition, shared, cache) for scale, x in enumerate(inputs)], 1)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True], ids=["ada per block", "shared ada"])
def test_block_masked_logits_equal_cached_logits(tiny_var: Callable[..., VAR], shared: bool) -> None:
    model = tiny_var(shared_adaln=shared)
    labels, codes = torch.tensor([0, 3, 5]), random_codes(model, 3)
    whole, stepwise = model.forward(labels, codes).logits, cached_logits(model, labels, codes)
    assert (whole - stepwise).abs().max() < 1e-5
    # the comparison can fail: without the mask the coarser scales would see the finer ones
    assert (whole[:, :1] - model.forward(labels, [codes[0], *[c.flip(1) for c in codes[1:]]]).logits[:, :1]).abs().max() < 1e-6
    assert (whole[:, 5:] - model.forward(labels, [codes[0] * 0, *codes[1:]]).logits[:, 5:]).abs().max() > 1e-3


def test_the_loss_reaches_every_weight_but_the_tokenizers(tiny_var: Callable[..., VAR]) -> None:
    model = tiny_var(shared_adaln=True)
    model.forward(torch.tensor([1]), random_codes(model, 1)).loss.backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    assert untouched == {name for name, _ in model.named_parameters() if name.startswith("tokenizer.")}


def test_guidance_grows_from_zero_to_its_full_weight(tiny_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_var(), []
    constant = {"cond": 2.0, "null": 0.5}

    def logits(x: Any, scale: int, condition: Tensor, shared: Tensor, cache: Any) -> Tensor:
        n = model.schedule.tokens[scale]
        return torch.tensor([constant["cond"], constant["null"]])[:, None, None].expand(2, n, 16)

    monkeypatch.setattr(model, "_scale_logits", logits)
    monkeypatch.setattr(var_model, "filtered", lambda logits, **_: seen.append(float(logits[0, 0, 0])) or logits)
    model.generate_codes([1], guidance_scale=3.0, seed=0)
    # t = 3 · k / 3 = 0, 1, 2, 3; (1 + t) · 2 − t · 0.5
    assert seen == [2.0, 3.5, 5.0, 6.5]


def test_guidance_rows_are_the_labels_and_then_the_null_class(tiny_var: Callable[..., VAR]) -> None:
    model = tiny_var()
    rows, is_guided = model._rows([4, 0], 1.5)
    assert (rows.tolist(), is_guided) == ([4, 0, 5, 5], True)
    rows, is_guided = model._rows(torch.tensor([4, 0]), 0.0)
    assert (rows.tolist(), is_guided) == ([4, 0], False)
    guided, plain, null = (model.generate_codes([1], seed=0, guidance_scale=g)[0] for g in (50.0, 0.0, 1e-9))
    assert not all(torch.equal(a, b) for a, b in zip(guided, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(null, plain, strict=True))


@pytest.mark.parametrize("seeds", [[11, 12, 13], 11], ids=["list", "int"])
def test_same_seed_gives_the_same_image_in_any_batch(tiny_var: Callable[..., VAR], seeds: Any) -> None:
    model, labels = tiny_var(), [3, 1, 4]
    together = model.generate(labels, seed=seeds, output="tensor")
    for parts in ([[0], [1], [2]], [[0, 1], [2]], [[2, 0], [1]]):
        for part in parts:
            split = model.generate([labels[i] for i in part], seed=[11 + i for i in part], output="tensor")
            assert torch.allclose(split, together[part], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    other = model.generate(labels, seed=[11, 12, 99], output="tensor")
    assert torch.allclose(other[:2], together[:2], atol=1e-5)
    assert not torch.allclose(other[2], together[2], atol=1e-2)


def test_generate_returns_pictures_of_the_right_size(tiny_var: Callable[..., VAR], capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_var()
    images = model.generate(2, seed=0, progress=True)
    assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))]
    assert "scales: 100%" in capsys.readouterr().err
    tensor = model.generate([2, 3], seed=0, output="tensor")
    assert tensor.shape == (2, 3, 8, 8)
    assert tensor.dtype == torch.float32
    assert tensor.min() >= 0
    assert tensor.max() <= 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": []}, "non-empty"), ({"labels": [1.5]}, "list of ints"), ({"labels": [6]}, "0…4, or 5 for no class"), ({"labels": [-1]}, "0…4"),
        ({"labels": [[1], [2]]}, "one-dimensional"), ({"labels": "x"}, "got 'x'"),
        ({"labels": ["1"]}, "list of ints"), ({"labels": None}, "list of ints"), ({"labels": [[1], [2, 3]]}, "list of ints"),
        ({"labels": [2**70]}, "list of ints"), ({"labels": torch.tensor([1j])}, "list of ints"), ({"seed": ["1"]}, "the list holds '1'"),
        ({"guidance_scale": -1.0}, "guidance_scale"), ({"guidance_scale": float("inf")}, "finite"), ({"top_p": 2.0}, "top_p"),
        ({"top_k": -2}, "top_k"), ({"seed": [1, 2]}, "2 seeds for 1"), ({"output": "png"}, "output"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_wrong_arguments_explain_themselves(tiny_var: Callable[..., VAR], call: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tiny_var().generate(**({"labels": [1]} | call))


def test_guidance_without_a_null_class_raises(tiny_var: Callable[..., VAR]) -> None:
    model = tiny_var(has_null_class=False)
    with pytest.raises(OptionError, match="null class"):
        model.generate([1])
    with pytest.raises(OptionError, match="0…4, got"):
        model.generate([5], guidance_scale=0)
    assert len(model.generate([4], guidance_scale=0)) == 1


def test_teacher_forced_codes_of_the_wrong_shape_raise(tiny_var: Callable[..., VAR]) -> None:
    model = tiny_var()
    with pytest.raises(OptionError, match="codes must have the shapes"):
        model.forward(torch.tensor([1]), random_codes(model, 2))


@pytest.mark.parametrize("content", ["text", "object"])
def test_what_is_no_weights_file_is_refused_without_advice_to_load_it_unsafely(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    if content == "text":
        path.write_text("# A page of text\nwith lines\n")
    else:
        torch.save({"weights": torch.zeros(2), "args": Unknown()}, path)
    with pytest.raises(CheckpointError) as caught:
        VAR.from_original(path)
    expected = "is no weights file" if content == "text" else f"holds a Python object ({__name__}.Unknown)"
    assert str(caught.value).startswith(f"{path} {expected}")
    shown = "".join(traceback.format_exception(caught.value))
    assert "weights_only" not in shown
    assert "safe_globals" not in shown


class Unknown:
    """Something that no checkpoint should hold."""


def test_a_folder_of_the_other_kind_of_model_is_refused(tiny_var: Callable[..., VAR], tiny_infinity: Callable[..., Any], tmp_path: Path) -> None:
    tiny_var().save_pretrained(tmp_path / "var")
    tiny_infinity().save_pretrained(tmp_path / "infinity")
    for family, other, kind in ((VAR, "infinity", "accel_infinity"), (type(tiny_infinity()), "var", "accel_var")):
        with pytest.raises(CheckpointError, match=f"{other} holds a model of type '{kind}', and {family.__name__} reads the type"):
            family.from_pretrained(tmp_path / other)


def test_auto_classes_know_our_folders(tiny_var: Callable[..., VAR], tiny_infinity: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    for model in (tiny_var(), tiny_infinity()):
        model.save_pretrained(tmp_path / type(model).__name__)
        folder = str(tmp_path / type(model).__name__)
        assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
        found = AutoModel.from_pretrained(folder)
        assert type(found) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values(), strict=True))


def test_save_and_load_round_trip(tiny_var: Callable[..., VAR], tmp_path: Path) -> None:
    model = tiny_var(shared_adaln=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = VAR.from_pretrained(tmp_path)
    assert again.config.to_dict() == model.config.to_dict() | {"architectures": ["VAR"], "dtype": "float32"} | {
        key: again.config.to_dict()[key] for key in ("_name_or_path", "transformers_version") if key in again.config.to_dict()
    }
    assert {key: value.tolist() for key, value in again.state_dict().items()} == {key: value.tolist() for key, value in model.state_dict().items()}
    assert torch.equal(again.generate([1, 2], seed=0, output="tensor"), model.generate([1, 2], seed=0, output="tensor"))


def test_incomplete_and_cut_folders_raise_instead_of_starting_at_random(tiny_var: Callable[..., VAR], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_var().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, state = file.read_bytes(), load_file(file)
    for change, message in (({"head.linear.bias": None}, r"missing_keys \['head\.linear\.bias'\]"), ({"rope": torch.zeros(2)}, "unexpected_keys")):
        save_file({key: value for key, value in (state | change).items() if value is not None}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            VAR.from_pretrained(tmp_path)
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        VAR.from_pretrained(tmp_path)
    file.write_bytes(whole)
    model, info = VAR.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, VAR)
    assert not info["missing_keys"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_the_delicate_parts_and_stays_close(tiny_var: Callable[..., VAR], tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_var(shared_adaln=True)
    model.save_pretrained(tmp_path)
    half = VAR.from_pretrained(tmp_path, dtype=dtype)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert {"blocks.1.attn.log_scale", "blocks.0.gss", "shared_ada.linear.weight", "tokenizer.quantizer.codebook.weight"} <= kept
    assert half.head.linear.weight.dtype == half.tokenizer.decoder.conv_in.weight.dtype == dtype
    labels, codes = torch.tensor([1, 2]), random_codes(model, 2)
    exact, rounded = model.forward(labels, codes).logits, half.forward(labels, codes).logits
    assert rounded.dtype == torch.float32
    # measured: 0.09 to 0.12 % of the largest logit in fp16, 0.5 to 1 % in bf16
    assert (exact - rounded).abs().max() < {torch.float16: 0.003, torch.bfloat16: 0.025}[dtype] * exact.abs().max()
    # also where the user casts everything
    assert len(model.to(dtype).generate([1], seed=0)) == 1


def test_accelerate_may_offload_every_module(tiny_var: Callable[..., VAR]) -> None:
    from accelerate import cpu_offload

    model = tiny_var(shared_adaln=True)
    before = model.generate([1, 2], seed=0, output="tensor")
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.class_embed.weight.device.type == "meta"
    assert torch.equal(model.generate([1, 2], seed=0, output="tensor"), before)
    assert {"VARBlock", "ConvDecoder"} <= set(model._no_split_modules)


# --- official files


def test_every_official_key_of_the_full_sizes_is_known(official_var: Any, official_var_tokenizer: Any) -> None:
    tokenizer = official_var_tokenizer(ch=160, mult=(1, 1, 2, 2, 4), codes=4096, code=32, device="meta")
    for depth, sides, shared in ((16, VARConfig.official(16).schedule, False), (36, VARConfig.official(36).schedule, True)):
        state = official_var(
            depth=depth, width=64 * depth, heads=depth, sides=sides, shared=shared, codes=4096, code=32, classes=1001, device="meta"
        )  # fmt: skip
        model = VAR.from_original(state, tokenizer)
        expected = VARConfig.official(depth).to_dict()
        assert {key: value for key, value in model.config.to_dict().items() if key != "dtype"} == {k: v for k, v in expected.items() if k != "dtype"}


@pytest.mark.parametrize("wrapping", ["training", "ddp", "plain"])
def test_wrapped_files_load(official_var: Any, official_var_tokenizer: Any, tmp_path: Path, wrapping: str) -> None:
    state, tokenizer = official_var(**TINY_FILE, shared=False), official_var_tokenizer(**TINY_TOKENIZER)
    plain = VAR.from_original(state, tokenizer, schedule=[1, 2, 3])
    weights, codes = tmp_path / "var.pth", None
    if wrapping == "training":
        torch.save({"epoch": 3, "args": "…", "trainer": {"var_wo_ddp": state, "vae_local": tokenizer}}, weights)
    else:
        codes = tmp_path / "vae.pth"
        torch.save({f"module.{key}": value for key, value in state.items()} if wrapping == "ddp" else state, weights)
        torch.save(tokenizer, codes)
    model = VAR.from_original(weights, codes, schedule=[1, 2, 3], dtype=torch.bfloat16)
    assert model.head.linear.weight.dtype == torch.bfloat16
    model.float()
    assert torch.equal(model.embed.word.weight, plain.embed.word.weight.bfloat16().float())
    assert model.config.schedule == [1, 2, 3]


def test_old_format_files_load(official_var: Any, official_var_tokenizer: Any, tmp_path: Path) -> None:
    torch.save(official_var(**TINY_FILE, shared=False), tmp_path / "var.pth", _use_new_zipfile_serialization=False)
    assert VAR.from_original(tmp_path / "var.pth", official_var_tokenizer(**TINY_TOKENIZER), schedule=[1, 2, 3]).config.num_hidden_layers == 2


def broken(state: dict[str, Any], how: str) -> dict[str, Any]:
    state = dict(state)
    if how == "a block lost":
        return {key: value for key, value in state.items() if not key.startswith("blocks.0.")}
    if how == "a middle block lost":
        return {key.replace("blocks.1.", "blocks.2."): value for key, value in state.items()}
    if how == "a key lost":
        del state["blocks.1.ffn.fc2.bias"]
    elif how == "unknown key":
        state["blocks.1.attn.rope"] = torch.zeros(2)
    elif how == "wrong shape":
        state["head.weight"] = torch.zeros(15, 32)
    elif how == "key bias":
        state["blocks.1.attn.zero_k_bias"] = torch.ones(32)
    elif how == "not tensors":
        state["step"] = 7
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a block lost", "lacks blocks.0"), ("a middle block lost", "blocks 1 of 3 are missing"), ("a key lost", "missing blocks.1.ffn.fc2.bias"),
        ("unknown key", "unknown keys blocks.1.attn.rope"), ("wrong shape", r"head.linear.weight has shape \(15, 32\), expected \(16, 32\)"),
        ("key bias", "key bias"), ("not tensors", "holds step"),
    ],
)  # fmt: skip
def test_a_wrong_checkpoint_says_what_is_wrong(official_var: Any, official_var_tokenizer: Any, how: str, message: str) -> None:
    state = broken(official_var(**TINY_FILE, shared=False), how)
    with pytest.raises(CheckpointError, match=message) as caught:
        VAR.from_original(state, official_var_tokenizer(**TINY_TOKENIZER), schedule=[1, 2, 3])
    assert isinstance(caught.value, AccelError)


def test_files_that_do_not_fit_explain_themselves(official_var: Any, official_var_tokenizer: Any, tmp_path: Path) -> None:
    state, tokenizer = official_var(**TINY_FILE, shared=False), official_var_tokenizer(**TINY_TOKENIZER)
    with pytest.raises(CheckpointError, match="3 scales with 14 tokens, and no published schedule"):
        VAR.from_original(state, tokenizer)
    with pytest.raises(CheckpointError, match=r"schedule=\[1, 2, 4\]"):
        VAR.from_original(state, tokenizer, schedule=[1, 2, 4])
    with pytest.raises(CheckpointError, match="without a tokenizer"):
        VAR.from_original(state, schedule=[1, 2, 3])
    with pytest.raises(CheckpointError, match=r"not a VAR transformer.*pos_start"):
        VAR.from_original(tokenizer, tokenizer)
    with pytest.raises(CheckpointError, match="not a VAR tokenizer"):
        VAR.from_original(state, state, schedule=[1, 2, 3])
    with pytest.raises(CheckpointError, match="num_classes=1000"):
        VAR.from_original(state, tokenizer, schedule=[1, 2, 3], num_classes=1000)
    assert not VAR.from_original(state, tokenizer, schedule=[1, 2, 3], num_classes=6).config.has_null_class
    with pytest.raises(CheckpointError, match="no such file"):
        VAR.from_original(tmp_path / "absent.pth", tokenizer)
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        VAR.from_original(tmp_path / "cut.pth", tokenizer)
    torch.save({"model": Schedule.of([1])}, tmp_path / "objects.pth")
    with pytest.raises(CheckpointError, match="a Python object"):
        VAR.from_original(tmp_path / "objects.pth", tokenizer)
