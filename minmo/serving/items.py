"""A conversation's items as its client sees them: messages of either side, in order, and what is kept of their
sound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from minmo.serving.protocol import Json, ProtocolError
from minmo.serving.sound import to_base64

MOST_ITEMS = 1000
"""Of a longer conversation the oldest items can be named no more."""
FORGOTTEN = -1
"""Number of a reply that the context does not hold any more."""
MOST_MS = 60_000
KEPT_BYTES = 8 << 20
"""Sound that is kept for `conversation.item.retrieve`: of older items none is."""


@dataclass(eq=False)
class Item:
    """One message. kind: of its content. text: its words, or its sound's transcript where there is one. reply: the
    number of the reply that it is, or that answered it. bytes_per_ms: of its sound's format. heard: what the model
    understood of the user's sound, where it was asked; told only as `text`."""

    id: str
    role: str
    kind: str
    text: str | None = None
    status: str = "in_progress"
    reply: int | None = None
    bytes_per_ms: float = 48.0
    sound: bytearray | None = field(default_factory=bytearray)
    """None once it is kept no more."""
    sound_ms: float = 0.0
    heard: str = ""

    @property
    def words(self) -> str:
        """Of the user's: what was typed, or understood."""
        return self.heard or self.text or ""

    def as_json(self, with_sound: bool = False) -> Json:
        content: Json = {"type": self.kind}
        if self.kind in ("input_audio", "output_audio"):
            content["transcript"] = self.text
            if with_sound:
                content["audio"] = to_base64(bytes(self.sound or b""))
        else:
            content["text"] = self.text or ""
        # An assistant's item that has just begun has no content yet.
        begun = self.role == "user" or self.status != "in_progress"
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            "status": self.status,
            "role": self.role,
            "content": [content] if begun else [],
        }

    def add_sound(self, data: bytes) -> None:
        """Of more than a minute the newest is kept, as of a turn."""
        self.sound_ms += len(data) / self.bytes_per_ms
        if self.sound is not None:
            self.sound += data
            if (over := len(self.sound) - int(MOST_MS * self.bytes_per_ms)) > 0:
                del self.sound[:over]

    def split(self, ms: float) -> bytes:
        """Takes the last so many milliseconds of its sound away -> them, as far as they are kept."""
        size = min(len(self.sound or b""), 2 * round(ms * self.bytes_per_ms / 2))
        self.sound_ms -= size / self.bytes_per_ms
        if self.sound is None or not size:
            return b""
        rest = bytes(self.sound[-size:])
        del self.sound[-size:]
        return rest

    def truncate(self, ms: float) -> None:
        """Only so much of its sound was heard: the rest goes, and the transcript, which nobody can cut to the word."""
        self.sound_ms, self.text = ms, None
        if self.sound is not None:
            del self.sound[2 * round(ms * self.bytes_per_ms / 2) :]


class Items:
    """The items of one session, the oldest first."""

    def __init__(self) -> None:
        self._items: dict[str, Item] = {}

    def add(self, item: Item) -> str | None:
        """Puts an item last -> the id of the one before it."""
        before = next(reversed(self._items), None)
        self._items[item.id] = item
        if len(self._items) > MOST_ITEMS:
            del self._items[next(iter(self._items))]
        self._forget_sound()
        return before

    def check_free(self, item_id: str) -> None:
        if item_id in self._items:
            raise ProtocolError(
                f"there is an item {item_id!r:.80} already; give another id", "item_id_taken", "item.id"
            )

    def get(self, item_id: object) -> Item:
        if not isinstance(item_id, str) or item_id not in self._items:
            raise ProtocolError(f"there is no item {item_id!r:.80} in this conversation", "item_not_found", "item_id")
        return self._items[item_id]

    def before(self, item: Item) -> str | None:
        """The id of the one before it; none before the first, and before one that can be named no more."""
        ids = list(self._items)
        at = ids.index(item.id) if item.id in self._items else 0
        return ids[at - 1] if at else None

    def delete(self, item: Item) -> None:
        self._items.pop(item.id, None)  # of many it may be gone already

    @property
    def last_id(self) -> str | None:
        return next(reversed(self._items), None)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items.values())

    def _forget_sound(self) -> None:
        kept = 0
        for item in reversed(self._items.values()):
            kept += len(item.sound or b"")
            if kept > KEPT_BYTES:
                item.sound = None
