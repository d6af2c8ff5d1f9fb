"""`minmo serve --cluster`: the same app on the replicas of a Ray Serve application.

A WebSocket stays with the replica that took it. What its session goes on with lies in an actor of the cluster, as
words: where a replica ends, or dies, clients come back with `?resume=TOKEN` to another, which reads the words again.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayError, RayTaskError
from starlette.applications import Starlette

from minmo.console import err
from minmo.conversation.budget import Budget
from minmo.serving.plan import Plan
from minmo.serving.store import Kept, Shelf, StoreError
from minmo.serving.telemetry import log, log_to_stderr

NAMESPACE = APP = "minmo"
STORE = "minmo-sessions"
MOST_WAITING = 4096
"""Sessions of all replicas that wait for their clients at once."""
ASK_S = 5.0
"""How long the store may take to answer."""
BESIDE = 8
"""Requests that a replica takes beside its sessions: pages, metrics, and whoever is told that there is no room. Serve
would let them wait in silence."""
QUEUED = 64
"""Requests that may wait at a proxy for a replica; more are refused with 503."""
FULL = 0.75
"""Share of its sessions from which on a replica counts as full: then another is started, which takes its time."""
HEALTH_S = 1.0
LAPSE_S = 4.0
"""A replica that Serve has not asked for its health for so long asks Serve whether it is being stopped."""


@dataclass(frozen=True)
class Scale:
    """least, most: replicas (most None: one a GPU, or a core where there is none). drain_s: replies of a replica that
    is being stopped may go on for so long."""

    least: int = 1
    most: int | None = None
    drain_s: float = 10.0


class ClusterStore:
    """A shelf in an actor that outlives every replica, and whoever started it. It gets and gives text."""

    outlives = True

    def __init__(self) -> None:
        self._actor: Any = None

    async def put(self, token: str, owner: str, kept: Kept, waiting: bool) -> bool:
        return bool(await self._ask("put", token, owner, kept.as_text(), waiting))

    async def put_back(self, token: str, owner: str, kept: Kept) -> None:
        await self._ask("put_back", token, owner, kept.as_text())

    async def take(self, token: str, owner: str) -> Kept | None:
        text = await self._ask("take", token, owner)
        return None if text is None else Kept.of_text(text)

    async def _ask(self, what: str, *given: Any) -> Any:
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(ray.get_actor, STORE, NAMESPACE)
            return await asyncio.wait_for(getattr(self._actor, what).remote(*given), ASK_S)
        except (RayError, ValueError, asyncio.TimeoutError) as error:  # ValueError: there is no such actor
            self._actor = None
            raise StoreError(f"the store of sessions does not answer ({type(error).__name__})") from error


@serve.ingress()
class Replica:
    """One server, in a process and on a GPU of its own."""

    def __init__(self, plan: Plan, drain_s: float) -> None:
        log_to_stderr()
        self._server, self._drain_s = plan.server(ClusterStore()), drain_s
        self._server.exposition = self._all_figures
        self._asked = time.monotonic()
        """When Serve asked for our health last."""
        self._watch: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._server.app()

    async def check_health(self) -> None:
        """Raises RuntimeError where another replica should take this one's place."""
        self._asked = time.monotonic()
        if self._watch is None:
            self._watch = asyncio.create_task(self._drain_when_stopped())
        if not self._server.scheduler.alive:
            raise RuntimeError("the engine has failed")
        if self._server.hall.draining:
            raise RuntimeError("this replica is draining")

    async def figures(self) -> tuple[str, bytes]:
        """Its name, and its metrics."""
        return serve.get_replica_context().replica_tag, self._server.metrics.exposition()

    async def _all_figures(self) -> bytes:
        """The metrics of all replicas: a request reaches any of them."""
        found = serve.get_deployment_handle(type(self).__name__, APP).broadcast("figures")
        answers = await found.results_async(timeout_s=ASK_S, return_exceptions=True)
        return merged([answer for answer in answers if not isinstance(answer, BaseException)])

    async def _drain_when_stopped(self) -> None:
        """Serve sends nobody new to a replica that it stops, and waits for its requests, but does not tell it."""
        while True:
            await asyncio.sleep(HEALTH_S)
            asked = self._asked
            if time.monotonic() - asked < LAPSE_S:
                continue
            try:
                stopped = await asyncio.to_thread(_stops_replicas, type(self).__name__)
            except RayError as error:
                log("no answer from Ray Serve", why=type(error).__name__)
                continue
            await asyncio.sleep(HEALTH_S)
            if stopped and self._asked == asked:
                break
        log("draining", sessions=len(self._server.hall.live))
        await self._server.hall.drain(self._drain_s)


def _stops_replicas(name: str) -> bool:
    """Whether replicas of our application are being stopped."""
    app = serve.status().applications.get(APP)
    if app is None or app.status == "DELETING":
        return True
    deployment = app.deployments.get(name)
    return deployment is None or deployment.replica_states.get("STOPPING", 0) > 0


class _Merged(Collector):
    def __init__(self, families: dict[str, Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return list(self._families.values())


def merged(figures: list[tuple[str, bytes]]) -> bytes:
    """The metrics of several replicas as one, each with its replica's name."""
    families: dict[str, Metric] = {}
    for name, text in figures:
        for family in text_string_to_metric_families(text.decode("utf-8")):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, {**sample.labels, "replica": name}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Merged(families))
    return generate_latest(registry)


def deploy(
    plan: Plan, host: str, port: int, tls_cert: Path | None = None, tls_key: Path | None = None, scale: Scale = Scale()
) -> None:
    """Has the cluster that this process has joined serve, and returns once it does.

    A plan without a budget is measured first, on what a replica gets. Raises ValueError where that is too slow for one
    session, and where replicas cannot be started.
    """
    resources = ray.cluster_resources()
    gpus = 0 if plan.device == "cpu" else int(resources.get("GPU", 0))
    needs = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    most = max(scale.least, (gpus or int(resources.get("CPU", 1))) if scale.most is None else scale.most)
    if plan.budget is None:
        plan = replace(plan, budget=_measured(plan, needs))
    sessions = _admitted(plan)
    ray.remote(Shelf).options(
        name=STORE, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=-1
    ).remote(plan.limits.resume_s, MOST_WAITING)
    if serve.status().proxies:
        err.print(
            "minmo: this cluster runs Ray Serve already, which keeps the address and certificates that it has",
            style="yellow", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    tls = {} if tls_cert is None else {"ssl_certfile": str(tls_cert), "ssl_keyfile": str(tls_key)}
    quiet = {"enable_access_log": False}
    try:
        serve.start("EveryNode", {"host": host, "port": port, **tls}, logging_config=quiet)
    except RayError as error:
        raise ValueError(
            f"Ray Serve could not listen on {host}:{port} ({type(error).__name__}): another port may be free, and a "
            "slow machine needs RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 where Ray is started"
        ) from None
    deployment = serve.deployment(
        Replica,
        name=Replica.__name__,
        ray_actor_options=needs,
        max_ongoing_requests=sessions + BESIDE,
        max_queued_requests=QUEUED,
        autoscaling_config={
            "min_replicas": scale.least,
            "max_replicas": most,
            "target_ongoing_requests": max(1.0, FULL * sessions),
            "upscale_delay_s": 5.0,
            "downscale_delay_s": 300.0,
        },
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=plan.limits.session_s,
        graceful_shutdown_wait_loop_s=0.5,
    )
    try:
        serve.run(deployment.bind(plan, scale.drain_s), name=APP, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise ValueError(f"replicas could not be started: {error}") from None
    log("listening", host=host, port=port, replicas=scale.least, most=most, sessions=sessions)


def withdraw(drain_s: float) -> None:
    """Ends the application, and returns once its sessions are over. The store stays, for whoever deploys it again."""
    deadline = time.monotonic() + drain_s + 60
    while True:
        try:
            serve.delete(APP)
            return
        except TimeoutError:
            if time.monotonic() > deadline:
                raise


def run_on(
    address: str, plan: Plan, host: str, port: int, tls_cert: Path | None, tls_key: Path | None, scale: Scale
) -> None:
    """Serves on a Ray cluster until a signal ends it; a second one ends this process alone, and the replicas serve on.

    Raises ValueError where there is no cluster, and as `deploy` does.
    """
    log_to_stderr()
    if not port:
        raise ValueError("on a cluster every node listens on the same port: give --port")
    try:
        ray.init(address, namespace=NAMESPACE)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"there is no Ray cluster at {address} ({error}): ray start --head begins one") from None
    ended = threading.Event()

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        ended.set()

    try:
        deploy(plan, host, port, tls_cert, tls_key, scale)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        ended.wait()
        log("draining")
        withdraw(scale.drain_s)
    finally:
        ray.shutdown()


def _measured(plan: Plan, needs: dict[str, int]) -> Budget:
    # A process of its own, which gives its GPU back.
    measuring = ray.remote(max_calls=1, max_retries=0, **needs)(_measure).remote(plan)
    try:
        return ray.get(measuring)
    except RayTaskError as error:
        raise ValueError(str(error.cause)) from None


def _measure(plan: Plan) -> Budget:
    with plan.scheduler() as scheduler:
        return scheduler.budget


def _admitted(plan: Plan) -> int:
    """Sessions of a replica. Raises ValueError where there is not time for one."""
    assert plan.budget is not None
    if shortage := plan.budget.shortage(1):
        raise ValueError(
            f"a replica here has no time for one session, which would need {shortage}: serve on faster machines"
        )
    return max(n for n in range(1, plan.sessions + 1) if not plan.budget.shortage(n))
