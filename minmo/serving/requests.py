"""What a client asks for, one function a client event: done, or refused with one `error` event after which the session
goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import numpy as np

from minmo.config import SAMPLE_RATE
from minmo.conversation import Conversation
from minmo.conversation.events import Event
from minmo.conversation.line import MOST_WAITING_S
from minmo.conversation.scheduler import Refused
from minmo.serving import protocol
from minmo.serving.items import FORGOTTEN, Item
from minmo.serving.protocol import Json, ProtocolError, a_number, a_string, an_object, check_fields, error_event, new_id
from minmo.serving.response import Wishes
from minmo.serving.session import Session

LEAST_MS = 100
"""Sound that a client must have sent to commit it."""


async def receive(session: Session, text: str) -> None:
    """One message."""
    name = None
    try:
        event = protocol.decode(text)
        name = protocol.event_id(event)
        kind = protocol.check(event, duplex=session.duplex)
        await HANDLERS[kind](session, event)
        if kind != "input_audio_buffer.append":
            session.changed.set()
    except ProtocolError as error:
        session.send(error_event(str(error), error.code, param=error.param, client_event=name))
    except Refused as error:
        session.send(error_event(str(error), "no_room", client_event=name))
    except (ValueError, RuntimeError) as error:  # what a conversation says of a request that it cannot fulfil
        session.send(error_event(str(error), "invalid_request", client_event=name))


async def update(session: Session, event: Json) -> None:
    settings = session.settings.updated(event["session"])
    drawing, turn_taking = session.drawing(Wishes.of(None, settings)), session.turn_taking(settings)
    loop = asyncio.get_running_loop()

    def change(conversation: Conversation) -> list[Event]:
        conversation.settings = drawing
        if conversation.turn_taking != turn_taking:
            conversation.turn_taking = turn_taking
        loop.call_soon_threadsafe(session.updated, settings)  # ahead of a turn that is taken by them at once
        return []

    await session.transcribe(settings.transcription)
    if settings.input_format != session.settings.input_format:
        session.hear(session.decoder.flush())
    await session.do(change)
    session.send({"type": "session.updated", "session": session.as_json()})


async def append(session: Session, event: Json) -> None:
    data = session.decoder.bytes_of(a_string(event["audio"], "audio"))
    if not data:
        return  # no sound is not sound of no length: silence may have to take its place
    if (seconds := session.decoder.ms(data) / 1e3) > MOST_WAITING_S:
        raise Refused(f"{seconds:.1f} s of sound came at once, and {MOST_WAITING_S:.0f} s may: send less at a time")
    step, pieces = session.decoder.rate * session.decoder.width, list[np.ndarray]()
    for start in range(0, len(data), step):
        if start:
            await asyncio.sleep(0)  # a second's worth takes milliseconds, a minute's would keep all others waiting
        pieces.append(session.decoder.decode(data[start : start + step]))
    session.hear(np.concatenate(pieces))
    session.microphone.came(session.clock(), session.decoder.ms(data))
    session.input.add_sound(data)


async def commit(session: Session, event: Json) -> None:
    if session.input.sound_ms < LEAST_MS:
        raise ProtocolError(
            f"the input buffer holds {session.input.sound_ms:.0f} ms of sound, and {LEAST_MS} are the least",
            "input_audio_buffer_commit_empty",
        )
    session.hear(session.decoder.flush())
    session.microphone.rest(session.clock())
    session.commit()


async def clear(session: Session, event: Json) -> None:
    session.microphone.dropped(1e3 * len(session.decoder.flush()) / SAMPLE_RATE)
    unanswered = [item for item in session.items if item.reply is None]
    await session.clear()
    session.send({"type": "input_audio_buffer.cleared"})
    for item in unanswered:
        if item.reply == FORGOTTEN:  # no turn was taken meanwhile: the context holds it no more
            session.items.delete(item)
            session.send({"type": "conversation.item.deleted", "item_id": item.id})


async def create_item(session: Session, event: Json) -> None:
    given = an_object(event["item"], "item")
    check_fields(given, {"id", "type", "object", "role", "status", "content"}, "item")
    if given.get("type") != "message" or given.get("role") != "user":
        raise ProtocolError("only messages of the user can be added", "unsupported", "item")
    content = given.get("content")
    if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
        raise ProtocolError("item.content must hold one input_text", "invalid_value", "item.content")
    if content[0].get("type") != "input_text":
        raise ProtocolError(
            "item.content can hold text; sound comes by input_audio_buffer.append", "unsupported", "item.content"
        )
    if event.get("previous_item_id") not in (None, session.items.last_id):
        raise ProtocolError("items can only be added at the end", "unsupported", "previous_item_id")
    text = a_string(content[0].get("text"), "item.content.text")
    name = new_id("item") if given.get("id") is None else a_string(given["id"], "item.id")
    if not 0 < len(name) <= 64:
        raise ProtocolError("item.id must have 1 to 64 characters", "invalid_value", "item.id")
    if name == session.input.id:  # which `speech_started` has told, or will
        raise ProtocolError(f"there is an item {name!r:.80} already; give another id", "item_id_taken", "item.id")
    session.items.check_free(name)
    item, loop = Item(name, "user", "input_text", text, "completed"), asyncio.get_running_loop()

    def write(conversation: Conversation) -> list[Event]:
        events = conversation.typed(text)
        loop.call_soon_threadsafe(session.add, item)  # ahead of a turn that the predictor takes on it at once
        return events

    await session.do(write, after_sound=True)


async def retrieve_item(session: Session, event: Json) -> None:
    item = session.items.get(event["item_id"])
    if item.sound is None:
        raise ProtocolError("the item's sound is not kept any more", "item_expired", "item_id")
    session.send({"type": "conversation.item.retrieved", "item": item.as_json(with_sound=True)})


async def delete_item(session: Session, event: Json) -> None:
    """The context holds exchanges, so both sides of one go, if it holds theirs; what is not yet answered goes with the
    open turn."""
    item = session.items.get(event["item_id"])
    in_progress = ProtocolError("the item is being answered; cancel the response first", "item_in_progress", "item_id")
    if session.response is not None and item.reply == session.response.reply:
        raise in_progress
    number = item.reply
    gone = [item] if number == FORGOTTEN else [i for i in session.items if i.reply == number]
    if number is None:
        await session.clear()
        if item.reply != FORGOTTEN:  # its turn was taken before
            raise in_progress
    elif number != FORGOTTEN:
        await session.do(lambda conversation: conversation.remove(number) if conversation.history.holds(number) else [])
    for other in gone:
        session.items.delete(other)
        session.send({"type": "conversation.item.deleted", "item_id": other.id})


async def truncate_item(session: Session, event: Json) -> None:
    item = session.items.get(event["item_id"])
    a_number(event["content_index"], "content_index", 0, 0, whole=True)
    ms = a_number(event["audio_end_ms"], "audio_end_ms", 0, 1e9, whole=True)
    if item.kind != "output_audio" or item.reply is None:
        raise ProtocolError("only the assistant's sound can be truncated", "invalid_value", "item_id")
    if ms > item.sound_ms:
        raise ProtocolError(
            f"audio_end_ms is {ms}, and the item has {item.sound_ms:.0f} ms of sound", "invalid_value", "audio_end_ms"
        )
    if session.response is not None and session.response.item is item:
        # Sound is sent at the speed of speech, so who has stopped playing truncates a response that still runs.
        with contextlib.suppress(RuntimeError):  # it was over meanwhile
            await session.do(lambda conversation: conversation.stop())
    await played(session, item.reply, ms, last=True)
    item.truncate(ms)
    session.send(
        {"type": "conversation.item.truncated", "item_id": item.id, "content_index": 0, "audio_end_ms": int(ms)}
    )


async def create_response(session: Session, event: Json) -> None:
    _check_none_runs(session)
    wishes = Wishes.of(event.get("response"), session.settings)
    drawing, loop = session.drawing(wishes), asyncio.get_running_loop()

    def wish() -> None:
        session.wishes = wishes

    def take(conversation: Conversation) -> list[Event]:
        kept, conversation.settings = conversation.settings, drawing
        try:
            events = conversation.take_turn()
        finally:
            conversation.settings = kept
        loop.call_soon_threadsafe(wish)  # ahead of the events: the predictor's own replies are not meant
        return events

    try:
        await session.do(take, after_sound=True)
    except RuntimeError:
        _check_none_runs(session)  # the predictor may have been first
        raise


def _check_none_runs(session: Session) -> None:
    if session.response is not None:
        raise ProtocolError(
            f"{session.response.id} is running: wait for response.done, or cancel it",
            "conversation_already_has_active_response",
        )


async def cancel_response(session: Session, event: Json) -> None:
    running = session.response
    not_active = ProtocolError("there is no such response running", "response_cancel_not_active", "response_id")
    if running is None or event.get("response_id") not in (None, running.id):
        raise not_active
    try:
        await session.do(lambda conversation: conversation.stop())
    except RuntimeError:
        if session.response is not running:  # it was over meanwhile
            raise not_active from None
        raise


async def acknowledge(session: Session, event: Json) -> None:
    response = session.responses.get(a_string(event["response_id"], "response_id"))
    ms = a_number(event["played_ms"], "played_ms", 0, 1e9)
    if response is None:
        raise ProtocolError("there is no such response, or it is long over", "response_not_found", "response_id")
    if ms > response.item.sound_ms:
        raise ProtocolError(
            f"played_ms is {ms:g}, and {response.item.sound_ms:.0f} ms were sent", "invalid_value", "played_ms"
        )
    await played(session, response.reply, ms)
    playback = {"sent_ms": round(response.item.sound_ms), "played_ms": round(ms)}
    session.send({"type": "playback.acknowledged", "response_id": response.id, "playback": playback})


async def played(session: Session, reply: int, ms: float, last: bool = False) -> None:
    """So much of a reply was heard, and where it is the last, no more will be: what the context keeps of it."""

    def acknowledge(conversation: Conversation) -> list[Event]:
        conversation.played(reply, ms, last)
        return []

    await session.do(acknowledge)


HANDLERS: dict[str, Callable[[Session, Json], Awaitable[None]]] = {
    "session.update": update,
    "input_audio_buffer.append": append,
    "input_audio_buffer.commit": commit,
    "input_audio_buffer.clear": clear,
    "conversation.item.create": create_item,
    "conversation.item.retrieve": retrieve_item,
    "conversation.item.delete": delete_item,
    "conversation.item.truncate": truncate_item,
    "response.create": create_response,
    "response.cancel": cancel_response,
    "playback.ack": acknowledge,
}
