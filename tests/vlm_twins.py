"""One tiny vision-language model in vLLM and in transformers, and the prompts that both are asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import tiny_vlms
import torch
from tiny_vllm import engine
from tiny_vlms import picture, prompt

import accel
from accel.patches.hosts.transformers.pruning.vision import family_of
from accel.patches.hosts.vllm.models import ARCHITECTURES

Tokens = list[list[int]]
# chunks cut pictures and mix with decoding rows; blocks are small enough to be counted
ENGINE: dict[str, Any] = {
    "limit_mm_per_prompt": {"image": 2, "video": 0}, "max_num_batched_tokens": 128, "block_size": 32, "disable_log_stats": False,
}  # fmt: skip
SAVED = {
    "llava": tiny_vlms.save_llava, "siglip": partial(tiny_vlms.save_llava, tower="siglip"), "llava_next": tiny_vlms.save_llava_next,
    "qwen2_5_vl": tiny_vlms.save_qwen2_5_vl,
}  # fmt: skip
# in front of text of 3, 70, 333 and 500 tokens; two pictures of one prompt, pictures of other shapes, none
PROMPTS = [
    prompt(2, [picture(90, 64, 1)], 1, seed=1),
    prompt(20, [picture(64, 64, 2), picture(120, 70, 3)], 50, seed=2),
    prompt(333, [], 0, seed=3),
    prompt(400, [picture(50, 126, 4)], 100, seed=4),
]


class Twin:
    """One model on disk, in vLLM and in transformers."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.architecture = ARCHITECTURES[type(self.model).__name__].name
        # positions of several axes cannot be made compact, and vLLM keeps them
        self.like_vllm: dict[str, Any] = {} if type(self.model).__name__.startswith("Qwen") else {"position_mode": "compact"}
        self._stock: tuple[Tokens, list[int]] | None = None

    def serve(self, *methods: Any, **options: Any) -> Any:
        return engine(self.folder, *methods, architecture=self.architecture, **{**ENGINE, **options})

    def stock(self) -> tuple[Tokens, list[int]]:
        """What vLLM as it is gives for `PROMPTS`."""
        if self._stock is None:
            with self.serve() as llm:
                self._stock = greedy(llm, PROMPTS)
        return self._stock

    def transformers(self, prompts: Sequence[dict[str, Any]], method: Any = None, n: int = 8) -> Tokens:
        """The greedy tokens of our host of transformers, or of the model as it is."""
        if method is None:
            return [self._generate(given, n) for given in prompts]
        with accel.apply(self.model, method):
            return [self._generate(given, n) for given in prompts]

    def _generate(self, given: dict[str, Any], n: int) -> list[int]:
        sizes = [self._n_tokens(p) for p in given.get("multi_modal_data", {}).get("image", [])]
        inputs = tiny_vlms.for_transformers(self.processor, given, sizes)
        out = self.model.generate(**inputs, max_new_tokens=n, do_sample=False)
        return list(out[0, inputs["input_ids"].shape[1] :].tolist())

    def _n_tokens(self, image: Any) -> int:
        made = dict(self.processor.image_processor([image], return_tensors="pt"))
        config: Any = self.model.config
        return len(family_of(config).pictures(SimpleNamespace(config=config), "image", made, None)[0])      # type: ignore[arg-type]


def greedy(llm: Any, prompts: Sequence[dict[str, Any]], n: int = 8) -> tuple[Tokens, list[int]]:
    """The greedy continuations of prompts with pictures, and how long the prompts were when pictures stood in them."""
    from vllm import SamplingParams

    outputs = llm.generate(prompts, SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False), use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs], [len(o.prompt_token_ids) for o in outputs]


def asking(prompts: Sequence[dict[str, Any]], keep: Any) -> list[dict[str, Any]]:
    """The prompts with a `keep` of their own where they hold pictures."""
    return [{**p, "mm_processor_kwargs": {"keep": keep}} if "multi_modal_data" in p else p for p in prompts]
