"""The protocol over loopback, its conversations scripted: turns, items and settings, event by event."""

from __future__ import annotations

import base64
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")

from realtime_client import REPLY, SILENCE, VOICE, kinds, of  # noqa: E402

from minmo.serving.sound import Encoding  # noqa: E402


def test_a_spoken_turn(serve, scripted, client):
    """Names and order of a turn, its sound whole, and what is kept of it."""
    c = client(serve(scripted(reply_s=0.8)))
    assert c.greeting["type"] == "session.created" and "resume_token" not in c.greeting
    c.update(transcription={"model": "nano"})
    c.say(VOICE, SILENCE, SILENCE)
    came = c.until("response.done")
    at = kinds(came).index("response.created")
    assert kinds(came)[:at] == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
    ]
    told = [kind for kind in kinds(came)[at:] if "input_audio_transcription" not in kind]
    assert told == REPLY
    started, stopped, committed = came[:3]
    assert started["item_id"] == stopped["item_id"] == committed["item_id"]
    assert started["audio_start_ms"] == 0 and 1000 <= stopped["audio_end_ms"] <= 1500
    sound = b"".join(base64.b64decode(event["delta"]) for event in of("response.output_audio.delta", came))
    expected = np.round(0.3 * np.sin(2 * np.pi * 440 / 24_000 * np.arange(19_200)) * 32768)
    np.testing.assert_allclose(np.frombuffer(sound, "<i2"), expected, atol=1)
    done = came[-1]["response"]
    assert done["status"] == "completed" and done["status_details"] is None
    assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": "three and four"}]
    transcript = of("conversation.item.input_audio_transcription.completed", came)
    assert [(t["item_id"], t["transcript"]) for t in transcript] == [(committed["item_id"], "what is it")]
    c.send("conversation.item.retrieve", item_id=done["output"][0]["id"])
    content = c.until("conversation.item.retrieved")[-1]["item"]["content"][0]
    assert base64.b64decode(content["audio"]) == sound
    ids = [event["event_id"] for event in c.events]
    assert len(set(ids)) == len(ids)


def test_barge_in(serve, scripted, client):
    """The reply is told to be over before the voice is told to have begun; a client says what it has played of it."""
    running = serve(scripted(reply_s=30))
    c = client(running)
    c.say(VOICE, SILENCE)
    c.until("response.output_audio.delta")
    c.say(VOICE)
    came = c.until("input_audio_buffer.speech_started")
    assert kinds(came)[-7:] == [*REPLY[-6:], "input_audio_buffer.speech_started"]
    done = of("response.done", came)[0]["response"]
    assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "turn_detected")
    item = done["output"][0]["id"]
    c.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=80)
    c.until("conversation.item.truncated")
    assert running.scheduler.opened[0].conversation.acknowledged == [(0, 80)]
    c.send("conversation.item.retrieve", item_id=item)
    content = c.until("conversation.item.retrieved")[-1]["item"]["content"][0]
    assert content["transcript"] is None and len(base64.b64decode(content["audio"])) == 80 * 48
    c.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=10_000)
    assert c.error()["param"] == "audio_end_ms"


def test_a_voice_that_does_not_interrupt_is_told_after_the_reply(serve, scripted, client):
    running = serve(scripted(reply_s=2))
    c = client(running)
    c.update(turn_detection={"type": "semantic_vad", "interrupt_response": False})
    c.say(VOICE, SILENCE)
    c.until("response.created")
    c.say(VOICE, VOICE, VOICE)
    came = c.until("input_audio_buffer.speech_started")
    assert of("response.done", came)[0]["response"]["status"] == "completed"


def test_push_to_talk(serve, scripted, client):
    running = serve(scripted(reply_s=20))
    c = client(running)
    assert c.update(turn_detection=None)["audio"]["input"]["turn_detection"] is None
    c.send("input_audio_buffer.commit")
    assert c.error()["code"] == "input_audio_buffer_commit_empty"
    c.say(VOICE)
    c.send("input_audio_buffer.clear")
    assert kinds(c.until("input_audio_buffer.cleared")) == ["input_audio_buffer.cleared"]
    c.send("response.create")
    assert "nothing was heard" in c.error()["message"]
    c.say(VOICE)
    c.send("input_audio_buffer.commit")
    c.send("response.create", response={"metadata": {"turn": "1"}})
    came = c.until("response.output_audio.delta")
    assert kinds(came)[:4] == [
        "input_audio_buffer.committed", "conversation.item.added", "conversation.item.done", "response.created",
    ]  # fmt: skip
    assert of("response.created", came)[0]["response"]["metadata"] == {"turn": "1"}
    c.send("response.create")
    assert c.error()["code"] == "conversation_already_has_active_response"
    c.send("response.cancel", response_id="resp_of_somebody")
    assert c.error()["code"] == "response_cancel_not_active"
    c.send("response.cancel")
    done = c.until("response.done")[-1]["response"]
    assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
    c.send("response.cancel")
    assert c.error()["code"] == "response_cancel_not_active"


def test_a_pause_ends_the_turn_with_server_vad(serve, scripted, client):
    running = serve(scripted())
    c = client(running)
    c.update(turn_detection={"type": "server_vad", "silence_duration_ms": 800})
    c.say(VOICE, SILENCE[:12_000], VOICE, SILENCE, SILENCE)
    came = c.until("response.done")
    assert kinds(came).count("input_audio_buffer.speech_stopped") == 2
    assert kinds(came).count("input_audio_buffer.committed") == kinds(came).count("response.created") == 1
    assert kinds(came).index("response.created") > kinds(came)[2:].index("input_audio_buffer.speech_stopped")


def test_turns_without_replies(serve, scripted, client):
    """create_response false: the predictor commits the turn, and the client asks for the reply."""
    c = client(serve(scripted()))
    # A scripted predictor is sure for one tick.
    c.update(turn_detection={"type": "semantic_vad", "eagerness": "high", "create_response": False})
    c.say(VOICE, SILENCE)
    assert "response.created" not in kinds(c.until("conversation.item.done"))
    c.send("response.create")
    c.until("response.done")


def test_two_turns_that_came_at_once_are_two_items(serve, scripted, client):
    """As after a stall of the network. Their transcripts come, too, and a retrieved item has its own sound alone."""
    c = client(serve(scripted(reply_s=0.3)))
    c.update(transcription={"model": "nano"})
    c.say(np.concatenate([VOICE, SILENCE, SILENCE, VOICE, VOICE, SILENCE, SILENCE]))
    came = c.until("response.done") + c.until("response.done")
    told = [e["item_id"] for e in of("conversation.item.input_audio_transcription.completed", came)]
    committed = [e["item_id"] for e in of("input_audio_buffer.committed", came)]
    assert committed == told and len(told) == 2
    seconds = []
    for name in committed:
        c.send("conversation.item.retrieve", item_id=name)
        (content,) = c.until("conversation.item.retrieved")[-1]["item"]["content"]
        seconds.append(len(base64.b64decode(content["audio"])) / 48_000)
    assert 1.2 < seconds[0] < 2.5 and 3.5 < seconds[1] < 6.5 and sum(seconds) < 7.1


def test_every_committed_item_gets_its_transcript(serve, scripted, client):
    """Of two in one turn the first has all words; of a turn that was typed, too, none has any."""
    c = client(serve(scripted(reply_s=0.3)))
    c.update(turn_detection=None, transcription={"model": "nano"})
    in_text = {"output_modalities": ["text"]}
    for _ in range(2):
        c.say(VOICE)
        c.send("input_audio_buffer.commit")
    c.send("response.create", response=in_text)
    came = c.until("response.done")
    told = of("conversation.item.input_audio_transcription.completed", came)
    assert [(e["item_id"], e["transcript"]) for e in told] == [
        (e["item_id"], text)
        for e, text in zip(of("input_audio_buffer.committed", came), ["what is it", ""], strict=True)
    ]
    c.say(VOICE)
    c.send("input_audio_buffer.commit")
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two plus two"}]}
    c.send("conversation.item.create", item=message)
    c.send("response.create", response=in_text)
    (failed,) = of("conversation.item.input_audio_transcription.failed", c.until("response.done"))
    assert "typed" in failed["error"]["message"]


def test_clearing_tells_which_items_are_forgotten(serve, scripted, client):
    """What is not answered yet goes with the open turn."""
    c = client(serve(scripted()))
    c.update(turn_detection=None)
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two plus two"}]}
    c.send("conversation.item.create", item=message)
    item = c.until("conversation.item.done")[-1]["item"]["id"]
    c.send("input_audio_buffer.clear")
    assert c.until("conversation.item.deleted")[-1]["item_id"] == item
    c.send("conversation.item.retrieve", item_id=item)
    assert c.error()["code"] == "item_not_found"


def beside(line, act, first):
    """Something happens just before, or just after, the next thing that is asked of a line; in another thread, as an
    engine's is."""
    do, engine = line.do, ThreadPoolExecutor(1)

    def both(action, **options):
        line.do = do
        if first:
            line.tell(act())
        done = do(action, **options)
        if not first:
            line.tell(act())
        return done.result()

    line.do = lambda action, **options: engine.submit(both, action, **options)


def test_who_asks_for_a_response_when_the_predictor_has_just_begun_one_is_told_so(serve, scripted, client):
    """And who cancels one that was just over, or deletes what has just been answered."""
    running = serve(scripted(reply_s=20))
    c, line = client(running), running.scheduler.lines[0]
    beside(line, line.take, first=True)
    c.send("response.create")
    assert c.error()["code"] == "conversation_already_has_active_response"
    beside(line, line.done, first=True)
    c.send("response.cancel")
    assert c.error()["code"] == "response_cancel_not_active"
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two plus two"}]}
    c.send("conversation.item.create", item=message)
    item = c.until("conversation.item.done")[-1]["item"]["id"]
    beside(line, line.take, first=True)
    c.send("conversation.item.delete", item_id=item)
    assert c.error()["code"] == "item_in_progress"


def test_a_turn_that_is_taken_as_settings_change_is_told_by_the_new_ones(serve, scripted, client):
    running = serve(scripted())
    c, line = client(running), running.scheduler.lines[0]
    beside(line, line.take, first=False)
    c.send("session.update", session={"type": "realtime", "output_modalities": ["text"]})
    came = c.until("response.done")
    assert of("response.created", came)[0]["response"]["output_modalities"] == ["text"]
    assert came[-1]["response"]["output"][0]["content"][0]["text"] == "three and four"


def test_other_settings_leave_a_pause_as_it_is(serve, scripted, client):
    c = client(serve(scripted()))
    c.update(turn_detection={"type": "server_vad", "silence_duration_ms": 2000})
    c.say(VOICE, SILENCE)
    c.until("input_audio_buffer.speech_stopped")
    c.send("session.update", session={"type": "realtime", "max_output_tokens": 12})
    c.until("session.updated")
    c.say(SILENCE, SILENCE)
    c.until("response.created")


def test_a_reply_to_sound_that_came_ahead_of_its_time_does_not_wait(serve, scripted, client):
    """Without a commit, too."""
    c = client(serve(scripted(reply_s=0.5)))
    c.update(turn_detection=None)
    c.say(*[VOICE] * 40)
    c.send("response.create")
    began = time.monotonic()
    c.until("response.done")
    assert time.monotonic() - began < 30


def test_typed_turns_in_text(serve, scripted, client):
    running = serve(scripted())
    c = client(running)
    message = {
        "type": "message",
        "role": "user",
        "id": "mine",
        "content": [{"type": "input_text", "text": "two plus two"}],
    }
    c.send("conversation.item.create", item=message)
    assert kinds(c.until("conversation.item.done")) == ["conversation.item.added", "conversation.item.done"]
    c.send("conversation.item.create", item=message)
    assert c.error()["code"] == "item_id_taken"
    c.send("response.create", response={"output_modalities": ["text"]})
    came = c.until("response.done")
    text = "".join(event["delta"] for event in of("response.output_text.delta", came))
    assert text == came[-1]["response"]["output"][0]["content"][0]["text"] == "three and four"
    assert not of("response.output_audio.delta", came)
    assert running.scheduler.opened[0].conversation.settings.speak  # of that response alone
    c.send("conversation.item.delete", item_id="mine")
    gone = [c.until("conversation.item.deleted")[-1]["item_id"] for _ in range(2)]
    assert gone == ["mine", came[-1]["response"]["output"][0]["id"]]
    assert running.scheduler.opened[0].conversation.removed == [0]
    c.send("conversation.item.retrieve", item_id="mine")
    assert c.error()["code"] == "item_not_found"


def test_what_the_model_has_forgotten_may_be_deleted(serve, scripted, client):
    """As after every reply of a model that remembers none."""
    running = serve(scripted())
    c = client(running)
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two plus two"}]}
    c.send("conversation.item.create", item=item)
    c.send("response.create")
    answer = c.until("response.done")[-1]["response"]["output"][0]["id"]
    conversation = running.scheduler.opened[0].conversation
    conversation.history.exchanges.clear()
    c.send("conversation.item.delete", item_id=answer)
    gone = [c.until("conversation.item.deleted")[-1] for _ in range(2)]
    assert gone[1]["item_id"] == answer and conversation.removed == []


@pytest.mark.parametrize("name", ["audio/pcmu", "audio/pcma"])
def test_telephones(serve, scripted, client, name):
    running = serve(scripted(reply_s=0.8))
    c = client(running)
    audio = {"input": {"format": {"type": name}}, "output": {"format": {"type": name}}}
    c.send("session.update", session={"type": "realtime", "audio": audio})
    c.until("session.updated")
    encoder = Encoding(name, 24_000, to_wire=True)
    data = encoder.encode(np.concatenate([VOICE, SILENCE, SILENCE]), final=True)
    assert len(data) == 3 * 8000
    c.send("input_audio_buffer.append", audio=base64.b64encode(data).decode())
    came = c.until("response.done")
    sound = b"".join(base64.b64decode(event["delta"]) for event in of("response.output_audio.delta", came))
    assert len(sound) == round(0.8 * 8000)


def test_the_stock_sdk_asks_for_what_is_not_there(serve, scripted, client):
    """Every update is taken as a whole or refused as a whole."""
    c = client(serve(scripted()))
    before = c.greeting["session"]
    for session in (
        {"instructions": "be brief"},
        {"tools": [{"type": "function", "name": "f"}]},
        {"output_modalities": ["text"], "audio": {"output": {"voice": "alloy"}}},
        {"output_modalities": ["text"], "audio": {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}},
        {"output_modalities": ["audio", "text"]},
        {"output_modalities": ["text"], "model": "gpt-realtime"},
        {"output_modalities": ["text"], "audio": {"input": {"turn_detection": {"type": "telepathy"}}}},
        {"output_modalities": ["text"], "temperature": 0.8},
        {"max_output_tokens": 0},
    ):
        c.send("session.update", event_id="mine", session={"type": "realtime", **session})
        error = c.error()
        assert error["type"] == "invalid_request_error" and error["event_id"] == "mine" and error["param"]
    c.send("session.update", session={"type": "realtime"})
    assert c.until("session.updated")[-1]["session"] == before
