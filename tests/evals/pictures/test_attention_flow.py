"""What text and visual tokens read by layer: the same as from transformers' own attention weights, in every family, and the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.families import FAMILIES
from conformance.vision_families import IMAGE

from accel.errors import OptionError, UnsupportedError
from accel.evals.pictures.attention_flow import attention_flow

WITH_IMAGES = [family for family in FAMILIES.values() if family.has_images]


def built(name: str) -> tuple[Any, dict[str, Any]]:
    model, inputs = next(family for family in WITH_IMAGES if family.name == name).build()
    return model.eval(), {key: value[:1] if key in ("input_ids", "attention_mask", "token_type_ids") else value for key, value in inputs.items()}


@pytest.mark.parametrize("name", [family.name for family in WITH_IMAGES])
def test_shares_are_those_of_the_attention_weights(name: str) -> None:
    model, inputs = built(name)
    found = attention_flow(model, inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True, use_cache=False).attentions
    ids = inputs["input_ids"][0].tolist()
    visual = [i for i, token in enumerate(ids) if token == IMAGE]
    text = [i for i in range(len(ids)) if i not in visual]
    asked = [i for i in text if i > visual[-1]]
    assert (found["n_visual"], found["n_text"]) == (len(visual), len(asked))
    assert [row["layer"] for row in found["layers"]] == list(range(len(weights)))
    for row, layer in zip(found["layers"], weights, strict=True):
        mean = layer[0].mean(0)
        for key, queries, keys in (("text_to_visual", asked, visual), ("text_to_text", asked, text), ("visual_to_visual", visual, visual)):
            # query by query: sums over keys, then the mean
            expected = sum(float(mean[q, keys].sum()) for q in queries) / len(queries)
            assert row[key] == pytest.approx(expected, abs=1e-5), key


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built("llava")
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        before = model(**inputs).logits
    # transformers leaves hooks of its own
    hooks = [list(module._forward_hooks) for module in model.modules()]
    attention_flow(model, inputs)

    def failing(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("stop")

    layer = model.get_decoder().layers[-1]
    monkeypatch.setattr(layer, "forward", failing)
    with pytest.raises(RuntimeError, match="stop"):
        attention_flow(model, inputs)
    monkeypatch.undo()
    assert model.config.text_config._attn_implementation == "sdpa"
    assert [list(module._forward_hooks) for module in model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_prompts_that_show_nothing_say_why() -> None:
    model, inputs = built("llava")
    behind = inputs["input_ids"][0].tolist().index(IMAGE) + 16
    with pytest.raises(OptionError, match="no text stands behind the picture"):
        attention_flow(model, {**inputs, **{name: inputs[name][:, :behind] for name in ("input_ids", "attention_mask")}})
    with pytest.raises(UnsupportedError, match="no placeholder of a picture"):
        attention_flow(model, {"input_ids": torch.ones(1, 5, dtype=torch.int64)})
