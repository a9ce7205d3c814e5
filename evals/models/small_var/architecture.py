"""The untrained model, and the judge that looks at what it draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.evals.models.small_var.drawings import CLASSES
from accel.models.var import VAR, VARConfig

SIDES = (1, 2, 3, 4, 6, 8)
WIDTH, LAYERS, HEADS = 128, 6, 4
CODES, CODE_WIDTH = 256, 16


def new_model() -> VAR:
    """The `VAR` with random weights, in fp32, its tokenizer included. The caller seeds torch."""
    config = VARConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=2 * WIDTH, num_classes=len(CLASSES),
        schedule=list(SIDES), codebook_size=CODES, code_width=CODE_WIDTH, vae_channels=16, vae_multipliers=[1, 2, 4], vae_blocks=1,
        # 1/√width: the usual 0.02 is meant for wider models
        initializer_range=WIDTH**-0.5,
    )  # fmt: skip
    model = VAR(config)
    for name, weight in model.named_parameters():
        # gates that start near 0 would keep the blocks out of the first hundreds of steps
        if name.startswith("blocks") and name.endswith("ada.linear.bias"):
            nn.init.constant_(weight[: 2 * WIDTH], 0.5)
    return model


class Judge(nn.Module):
    """A small classifier of drawings, never shown a generated one. What it sees before its last layer are the features of the image metrics."""

    FEATURES = 64

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([
            nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, stride=2),
        ])  # fmt: skip
        self.to_features = nn.Linear(64 * 16, self.FEATURES)
        self.to_logits = nn.Linear(self.FEATURES, len(CLASSES))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """What each convolution makes of pixels (n, 3, 32, 32) in [0, 1]."""
        x, found = pixels * 2 - 1, []
        for conv in self.convs:
            x = F.relu(conv(x))
            found.append(x)
        return found

    def features(self, pixels: Tensor) -> Tensor:
        """(n, FEATURES)."""
        return self.to_features(self.maps(pixels)[-1].flatten(1))  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (n, 10)."""
        return self.to_logits(F.relu(self.features(pixels)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def classes(self, pixels: Tensor) -> Tensor:
        """The digit that each picture shows, (n,) int64."""
        return self(pixels).argmax(-1)  # type: ignore[no-any-return]
