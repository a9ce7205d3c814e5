"""Routers of DyVTE: small networks that read the text's hidden states and say whether visual tokens may leave, and the file that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.protocols import ModelInfo

FORMAT = "accel.dyvte.routers.1"
KEEP, EXIT = 0, 1       # classes


@dataclass(frozen=True)
class Router:
    """Two matrices without biases. w1: (hidden, 2D); w2: (2, hidden)."""

    w1: Tensor
    w2: Tensor

    def to(self, device: torch.device) -> Router:
        return Router(self.w1.to(device, torch.float32), self.w2.to(device, torch.float32))

    def logits(self, feature: Tensor) -> Tensor:
        """(…, 2D) fp32 -> (…, 2): keep, exit (visual-token-pruning.md §3.2)."""
        return torch.nn.functional.gelu(feature @ self.w1.T) @ self.w2.T


def text_feature(features: Tensor, is_text: Tensor, is_image: Tensor) -> Tensor:
    """(B, 2D) fp32: the mean of the text behind the last visual token but for its last token, and that last token (§3.3).

    features: (B, tokens, D); is_text, is_image: (B, tokens) bool. Where fewer than two text tokens lie behind the last visual one, all text of the
    sequence counts; of a single text token both halves are that token. A sequence without text gives zeros. Nothing here waits for a device.
    """
    place = torch.arange(1, is_text.shape[1] + 1, device=is_text.device)
    behind = is_text & (place > (is_image * place).amax(1, keepdim=True))
    used = torch.where(behind.sum(1, keepdim=True) >= 2, behind, is_text)
    end = (used * place).amax(1)
    last = features.gather(1, (end - 1).clamp_min(0)[:, None, None].expand(-1, 1, features.shape[2]))[:, 0].float()
    others = used & (place < end[:, None])
    n = others.sum(1)[:, None]
    # masked before the sum: whatever stands in padding, 0 · NaN would be NaN
    mean = features.masked_fill(~others[..., None], 0).sum(1, dtype=torch.float32) / n.clamp_min(1)
    mean = torch.where(n > 0, mean, last)
    return torch.cat([mean, last], 1).masked_fill(end[:, None] == 0, 0)


# --- the file -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterHeader:
    """What a file says of its routers. model, fingerprint: for which weights they were trained. hidden_size: D of that model's decoder.

    threshold: calibrated share of `softmax` above which a router means exit. label_scale, label_slack: how much the loss of the answer could grow
    without the visual tokens and still count as unharmed, as a factor and in nats. data: on what they were trained, for people.
    """

    model: str
    fingerprint: str
    n_layers: int
    hidden_size: int
    router_hidden: int
    candidate_layers: tuple[int, ...]
    threshold: float
    label_scale: float
    label_slack: float
    data: str

    def mismatches(self, model: ModelInfo) -> list[str]:
        """Why these routers cannot run on the model, whatever it was trained on: sizes alone."""
        found = []
        for what, own, asked in (("layers", self.n_layers, model.n_layers), ("hidden size", self.hidden_size, model.hidden_size)):
            if asked is None:
                found.append(f"the host does not say the {what} of {model.family}, and routers must fit it")
            elif own != asked:
                found.append(f"the routers were trained for {self.model} with {what} {own}, this {model.family} model has {asked}")
        return found

    def is_of_other_weights(self, model: ModelInfo) -> bool:
        """Whether they were trained for other weights than these. Hosts that cannot tell weights apart are believed."""
        return model.fingerprint is not None and model.fingerprint() != self.fingerprint

    def as_metadata(self) -> dict[str, str]:
        plain = {name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in asdict(self).items()}
        return {"format": FORMAT, **plain}

    @classmethod
    def from_metadata(cls, found: Mapping[str, str]) -> Self:
        read: dict[str, Any] = {
            "n_layers": int, "hidden_size": int, "router_hidden": int, "threshold": float, "label_scale": float, "label_slack": float,
            "candidate_layers": lambda text: tuple(map(int, text.split(","))),
        }  # fmt: skip
        return cls(**{f.name: read.get(f.name, str)(found[f.name]) for f in fields(cls)})


def save_routers(path: Path, routers: Mapping[int, Router], header: RouterHeader, *, dtype: torch.dtype = torch.float16) -> Path:
    """Writes the routers by layer."""
    from safetensors.torch import save_file

    tensors = {}
    for layer in header.candidate_layers:
        tensors[f"routers.{layer}.w1"] = routers[layer].w1.to(dtype).contiguous()
        tensors[f"routers.{layer}.w2"] = routers[layer].w2.to(dtype).contiguous()
    save_file(tensors, path, metadata=header.as_metadata())
    return path


def read_header(path: str | Path) -> RouterHeader:
    """What a file of routers says of itself. OptionError for anything else than such a file."""
    return _read(path, ())[0]


def load_routers(path: str | Path, layers: Sequence[int] | None = None) -> dict[int, Router]:
    """The routers of these layers, or all, in fp32 on the CPU. OptionError where the file does not hold them."""
    return _read(path, layers)[1]


def _read(path: str | Path, layers: Sequence[int] | None) -> tuple[RouterHeader, dict[int, Router]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if found.get("format") != FORMAT:
                raise OptionError(f"dyvte: {path} holds no routers of this version ({FORMAT}), but {found.get('format', 'something else')!r}")
            header = RouterHeader.from_metadata(found)
            wanted = header.candidate_layers if layers is None else layers
            missing = [layer for layer in wanted if layer not in header.candidate_layers]
            if missing:
                raise OptionError(f"dyvte: {path} holds routers of layers {_list(header.candidate_layers)}, asked for {_list(missing)}")
            routers = {i: Router(*(file.get_tensor(f"routers.{i}.{name}").float() for name in ("w1", "w2"))) for i in wanted}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OptionError(f"dyvte: cannot read routers from {path}: {error}. `accel tune dyvte` writes such files") from error
    for layer, router in routers.items():
        shapes = (tuple(router.w1.shape), tuple(router.w2.shape))
        expected = ((header.router_hidden, 2 * header.hidden_size), (2, header.router_hidden))
        if shapes != expected:
            raise OptionError(f"dyvte: {path}: the router of layer {layer} has shapes {shapes}, expected {expected}")
    return header, routers


def _list(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
