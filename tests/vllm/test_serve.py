"""`accel serve` as people run it: a process of its own with the engine and its worker below, and the OpenAI client in front."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from accel.patches.hosts.vllm.bench import free_port, own_metrics

START_SECONDS = 300
METHODS = ("--method", "fastervlm:keep=0.25", "--method", "streaming:block_size=16,window_blocks=1,min_seq_len=0")
# long prompts take several steps, so that one can be given up in the middle
ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--max-num-batched-tokens", "48", "--no-enable-prefix-caching")
OWN_KEEP = ("--trust-request-mm-kwargs",)


class Server:
    """A running `accel serve`."""

    def __init__(self, words: Sequence[str], log: Path, **environment: str) -> None:
        self.log, self.url = log, f"http://127.0.0.1:{(port := free_port())}"
        # the server's processes are its own: what this test process was told for engines in it does not hold there
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
        command = [sys.executable, "-m", "accel", "serve", *words, "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the server did not come up:\n{self.text()[-3000:]}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(["small-vlm", *METHODS, *ENGINE, *OWN_KEEP], tmp_path_factory.mktemp("serve") / "log")
    try:
        found.wait()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def scenes(n: int) -> list[Any]:
    from accel.evals.scenes.questions import held_out

    return held_out("color", "test", n)


def messages(item: Any) -> list[dict[str, Any]]:
    """A question about a drawn picture, as the OpenAI API takes it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(item.scene.image).save(file, "PNG")
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": item.question.text}]}]


def ask(client: Any, item: Any, **body: Any) -> Any:
    return client.chat.completions.create(model="small-vlm", messages=messages(item), temperature=0, max_tokens=3, extra_body=body)


def hosts_answers(items: Sequence[Any]) -> list[str]:
    """The same of our transformers host."""
    import accel
    from accel.evals.models import load_model

    loaded: Any = load_model("small-vlm")
    methods = [accel.FasterVLM(keep=0.25, position_mode="compact"), accel.Streaming(block_size=16, window_blocks=1, min_seq_len=0)]
    found = []
    with accel.apply(loaded.model, *methods):
        for item in items:
            inputs = loaded.processor(images=[item.scene.image], text=loaded.prompt_text(item.question.text), return_tensors="pt")
            ids = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            found.append(loaded.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found


def calls(server: Server) -> tuple[int, int]:
    """Attention calls of prompts, and of single new tokens."""
    found = own_metrics(server.url)
    decode = found["dense_calls"].get("decode", 0)
    return found["sparse_calls"] + sum(found["dense_calls"].values()) - decode, decode


def given_up(server: Server, prompt: str, seconds: float) -> tuple[int, int]:
    """The calls of a request whose client goes away after so many seconds, when all has come to rest."""
    before = calls(server)
    body = json.dumps({"model": "small-vlm", "prompt": prompt, "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
    with contextlib.suppress(TimeoutError):
        urllib.request.urlopen(request, timeout=seconds).read()
    then, now = before, calls(server)
    while then != now:
        time.sleep(0.3)
        then, now = now, calls(server)
    return now[0] - before[0], now[1] - before[1]


def test_questions_about_pictures_are_answered_as_by_our_transformers_host(server: Server, client: Any) -> None:
    before, items = own_metrics(server.url), scenes(4)
    answers = [ask(client, item) for item in items]
    assert [a.choices[0].message.content.strip() for a in answers] == hosts_answers(items)
    # 144 patches, a quarter of them left; [bos] and six words
    assert {a.usage.prompt_tokens for a in answers} == {36 + 7}
    after = own_metrics(server.url)
    assert after["visual_tokens"] - before["visual_tokens"] == 4 * 144
    assert after["kept_tokens"] - before["kept_tokens"] == 4 * 36
    assert after["sparse_calls"] - before["sparse_calls"] == 4 * 8, "once per prompt in each of eight layers"
    assert 0 < after["density"] < 1


def test_a_request_asks_for_its_own_share(client: Any) -> None:
    from openai import BadRequestError

    [item] = scenes(1)
    for keep, n in ((0.5, 72), (20, 20), (1.0, 144)):
        assert ask(client, item, mm_processor_kwargs={"keep": keep}).usage.prompt_tokens == n + 7
    with pytest.raises(BadRequestError, match="keep must be a share"):
        ask(client, item, mm_processor_kwargs={"keep": 1.5})
    assert ask(client, item).usage.prompt_tokens == 36 + 7


def test_an_answer_comes_in_pieces(client: Any) -> None:
    [item] = scenes(1)
    pieces = client.chat.completions.create(
        model="small-vlm", messages=messages(item), temperature=0, max_tokens=6, stream=True, extra_body={"ignore_eos": True}
    )
    words = [piece.choices[0].delta.content for piece in pieces if piece.choices and piece.choices[0].delta.content]
    assert len(words) >= 2
    assert words[0].strip() == ask(client, item).choices[0].message.content.split()[0]


def test_two_questions_at_once_are_answered_as_one_after_the_other(client: Any) -> None:
    items = scenes(4)[2:]
    alone = [ask(client, item).choices[0].message.content for item in items]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda item: ask(client, item).choices[0].message.content, items))
    assert together == alone


def test_a_prompt_given_up_in_the_middle_leaves_the_server_as_it_was(server: Server, client: Any) -> None:
    [item] = scenes(1)
    expected = ask(client, item).choices[0].message.content
    prompt = " ".join([item.question.text] * 60)
    whole, _ = given_up(server, prompt, 60)
    assert whole == 8 * 8, "361 tokens, 48 at a time, in eight layers"
    # when a prompt is in the middle depends on the machine
    tries = (given_up(server, prompt, seconds) for seconds in [0.01 * 1.2**i for i in range(20)] * 3)
    assert any(0 < prefill < whole and decode == 0 for prefill, decode in tries)
    assert ask(client, item).choices[0].message.content == expected


def test_a_killed_worker_ends_the_server_with_a_message(server: Server) -> None:
    # the last test of this server
    import psutil

    below = psutil.Process(server.process.pid).children(recursive=True)
    [worker] = [p for p in below if p.cmdline() and "Worker" in p.cmdline()[0]]
    worker.kill()
    assert server.process.wait(60) == 2
    assert "accel: the engine died and took the server with it" in server.text()


_OTHERS = """
def register():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend")
"""


def test_workers_in_which_another_plugin_has_the_backend_s_place_are_not_served(tmp_path: Path) -> None:
    (tmp_path / "others.py").write_text(_OTHERS)
    told = tmp_path / "others-1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1\n")
    (told / "entry_points.txt").write_text("[vllm.general_plugins]\nothers = others:register\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    tiny = Server(["small-vlm", "--method", "streaming:min_seq_len=0", *ENGINE], tmp_path / "log", PYTHONPATH=path)
    assert tiny.process.wait(START_SECONDS) == 2
    text = tiny.text()
    assert "accel: not served: a worker does not run what was asked for:\n  - worker 0: streaming runs in no attention layer" in text
    assert "Application startup complete" not in text
