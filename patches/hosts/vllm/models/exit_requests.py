"""What an engine whose visual tokens leave inside the decoder cannot be asked for, refused where vLLM validates a request.

vLLM validates by the processors of logits that an engine is given, in both of its model runners; this one changes no logits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accel.patches.hosts.vllm.compat import LogitsProcessor, NewerLogitsProcessor

PATH = f"{__name__}:NoPromptScores"


class NoPromptScores(LogitsProcessor, NewerLogitsProcessor):
    """Fails a request that asks for log-probs of its prompt: tokens that left have none, and what follows them would be made up."""

    def __init__(self, vllm_config: Any, *of_the_runner: Any) -> None:
        """Both runners give the configuration first."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError, which a server answers by HTTP 400. Prompts without pictures are refused too: the prompt is not known here."""
        if sampling_params.prompt_logprobs is not None or getattr(sampling_params, "prompt_logprob_token_ids", None) is not None:
            raise ValueError(
                "prompt_logprobs (echo with logprobs, too) cannot be had of this engine: visual tokens leave inside its model and have no "
                "log-probs; leave it out, or serve without exit_layer"
            )

    def apply(self, logits: Tensor, *context: Any) -> Tensor:
        """The logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Of the older runner: greedy sampling passes it by."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Of the older runner: nothing is kept."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Of the newer runner: no request's logits change."""
        return False
