"""An HTTP proxy between our client and the real server that can be told to misbehave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
from aiohttp import web

BASE_PATH = "/some/base"  # the server is found here too, as behind an ingress

Garble = Callable[[bytes], bytes]


@dataclass(kw_only=True)
class Fault:
    """What happens to requests of one route.

    Attributes:
        status: answer this instead of passing the request on.
        body: what to say then.
        delay_s: wait before anything else.
        cut: close the connection without an answer.
        lose: pass the request on, and close the connection instead of answering.
        garble: change the server's answer.
        after: how many requests it lets pass first.
        times: how many requests it meets; then the route works again.
    """

    status: int | None = None
    body: str = '{"success": false, "message": "injected fault"}'
    delay_s: float = 0.0
    cut: bool = False
    lose: bool = False
    garble: Garble | None = None
    after: int = 0
    times: int = 1_000_000


@dataclass
class FaultProxy:
    """Passes everything on to ``target``, except where a fault is set.

    Attributes:
        faults: fault per path.
        seen: paths and bodies of the requests so far.
    """

    target: str
    faults: dict[str, Fault] = field(default_factory=dict)
    seen: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *exc: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20.0)

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        server = self._runner.server
        await self._runner.cleanup()
        await asyncio.sleep(0.02)  # what was being accepted meanwhile is closed too
        if server is not None:
            await server.shutdown(0.1)
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request.path, body))
        fault = self._take_fault(request.path)
        await asyncio.sleep(fault.delay_s)
        if fault.cut:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if fault.status is not None:
            return web.Response(
                status=fault.status, text=fault.body, content_type="application/json"
            )
        headers = {k: v for k, v in request.headers.items() if k.lower() != "host"}
        path = request.path_qs.removeprefix(BASE_PATH)
        async with self._session.request(
            request.method, self.target + path, data=body, headers=headers
        ) as answer:
            content = await answer.read()
            if fault.lose:
                assert request.transport is not None
                request.transport.close()
            if fault.garble is not None:
                content = fault.garble(content)
            return web.Response(
                status=answer.status,
                body=content,
                headers={"Content-Type": answer.headers.get("Content-Type", "text/plain")},
            )

    def _take_fault(self, path: str) -> Fault:
        fault = self.faults.get(path)
        if fault is None or fault.times <= 0:
            return Fault()
        if fault.after > 0:
            fault.after -= 1
            return Fault()
        fault.times -= 1
        return fault


class WatchingProxy(FaultProxy):
    """Tells at once which clients went away before they had their answer."""

    left: list[str]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await super()._handle(request)
        except asyncio.CancelledError:
            self.left.append(json.loads(await request.read())["rid"])
            raise
