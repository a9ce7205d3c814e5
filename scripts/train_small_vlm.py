"""Trains the small vision-language model of evals/models/small_vlm from random weights, on a CPU.

First the tower learns to name what each patch shows, and its [CLS] token what the picture holds. Then the tower is frozen and the text model
learns to answer, eight questions a picture. A checkpoint is written every minute; --resume goes on from the last one.
The model that ships was made by

    python scripts/train_small_vlm.py --out runs/small_vlm
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from accel.evals.models.small_vlm import training as T
from accel.evals.models.small_vlm.architecture import new_model, new_processor

CHECKPOINT = "checkpoint.pt"
TOWER_SHARE = 0.15              # of --minutes


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    if args.resume:
        run.load()
    run.train_tower()
    run.train_text()
    run.export()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower-steps", type=int, default=450)
    parser.add_argument("--text-steps", type=int, default=1600)
    parser.add_argument("--minutes", type=float, help="of processor time, for both stages together, if that is reached before the steps")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and the finished model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--restart-text", action="store_true", help="with --resume: keep the tower, begin the text model again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tower-batch", type=int, default=32)
    parser.add_argument("--batch", type=int, default=12, help="pictures a step, eight questions each")
    parser.add_argument("--lr", type=float, default=0.015, help="of the matrices; embeddings, norms and readers use a tenth")
    return parser.parse_args()


class Run:
    """One training run: model, optimisers and what was done so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = new_model()
        self.model.set_attn_implementation("eager")     # faster than SDPA at this size, and the taught attention is needed
        self.tower = self.model.model.vision_tower
        self.heads = T.TowerHeads()
        self.done: dict[str, Any] = {"tower_steps": 0, "tower_s": 0.0, "text_steps": 0, "text_s": 0.0, "pictures": 0}
        self.saved_at = time.monotonic()
        self.tower_opt = self._optimisers([*self.tower.parameters(), *self.heads.parameters()])
        projector, text = self.model.model.multi_modal_projector, self.model.model.language_model
        self.text_opt = self._optimisers([*projector.parameters(), *text.parameters()])
        self.drop_rng = torch.Generator()

    def _optimisers(self, weights: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Muon for the square-ish matrices; Adam for embeddings, norms, biases and readers."""
        skip = {id(self.model.get_input_embeddings().weight), id(self.tower.embeddings.position_embedding.weight), *map(id, self.heads.parameters())}
        matrices = [w for w in weights if w.ndim == 2 and id(w) not in skip]
        chosen = set(map(id, matrices))
        others = [w for w in weights if id(w) not in chosen]
        lr = self.args.lr
        found: list[torch.optim.Optimizer] = [T.Muon(matrices, lr), torch.optim.AdamW(others, lr / 8, betas=(0.9, 0.98), weight_decay=0.0)]
        for opt in found:
            for group in opt.param_groups:
                group["full_lr"] = group["lr"]
        return found

    # --- stages -----------------------------------------------------------------------------------------------------------------

    def _progress(self, stage: str, share: float) -> float:
        """What is done of a stage, 0–1: by steps, or by its share of the minutes where these run out first."""
        by_steps = self.done[f"{stage}_steps"] / getattr(self.args, f"{stage}_steps")
        return max(by_steps, self.done[f"{stage}_s"] / (self.args.minutes * 60 * share) if self.args.minutes else 0.0)

    def train_tower(self) -> None:
        weights = [*self.tower.parameters(), *self.heads.parameters()]
        while (progress := self._progress("tower", TOWER_SHARE)) < 1:
            begin = time.process_time()
            scenes = [T.scene("train", self._next_picture(), seed=self.args.seed) for _ in range(self.args.tower_batch)]
            with torch.autocast("cpu", torch.bfloat16):
                loss, parts = T.tower_loss(self.tower, self.heads, T.pictures(scenes))
            self._step(self.tower_opt, weights, loss, progress, self.done["tower_steps"])
            self.done["tower_steps"] += 1
            self.done["tower_s"] += time.process_time() - begin
            if self.done["tower_steps"] % 50 == 0:
                self._log("tower", step=self.done["tower_steps"], minutes=self.done["tower_s"] / 60, **parts)
            self._save_now_and_then()

    def train_text(self) -> None:
        self.tower.requires_grad_(False)
        weights = [w for w in self.model.parameters() if w.requires_grad]
        sums: dict[str, float] = defaultdict(float)
        while (progress := self._progress("text", 1 - TOWER_SHARE)) < 1:
            begin = time.process_time()
            families = T.EARLY if progress < 0.15 else T.LATE
            numbers = [self._next_picture() for _ in range(self.args.batch)]
            scenes, asked = T.draw_batch("train", numbers, families, self.args.seed)
            labels = T.pictures(scenes)
            kept, is_compact = self._kept(labels.kind, progress)
            # taught attention helps the first look-ups to appear; the last third of the training is free of it
            look_weight = 0.3 * max(0.0, min(1.0, (0.65 - progress) / 0.3))
            with torch.autocast("cpu", torch.bfloat16):
                loss, answers, looking = T.answer_loss(
                    self.model, self.features(labels.pixels), kept, T.slots(asked), is_compact=is_compact, look_weight=look_weight
                )
            self._step(self.text_opt, weights, loss, progress, self.done["text_steps"])
            self.done["text_steps"] += 1
            self.done["text_s"] += time.process_time() - begin
            if kept.shape[1] == T.N_PATCHES:
                for name, value in (("answers", answers), ("looking", looking), ("n", 1)):
                    sums[name] += value
            if self.done["text_steps"] % 50 == 0:
                n = max(sums["n"], 1)
                means = {name: sums[name] / n for name in ("answers", "looking")}
                self._log("text", step=self.done["text_steps"], minutes=self.done["text_s"] / 60, **means)
                sums.clear()
            if self.done["text_steps"] % 200 == 0:
                self._log("validation", step=self.done["text_steps"], **self.validate())
            self._save_now_and_then()
        self._log("validation", step=self.done["text_steps"], **self.validate(96))

    def _kept(self, kind: torch.Tensor, progress: float) -> tuple[torch.Tensor, bool]:
        """Patches of this step and whether they are renumbered: all of them in half of the steps and at first, otherwise a random share."""
        self.drop_rng.manual_seed(self.args.seed * 1_000_003 + self.done["text_steps"])
        dice = torch.rand(4, generator=self.drop_rng).tolist()
        if progress < 0.2 or dice[0] < 0.5:
            return torch.arange(T.N_PATCHES).expand(len(kind), -1), False
        share = math.exp(dice[1] * math.log(0.08))
        # a small random share holds the evidence of hardly any question
        content_first = dice[2] < 0.5 or share < 0.25
        return T.choose_patches(kind, share, content_first=content_first, generator=self.drop_rng), dice[3] < 0.25

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, patches, width) as `LlavaModel` takes them from the tower."""
        found: torch.Tensor = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return found

    @torch.no_grad()
    def validate(self, n: int = 48) -> dict[str, float]:
        """Share of right answers by family on validation pictures."""
        right, asked_of = defaultdict(int), defaultdict(int)
        for first in range(0, n, 16):
            scenes, asked = T.draw_batch("validation", range(first, first + 16), T.LATE, 0)
            rows = T.slots(asked)
            kept = torch.arange(T.N_PATCHES).expand(len(scenes), -1)
            with torch.autocast("cpu", torch.bfloat16):
                logits, _ = T.answer_logits(self.model, self.features(T.pixels_of(scenes)), kept, rows, is_compact=False, with_attention=False)
            is_right = ((logits.argmax(-1) == rows.targets) | (rows.targets == T.IGNORED)).all(-1)
            for i, names in enumerate(rows.families):
                for j, name in enumerate(names):
                    right[name] += int(is_right[i, j])
                    asked_of[name] += 1
        return {name: right[name] / asked_of[name] for name in sorted(asked_of)}

    # --- steps and files --------------------------------------------------------------------------------------------------------

    def _next_picture(self) -> int:
        self.done["pictures"] += 1
        return int(self.done["pictures"])

    def _step(self, opts: list[torch.optim.Optimizer], weights: list[Any], loss: torch.Tensor, progress: float, step: int) -> None:
        """One update; the rate rises over 50 steps, stays until 60 % of the stage and falls to a fiftieth."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        rate = min(1.0, (step + 1) / 50) * max(0.02, min(1.0, (1 - progress) / 0.4))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["full_lr"] * rate
            opt.step()
            opt.zero_grad(set_to_none=True)

    def _log(self, stage: str, **values: float) -> None:
        line = json.dumps({"stage": stage, **{name: round(value, 4) for name, value in values.items()}})
        print(line, flush=True)
        with (self.args.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self.saved_at > 60:
            self.save()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "done": self.done,
            "tower_opt": [o.state_dict() for o in self.tower_opt], "text_opt": [o.state_dict() for o in self.text_opt],
        }  # fmt: skip
        temporary = self.args.out / (CHECKPOINT + ".new")
        torch.save(state, temporary)
        temporary.replace(self.args.out / CHECKPOINT)
        self.saved_at = time.monotonic()

    def load(self) -> None:
        state = torch.load(self.args.out / CHECKPOINT, weights_only=True)
        self.heads.load_state_dict(state["heads"])
        self.done = state["done"]
        if self.args.restart_text:
            fresh = self.model.state_dict()
            state["model"] = {name: w if "vision_tower" in name else fresh[name] for name, w in state["model"].items()}
            self.done.update(text_steps=0, text_s=0.0)
        self.model.load_state_dict(state["model"])
        for opts, saved in ((self.tower_opt, state["tower_opt"]), (self.text_opt, state["text_opt"])):
            if self.args.restart_text and opts is self.text_opt:
                continue
            for opt, one in zip(opts, saved, strict=True):
                opt.load_state_dict(one)

    def export(self) -> None:
        """The finished model in fp16 with its processor, as `from_pretrained` wants them, in --out/model."""
        self.save()
        folder = self.args.out / "model"
        self.model.set_attn_implementation("sdpa")
        self.model.to(torch.float16).save_pretrained(folder)
        new_processor().save_pretrained(folder)
        (self.args.out / "done.json").write_text(json.dumps(self.done))


if __name__ == "__main__":
    main()
