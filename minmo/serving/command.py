"""`minmo serve`: a model, its scheduler and the app, on uvicorn or on the replicas of a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from minmo.console import err
from minmo.conversation import Settings
from minmo.conversation.front import installed
from minmo.fast.linear import WEIGHTS


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need --api-keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any that is free.")] = 8000,
    preset: Annotated[str, typer.Option(help="A preset, or a checkpoint directory.")] = "nano",
    sessions: Annotated[int, typer.Option(min=1, max=2048, help="Most at once, if the machine keeps up.")] = 4,
    measure: Annotated[
        bool, typer.Option(help="First measure how many sessions the machine keeps up with, and refuse more.")
    ] = True,
    weights: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(WEIGHTS)} (default: the model's own).")
    ] = None,
    max_positions: Annotated[int, typer.Option(min=64, help="LLM context of a session.")] = 2048,
    max_text_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in text tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of the text; 0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Same seed, same replies to the same sound.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda … (default: a GPU where there is one).")] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file with an API key a line; or one key in MINMO_API_KEY.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="A certificate chain (PEM), for https and wss.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Another site whose pages may connect, as https://example.org; repeat for more."),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="A folder for the sound and words of every session; by default none is kept.")
    ] = None,
    sessions_per_key: Annotated[int, typer.Option(min=1, help="Sessions that one API key may have at once.")] = 8,
    session_seconds: Annotated[float, typer.Option(min=1, help="Longest session.")] = 3600.0,
    idle_seconds: Annotated[float, typer.Option(min=1, help="Longest silence of a client.")] = 300.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="On SIGTERM, replies may go on for so long.")] = 10.0,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Serve by replicas on a Ray cluster, one a GPU or, where there is none, a core. Its HOST:PORT, or "
            "auto for the one that this machine belongs to. --sessions are a replica's.",
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="On a cluster, at least so many.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="On a cluster, at most so many (default: a GPU each, or a core).")
    ] = None,
) -> None:
    """Serves the realtime protocol of OpenAI's SDKs (WS /v1/realtime) and a page that talks (GET /)."""
    try:
        from minmo.serving.guard import Limits, is_local
        from minmo.serving.plan import FREE, Plan
        from minmo.serving.run import check_pair, config, run
    except ImportError as error:
        raise ValueError(f"serving needs more packages ({error.name} is missing): pip install 'minmo[serve]'") from None

    keys = _keys(api_keys)
    local = is_local(host)
    if not local and not keys:
        raise ValueError(f"whoever reaches {host} could use this server: give --api-keys FILE, or listen on 127.0.0.1")
    if (tls_cert is None) != (tls_key is None):
        raise ValueError("--tls-cert and --tls-key go together")
    for file in (tls_cert, tls_key):
        if file is not None and not file.is_file():
            raise ValueError(f"{file} is not a file; give one in PEM format")
    if tls_cert is not None and tls_key is not None:
        check_pair(tls_cert, tls_key)
    if not local and tls_cert is None:
        err.print(
            "minmo: without --tls-cert and --tls-key browsers refuse the microphone to pages that do not come from "
            "localhost, and keys and sound travel in the clear",
            style="yellow", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    plan = Plan(
        preset,
        sessions,
        None if measure else FREE,
        weights,
        max_positions,
        Settings(seed=seed, temperature=temperature, max_text_tokens=max_text_tokens),
        device,
        tuple(keys),
        tuple(origin or ()),
        local,
        Limits(session_s=session_seconds, idle_s=idle_seconds, sessions_per_key=sessions_per_key),
        record,
    )
    if cluster is not None:
        installed("ray.serve", "a cluster", "cluster")
        from minmo.serving.cluster import Scale, run_on

        run_on(cluster, plan, host, port, tls_cert, tls_key, Scale(replicas, max_replicas, drain_seconds))
        return
    server = plan.server()
    try:
        run(config(server.app(), host, port, tls_cert, tls_key), server.hall, drain_seconds)
    finally:
        server.scheduler.close()


def _keys(file: Path | None) -> list[str]:
    """Raises ValueError for a file that holds none, and for a key that is guessed soon."""
    lines = [] if file is None else file.read_text(encoding="utf-8").split()
    if file is not None and not lines:
        raise ValueError(f"{file} holds no API key; write one a line")
    keys = [*lines, *filter(None, [os.environ.get("MINMO_API_KEY")])]
    if any(len(key) < 16 or not key.isascii() for key in keys):
        raise ValueError("an API key must have 16 characters or more, ASCII only; openssl rand -hex 24 makes one")
    return keys
