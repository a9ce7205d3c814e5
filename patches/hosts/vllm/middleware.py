"""What stands in front of vLLM's API server: every worker is asked before the first request is let in, and `/metrics` shows what they count.

vLLM puts it there itself, in each of its server processes (`--middleware`); no function of vLLM is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from accel.patches.hosts.vllm.metrics import Report, exposition, why_not_served
from accel.patches.hosts.vllm.options import read_options

logger = logging.getLogger("accel")

PATH = f"{__name__}.AccelMiddleware"
# a scrape waits for an engine in the middle of a step no longer than this
SCRAPE_SECONDS = 10.0
# for whoever started the server of this process: why it did not begin to serve, and what ended it that was not asked for
refused: list[str] = []
died: list[str] = []

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class AccelMiddleware:
    """An ASGI application around vLLM's."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            await self._metrics(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _start(self, scope: Message, receive: Receive, send: Send) -> None:
        """Asks every worker before the server says that it has started; one that is dense, or silent, ends it."""
        client = scope["app"].state.engine_client
        names = [m.method_name() for m in read_options(client.vllm_config.additional_config)]
        reports: list[Report | None] = []
        try:
            reports = await ask_workers(client, "accel_ready")
            reasons = why_not_served(reports, names)
        except Exception as error:  # whatever keeps workers from answering, what they run is not known
            reasons = [f"the workers could not be asked: {type(error).__name__}: {error}"]
        if not reasons:
            notices = dict.fromkeys(notice for report in reports if report is not None for notice in report.get("notices", ()))
            print("\naccel: ".join([f"accel: every worker runs {', '.join(names)}", *notices]), file=sys.stderr, flush=True)
            await self.app(scope, _watched(receive, client), send)
            return
        refused.extend(reasons)
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "accel does not serve: " + "; ".join(reasons)})

    async def _metrics(self, scope: Message, receive: Receive, send: Send) -> None:
        """vLLM's answer with our counters behind it."""
        # neither compressed nor in OpenMetrics, which ends in a mark behind which nothing may follow
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in (b"accept", b"accept-encoding")]
        start: Message = {}
        body = b""

        async def hold(message: Message) -> None:
            nonlocal body
            if message["type"] == "http.response.start":
                start.update(message)
            elif message["type"] == "http.response.body":
                body += message.get("body", b"")

        await self.app({**scope, "headers": headers}, receive, hold)
        if start.get("status") == 200:
            body += (await _own_metrics(scope["app"].state.engine_client)).encode()
            others = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            start["headers"] = [*others, (b"content-length", str(len(body)).encode())]
        await send(start)
        await send({"type": "http.response.body", "body": body})


def _watched(receive: Receive, client: Any) -> Receive:
    """`receive`, which notes at the end of a server whether its engine had died: vLLM ends with exit code 0 then."""

    async def wrapped() -> Message:
        message = await receive()
        # one that was told to end is shut down first
        finalizer = getattr(client.engine_core, "_finalizer", None)
        if message["type"] == "lifespan.shutdown" and client.errored and finalizer is not None and finalizer.alive:
            died.append("the engine died and took the server with it: a worker was killed or has failed, with its own message above")
        return message

    return wrapped


async def ask_workers(client: Any, question: str = "accel_report") -> list[Report | None]:
    """What every worker of every engine behind this server reports. question: the method of the worker."""
    ask_all = getattr(client.engine_core, "call_utility_all_async", None)
    if ask_all is None:
        return list(await client.collective_rpc(question))
    # with several engines (data parallelism) collective_rpc gives the answer of the first alone
    answers = await ask_all("collective_rpc", question, None, (), None)
    return [report for answer in answers for report in answer]


async def _own_metrics(client: Any) -> str:
    """Our part of `/metrics`; where the workers do not answer in time, that none did."""
    try:
        reports = await asyncio.wait_for(ask_workers(client), SCRAPE_SECONDS)
    except Exception as error:  # a scrape must not fail where vLLM's own part is there
        logger.warning("accel: the workers could not be asked for their counters: %s: %s", type(error).__name__, error)
        reports = []
    return exposition([report for report in reports if report is not None])
