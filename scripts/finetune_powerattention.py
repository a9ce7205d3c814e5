"""Adapts a model to PowerAttention's mask with the Hugging Face Trainer, on passkeys made by code.

Without arguments: a tiny random Llama, about a minute on two cores. The passkey lies anywhere in the text, often outside every block that
the last query sees, so that the answer has to travel through several layers. Texts grow in four stages to the full length, as in the
paper's curriculum. `--model` takes any path or hub id; then raise `--length` and `--block-size` to what the model shall serve, and mix in
your own data: passkeys teach the mask, not the language.

    python scripts/finetune_powerattention.py --steps 320 --out adapted
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

import accel

# Token ids of the made-up language: a question mark, the passkeys, and behind them filler
QUESTION = 1
PASSKEYS = range(2, 18)
IGNORED = -100


class Passkeys(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of filler with one passkey token somewhere, closed by a question mark and the passkey; only the last token is learnt."""

    def __init__(self, n_rows: int, length: int, *, vocab_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(PASSKEYS.stop, vocab_size, (n_rows, length), generator=generator)
        answer = torch.randint(PASSKEYS.start, PASSKEYS.stop, (n_rows,), generator=generator)
        place = torch.randint(0, length - 2, (n_rows,), generator=generator)
        self.ids[torch.arange(n_rows), place] = answer
        self.ids[:, -2] = QUESTION
        self.ids[:, -1] = answer

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        labels = torch.full_like(self.ids[row], IGNORED)
        labels[-1] = self.ids[row, -1]
        return {"input_ids": self.ids[row], "labels": labels}


def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of three layers, as many as the default length needs for information to reach its end from everywhere."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def finetune(model: PreTrainedModel, data: Passkeys, *, steps: int, batch_size: int, learning_rate: float) -> list[float]:
    """Trains `model` in place, under whatever is applied to it, and returns about ten losses of the run."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=max(1, steps // 10),
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def share_found(model: PreTrainedModel, data: Passkeys) -> float:
    """Share of the passkeys that are the model's first choice behind the question mark."""
    model.eval()
    device = model.device
    found = [model(ids[:, :-1].to(device), logits_to_keep=1).logits[:, -1].argmax(-1).cpu() == ids[:, -1] for ids in data.ids.split(16)]
    return float(torch.cat(found).float().mean())


def main() -> int:
    options = parsed()
    set_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) if options.model else tiny_llama()
    vocab_size = model.config.get_text_config().vocab_size
    test = Passkeys(128, options.length, vocab_size=vocab_size, seed=0)
    # an adapted model sees its mask at every length, hence no minimum
    method = accel.PowerAttention(block_size=options.block_size, is_adapted=True, min_seq_len=0)
    started = time.perf_counter()
    with accel.apply(model, method) as handle:
        before = share_found(model, test)
        for stage, length in enumerate([options.length // 8, options.length // 4, options.length // 2, options.length], start=1):
            # short texts come in larger batches, so that every step sees about as many tokens
            batch_size = min(options.batch_size * options.length // length, 8 * options.batch_size)
            steps = options.steps // 4
            data = Passkeys(steps * batch_size, length, vocab_size=vocab_size, seed=stage)
            losses = finetune(model, data, steps=steps, batch_size=batch_size, learning_rate=options.learning_rate)
            print(f"{length} tokens: loss {losses[0]:.3f} -> {losses[-1]:.3f} after {time.perf_counter() - started:.0f} s", flush=True)
        handle.stats.reset()
        after = share_found(model, test)
        print(handle.report())
        with handle.paused():
            dense = share_found(model, test)
    print(f"passkeys found: {before:.0%} before, {after:.0%} after; {dense:.0%} with dense attention (chance {1 / len(PASSKEYS):.0%})")
    if options.out:
        model.save_pretrained(options.out)
        recipe = accel.Recipe.of(method).save(Path(options.out) / "accel.yaml")
        print(f"wrote {options.out}; run it with accel.apply(model, accel.Recipe.load({str(recipe)!r}))")
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path or hub id; default: a tiny random Llama")
    parser.add_argument("--steps", type=int, default=320, help="in all four stages together; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="at the full length; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="default: %(default)s, for the tiny model; 1e-5 suits a real one")
    parser.add_argument("--length", type=int, default=256, help="tokens, of which 6 blocks are dense; default: %(default)s")
    parser.add_argument("--block-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--out", help="folder for the adapted model and its recipe")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
