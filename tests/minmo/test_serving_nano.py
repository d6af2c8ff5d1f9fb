"""The stock OpenAI SDK talks with the trained nano over loopback; what an engine's error and signals do to clients."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import subprocess
import sys
import time
from importlib import resources

import numpy as np
import pytest
import soxr

import minmo
from minmo.conversation import steps
from minmo.conversation.budget import Budget
from minmo.conversation.scheduler import Scheduler

openai = pytest.importorskip("openai", reason="the stock client: pip install 'openai[realtime]'")
pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")

from websockets.exceptions import ConnectionClosed  # noqa: E402

SUM = minmo.load_audio(str(resources.files("minmo") / "assets" / "sum.wav"))
ANSWER = "five plus three is eight"
SILENCE = np.zeros(16_000, np.float32)
DRAWING = minmo.Settings(temperature=0.0, max_text_tokens=16)
WAIT_S = 600
"""How long a test waits for what must come: machines may be slow."""


@pytest.fixture(scope="module")
def scheduler():
    engine = minmo.FastMinMo.from_pretrained("nano", "cpu", rows=5, max_positions=600, max_voice_positions=1200)
    with Scheduler(engine, budget=Budget(*[{1: 1.0}] * 7)) as scheduler:
        yield scheduler


def pcm(sound):
    wide = soxr.resample(sound, 16_000, 24_000)
    return base64.b64encode((np.clip(wide, -1, 1) * 32767).astype("<i2").tobytes()).decode()


def run(url, talk, **options):
    """Runs talk(connection) with the SDK connected."""

    async def connected():
        client = openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1")
        patient = {"open_timeout": WAIT_S}
        async with client.realtime.connect(model="nano", websocket_connection_options=patient, **options) as connection:
            connection.greeting = await connection.recv()
            assert connection.greeting.type in ("session.created", "session.resumed")
            return await asyncio.wait_for(talk(connection), WAIT_S)

    return asyncio.run(connected())


async def say(connection, *sounds):
    for sound in sounds:
        for start in range(0, len(sound), 3200):
            await connection.input_audio_buffer.append(audio=pcm(sound[start : start + 3200]))


async def until(connection, *kinds):
    """-> the events until one of each of the kinds has come."""
    came, missing = [], set(kinds)
    async for event in connection:
        assert event.type != "error", event
        came.append(event)
        missing.discard(event.type)
        if not missing:
            return came
    raise AssertionError(f"the connection ended, and {missing} had not come")


def sound_of(events):
    data = b"".join(base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta")
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def test_a_question_is_answered(serve, scheduler):
    """Once a pause has ended it: the right words, and the same words when they are listened to."""

    async def talk(connection):
        heard = {"transcription": {"model": "nano"}, "turn_detection": {"type": "server_vad"}}
        await connection.session.update(session={"type": "realtime", "audio": {"input": heard}})
        await say(connection, SUM, SILENCE, SILENCE)
        return await until(connection, "response.done", "conversation.item.input_audio_transcription.completed")

    came = run(serve(scheduler, drawing=DRAWING).url, talk)
    done = next(e for e in came if e.type == "response.done").response
    assert done.status == "completed" and done.output[0].content[0].transcript == ANSWER
    deltas = "".join(e.delta for e in came if e.type == "response.output_audio_transcript.delta")
    assert deltas == ANSWER
    assert next(e for e in came if e.type.endswith("transcription.completed")).transcript.split()
    judges = pytest.importorskip("minmo.evaluation.judges")
    pytest.importorskip("moonshine_voice")
    from minmo.evaluation.words import spoken

    sound = np.asarray(soxr.resample(sound_of(came), 24_000, 16_000), np.float32)
    assert spoken(judges.Moonshine()(sound), forgive=True) == spoken(ANSWER)


def test_a_reply_that_is_cut_at_its_longest_is_incomplete(serve, scheduler):
    async def talk(connection):
        await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        await say(connection, SUM)
        await connection.input_audio_buffer.commit()
        await connection.response.create(response={"max_output_tokens": 2})
        return await until(connection, "response.done")

    came = run(serve(scheduler, drawing=DRAWING).url, talk)
    done = came[-1].response
    assert (done.status, done.status_details.reason) == ("incomplete", "max_output_tokens")
    said = done.output[0].content[0].transcript
    assert said and ANSWER.startswith(said) and said != ANSWER and len(sound_of(came)) > 2400


def test_the_predictor_takes_the_turn(serve, scheduler):
    """Nobody asks for a reply: it comes by the predictor's own decision."""

    async def talk(connection):
        await say(connection, SUM, SILENCE, SILENCE)
        return await until(connection, "response.done")

    came = [event.type for event in run(serve(scheduler, drawing=DRAWING).url, talk)]
    committed = came.index("input_audio_buffer.committed")
    assert came.index("input_audio_buffer.speech_started") < committed < came.index("response.created")


def test_push_to_talk_and_cancel(serve, scheduler):
    async def talk(connection):
        await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        await say(connection, SUM)
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        came = await until(connection, "response.output_audio.delta")
        await connection.response.cancel()
        return came + await until(connection, "response.done")

    done = run(serve(scheduler, drawing=DRAWING).url, talk)[-1].response
    assert (done.status, done.status_details.reason) == ("cancelled", "client_cancelled")
    said = done.output[0].content[0].transcript
    assert said and ANSWER.startswith(said)


def test_once_a_response_is_done_the_next_may_be_asked_for(serve, scheduler):
    """Also while the last of its sound is still on its way to the ear; and that what was said may be deleted."""

    async def ask(connection, text):
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
        await connection.conversation.item.create(item=item)
        await connection.response.create()
        return (await until(connection, "response.done"))[-1].response.output[0]

    async def talk(connection):
        await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        said = [await ask(connection, f"{n} plus two") for n in ("one", "two")]
        await connection.conversation.item.delete(item_id=said[-1].id)
        await until(connection, "conversation.item.deleted")
        return [item.content[0].transcript for item in said]

    said = run(serve(scheduler, drawing=DRAWING).url, talk)
    assert said == ["one plus two is three", "two plus two is four"]


def test_who_clears_what_was_not_heard_yet_is_answered_on(serve, scheduler):
    """Push to talk: a recording is sent at once, and taken back. The clock goes on without it."""

    async def talk(connection):
        await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        await say(connection, SUM, SUM)
        await connection.input_audio_buffer.clear()
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two plus two"}]}
        await connection.conversation.item.create(item=item)
        await connection.response.create()
        return await until(connection, "response.done")

    done = run(serve(scheduler, drawing=DRAWING).url, talk)[-1].response
    assert done.status == "completed" and done.output[0].content[0].transcript == "two plus two is four"


def test_an_unanswered_question_outlives_its_connection(serve, scheduler):
    """It is still there when more is said after the client has come back."""
    url = serve(scheduler, drawing=DRAWING).url

    async def begin(connection):
        await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        await say(connection, SUM)
        await connection.input_audio_buffer.commit()
        return len(await heard(len(SUM))), connection.greeting.resume_token

    async def go_on(connection):
        tone = 0.2 * np.sin(2 * np.pi * 300 / 16_000 * np.arange(8000)).astype(np.float32)
        await say(connection, SILENCE, tone, SILENCE)
        return len(await heard(2 * len(SILENCE) + len(tone)))

    async def heard(samples):
        conversation = scheduler._lines[-1]._conversation
        while conversation.now_ms < samples // 1280 * 80:
            await asyncio.sleep(0.02)
        return conversation.history.open

    before, token = run(url, begin, extra_query={"duplex": "1"})
    assert before > 15
    assert run(url, go_on, extra_query={"resume": token}) > before + 25


def test_an_error_in_the_engine(serve, scheduler, monkeypatch):
    """Who shared the step is told and sent away; the next session is served."""
    url, hear = serve(scheduler, drawing=DRAWING).url, steps.hear

    def broken(*arguments):
        monkeypatch.setattr(steps, "hear", hear)
        raise RuntimeError("a kernel has failed")

    async def fail(connection):
        monkeypatch.setattr(steps, "hear", broken)
        await say(connection, SILENCE)
        with pytest.raises(ConnectionClosed) as closed:
            while (event := await connection.recv()).type != "error":
                pass
            assert event.error.type == "server_error" and "a kernel has failed" in event.error.message
            await connection.recv()
        assert closed.value.rcvd.code == 1011

    async def work(connection):
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two plus two"}]}
        await connection.conversation.item.create(item=item)
        await connection.response.create(response={"output_modalities": ["text"]})
        return await until(connection, "response.done")

    run(url, fail)
    assert run(url, work)[-1].response.output[0].content[0].text == "two plus two is four"
    for _ in range(WAIT_S):
        if not scheduler.statistics().sessions:
            return
        time.sleep(1)
    pytest.fail("rows are not free")


def test_signals_under_load():
    """`minmo serve` itself. SIGTERM: a reply that runs is heard to its end, then 1012, and the exit code is 0. SIGKILL:
    the connection breaks, which is all that a client is told."""
    command = [sys.executable, "-m", "minmo.cli", "serve", "--port", "0", "--sessions", "1", "--temperature", "0"]
    command += ["--no-measure", "--drain-seconds", "300"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]

    def url(process):
        for line in process.stderr:
            if line.startswith("{") and (found := json.loads(line))["event"] == "listening":
                return f"http://127.0.0.1:{found['port']}"
        raise AssertionError(f"it ended with {process.wait()}")

    async def begin(connection):
        await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        await say(connection, SUM)
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        return await until(connection, "response.output_audio.delta")

    async def terminated(connection):
        came = await begin(connection)
        both[0].send_signal(signal.SIGTERM)
        came += await until(connection, "response.done")
        assert came[-1].response.status == "completed"
        assert (await connection.recv()).error.code == "draining"
        with pytest.raises(ConnectionClosed) as closed:
            await connection.recv()
        assert closed.value.rcvd.code == 1012

    async def killed(connection):
        await begin(connection)
        both[1].kill()
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                assert (await connection.recv()).type != "error"
        assert closed.value.rcvd is None

    try:
        run(url(both[0]), terminated)
        assert both[0].wait(WAIT_S) == 0
        run(url(both[1]), killed)
        assert both[1].wait(WAIT_S) == -signal.SIGKILL
    finally:
        for process in both:
            process.kill()
            process.stderr.close()
            process.wait()
