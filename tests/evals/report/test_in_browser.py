"""Reports open in a browser without a network: every figure is drawn, and nothing is complained about on the console."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from written_runs import write_bench, write_run

from accel.evals.compare.folders import compare, read_sources
from accel.evals.compare.report import write_comparison
from accel.evals.report.page import write_reports
from accel.evals.summary.fronts import front_rows
from accel.evals.summary.run import summarise_run

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")

# says what the page is made of once it has been laid out; the report itself holds no script
PROBE = """<script>window.addEventListener('load', () => {
  const found = [...document.querySelectorAll('figure')].map(figure => {
    const image = figure.querySelector('img'), svg = figure.querySelector('svg');
    const inside = svg ? svg.querySelectorAll('path, use, image').length : image.naturalWidth;
    return {section: figure.closest('section').id, width: (svg || image).getBoundingClientRect().width, inside,
            overflow: svg ? Math.max(0, ...[...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect().right)) : 0};
  });
  const page = {figures: found, width: document.documentElement.scrollWidth, window: window.innerWidth};
  const told = document.createElement('pre'); told.id = 'probe'; told.textContent = JSON.stringify(page); document.body.append(told);
});</script></body>"""


def opened(page: Path, folder: Path) -> dict[str, Any]:
    """What a browser without a network made of the page: its figures and its width. Fails where the console says anything."""
    assert BROWSER is not None
    copy = folder / "opened.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1200,900", "--virtual-time-budget=5000",
             # whatever a page asks a host for fails, and is told on the console
             "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'browser'}"]  # fmt: skip
    done = subprocess.run([BROWSER, *flags, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    told = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert told is not None, "the page was never laid out"
    return dict(json.loads(html.unescape(told[1])))


def require_drawn(page: dict[str, Any], sections: set[str]) -> None:
    assert {figure["section"] for figure in page["figures"]} == sections
    for figure in page["figures"]:
        assert figure["width"] > 100, figure
        assert figure["inside"] > 0, f"an empty figure: {figure}"
        assert figure["overflow"] <= page["window"], f"its text runs out of the page: {figure}"
    assert page["width"] <= page["window"], "the page itself never scrolls sideways"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two lengths with everything that `accel run` reports on text, its labels long."""
    label = "flexprefill(min_seq_len=0, gamma=0.6, min_budget=128, block_size=64)"
    folder = write_run(tmp_path / "run", {label: [1, 1, 0, 1], "streaming (same density)": [0, 1, 0, 0]}, controls=["streaming (same density)"])
    [source] = read_sources([folder])
    result = json.loads((folder / "result.json").read_text())
    longer = [{**row, "tokens": 2048, "prefill_ms": {key: 3 * ms for key, ms in row["prefill_ms"].items()}} for row in result["scores"]]
    rows = [*result["scores"], *longer]
    with (folder / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps({**asdict(record), "tokens": 2048}) + "\n" for record in source.records)
    maps = {
        "label": label, "block_size": 128, "tokens": 384, "n_layers": 4, "density": {"1": [0.5, 1.0], "3": [0.2, 0.7]},
        "maps": [{"layer": 1, "head": 0, "density": 0.5, "rows": ["1", "01", "100"]}],
    }  # fmt: skip
    result |= {**summarise_run(source.records, rows, [label], []), "scores": rows, "fronts": front_rows(rows), "block_maps": [maps]}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@needs_browser
def test_a_run_report_opens_with_all_its_figures(run: Path, tmp_path: Path) -> None:
    page = opened(write_reports(run).html, tmp_path)
    require_drawn(page, {"accuracy", "depths", "fronts", "maps"})
    n = {section: sum(figure["section"] == section for figure in page["figures"]) for section in ("accuracy", "depths", "fronts", "maps")}
    # a front and a density plot per length, prefill against length, one head and all of them
    assert n == {"accuracy": 2, "depths": 1, "fronts": 3, "maps": 2}


@needs_browser
def test_a_comparison_opens_with_all_its_figures(run: Path, tmp_path: Path) -> None:
    bench = write_bench(tmp_path / "bench", {"dense (sdpa)": 100.0, "dense (accel)": 80.0, "m": 40.0})
    result = compare(read_sources([run, write_run(tmp_path / "b", {"m": [1, 1, 1, 1]}), bench]))
    page = opened(write_comparison(result, tmp_path / "out").html, tmp_path)
    require_drawn(page, {"accuracy", "fronts"})


@needs_browser
def test_the_check_itself_sees_errors_and_missing_pictures(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<body><section id='x'><figure><svg width='300' height='9'></svg></figure></section><script>nothing()</script></body>")
    with pytest.raises(AssertionError, match="nothing is not defined"):
        opened(page, tmp_path)
    page.write_text("<body><section id='x'><figure><svg width='300' height='9'></svg></figure></section></body>")
    with pytest.raises(AssertionError, match="an empty figure"):
        require_drawn(opened(page, tmp_path), {"x"})
    page.write_text("<body><section id='x'><figure><img src='http://example.org/a.png' width='300'></figure></section></body>")
    with pytest.raises(AssertionError):
        require_drawn(opened(page, tmp_path), {"x"})
