"""What stays of a session while its client is away: in this process, or in a store that outlives it, as words.

A store is a `Shelf` of `Kept`, or stands for one elsewhere (`cluster.ClusterStore`): the server knows the difference by
`outlives` alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from minmo.conversation import Conversation, History
from minmo.serving.items import FORGOTTEN, Item, Items
from minmo.serving.protocol import Json
from minmo.serving.settings import SessionSettings, TurnDetection

FORMAT = 1
"""Of `Kept.as_text`. What another version has kept is refused, not guessed at."""
MOST_CHARS = 1 << 20
"""Of one session's text: of a longer one the oldest items, with their exchanges, are left out."""


class StoreError(Exception):
    """A store does not answer, or has what cannot be read."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A session without its connection: no rows, no caches.

    history: the conversation's own, or its words: what the user said (None where that is not known) and what was heard
    of the reply. replies: these, in the order of the exchanges; numbers: by which the items name them. unanswered: what
    the user has typed in the open turn, where the history does not hold it.
    """

    settings: SessionSettings
    items: Items
    history: History | Sequence[tuple[str | None, str]]
    numbers: Sequence[int]
    replies: Sequence[str]
    conversation_id: str
    unanswered: Sequence[str] = ()

    @classmethod
    def of(cls, settings: SessionSettings, items: Items, conversation_id: str, conversation: Conversation) -> Kept:
        """As it is now; in the engine's thread."""
        heard = conversation.heard_replies()
        return cls(settings, items, conversation.history, list(heard), list(heard.values()), conversation_id)

    def as_text(self) -> str:
        """JSON without sound: whoever reads it goes on by reading the words again."""
        items = [_item_json(item) for item in self.items]
        size = len(json.dumps(items))
        dropped = set[int | None]()
        while items and size > MOST_CHARS:
            size -= len(json.dumps(items[0])) + 2
            dropped.add(items.pop(0)["reply"])
        said = [(n, reply) for n, reply in zip(self.numbers, self.replies, strict=True) if n not in dropped]
        return json.dumps({
            "format": FORMAT,
            "settings": dataclasses.asdict(self.settings),
            "conversation_id": self.conversation_id,
            "items": items,
            "exchanges": [{"number": n, "user": self._user(n), "reply": reply} for n, reply in said],
        })  # fmt: skip

    @classmethod
    def of_text(cls, text: str) -> Kept:
        """Raises StoreError for what another version has written."""
        found = json.loads(text)
        if found.get("format") != FORMAT:
            raise StoreError("the session was kept by another version of this server; begin another")
        given, items, unanswered = found["settings"], Items(), list[str]()
        detection = given.pop("turn_detection")
        settings = SessionSettings(**given, turn_detection=None if detection is None else TurnDetection(**detection))
        for each in found["items"]:
            items.add(item := Item(**each, sound=None))
            if item.reply is None and item.kind == "input_text":
                unanswered.append(item.words)
            elif item.reply is None:
                item.reply = FORGOTTEN  # its sound is not there any more
        exchanges = found["exchanges"]
        return cls(
            settings,
            items,
            [(e["user"], e["reply"]) for e in exchanges],
            [e["number"] for e in exchanges],
            [e["reply"] for e in exchanges],
            found["conversation_id"],
            unanswered,
        )

    def _user(self, number: int) -> str | None:
        """What the user said in an exchange, as far as words are known of it."""
        own = (item for item in self.items if item.role == "user" and item.reply == number)
        said = " ".join(filter(None, (item.words.strip() for item in own)))
        return said or None


def _item_json(item: Item) -> Json:
    told: dict[str, Any] = {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.name != "sound"}
    # What is being said when its server dies stays half said.
    return told | {"status": "incomplete" if item.status == "in_progress" else item.status}


class Store(Protocol):
    """Where sessions wait for their clients. Each method raises StoreError where the store does not answer."""

    outlives: bool
    """Whether it outlives the server: then live sessions are put there, too, as they go on."""

    async def put(self, token: str, owner: str, kept: Kept, waiting: bool) -> bool:
        """Keeps a session, in place of what the token named, for a while. waiting: for its client, who has gone.
        -> False where the token has been taken: the session goes on elsewhere, and nothing is kept."""
        ...

    async def put_back(self, token: str, owner: str, kept: Kept) -> None:
        """What was taken could not go on: it waits again."""
        ...

    async def take(self, token: str, owner: str) -> Kept | None:
        """What a token of that owner's names, which is then not there any more; None for any other token."""
        ...


Entry = TypeVar("Entry")


class Shelf(Generic[Entry]):
    """Entries by token, each for its owner and for so many seconds. most: that may wait; of more the oldest go."""

    outlives = False

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most
        self._entries: dict[str, tuple[str, Entry, bool, float]] = {}
        """Owner, entry, whether it waits, until when; what was put last stands last."""
        self._taken: dict[str, float] = {}
        """Until when a token that has been taken is remembered."""

    async def put(self, token: str, owner: str, entry: Entry, waiting: bool) -> bool:
        self._expire()
        if token in self._taken:
            return False
        self._entries.pop(token, None)
        self._entries[token] = owner, entry, waiting, time.monotonic() + self._seconds
        queue = [name for name, (_, _, waits, _) in self._entries.items() if waits]
        if len(queue) > self._most:
            del self._entries[queue[0]]
        # Nothing that somebody said stays because nobody asks.
        asyncio.get_running_loop().call_later(self._seconds, self._expire)
        return True

    async def put_back(self, token: str, owner: str, entry: Entry) -> None:
        self._taken.pop(token, None)
        await self.put(token, owner, entry, True)

    async def take(self, token: str, owner: str) -> Entry | None:
        self._expire()
        found = self._entries.get(token)
        if found is None or found[0] != owner:
            return None
        del self._entries[token]
        self._taken[token] = time.monotonic() + self._seconds
        return found[1]

    def _expire(self) -> None:
        now = time.monotonic()
        for token in [t for t, (_, _, _, until) in self._entries.items() if until <= now]:
            del self._entries[token]
        for token in [t for t, until in self._taken.items() if until <= now]:
            del self._taken[token]
