"""RULER's QA scores, recomputed from samples as lm-eval logs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from accel.errors import AccelError
from accel.evals.adapters.ruler_qa import is_right, main, rescore, rescore_results


def sample(answer: str, accepted: list[str], reported: float, length: int = 4096) -> dict[str, Any]:
    """As in `samples_ruler_qa_squad_*.jsonl`; lengths that the sample does not have are −1 there."""
    doc = {"input": "…", "outputs": accepted, "max_length": length}
    return {"doc": doc, "filtered_resps": [answer], "resps": [[answer]], "4096": -1.0, str(length): reported}


@pytest.mark.parametrize(
    ("answer", "is_accepted"),
    [("It was denver broncos.", True), ("the Broncos", True), ("Broncos\x07", True), ("Bron\tcos", False), ("Denver", False), ("", False)],
)
def test_one_accepted_answer_is_enough(answer: str, is_accepted: bool) -> None:
    assert is_right(answer, ["Denver Broncos", "Broncos"]) is is_accepted


def test_lm_eval_still_gives_a_share_where_one_answer_is_enough() -> None:
    """When this fails, lm-eval has been repaired: say in `ruler_qa.py` which versions need it."""
    ruler = pytest.importorskip("lm_eval.tasks.ruler.common_utils", reason="needs lm-eval: pip install 'accel-inference[lm-eval]'")
    doc = {"outputs": ["Denver Broncos", "the Broncos", "Broncos"], "max_length": 4096}
    assert ruler.process_results_part(doc, ["Denver Broncos"])["4096"] == pytest.approx(2 / 3)


def test_scores_are_means_by_length() -> None:
    three = ["Denver Broncos", "the Broncos", "Broncos"]
    samples = [sample("the Denver Broncos", three, 2 / 3), sample("Panthers", three, 0.0), sample("Paris", ["Paris"], 1.0), sample("?", ["a"], 0.0)]
    found = rescore([*samples, sample("the Broncos", three, 2 / 3, length=8192)])
    assert list(found) == [4096, 8192]
    assert found[4096].n == 4
    assert found[4096].score == 0.5
    # ½ ± ½: the deviation of four samples is 1/√3, and over √4 that is 0.289
    assert found[4096].stderr == pytest.approx(0.2887, abs=1e-4)
    assert found[4096].reported == pytest.approx((2 / 3 + 1) / 4)
    assert (found[8192].n, found[8192].score, found[8192].stderr) == (1, 1.0, None)


def test_only_the_qa_tasks_of_a_result_are_rescored() -> None:
    rows = [sample("Broncos", ["Broncos", "the Broncos"], 0.5)]
    found = rescore_results({"samples": {"niah_single_1": [{"doc": {}}], "ruler_qa_squad": rows}})
    assert {task: lengths[4096].score for task, lengths in found.items()} == {"ruler_qa_squad": 1.0}
    assert rescore_results({"results": {}}) == {}


def test_other_samples_are_refused() -> None:
    with pytest.raises(AccelError, match=r"no sample of a RULER QA task.*max_length"):
        rescore([{"doc": {"outputs": ["a"]}, "filtered_resps": ["a"]}])


def test_the_command_prints_both_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    lines = [json.dumps(sample("Broncos", ["Broncos", "the Broncos"], 0.5)), json.dumps(sample("?", ["a"], 0.0))]
    (folder / "samples_ruler_qa_squad_2026.jsonl").write_text("\n".join(lines) + "\n")
    assert main([str(tmp_path)]) == 0
    assert "model/samples_ruler_qa_squad_2026.jsonl    4096  2  0.5000  0.5000     0.2500" in capsys.readouterr().out
    assert main([str(folder / "nothing")]) == 1
    assert "--log_samples" in capsys.readouterr().err
