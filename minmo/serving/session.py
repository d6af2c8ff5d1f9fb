"""One realtime session: a conversation on one side, a client's items, responses and input buffer on the other.

What the conversation tells becomes server events here; what the client asks for is in `requests`. It knows no socket:
all of it runs in the event loop's thread, and the conversation computes elsewhere, on a `Line` of the scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from minmo.config import SAMPLE_RATE, TICK
from minmo.conversation import Phase, Settings, TurnTaking, eagerness
from minmo.conversation.events import (
    Decision,
    Event,
    Fault,
    Interrupted,
    ReplyDone,
    Sound,
    SpeechStarted,
    SpeechStopped,
    TextDelta,
    TurnTaken,
    UserText,
)
from minmo.conversation.scheduler import Action, Line
from minmo.conversation.turn_taking import BY_REQUEST, Floor
from minmo.serving.items import FORGOTTEN, Item, Items
from minmo.serving.microphone import Microphone
from minmo.serving.protocol import Json, error_event, new_id
from minmo.serving.recording import Recorder
from minmo.serving.response import Response, Wishes
from minmo.serving.settings import SessionSettings
from minmo.serving.sound import Encoding

LOG = logging.getLogger(__name__)
ATTENTION_S = 10.0
"""How long silence is heard in place of a client's sound that has ended, unless a reply runs."""
BEHIND_MS = 400.0
"""Sound that may wait to be heard while silence still takes the place of more."""
KEPT_RESPONSES = 16
"""Newest responses whose playback may still be acknowledged."""


class Session:
    """settings: as at the beginning. drawing: how replies are drawn. rate: of the model's sound. send: takes a server
    event; end: closes the connection, with a WebSocket code and a reason. duplex: whether the client wants the events
    of `?duplex=1`, too. by_words: whether it may be resumed by what was said: then its turns are always transcribed."""

    def __init__(
        self,
        settings: SessionSettings,
        drawing: Settings,
        rate: int,
        send: Callable[[Json], None],
        end: Callable[[int, str], None],
        *,
        duplex: bool = False,
        by_words: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.recorder: Recorder | None = None
        self.id, self.conversation_id = new_id("sess"), new_id("conv")
        self.settings, self.duplex, self.items = settings, duplex, Items()
        self.by_words = by_words
        self.changed = asyncio.Event()
        """Set when something has changed that a session goes on with when it is resumed."""
        self._send, self._end, self.clock = send, end, clock
        self._drawing, self._rate = drawing, rate
        self.line: Line | None = None
        self._over = False
        self.microphone = Microphone()
        self.decoder = Encoding(settings.input_format, SAMPLE_RATE, to_wire=False)
        self.input = self._next_input()
        """The item that the sound becomes which the client is sending."""
        self.response: Response | None = None
        """The one that runs: it has been created and is not done."""
        self.responses: dict[str, Response] = {}
        self.wishes: Wishes | None = None
        """Of the response whose begin is told next, where it was asked for."""
        self.stopping = "client_cancelled"
        """Why the reply is being stopped, where it is not the predictor that does."""
        self._phase, self._at_ms = Phase.LISTENING, 0.0
        self._voice_ms: float | None = None
        """Where the user's voice began, while it lasts."""
        self._voice_told = False
        self._pause_ends_ms: float | None = None
        """With server_vad: when a pause will have been long enough."""
        self._paused = False
        """Whether such a pause has ended the turn, which is about to be taken: sound that comes now is not of it."""
        self._judge: Floor | None = None
        """Decides which turns are over, where they are not answered by themselves."""
        self._judged = False
        """Whether it has, and no voice was noticed since."""
        self.updated(settings)

    def as_json(self) -> Json:
        return {"id": self.id} | self.settings.as_json()

    def send(self, event: Json) -> None:
        if self.recorder is not None:
            self.recorder.event(event)
        self._send(event)

    def begin(self, line: Line) -> None:
        """Its conversation is there."""
        self.line = line
        self.microphone.came(self.clock(), 0.0)

    def greet(self, token: str | None, *, resumed: bool) -> None:
        """The first event. token: by which it can be resumed later."""
        told: Json = {"type": "session.resumed" if resumed else "session.created", "session": self.as_json()}
        if token is not None:
            told["resume_token"] = token
        if resumed:
            told["items"] = [item.as_json() for item in self.items]
        self.send(told)

    def close(self) -> None:
        """Its rows are free. No event comes after, also of those that were on their way."""
        self._over = True
        if self.line is not None:
            self.line.close()
            self.line = None

    def renumber(self, exchanges: Sequence[int]) -> None:
        """A conversation goes on from exchanges of these numbers, and counts them from 0: items go by its numbers."""
        numbers = {number: at for at, number in enumerate(exchanges)}
        for item in self.items:
            if item.reply is not None:
                item.reply = numbers.get(item.reply, FORGOTTEN)

    def turn_taking(self, settings: SessionSettings) -> TurnTaking:
        """What settings mean for the conversation: who may take turns, and how eagerly."""
        detection = settings.turn_detection
        if detection is None or detection.kind == "server_vad":
            return BY_REQUEST
        taking = eagerness(detection.eagerness)
        return dataclasses.replace(
            taking,
            answer=taking.answer if detection.create_response else None,
            stop=taking.stop if detection.interrupt_response else None,
        )

    def drawing(self, wishes: Wishes) -> Settings:
        """How a reply is drawn that is wished for."""
        return dataclasses.replace(self._drawing, speak=wishes.modality == "audio", max_text_tokens=wishes.max_tokens)

    def updated(self, settings: SessionSettings) -> None:
        """Goes on with other settings. Of another input format what the decoder holds back is to be heard before."""
        before = self.settings.turn_detection
        if settings.input_format != self.settings.input_format:
            self.decoder = Encoding(settings.input_format, SAMPLE_RATE, to_wire=False)
            self.settings = settings
            self.input = self._next_input()
        self.settings, detection = settings, settings.turn_detection
        if detection != before:
            self._pause_ends_ms = None
        judges = detection is not None and detection.kind == "semantic_vad" and not detection.create_response
        self._judge = Floor(eagerness(detection.eagerness)) if detection is not None and judges else None

    async def do(self, action: Action, *, after_sound: bool = False) -> None:
        """Has the conversation do something, its events told first; raises what the action raises."""
        if self.line is None:
            raise RuntimeError("this session is over; connect again")
        await asyncio.wrap_future(self.line.do(action, after_sound=after_sound))

    async def transcribe(self, wanted: bool) -> None:
        """Whether the user's turns are transcribed. Raises Refused where there is no time for it."""
        if self.line is not None and wanted != self.settings.transcription and not self.by_words:
            await asyncio.wrap_future(self.line.transcribe(wanted))

    def hear(self, sound: np.ndarray) -> None:
        """sound (n,) at 16 kHz. Raises Refused where too much waits."""
        if self.line is not None and len(sound):
            self.line.hear(sound)
            if self.recorder is not None:
                self.recorder.user(sound)

    def tick(self) -> None:
        """To be called every 80 ms: where the client sends no sound, silence is heard."""
        now = self.clock()
        idle = self._phase is Phase.LISTENING and self.response is None and self._pause_ends_ms is None
        if self.line is None or (idle and self.microphone.since(now) > ATTENTION_S):
            return
        if self.microphone.ahead_ms(self._at_ms) > BEHIND_MS:
            return  # silence would only make an engine later that is late already
        if due := self.microphone.missing(now):
            with contextlib.suppress(RuntimeError):  # it has just ended, and what tells so is on its way
                self.line.hear(np.zeros(due * TICK, np.float32))

    def add(self, item: Item) -> None:
        """An item that is whole joins the conversation."""
        told = {"previous_item_id": self.items.add(item), "item": item.as_json()}
        self.send({"type": "conversation.item.added", **told})
        self.send({"type": "conversation.item.done", **told})

    def commit(self) -> None:
        """What the client has sent becomes an item."""
        item, self.input = self.input, self._next_input()
        item.status = "completed"
        previous = self.items.last_id
        self.send({"type": "input_audio_buffer.committed", "previous_item_id": previous, "item_id": item.id})
        self.add(item)

    async def clear(self) -> None:
        """What the client has sent since the last turn is forgotten."""
        if self.line is not None:
            before, clearing = self.line.dropped_ms, self.line.clear()
            self.microphone.dropped(self.line.dropped_ms - before)
            await asyncio.wrap_future(clearing)
        for item in self.items:
            if item.reply is None:
                item.reply = FORGOTTEN
        self.input = self._next_input()
        self._voice_ms, self._pause_ends_ms = None, None
        self._paused = self._judged = False

    # From the conversation.

    def on_events(self, events: list[Event]) -> None:
        """Where one of them cannot be told the session ends, as half of a reply is none."""
        try:
            for event in events:
                if not self._over:
                    self._told_by[type(event)](self, event)
        except Exception as error:
            LOG.exception("events of %s could not be told", self.id)
            self._over, self.recorder = True, None
            why = f"the session failed ({type(error).__name__}); connect again"
            self.send(error_event(why, "server_error", kind="server_error"))
            self._end(1011, "the session failed")

    def _decision(self, event: Decision) -> None:
        if event.phase is not self._phase:
            self.changed.set()
        self._phase, self._at_ms = event.phase, event.at_ms
        if self.duplex:
            speaks = event.phase in (Phase.TAKING, Phase.SPEAKING)
            told: Json = {"at_ms": self.microphone.client_ms(event.at_ms), "phase": event.phase.value}
            told |= {"answer": round(event.answer, 4), "stop": round(event.stop, 4)}
            self.send({"type": "response.speak" if speaks else "response.listen", **told})
        if event.phase is not Phase.LISTENING or self.response is not None:
            return
        self._tell_voice()
        if self._judge is not None and not self._judged and self._judge.hear(event.answer, event.stop):
            self._judge, self._judged = Floor(self._judge.settings), True
            self._turn_over(event.at_ms, event.at_ms)
        if self._pause_ends_ms is not None and event.at_ms >= self._pause_ends_ms:
            self._pause_ends_ms = None
            self._turn_over(event.at_ms, event.at_ms)
            detection = self.settings.turn_detection
            if detection is not None and detection.create_response:
                self._paused = True
                self._without_waiting(lambda conversation: conversation.take_turn())

    def _speech_started(self, event: SpeechStarted) -> None:
        self._voice_ms, self._voice_told, self._pause_ends_ms = event.audio_start_ms, False, None
        self._paused = self._judged = False
        detection = self.settings.turn_detection
        if detection is None:
            return
        by_loudness = detection.kind == "server_vad"
        # A reply that was begun since the last tick is not in the phase that was told with it.
        replying = self.response is not None or self._phase in (Phase.TAKING, Phase.SPEAKING)
        if by_loudness and detection.interrupt_response and replying:
            self.stopping = "turn_detected"
            self._without_waiting(lambda conversation: conversation.stop())
        # A client stops playing at `speech_started`: while a reply sounds, the predictor says whether it shall.
        if by_loudness or self._phase is Phase.LISTENING:
            self._tell_voice()

    def _tell_voice(self) -> None:
        if self._voice_ms is not None and not self._voice_told and self.settings.turn_detection is not None:
            self._voice_told = True
            began = self.microphone.client_ms(self._voice_ms)
            self.send({"type": "input_audio_buffer.speech_started", "audio_start_ms": began, "item_id": self.input.id})

    def _speech_stopped(self, event: SpeechStopped) -> None:
        detection = self.settings.turn_detection
        self._tell_voice_end(event.audio_end_ms)
        if detection is not None and detection.kind == "server_vad":
            self._pause_ends_ms = event.audio_end_ms + detection.silence_duration_ms

    def _tell_voice_end(self, at_ms: float) -> None:
        if self._voice_ms is not None and self._voice_told:
            ended = self.microphone.client_ms(at_ms)
            self.send({"type": "input_audio_buffer.speech_stopped", "audio_end_ms": ended, "item_id": self.input.id})
        self._voice_ms = None

    def _turn_over(self, at_ms: float, heard_ms: float) -> None:
        """The user's turn ends here, by whoever's decision, taken when so much had been heard: much that has come since
        is of the next turn."""
        self._tell_voice()
        self._tell_voice_end(at_ms)
        microphone = self.microphone
        late = microphone.client_ms(microphone.heard_ms) - microphone.client_ms(heard_ms)
        rest = self.input.split(late) if late > BEHIND_MS else b""
        if self.input.sound_ms:
            self.commit()
        self.input.add_sound(rest)

    def _turn_taken(self, event: TurnTaken) -> None:
        if not self._paused:
            self._turn_over(event.voice_ended_ms, event.at_ms)
        self._paused = self._judged = False
        self.microphone.rest(self.clock())  # the reply is heard from here, whatever sound came ahead
        wishes, self.wishes = self.wishes or Wishes.of(None, self.settings), None
        self.stopping = "client_cancelled"
        response = Response(event.reply, wishes, self.conversation_id, self._rate, self.send)
        self.response = self.responses[response.id] = response
        if len(self.responses) > KEPT_RESPONSES:
            del self.responses[next(iter(self.responses))]
        for item in self.items:
            if item.reply is None:
                item.reply = event.reply
        response.begin(self.items.add(response.item))
        own = [item for item in self.items if item.reply == event.reply and item.role == "user"]
        if any(item.kind == "input_text" for item in own):
            for item in own:
                self._tell_transcript(item, "", "some of its turn was typed")

    def _user_text(self, event: UserText) -> None:
        text = event.text
        for item in [i for i in self.items if i.reply == event.reply and i.kind == "input_audio"]:
            item.heard = text
            self._tell_transcript(item, text, event.fault)
            text = ""  # of a turn of several items the first has all its words
        self.changed.set()

    def _tell_transcript(self, item: Item, text: str, fault: str) -> None:
        if not self.settings.transcription or item.kind != "input_audio":
            return
        told: Json = {"item_id": item.id, "content_index": 0}
        kind = "conversation.item.input_audio_transcription"
        if fault:
            error = {"type": "server_error", "code": "transcription_failed", "message": fault, "param": None}
            self.send({"type": f"{kind}.failed", **told, "error": error})
            return
        item.text = text
        if text:
            self.send({"type": f"{kind}.delta", **told, "delta": text})
        usage = {"type": "duration", "seconds": round(item.sound_ms / 1e3, 3)}
        self.send({"type": f"{kind}.completed", **told, "transcript": text, "usage": usage})

    def _text(self, event: TextDelta) -> None:
        if self.response is not None:
            self.response.text(event.text)

    def _sound(self, event: Sound) -> None:
        if self.response is not None:
            self.response.sound(event.audio)
            if self.recorder is not None:
                self.recorder.assistant(event.audio)

    def _reply_done(self, event: ReplyDone) -> None:
        self._finish(*(("completed", None) if event.whole else ("incomplete", "max_output_tokens")))

    def _interrupted(self, event: Interrupted) -> None:
        running = next((r for r in self.responses.values() if r.reply == event.reply), None)
        self._finish("cancelled", "turn_detected" if event.by_user else self.stopping)
        if event.by_user and self._voice_ms is None:  # it went on through the turn, or is too soft to be noticed
            self._voice_ms, self._voice_told = event.at_ms, False
        self.stopping = "client_cancelled"
        if self.duplex and running is not None:
            times = {name: getattr(event, name) for name in ("heard_ms", "decided_ms", "sent_ms", "played_ms")}
            told = {name: None if ms is None else round(ms) for name, ms in times.items()}
            self.send({"type": "response.interrupted", "response_id": running.id, "heard_text": event.text, **told})
        self._tell_voice()

    def _fault(self, event: Fault) -> None:
        self._finish("failed", None)
        self.line = None
        self.send(error_event(f"{event.why}; connect again", "conversation_failed", kind="server_error"))
        self._end(1011, "the conversation failed")

    def _finish(self, status: str, reason: str | None) -> None:
        response, self.response = self.response, None
        if response is not None:
            response.finish(status, reason, self.items.before(response.item))

    _told_by: dict[type[Event], Callable[..., None]] = {
        Decision: _decision,
        SpeechStarted: _speech_started,
        SpeechStopped: _speech_stopped,
        TurnTaken: _turn_taken,
        UserText: _user_text,
        TextDelta: _text,
        Sound: _sound,
        ReplyDone: _reply_done,
        Interrupted: _interrupted,
        Fault: _fault,
    }

    def _next_input(self) -> Item:
        decoder = self.decoder
        return Item(new_id("item"), "user", "input_audio", bytes_per_ms=decoder.rate * decoder.width / 1e3)

    def _without_waiting(self, action: Action) -> None:
        """What follows from an event. That it has been overtaken by another is no error of anybody's."""
        if self.line is not None:
            self.line.do(action).add_done_callback(lambda done: done.cancelled() or done.exception())
