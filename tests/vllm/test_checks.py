"""What is refused before any weight is loaded: the folders of these models hold a configuration and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import accel
from accel.errors import OptionError, UnsupportedError
from accel.patches.hosts.vllm.checks import prepare
from accel.patches.hosts.vllm.options import KEY, WORKER

SPARSE = accel.Streaming(min_seq_len=0)
GIVEN = {"dtype": "float32", "skip_tokenizer_init": True}


def llama(folder: Path, **changes: Any) -> str:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 4, "intermediate_size": 64}
    LlamaConfig(vocab_size=64, architectures=["LlamaForCausalLM"], **{**sizes, **changes}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def small_vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded vision-language model without its weights."""
    from shutil import copytree, ignore_patterns

    from accel.evals.models.small_vlm.load import WEIGHTS

    return str(copytree(WEIGHTS, tmp_path_factory.mktemp("vlm") / "m", ignore=ignore_patterns("*.safetensors")))


def reasons(model: str, *methods: Any, **given: Any) -> list[str]:
    with pytest.raises(UnsupportedError) as caught:
        prepare(model, methods, {**GIVEN, **given})
    return caught.value.reasons


def test_what_can_be_served_gets_the_options_of_its_engine(config_only: str) -> None:
    found = prepare(config_only, [SPARSE], {**GIVEN, "additional_config": {"mine": 1}})
    assert found["additional_config"].keys() == {"mine", KEY}
    assert found["worker_extension_cls"] == WORKER
    assert "hf_overrides" not in found
    assert found["dtype"] == "float32"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="vLLM cannot take the model") as caught:
        prepare(str(tmp_path / "nothing"), [SPARSE], GIVEN)
    [reason] = caught.value.reasons
    assert "Invalid repository ID or local directory" in reason


def test_an_architecture_that_vllm_does_not_know(tmp_path: Path) -> None:
    model = llama(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["NoSuchForCausalLM"]}))
    [reason] = reasons(model, SPARSE, model_impl="vllm")
    assert "NoSuchForCausalLM" in reason


def test_a_head_size_that_the_backend_does_not_take(tmp_path: Path) -> None:
    [reason] = reasons(llama(tmp_path, head_dim=24), SPARSE)
    assert reason.startswith("heads of 24 do not fit vLLM's attention on CPUs, which takes 32,")


def test_layers_that_the_model_has_not(config_only: str) -> None:
    assert reasons(config_only, accel.Streaming(dense_layers=(1, 7))) == ["dense_layers names 7, but the model has 4 layers"]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8"), ({"kv_cache_dtype": "int4_per_token_head"}, "kv_cache_dtype is int4_per_token_head"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype is bfloat16: the sparse kernels read keys in the model's float32"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
    ],
    ids=["fp8", "int4", "cast", "context_parallel"],
)
def test_options_under_which_no_layer_would_be_sparse(config_only: str, given: dict[str, Any], word: str) -> None:
    [reason] = reasons(config_only, SPARSE, **given)
    assert reason.startswith(word)


@pytest.mark.parametrize(
    ("given", "word"),
    [({"worker_extension_cls": "my.Worker"}, "cannot share the place"), ({"additional_config": {KEY: {}}}, "holds the key")],
    ids=["worker", "key"],
)
def test_options_that_stand_in_the_way(config_only: str, given: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        prepare(config_only, [SPARSE], {**GIVEN, **given})


def test_pictures_of_a_text_model(config_only: str) -> None:
    [reason] = reasons(config_only, accel.FasterVLM(keep=0.25))
    assert reason.startswith("visual tokens can leave LlavaForConditionalGeneration")
    assert reason.endswith("the model is a LlamaForCausalLM")


def test_a_model_class_takes_the_place_of_vllm_s(small_vlm: str) -> None:
    found = prepare(small_vlm, [accel.FasterVLM(keep=0.25)], {"dtype": "float32"})
    assert found["hf_overrides"]["architectures"] == ["AccelLlavaForConditionalGeneration"]


def test_an_exit_beside_the_prefix_cache(small_vlm: str) -> None:
    method = accel.DyVTE(exit_layer=4)
    [reason] = reasons(small_vlm, method, dtype="float32", enforce_eager=True)
    assert reason.startswith("prefix caching is on")
    assert prepare(small_vlm, [method], {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False})


def test_flags_of_the_command_line_arrive_as_the_engine_takes_them(config_only: str) -> None:
    from accel.patches.hosts.vllm.launch import apply_methods, parse
    from accel.patches.hosts.vllm.middleware import PATH

    words = [config_only, "--dtype", "float32", "--skip-tokenizer-init", "--additional-config.mine", "1", "--middleware", "a.b"]
    _, args = parse(words)
    apply_methods(args, [SPARSE])
    assert args.additional_config.keys() == {"mine", KEY}
    assert args.worker_extension_cls == WORKER
    assert args.middleware == ["a.b", PATH]
    assert args.model_tag == config_only


def test_flags_whose_servers_ask_no_worker(config_only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel.patches.hosts.vllm.launch import apply_methods, parse

    _, args = parse([config_only, "--dtype", "float32", "--skip-tokenizer-init", "--grpc"])
    with pytest.raises(OptionError, match="--grpc does not go with methods"):
        apply_methods(args, [SPARSE])


def test_a_port_that_is_taken_is_named(config_only: str) -> None:
    import socket

    from accel.errors import AccelError
    from accel.patches.hosts.vllm.launch import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [config_only, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--skip-tokenizer-init"]
        with pytest.raises(AccelError, match=f"port {port} is taken"):
            serve(words, [])


def test_an_embedded_model_keeps_its_name() -> None:
    from accel.patches.hosts.vllm.launch import apply_methods, parse

    _, args = parse(["small-vlm"])
    apply_methods(args, [])
    assert args.served_model_name == ["small-vlm"]
    assert Path(args.model_tag, "config.json").exists()


def test_vllm_s_own_model_is_not_served_by_accident() -> None:
    from accel.patches.hosts.vllm.launch import parse

    with pytest.raises(OptionError, match="name the model"):
        parse(["--max-model-len", "64"])


@pytest.mark.parametrize("form", ["two_words", "one_word", "flag"])
def test_a_model_may_be_named_by_a_flag_or_in_vllm_s_file(tmp_path: Path, form: str) -> None:
    from accel.patches.hosts.vllm.launch import apply_methods, parse

    file = tmp_path / "c.yaml"
    file.write_text("model: small-vlm\nmax-model-len: 64\n")
    words = {"two_words": ["--config", str(file)], "one_word": [f"--config={file}"], "flag": ["--model=small-vlm", "--max-model-len", "64"]}
    _, args = parse(words[form])
    apply_methods(args, [])
    assert args.max_model_len == 64
    assert args.served_model_name == ["small-vlm"]
    assert Path(args.model_tag, "config.json").exists()


def test_a_file_that_names_no_model_is_told(tmp_path: Path) -> None:
    from accel.patches.hosts.vllm.launch import parse

    file = tmp_path / "c.yaml"
    file.write_text("max-model-len: 64\n")
    with pytest.raises(OptionError, match="No model specified"):
        parse(["--config", str(file)])


def test_what_a_recipe_changed_is_not_shared_with_other_servers(config_only: str, small_vlm: str) -> None:
    [reason] = reasons(config_only, SPARSE, kv_transfer_config={"kv_connector": "NixlConnector", "kv_role": "kv_both"})
    assert reason.startswith("kv_transfer_config is given")
    connector = {"ec_connector": "ECExampleConnector", "ec_role": "ec_producer"}
    [reason] = reasons(small_vlm, accel.FasterVLM(keep=0.25), ec_transfer_config=connector)
    assert reason.startswith("ec_transfer_config is given")


def test_text_that_was_embedded_outside_would_leave_with_visual_tokens(small_vlm: str) -> None:
    given = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
    [reason] = reasons(small_vlm, accel.DyVTE(exit_layer=4), **given, enable_prompt_embeds=True)
    assert reason.startswith("enable_prompt_embeds is given: ")
