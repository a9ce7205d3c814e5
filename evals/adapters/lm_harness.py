"""lm-eval's Hugging Face model with methods of accel on it, under the name `accel-hf`: RULER, LongBench and InfiniteBench with any recipe.

lm-eval has no plugins, so importing this module is what registers the model: the command `accel-lm-eval` is lm-eval's own, started after that.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from accel.errors import AccelError, OptionError, UnsupportedError
from accel.evals.adapters.applied import Applied, read_methods
from accel.evals.decoder_cache import is_compressing
from accel.evals.models import embedded_names, load_model, reads_ahead
from accel.evals.scoring.single import decode, prefill, token_log_probs

logger = logging.getLogger("accel")
# the text of a request for lm-eval's cache, its context and its continuation as tokens
TokenRequest = tuple[Any, list[int], list[int]]


@register_model("accel-hf")
class AccelHF(HFLM):  # type: ignore[misc]
    """`HFLM` with a method or a recipe applied to its model. What ran is in the results, under `config` → `accel`, and in the log.

    pretrained: a local folder, a hub id, the name of an embedded model, or a loaded model. method, recipe: see `read_methods`; without either this is
    the dense baseline. require_effect: fail where a method had no effect. Everything else as in `HFLM`. Raises OptionError and UnsupportedError.

    Scores of continuations: a sparse method sees context and continuation in one pass, as `HFLM` scores them. A method that drops cache entries
    would have nothing to do there, so it drops them behind the context, and the continuation is read token by token; dense is read in one pass, so
    that in 16 bits their difference holds rounding too. lm-eval's own cache of responses (`use_cache`) knows no methods: take a file per recipe.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        method: str | None = None,
        recipe: str | None = None,
        require_effect: bool = False,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        **kwargs: Any,
    ) -> None:
        methods = read_methods(method, recipe, beside=list(kwargs))
        if methods and str(batch_size).startswith("auto"):
            raise OptionError("batch_size=auto tries batches of dummy tokens, which the counters would take for prompts; give a number with a method")
        # lm-eval asks for cuda where nobody said anything, whether there is one or not
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(pretrained, str) and pretrained in embedded_names():
            if "text" not in (reads_ahead(pretrained) or ("text",)):
                raise OptionError(f"{pretrained} knows no texts, which lm-eval's tasks are; smollm2 does, with pretrained=smollm2")
            loaded = load_model(pretrained, dtype="float32" if dtype == "auto" else dtype, device=device)
            pretrained, tokenizer = loaded.model, tokenizer or loaded.tokenizer
        super().__init__(pretrained, tokenizer=tokenizer, dtype=dtype, device=device, batch_size=batch_size, **kwargs)
        # lm-eval ends replies at it, and fails with a type error where there is none
        if self.tokenizer.eos_token_id is None:
            raise UnsupportedError(
                "lm-eval cannot read with this tokenizer:", ["it has no token that ends a text; set `eos_token` in its tokenizer_config.json"]
            )
        self.accel = Applied(self.model, methods, require_effect=require_effect)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """HFLM's answers, counted. Where methods drop cache entries, a batch holds requests of one length: a budget that is a share is one of the
        longest row.
        """
        run = super().generate_until
        with self.accel.counting("generate_until", len(requests)):
            if not is_compressing(self.accel.methods):
                found: list[str] = run(requests, disable_tqdm=disable_tqdm)
                return found
            return _by_length(requests, lambda request: len(self.tok_encode(request.args[0])), run, self._bar(requests, disable_tqdm))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """HFLM's scores, counted."""
        with self.accel.counting("loglikelihood", len(requests)):
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """HFLM's scores, counted. UnsupportedError for methods that drop cache entries: there is no prompt behind which they could."""
        if is_compressing(self.accel.methods):
            raise UnsupportedError(
                "loglikelihood_rolling scores whole texts without a prompt:",
                ["methods that drop cache entries drop them behind a prompt; use tasks of the types loglikelihood, multiple_choice, generate_until"],
            )
        with self.accel.counting("loglikelihood_rolling", len(requests)):
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return found

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's facts, and under `accel` what the methods did; lm-eval asks when all is done, and writes it to its results."""
        return {**super().get_model_info(), "accel": self.accel.info()}

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """HFLM's scores. With methods on, a batch holds requests of one length.

        HFLM fills shorter rows up on the right and says nothing of it to the model. Causal attention does not mind, but a method that looks at the
        last queries would look at the filling.
        """
        run = partial(super()._loglikelihood_tokens, override_bs=override_bs)
        if not self.accel.methods:
            found: list[tuple[float, bool]] = run(requests, disable_tqdm=disable_tqdm)
            return found
        bar = self._bar(requests, disable_tqdm)
        if is_compressing(self.accel.methods):
            return self._behind_cache(requests, bar)
        return _by_length(requests, lambda request: len(request[1]) + len(request[2]), run, bar)

    def _behind_cache(self, requests: Sequence[TokenRequest], bar: Any) -> list[tuple[float, bool]]:
        """Scores of continuations read token by token behind the cache that the methods leave of the context; no batches."""
        scores = []
        for key, context, continuation in requests:
            # as HFLM cuts: from the left, and the last token only has to be predicted
            room = self.max_length + 1 - len(continuation)
            prompt = torch.tensor([context[-room:] if room > 0 else []], device=self.device)
            if not prompt.numel():
                raise UnsupportedError("cannot score behind a cache:", [f"{len(continuation)} tokens to score leave no room for a context"])
            if len(context) > room:
                logger.warning("the model holds %d tokens: of a context of %d its last %d are read", self.max_length, len(context), room)
            target = torch.tensor(continuation, device=self.device)
            with torch.no_grad(), torch.autocast(self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None):
                first, cache = prefill(self.model, prompt)
                logits = torch.stack([first, *(decode(self.model, token, cache) for token in target[:-1])])
            score = (float(token_log_probs(logits, target).sum()), bool((logits.argmax(-1) == target).all()))
            scores.append(score)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
            bar.update()
        bar.close()
        return scores

    def _bar(self, requests: Sequence[Any], is_hidden: bool) -> Any:
        return tqdm(total=len(requests), disable=is_hidden or self.rank != 0, desc="requests")


def _by_length(requests: Sequence[Any], length: Callable[[Any], int], run: Callable[..., list[Any]], bar: Any) -> list[Any]:
    """What `run` gives for each request, in their order; it gets those of one length at a time, the longest first, so that none is padded."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        places[length(request)].append(place)
    found: list[Any] = [None] * len(requests)
    with bar:
        for _, same in sorted(places.items(), reverse=True):
            for place, result in zip(same, run([requests[i] for i in same], disable_tqdm=True), strict=True):
                found[place] = result
            bar.update(len(same))
    return found


def main() -> None:
    """lm-eval's command line, with `accel-hf` among its models. What accel refuses is told on stderr, with exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        code = cli_evaluate()
    except AccelError as error:
        print(f"accel: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
