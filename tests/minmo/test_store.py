"""What is kept of a session: as words, to another replica; for how long, and for whom."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")

from websockets.exceptions import ConnectionClosed  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from minmo.serving.items import FORGOTTEN, Item, Items  # noqa: E402
from minmo.serving.settings import SessionSettings, TurnDetection  # noqa: E402
from minmo.serving.store import MOST_CHARS, Kept, Shelf, StoreError  # noqa: E402


def kept(*items, exchanges=(), settings=None):
    """exchanges: (number, what was heard of the reply)."""
    whole = Items()
    for item in items:
        whole.add(item)
    numbers, replies = zip(*exchanges, strict=True) if exchanges else ((), ())
    return Kept(settings or SessionSettings("nano", 64), whole, object(), numbers, replies, "conv_1")


def user(name, text, reply, kind="input_text", **more):
    return Item(name, "user", kind, text, "completed", reply, **more)


def test_a_session_as_words():
    settings = SessionSettings("nano", 64, transcription=True, turn_detection=TurnDetection("server_vad"))
    whole = kept(
        user("a", "two plus two", 3),
        Item("b", "assistant", "output_audio", "two plus two is four", "in_progress", 3, sound_ms=700.0),
        user("c", None, 4, "input_audio", heard="what is it", sound=bytearray(b"\x01" * 999)),
        user("d", "three", 4),
        user("e", None, 5, "input_audio"),
        user("f", None, None, "input_audio"),
        user("g", "seven", None),
        exchanges=[(3, "two plus"), (4, ""), (5, "five")],
        settings=settings,
    )
    text = whole.as_text()
    assert len(text) < 3000 and isinstance(json.loads(text), dict), "words, no sound"
    again = Kept.of_text(text)
    assert again.settings == settings and again.conversation_id == "conv_1"
    assert again.history == [("two plus two", "two plus"), ("what is it three", ""), (None, "five")]
    assert list(again.numbers) == [3, 4, 5] and list(again.unanswered) == ["seven"]
    told = {item.id: item for item in again.items}
    assert list(told) == list("abcdefg") and all(item.sound is None for item in told.values())
    assert told["b"].status == "incomplete" and told["b"].sound_ms == 700.0
    assert told["c"].as_json()["content"] == [{"type": "input_audio", "transcript": None}], "nobody asked for it"
    assert (told["f"].reply, told["g"].reply) == (FORGOTTEN, None)
    assert Kept.of_text(kept(settings=SessionSettings("nano", 64, turn_detection=None)).as_text()).history == []
    with pytest.raises(StoreError, match="another version"):
        Kept.of_text(json.dumps({**json.loads(text), "format": 0}))


def test_of_what_is_too_long_the_newest_stays():
    items = [user(f"item_{n}", "x" * 10_000, n) for n in range(200)]
    whole = kept(*items, exchanges=[(n, "yes") for n in range(200)])
    text = whole.as_text()
    again = Kept.of_text(text)
    assert MOST_CHARS - 20_000 < len(text) < 2.2 * MOST_CHARS
    assert next(reversed(list(again.items))).id == "item_199" and again.numbers[-1] == 199
    assert len(again.history) == len(list(again.items)) < 200


def test_a_token_serves_its_owner_once():
    async def check():
        shelf = Shelf(60.0, 2)
        assert await shelf.put("t", "me", "live", False) and await shelf.put("t", "me", "later", True)
        assert await shelf.take("t", "you") is None
        assert await shelf.take("t", "me") == "later" and await shelf.take("t", "me") is None
        assert not await shelf.put("t", "me", "late", False), "it goes on elsewhere"
        await shelf.put_back("t", "me", "later")
        assert await shelf.take("t", "me") == "later"
        await shelf.put("live", "me", 0, False)
        for name in "abc":
            await shelf.put(name, "me", name, True)
        assert await shelf.take("a", "me") is None, "of those who wait the oldest has gone"
        assert await shelf.take("live", "me") == 0 and await shelf.take("b", "me") == "b"

    asyncio.run(check())


def test_entries_expire_though_nobody_asks():
    async def check():
        shelf = Shelf(0.05, 10)
        for waiting in (True, False):
            await shelf.put("t", "me", "said", waiting)
            while shelf._entries:
                await asyncio.sleep(0.01)
        await shelf.put("t", "me", "said", True)
        assert await shelf.take("t", "me") == "said"
        while shelf._taken:
            await asyncio.sleep(0.01)

    asyncio.run(check())


class Elsewhere:
    """A store that outlives servers, while it answers; in this process."""

    outlives = True

    def __init__(self):
        self.shelf, self.answers = Shelf(60.0, 10), True

    def check(self):
        if not self.answers:
            raise StoreError("the store does not answer")

    async def put(self, token, owner, kept, waiting):
        self.check()
        return await self.shelf.put(token, owner, kept.as_text(), waiting)

    async def put_back(self, token, owner, kept):
        self.check()
        await self.shelf.put_back(token, owner, kept.as_text())

    async def take(self, token, owner):
        self.check()
        text = await self.shelf.take(token, owner)
        return None if text is None else Kept.of_text(text)


class Client:
    def __init__(self, running, query="?duplex=1"):
        self.socket = connect(running.ws(query), close_timeout=1, open_timeout=60)
        self.greeting = json.loads(self.socket.recv(60))

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def until(self, kind):
        while (event := json.loads(self.socket.recv(60)))["type"] != kind:
            assert event["type"] != "error", event
        return event

    def ask(self, text):
        self.type(text)
        self.send("response.create", response={"output_modalities": ["text"]})
        return self.until("response.done")

    def type(self, text):
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
        self.send("conversation.item.create", item=item)
        self.until("conversation.item.done")

    def until_error(self):
        while (event := json.loads(self.socket.recv(60)))["type"] != "error":
            pass
        return event["error"]["code"]

    def closed(self):
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                self.socket.recv(60)
        return closed.value.rcvd.code


def resume(running, old):
    return Client(running, f"?resume={old.greeting['resume_token']}")


async def entries(store):
    return [json.loads(entry) for _, entry, _, _ in store.shelf._entries.values()]


def wait_for_turns(store, count):
    """Until the store has so many items."""
    for _ in range(6000):
        if any(len(e["items"]) >= count for e in asyncio.run(entries(store))):
            return
        time.sleep(0.01)
    pytest.fail("it was not put there")


def test_a_live_session_goes_on_at_another_server(serve, scripted):
    """What was said is there, what was typed and not answered is typed again, and the first connection is told."""
    store = Elsewhere()
    one, other = (serve(scripted(), store=store) for _ in range(2))
    client = Client(one)
    assert one.scheduler.opened[0].transcribed, "its words are needed, though nobody asked to be told"
    client.ask("two plus two")
    client.type("seven")
    wait_for_turns(store, 3)
    later = resume(other, client)
    assert later.greeting["type"] == "session.resumed"
    assert [(i["role"], i["status"]) for i in later.greeting["items"]] == [
        ("user", "completed"), ("assistant", "completed"), ("user", "completed"),
    ]  # fmt: skip
    conversation = other.scheduler.opened[0].conversation
    assert conversation.given_texts == [("two plus two", "three and four")] and conversation.typed_texts == ["seven"]
    later.send("conversation.item.delete", item_id=later.greeting["items"][1]["id"])
    later.until("conversation.item.deleted")
    assert conversation.removed == [0]
    client.type("eight")  # what the store is told of next
    assert client.until("session.replaced") and client.closed() == 4000
    assert resume(one, client).greeting["error"]["code"] == "session_not_found"


def test_where_there_is_no_room_it_waits_on(serve, scripted):
    store = Elsewhere()
    one, full = serve(scripted(), store=store), serve(scripted(rooms=0), store=store)
    client = Client(one)
    client.ask("two plus two")
    client.socket.close()
    wait_for_turns(store, 2)
    refused = resume(full, client)
    assert refused.greeting["error"]["code"] == "no_room" and refused.closed() == 1013
    assert resume(one, client).greeting["type"] == "session.resumed"


def test_without_its_store_a_session_goes_on(serve, scripted):
    store = Elsewhere()
    running = serve(scripted(), store=store)
    client = Client(running)
    client.ask("two")
    wait_for_turns(store, 2)
    store.answers = False
    client.send("session.update", session={"type": "realtime"})
    assert client.until_error() == "resume_unavailable"
    client.ask("three")
    lost = resume(running, client)
    assert lost.greeting["error"]["code"] == "resume_unavailable" and lost.closed() == 1008
    other = Client(running)
    assert other.greeting["type"] == "session.created"
    assert other.until_error() == "resume_unavailable"
