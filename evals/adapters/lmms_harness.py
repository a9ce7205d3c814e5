"""lmms-eval's Hugging Face models with methods of accel on them, under the name `accel_hf`.

    lmms-eval --model accel_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,recipe=r.yaml --tasks pope

Prompts are built, pictures read and answers cut by lmms-eval's own class for the model (`base=`, by default the one for its kind). What ran is in the
results under `throughput`, and in the log. Some tasks have prompts of their own for some names of models, such as qwen3_vl: they give accel_hf their
default, so that the dense run to compare with is accel_hf without a method.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from numbers import Number
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model, list_available_models
from lmms_eval.models.model_utils.gen_metrics import eval_logger, log_metrics
from lmms_eval.utils import simple_parse_args_string

import accel.evals.models
from accel.errors import AccelError, OptionError
from accel.evals.adapters.applied import Applied, read_methods
from accel.evals.models import embedded_names

# kinds of models (`model_type` in their configuration) that lmms-eval's classes of another name load; its llava_onevision is for the original code
BASES = {"llava": "llava_hf", "llava_next": "llava_hf", "llava_onevision": "llava_hf"}
# for models without a chat template, whose prompt is the picture and the question as they are
PLAIN = "{{ messages[0]['content'] }}"


class AccelHF(lmms):  # type: ignore[misc]
    """Builds one of lmms-eval's models with methods on it; never an object itself. lmms-eval calls `create_from_arg_string`.

    pretrained: a local folder, a hub id, or an embedded vision-language model. method, recipe: see `read_methods`; without either this is the dense
    baseline. require_effect: fail where a method had no effect. base: lmms-eval's name of the class to build on. All else goes to that class.
    """

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> lmms:
        """The model for `pretrained=…,recipe=…`; values of None in `additional_config` (batch size, device) say nothing."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return build(**{**simple_parse_args_string(arg_string), **given}, force_simple=cls.is_simple)


class AccelHFSimple(AccelHF):
    """The same on the classes that lmms-eval takes with --force_simple."""

    is_simple = True


def build(
    pretrained: str,
    *,
    method: str | None = None,
    recipe: str | None = None,
    require_effect: bool = False,
    base: str | None = None,
    force_simple: bool = False,
    **options: Any,
) -> lmms:
    """lmms-eval's model for `pretrained` with the methods on it. Raises OptionError and UnsupportedError; arguments as in `AccelHF`."""
    methods = read_methods(method, recipe, beside=list(options))
    if pretrained in embedded_names():
        pretrained = str(_embedded_folder(pretrained))
        # its processor has no chat template, which the other classes want
        force_simple = True
        options.setdefault("chat_template", PLAIN)
    base_class = get_model(base or base_for(_model_type(pretrained)), force_simple)
    model = _with_methods(base_class)(pretrained=pretrained, **{**_placement(base_class, options.get("device")), **options})
    model.accel = Applied(model.model, methods, require_effect=require_effect, tell=eval_logger.info)
    return model


def base_for(model_type: str) -> str:
    """lmms-eval's name of its class for a kind of model. OptionError where it has none of that name."""
    name = BASES.get(model_type, model_type)
    if name not in list_available_models(include_aliases=True):
        raise OptionError(f"lmms-eval has no model named {name}; name one of its Hugging Face models with base=, for example base=huggingface")
    return name


def _placement(base: type[lmms], device: str | None) -> dict[str, str]:
    """Arguments that put the model where its inputs will be; nothing for several processes, which the classes place themselves.

    The defaults of lmms-eval's classes (no map, or an automatic one beside inputs on cuda) work with neither this transformers nor a CPU.
    """
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return {}
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {name: place for name in ("device", "device_map") if name in inspect.signature(base.__init__).parameters}


@cache
def _with_methods(base: type[lmms]) -> type[lmms]:
    return type(f"Accel{base.__name__}", (_Counted, base), {})


class _Counted(lmms):  # type: ignore[misc]
    """Put before a class of lmms-eval: counts what the methods do for each kind of request."""

    accel: Applied

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """The answers of the class behind, counted; the same for the other kinds of requests."""
        return self._counted("generate_until", super().generate_until, requests)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        return self._counted("loglikelihood", super().loglikelihood, requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        return self._counted("generate_until_multi_round", super().generate_until_multi_round, requests)

    def clean(self) -> None:
        """lmms-eval is through with the model: the methods let go of it too."""
        self.accel.undo()
        super().clean()

    def _counted(self, kind: str, run: Callable[[Any], list[Any]], requests: Sequence[Any]) -> list[Any]:
        if self.accel.handle is None:
            with _failures_raise(self.model, kind):
                return run(requests)
        with self.accel.counting(kind, len(requests)), _failures_raise(self.model, kind):
            found = run(requests)
        # the one place in lmms-eval's results that a model can write to. It takes numbers; this entry adds no tokens and no time to its totals
        log_metrics(0.0, 0, 0.0, {f"accel_{name}": value for name, value in self.accel.calls[-1].items() if _is_number(value)})
        return found


@contextmanager
def _failures_raise(model: Any, kind: str) -> Iterator[None]:
    """Raises AccelError at the end where `model.generate` failed: lmms-eval's classes log that, and go on with an empty answer."""
    failed: list[Exception] = []
    # pruning methods have put one of their own on the model
    own, generate = vars(model).get("generate"), model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:  # of whatever kind, it would become an empty answer
            failed.append(error)
            raise

    model.generate = watched
    try:
        yield
    finally:
        if own is None:
            del model.generate
        else:
            model.generate = own
    if failed:
        first = f"{type(failed[0]).__name__}: {failed[0]}"
        raise AccelError(f"{len(failed)} calls of generate failed in requests of {kind}; the first: {first}") from failed[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool)


def _model_type(pretrained: str) -> str:
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(pretrained).model_type)
    except (OSError, ValueError) as error:      # no such files, no network, an unknown architecture
        raise AccelError(f"cannot load the model {pretrained!r}: {error}") from error


def _embedded_folder(name: str) -> Path:
    """Where the files of an embedded model lie. OptionError for one that is no folder of files that transformers loads, or reads no pictures."""
    folder = Path(accel.evals.models.__file__).parent / name.replace("-", "_") / "weights"
    if not (folder / "processor_config.json").exists():
        raise OptionError(f"{name} reads no pictures; small-vlm does, with pretrained=small-vlm")
    return folder
