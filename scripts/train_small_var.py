"""Trains the small VAR of evals/models/small_var from random weights, on a CPU: its judge, then its tokenizer, then its transformer.

A checkpoint is written every minute; --resume goes on from the last one. The model that ships was made by

    python scripts/train_small_var.py --out runs/small_var
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.evals.models.small_var import training as T
from accel.evals.models.small_var.architecture import Judge, new_model
from accel.evals.models.small_var.drawings import Drawn, drawings
from accel.evals.models.small_vlm.training import Muon

CHECKPOINT = "checkpoint.pt"
STAGES = ("judge", "tokenizer", "transformer")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and the finished model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--steps", type=int, nargs=3, default=[1000, 2126, 1312], help="of the three stages")
    parser.add_argument("--minutes", type=float, nargs=3, default=[math.inf] * 3, help="of the three stages, where these run out before the steps")
    parser.add_argument("--batch", type=int, nargs=3, default=[64, 16, 24])
    parser.add_argument("--lr", type=float, nargs=3, default=[0.002, 0.002, 0.015])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class Run:
    """One training run: the networks, their optimisers and what was done so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.judge, self.model = Judge(), new_model()
        self.done: dict[str, float] = {f"{stage}_{what}": 0 for stage in STAGES for what in ("steps", "s")}
        self.saved_at = time.monotonic()
        tokenizer = list(self.model.tokenizer.parameters())
        known = set(map(id, tokenizer))
        others = [w for w in self.model.parameters() if id(w) not in known]
        matrices = {id(w) for block in self.model.blocks for w in block.parameters() if w.ndim == 2}
        rates = args.lr
        self.optimisers: dict[str, list[torch.optim.Optimizer]] = {
            "judge": [torch.optim.AdamW(self.judge.parameters(), rates[0])],
            "tokenizer": [torch.optim.AdamW(tokenizer, rates[1], betas=(0.9, 0.98), weight_decay=0.0)],
            "transformer": [
                Muon([w for w in others if id(w) in matrices], rates[2]),
                torch.optim.AdamW([w for w in others if id(w) not in matrices], rates[2] / 5, betas=(0.9, 0.98), weight_decay=0.0),
            ],
        }
        for opt in (opt for opts in self.optimisers.values() for opt in opts):
            for group in opt.param_groups:
                group["full_lr"] = group["lr"]
        self.use = T.CodeUse(self.model.config.codebook_size)

    # --- stages -----------------------------------------------------------------------------------------------------------------

    def train(self, stage: str) -> None:
        """Runs a stage to its end: by steps, or by its minutes where these run out first."""
        number = STAGES.index(stage)
        steps, minutes, size = (getattr(self.args, name)[number] for name in ("steps", "minutes", "batch"))
        loss_of = getattr(self, f"_{stage}_loss")
        sums: dict[str, float] = {}
        while (progress := max(self.done[f"{stage}_steps"] / steps, self.done[f"{stage}_s"] / (60 * minutes))) < 1:
            begin = time.monotonic()
            step = int(self.done[f"{stage}_steps"])
            # every stage has pictures of its own
            first = number * 10**8 + step * size
            loss, shown = loss_of(drawings("train", range(first, first + size), seed=self.args.seed), step, progress)
            self._step(stage, loss, progress, step)
            self.done[f"{stage}_steps"] += 1
            self.done[f"{stage}_s"] += time.monotonic() - begin
            for name, value in shown.items():
                sums[name] = sums.get(name, 0.0) + float(value) / 50
            if (step + 1) % 50 == 0:
                self._log(stage, step=step + 1, minutes=self.done[f"{stage}_s"] / 60, **sums)
                sums = {}
            if time.monotonic() - self.saved_at > 60:
                self.save()
        self._log(stage, step=self.done[f"{stage}_steps"], minutes=self.done[f"{stage}_s"] / 60, **self.validate(stage))
        self.save()

    def _judge_loss(self, drawn: Drawn, step: int, progress: float) -> tuple[Tensor, dict[str, Any]]:
        loss = T.judge_loss(self.judge, *drawn)
        return loss, {"loss": loss.detach()}

    def _tokenizer_loss(self, drawn: Drawn, step: int, progress: float) -> tuple[Tensor, dict[str, Any]]:
        """Without codes for the first tenth; unused codes are moved until 80 %."""
        tokenizer, is_quantised = self.model.tokenizer, progress > 0.08
        found = T.tokenizer_loss(tokenizer, drawn.pixels, self.model.schedule, is_quantised=is_quantised)
        if not is_quantised:
            if step % 10 == 0:
                T.place_codes(tokenizer.quantizer.codebook, found.rests, rounds=2)
        else:
            self.use.count(found.ids)
            if step % 25 == 0 and progress < 0.8:
                self.use.move_unused(tokenizer.quantizer.codebook, found.rests)
        return found.loss, {"loss": found.loss.detach(), "error": found.error, "codes": len(found.ids.unique())}

    def _transformer_loss(self, drawn: Drawn, step: int, progress: float) -> tuple[Tensor, dict[str, Any]]:
        loss = T.transformer_loss(self.model, *drawn)
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def validate(self, stage: str) -> dict[str, float]:
        """What a stage has reached on pictures of the validation split."""
        pixels, labels = drawings("validation", range(500), seed=self.args.seed)
        if stage == "judge":
            return {"accuracy": float((self.judge.classes(pixels) == labels).float().mean())}
        if stage == "tokenizer":
            return {"error": float(T.tokenizer_loss(self.model.tokenizer, pixels, self.model.schedule, is_quantised=True).error)}
        made = torch.cat([self.model.generate(labels[i : i + 100], seed=i, output="tensor") for i in range(0, 300, 100)])
        return {"accuracy": float((self.judge.classes(made) == labels[:300]).float().mean())}

    # --- steps and files --------------------------------------------------------------------------------------------------------

    def _step(self, stage: str, loss: Tensor, progress: float, step: int) -> None:
        """One update; the rate rises over 50 steps, stays until half of the stage and falls to a fiftieth."""
        loss.backward()
        opts = self.optimisers[stage]
        torch.nn.utils.clip_grad_norm_([w for opt in opts for group in opt.param_groups for w in group["params"]], 1.0)
        rate = min(1.0, (step + 1) / 50) * max(0.02, min(1.0, (1 - progress) / 0.5))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["full_lr"] * rate
            opt.step()
            opt.zero_grad(set_to_none=True)

    def _log(self, stage: str, **values: float) -> None:
        line = json.dumps({"stage": stage, **{name: round(float(value), 5) for name, value in values.items()}})
        print(line, flush=True)
        with (self.args.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self) -> None:
        """Everything needed to go on, written beside the old checkpoint and then put in its place."""
        state = {
            "model": self.model.state_dict(), "judge": self.judge.state_dict(), "done": self.done, "use": self.use.share,
            "optimisers": {stage: [opt.state_dict() for opt in opts] for stage, opts in self.optimisers.items()},
        }  # fmt: skip
        temporary = self.args.out / (CHECKPOINT + ".new")
        torch.save(state, temporary)
        temporary.replace(self.args.out / CHECKPOINT)
        self.saved_at = time.monotonic()

    def load(self) -> None:
        """Goes on from the checkpoint in --out."""
        state = torch.load(self.args.out / CHECKPOINT, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.judge.load_state_dict(state["judge"])
        self.done, self.use.share = state["done"], state["use"]
        for stage, opts in self.optimisers.items():
            for opt, saved in zip(opts, state["optimisers"][stage], strict=True):
                opt.load_state_dict(saved)

    def export(self) -> None:
        """The finished model and judge as fp16 files, what stays in fp32 excepted."""
        from safetensors.torch import save_file

        weights = self.args.out / "weights"
        self.load_halved().save_pretrained(weights)
        save_file({name: w.half().contiguous() for name, w in self.judge.state_dict().items()}, weights / "judge.safetensors")

    def load_halved(self) -> Any:
        """A copy of the model in fp16, but for the parts that VAR keeps in fp32."""
        model = type(self.model)(self.model.config)
        model.load_state_dict(self.model.state_dict())
        for name, weight in model.named_parameters():
            if not any(part in name for part in model._keep_in_fp32_modules_strict):
                weight.data = weight.data.half()
        model.config.dtype = torch.float16
        return model


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    if args.resume:
        run.load()
    for stage in args.stages:
        run.train(stage)
    run.export()


if __name__ == "__main__":
    main()
