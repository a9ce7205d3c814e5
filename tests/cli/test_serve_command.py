"""`accel serve` and `accel bench serve` as far as they go without vLLM: whose words are whose, and what is refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from accel.cli.main import main
from accel.patches.hosts.vllm import bench, compat, launch


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `launch.serve` was called with."""
    calls: list[dict[str, Any]] = []

    def serve(words: Sequence[str], methods: Sequence[Any], *, is_dry_run: bool) -> int:
        calls.append({"words": list(words), "methods": [(m.method_name(), m.changed_options()) for m in methods], "is_dry_run": is_dry_run})
        return 0

    monkeypatch.setattr(launch, "serve", serve)
    return calls


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: None)


def test_words_that_are_not_ours_reach_vllm_in_their_order(served: list[dict[str, Any]]) -> None:
    words = ["--max-model-len", "4096", "M", "--hf-overrides", '{"a": 1}', "--enforce-eager", "-O", "0"]
    assert main(["serve", *words[:3], "--method", "streaming:min_seq_len=0", *words[3:], "--method", "fastervlm", "--dry-run"]) == 0
    assert served == [{"words": words, "methods": [("streaming", {"min_seq_len": 0}), ("fastervlm", {})], "is_dry_run": True}]


def test_the_beginning_of_our_flag_is_vllm_s(served: list[dict[str, Any]]) -> None:
    assert main(["serve", "M", "--rec", "x"]) == 0
    assert served[0]["words"] == ["M", "--rec", "x"]


@pytest.mark.parametrize("words", [["--model=M"], ["--model", "M"], ["--config", "c.yaml"], ["--config=c.yaml", "--port", "1"]], ids=" ".join)
def test_a_model_may_be_named_by_a_flag_or_in_vllm_s_file(words: list[str], served: list[dict[str, Any]]) -> None:
    assert main(["serve", *words]) == 0
    assert served[0]["words"] == words


def test_without_a_method_vllm_serves_as_it_is(served: list[dict[str, Any]]) -> None:
    assert main(["serve", "M"]) == 0
    assert served[0]["methods"] == []


def test_a_recipe_gives_the_methods(served: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("schema: 1\nmethods:\n  - flexprefill: {gamma: 0.9}\n")
    assert main(["serve", "M", "--recipe", str(file)]) == 0
    assert served[0]["methods"] == [("flexprefill", {"gamma": 0.9})]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the model to serve"),
        (["--method", "streaming"], "name the model to serve"),
        (["--enforce-eager", "--port=1"], "name the model to serve"),
        (["M", "--method", "streming"], "did you mean 'streaming'"),
        (["M", "--method", "streaming", "--recipe", "r.yaml"], "do not go together"),
        (["M", "--recipe", "no.yaml"], "cannot read the recipe no.yaml"),
        (["M", "--method", "hack"], "one block table for all heads"),
        (["M", "--method", "fastv"], "in the middle of the model"),
        (["M", "--method", "streaming", "--method", "flexprefill"], "at most one sparse-attention method"),
    ],
    ids=["no_model", "method_only", "flags_only", "unknown", "both", "no_file", "cache", "layers", "two"],
)
def test_a_wrong_word_is_told_without_vllm(words: list[str], message: str, served: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *words]) == 2
    assert message in capsys.readouterr().err
    assert served == []


@pytest.mark.usefixtures("no_vllm")
@pytest.mark.parametrize("words", [["serve", "M", "--method", "streaming"], ["serve", "M"], ["bench", "serve", "--method", "dense"]], ids=" ".join)
def test_without_vllm_the_line_that_installs_it_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert f"pip install 'vllm>={compat.OLDEST},<{compat.BELOW}'" in capsys.readouterr().err


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0")
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: object())
    assert "vLLM 0.31.0 is installed" in str(compat.why_unsupported())


def test_commands_without_more_words_still_refuse_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ls", "--no-such-flag"])
    assert "--no-such-flag" in capsys.readouterr().err


def client_result(ttft: float, texts: list[str], **more: Any) -> dict[str, Any]:
    """What vLLM's client returns of two requests."""
    metrics = {f"{kind}_{name}_ms": ttft for name in bench.METRICS for kind in ("median", "p20", "p80", "p99")}
    return {
        **metrics, "input_lens": [5, 7], "completed": 2, "total_input_tokens": 12, "total_output_tokens": 4, "request_throughput": 2.0,
        "output_throughput": 4.0, "generated_texts": texts, **more,
    }  # fmt: skip


class Played:
    """Servers and their clients: by server, what was started and what its client will measure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, results: list[dict[str, Any]]) -> None:
        from contextlib import contextmanager

        self.started: list[dict[str, Any]] = []
        self.client: list[list[str]] = []
        coming = iter(results)

        @contextmanager
        def started(model: str, recipe: Any, *, words: Sequence[str], log: Path, port: int) -> Any:
            self.started.append({"model": model, "recipe": recipe and Path(recipe).read_text(), "words": list(words)})
            yield "http://there"

        def run_client(model: str, url: str, words: Sequence[str]) -> dict[str, Any]:
            self.client.append(list(words))
            return next(coming)

        monkeypatch.setattr(compat, "require_vllm", lambda: None)
        monkeypatch.setattr(bench, "started", started)
        monkeypatch.setattr(bench, "run_client", run_client)
        counted = {"sparse_calls": 9, "dense_calls": {"decode": 2}, "density": 0.5, "visual_tokens": 0, "kept_tokens": 0}
        monkeypatch.setattr(bench, "own_metrics", lambda url: counted)


WORDS = ["bench", "serve", "--model", "M", "--method", "streaming:min_seq_len=0", "--server", "--max-model-len 64", "--num-prompts", "2"]


def test_both_servers_get_the_same_words_and_one_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    played = Played(monkeypatch, [client_result(20.0, ["a", "b"]), client_result(10.0, ["a", "c"])])
    assert main([*WORDS, "--out", str(tmp_path / "r")]) == 0
    assert [s["words"] for s in played.started] == [["--max-model-len", "64"]] * 2
    assert played.started[0]["recipe"] is None
    assert "streaming" in played.started[1]["recipe"]
    assert played.client == [["--num-prompts", "2"]] * 2
    report = (tmp_path / "r" / "report.md").read_text()
    row = next(line for line in report.splitlines() if line.startswith("| streaming"))
    assert "2.00×" in row
    assert "1 of 2" in row, "one of two texts is the same"
    assert "9 attention calls ran sparse, 2 dense (decode)" in report
    assert "2.00×" in capsys.readouterr().out


def test_a_benchmark_in_which_nothing_ran_sparse_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    Played(monkeypatch, [client_result(20.0, ["a", "b"]), client_result(10.0, ["a", "b"])])
    monkeypatch.setattr(bench, "own_metrics", lambda url: {"sparse_calls": 0, "dense_calls": {"shorter than 4096 tokens": 8}, "density": None})
    assert main([*WORDS, "--out", str(tmp_path / "r")]) == 0
    assert "nothing ran sparse; this compares dense with dense" in capsys.readouterr().out
    assert "nothing ran sparse" in (tmp_path / "r" / "report.md").read_text()


def test_a_report_on_several_workers_says_what_was_added_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Played(monkeypatch, [client_result(20.0, ["a", "b"]), client_result(10.0, ["a", "b"])])
    counted = {"workers": 2, "sparse_calls": 18, "dense_calls": {}, "density": 0.5, "visual_tokens": 0, "kept_tokens": 0}
    monkeypatch.setattr(bench, "own_metrics", lambda url: counted)
    assert main([*WORDS, "--out", str(tmp_path / "r")]) == 0
    assert "Attention calls are added up over 2 workers" in (tmp_path / "r" / "report.md").read_text()


def test_other_prompts_are_no_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Played(monkeypatch, [client_result(20.0, ["a", "b"]), client_result(10.0, ["a", "c"], input_lens=[5, 8])])
    assert main([*WORDS, "--out", str(tmp_path / "r")]) == 2
    assert "was sent other prompts" in capsys.readouterr().err


def test_a_request_without_an_answer_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Played(monkeypatch, [client_result(20.0, ["a", "b"]), client_result(10.0, ["a", ""], completed=1)])
    assert main([*WORDS, "--out", str(tmp_path / "r")]) == 1


def test_a_server_that_ends_early_is_told_with_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accel.errors import AccelError

    # `accel serve` without a model ends at once
    with pytest.raises(AccelError, match="exit code 2 before it answered") as caught, bench.started("", None, words=[], log=tmp_path / "l", port=1):
        pass
    assert "accel: " in str(caught.value)
