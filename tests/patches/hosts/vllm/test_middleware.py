"""What stands in front of vLLM's server: who is let start, and what is noted when it ends. The server and its engine are played."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

import accel
from accel.patches.hosts.vllm import middleware
from accel.patches.hosts.vllm.options import KEY
from accel.recipe import Recipe

RECIPE = Recipe((accel.Streaming(min_seq_len=0),))
# what workers were asked
asked: list[str] = []
GOOD = {"methods": ["streaming"], "problems": []}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "refused", [])
    monkeypatch.setattr(middleware, "died", [])
    asked.clear()


def client(reports: Any, *, errored: bool = False, told_to_end: bool = False) -> Any:
    """An engine client whose workers report this; an exception is raised instead."""

    async def collective_rpc(method: str) -> Any:
        asked.append(method)
        if isinstance(reports, Exception):
            raise reports
        return reports

    return SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config={KEY: RECIPE.as_dict()}), collective_rpc=collective_rpc, errored=errored,
        engine_core=SimpleNamespace(_finalizer=SimpleNamespace(alive=not told_to_end)),
    )  # fmt: skip


def lifespan(engine: Any) -> list[str]:
    """The messages that a server hears of an application that is started and ended."""
    sent: list[str] = []
    coming = iter(["lifespan.startup", "lifespan.shutdown"])

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        for word in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{word}"
            await send({"type": f"lifespan.{word}.complete"})

    async def receive() -> dict[str, Any]:
        return {"type": next(coming)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {"type": "lifespan", "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine))}
    asyncio.run(middleware.AccelMiddleware(inner)(scope, receive, send))
    return sent


def test_patched_workers_start_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert lifespan(client([GOOD])) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert (middleware.refused, middleware.died) == ([], [])
    assert asked == ["accel_ready"]
    assert "every worker runs streaming" in capsys.readouterr().err


def test_what_workers_want_users_to_know_is_told_once_when_the_server_starts(capsys: pytest.CaptureFixture[str]) -> None:
    told = {**GOOD, "notices": ["streaming runs nothing sparse here"]}
    assert "lifespan.startup.complete" in lifespan(client([told, told]))
    assert capsys.readouterr().err.count("accel: streaming runs nothing sparse here") == 1


@pytest.mark.parametrize(
    ("reports", "word"),
    [([GOOD, None], "worker 1 was not told"), ([], "no worker answered"), (RuntimeError("gone"), "could not be asked: RuntimeError: gone")],
    ids=["dense", "silent", "failing"],
)
def test_the_server_does_not_start_beside_a_worker_that_does_not_answer_for_it(reports: Any, word: str) -> None:
    assert lifespan(client(reports)) == ["lifespan.startup.failed"]
    assert len(middleware.refused) == 1
    assert word in middleware.refused[0]


def test_an_engine_that_died_is_told_apart_from_one_that_was_ended() -> None:
    lifespan(client([GOOD], errored=True, told_to_end=True))
    assert middleware.died == []
    lifespan(client([GOOD], errored=True))
    assert len(middleware.died) == 1


def test_workers_of_all_engines_are_asked() -> None:
    async def all_engines(*words: Any) -> list[list[Any]]:
        assert words == ("collective_rpc", "accel_report", None, (), None)
        return [[GOOD], [None]]

    engine = client([GOOD])
    engine.engine_core.call_utility_all_async = all_engines
    assert asyncio.run(middleware.ask_workers(engine)) == [GOOD, None]
    assert not asked


def test_other_requests_pass_untouched() -> None:
    passed: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        passed.append((scope, receive, send))

    scope, receive, send = {"type": "http", "path": "/v1/completions"}, object(), object()
    asyncio.run(middleware.AccelMiddleware(inner)(scope, receive, send))     # type: ignore[arg-type]
    assert passed == [(scope, receive, send)]
