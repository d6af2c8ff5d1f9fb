"""What an operator sees: log lines as JSON with a session's id, and metrics for Prometheus. Neither holds sound or
words."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minmo.conversation.scheduler import Scheduler

LOG = logging.getLogger("minmo.serving")


def log(event: str, session: str = "", level: int = logging.INFO, **fields: Any) -> None:
    """One line. What a client says is no field: its text may be anything."""
    LOG.log(level, event, extra={"fields": ({"session": session} if session else {}) | fields})


class JsonLines(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(level: int = logging.INFO) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its debug lines would show what is said
    logging.getLogger("minmo").setLevel(level)


class Metrics:
    """What is counted here, and what the scheduler measures, in one registry."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.connections = Counter(
            "minmo_connections", "WebSocket connections by how they began.", ["outcome"], registry=self.registry
        )
        self.errors = Counter("minmo_errors", "Error events sent, by code.", ["code"], registry=self.registry)
        self.closed = Counter(
            "minmo_closed", "Sessions that ended, by WebSocket code.", ["code"], registry=self.registry
        )
        self.registry.register(_Scheduler(scheduler))

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Scheduler(Collector):
    """The scheduler's statistics, read when asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        found = self._scheduler.statistics()
        yield GaugeMetricFamily("minmo_sessions", "Conversations that run.", found.sessions)
        yield CounterMetricFamily("minmo_ticks", "Ticks of 80 ms that were heard.", found.ticks)
        yield CounterMetricFamily("minmo_deadline_misses", "Ticks that took more than 80 ms.", found.deadline_misses)
        yield GaugeMetricFamily("minmo_lag_seconds", "How long the oldest tick that is due waits.", found.lag_ms / 1e3)
        yield CounterMetricFamily("minmo_busy_seconds", "Seconds spent computing.", found.busy_s)
        for name, what, spread in (
            ("tick", "From a tick's sound to its events.", found.tick_ms),
            ("first_audio", "From the end of the user's voice to the first sound.", found.first_audio_ms),
            ("stop_decided", "From an interrupting voice to the decision.", found.stop_decided_ms),
            ("stop_sent", "From an interrupting voice to the last sound sent.", found.stop_sent_ms),
            ("stop_played", "From an interrupting voice to the last sound's end.", found.stop_played_ms),
        ):
            gauge = GaugeMetricFamily(f"minmo_{name}_seconds", f"{what} Of the newest 10,000.", labels=["quantile"])
            for quantile, ms in (("0.5", spread.p50), ("0.95", spread.p95), ("0.99", spread.p99)):
                gauge.add_metric([quantile], ms / 1e3)
            yield gauge
        waiting = GaugeMetricFamily("minmo_waiting", "Pieces of work that wait, by kind.", labels=["kind"])
        steps = CounterMetricFamily("minmo_steps", "Batches computed, by kind.", labels=["kind"])
        for kind, count in found.waiting.items():
            waiting.add_metric([kind], count)
        for kind, count in found.steps.items():
            steps.add_metric([kind], count)
        yield waiting
        yield steps
