"""One conversation on a clock of 80 ms: it always listens, also while it speaks, and stops when the user takes over.

Each tick takes 80 ms of the user's sound, decides, and gives what may be sent of the reply. The heavy work lies between
ticks, in steps that are bounded: one piece of context read again, one block of text written; of its speech the tokens
of one block, the mel frames of one, a piece of their sound.

The LLM's context is in `branches`, whose turn it is in `turn_taking`, what was said in `history`, the way to the user
in `playback`. Several conversations on one engine share their steps: those are in `batch`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minmo.config import SAMPLE_RATE, TICK, is_real
from minmo.conversation import batch, steps
from minmo.conversation import timings as T
from minmo.conversation.branches import Branches, Reading
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
)
from minmo.conversation.history import Exchange, History, heard_tokens
from minmo.conversation.playback import Playback
from minmo.conversation.settings import Settings
from minmo.conversation.timings import Clock, Timings
from minmo.conversation.turn_taking import Floor, Phase, TurnTaking
from minmo.model import MinMo, MinMoState
from minmo.state import full_lengths
from minmo.tokenizer.onset import Onset
from minmo.tokenizer.text import CHAT, TextStream

LONGEST_TURN = 750
"""Positions of a user's turn (60 s); of a longer one the older half is forgotten."""
LONGEST_SILENCE, KEPT_SILENCE = 100, 13
"""Positions of an open turn without a voice, until all but the last second is forgotten."""
KEPT_SOUND = 40
"""Ticks of sound that can be heard again, where a turn begins."""
AHEAD_MS = 200.0
"""Sound that is sent ahead of what can have been played."""
ENOUGH_MS = 600.0
"""Sound that waits to be sent, beyond which no more is made."""


@dataclass
class _Answer:
    """A reply that is being made. begins: positions of the reply row before its text; last (1, dim): the state that
    predicts its next token; block: vectors that wait to be spoken; spoken, flowed: whether all its speech tokens, all
    its mel frames have been made; tokens (n,), mel (frames, n_mels): those that wait to flow, and to sound;
    most_frames: mel frames that sound at once."""

    number: int
    settings: Settings
    seed: int
    generation: int
    begins: int
    last: Tensor
    exchange: Exchange
    clock: Clock
    text: TextStream
    most_frames: int
    ids: list[int] = field(default_factory=list)
    written: bool = False
    block: tuple[Tensor, Tensor, int] | None = None
    tokens: Tensor | None = None
    spoken: bool = False
    mel: Tensor | None = None
    flowed: bool = False
    told: bool = False
    """Whether its end has been told."""
    cut: bool = False
    total_ms: float | None = None
    """All its sound, once it is complete."""

    @property
    def ends(self) -> bool:
        """Whether nothing waits to sound but what the vocoder holds back."""
        return self.flowed and self.mel is not None and not len(self.mel)

    @property
    def piece(self) -> Tensor:
        """What sounds next of the mel frames that wait: pieces are as few as may be, and of one length."""
        assert self.mel is not None
        return self.mel[: -(-len(self.mel) // max(1, -(-len(self.mel) // self.most_frames)))]


class Conversation:
    """One user's conversation, in two rows of a model's state.

    model: a MinMo, or a FastMinMo, of which it takes two rows. max_positions: LLM context, by default the model's; the
    oldest exchanges are forgotten where it fills up. ahead_ms: sound that may be sent beyond real time. history: what
    was said before, which the conversation takes over. Raises ValueError for settings that cannot be, and where a turn
    would not fit in the context.

    Drive it with `tick` every 80 ms, and with `step` in between while `next_step` names one.
    """

    def __init__(
        self,
        model: MinMo,
        settings: Settings = Settings(),  # noqa: B008 (frozen)
        turn_taking: TurnTaking = TurnTaking(),  # noqa: B008 (frozen)
        *,
        max_positions: int | None = None,
        ahead_ms: float = AHEAD_MS,
        history: History | None = None,
    ) -> None:
        max_positions = model.max_positions if max_positions is None else max_positions
        self.tokenizer = steps.check(model, settings, max_positions)
        if not is_real(ahead_ms) or not 80 <= ahead_ms <= 10_000:
            raise ValueError(f"ahead_ms must lie between 80 and 10000 milliseconds, got {ahead_ms!r}")
        self.model, self._settings, self._most = model, settings, settings
        self.timings = Timings()
        self.rate = model.config.vocoder.sample_rate
        """Samples a second of the replies' sound."""
        (opening, ending), (between, _) = self.tokenizer.turn(CHAT), self.tokenizer.turn(CHAT, first=False)
        reply = len(ending) + len(between) + settings.max_text_tokens
        self._longest = min(LONGEST_TURN, (max_positions - len(opening) - reply) // 4)
        if self._longest < 2:
            raise ValueError(
                f"a turn and its reply take {len(opening) + reply + 8} positions or more, but the context holds "
                f"{max_positions}: raise max_positions, or lower max_text_tokens"
            )
        self._floor, self._onset = Floor(turn_taking), Onset()
        self._playback = Playback(round(ahead_ms * self.rate / 1e3))
        self._samples = self._drawn = 0
        self._sounds: deque[np.ndarray] = deque(maxlen=KEPT_SOUND)
        self._answer: _Answer | None = None
        self._over: _Answer | None = None
        """The newest reply, once it is over, and until the next turn is taken."""
        self._fault = ""
        self._changed = False
        """Whether an exchange that precedes the running reply was removed: all is read anew after it."""
        settings.seeds(1)
        history = History() if history is None else history
        self._replies = history.number()
        if history.open:
            self._onset.go_on()
        voice_positions = 2 + self._longest + (1 + settings.max_speech_ratio) * settings.max_text_tokens
        self._seats = model.join(2, max_positions, voice_positions)
        # A turn, its reply and the turn that opens while it is spoken fit behind what is remembered.
        room = max_positions - reply - 2 * self._longest
        self._branches = Branches(model, self.tokenizer, self._seats, history, room)

    @property
    def now_ms(self) -> float:
        """The user's sound that was heard, in milliseconds: the conversation's clock."""
        return 1e3 * self._samples / SAMPLE_RATE

    @property
    def history(self) -> History:
        return self._branches.history

    def heard_replies(self) -> dict[int, str]:
        """The replies that the context holds, by number, as far as they have been heard by now."""
        ids = {exchange.number: exchange.reply for exchange in self.history.exchanges}
        if self._answer is not None and self._answer.number in ids:
            ids[self._answer.number] = self._answer.ids[: self._tokens_heard(self._answer)]
        # A cut between the tokens of one character leaves a part of it.
        return {number: self.tokenizer.decode(reply).rstrip("\ufffd") for number, reply in ids.items()}

    @property
    def phase(self) -> Phase:
        return self._floor.phase

    @property
    def fault(self) -> str:
        """Why the conversation has ended, where it has."""
        return self._fault

    @property
    def voiced(self) -> bool:
        """Whether a voice was noticed in the open turn, or some of it was typed."""
        return self._onset.turn is not None or self.history.typed

    @property
    def opened(self) -> bool:
        """Whether what precedes the first turn has been read, which a tick before would do at once."""
        return self._branches.opened

    @property
    def settings(self) -> Settings:
        """How the next reply is drawn. May be changed at any time; the running reply keeps its own. Raises ValueError
        for a longer reply than the conversation was opened for."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        steps.check(self.model, settings, 1)
        settings.seeds(1)
        for name in ("max_text_tokens", "max_speech_ratio"):
            wanted, most = getattr(settings, name), getattr(self._most, name)
            if wanted > most:
                raise ValueError(f"{name} may be at most {most}, for which the conversation was opened, got {wanted}")
        self._settings = settings

    @property
    def turn_taking(self) -> TurnTaking:
        """Who decides when to answer and when to stop. May be changed at any time."""
        return self._floor.settings

    @turn_taking.setter
    def turn_taking(self, turn_taking: TurnTaking) -> None:
        self._floor.change(turn_taking)

    @property
    def speaks(self) -> bool:
        """Whether a reply with sound is running."""
        return self._answer is not None and self._answer.settings.speak

    @property
    def buffered_ms(self) -> float:
        """How long the reply goes on with what has been made of it, by the conversation's clock; 0 before it sounds."""
        return 1e3 * (max(0, self._playback.ends - self._now) + self._playback.queued) / self.rate

    @property
    def next_step(self) -> str | None:
        """The work that is due: "read", "write", "speak", "flow", "sound" or "end", or None."""
        if self._branches.reading is not None:
            return "read"
        answer = self._answer
        if answer is None or self._playback.queued >= ENOUGH_MS * self.rate / 1e3:
            return None
        if answer.mel is not None:
            return "end" if answer.ends else "sound"
        if answer.tokens is not None:
            return "flow"
        if answer.block is None and not answer.written:
            return "write"
        return "speak" if answer.settings.speak and not answer.spoken else None

    def tick(self, samples: np.ndarray) -> list[Event]:
        """Hears 80 ms: 1280 mono float32 samples of 16 kHz -> what came of it, the tick's Decision included.

        Raises ValueError for another number of samples, and for a conversation that has ended by a fault.
        """
        return _given(batch.tick([self], [samples]))

    def step(self) -> list[Event]:
        """Does the work that is due -> what came of it."""
        due = self.next_step
        return [] if due is None else _given(batch.STEPS[due]([self]))

    @torch.inference_mode()
    def take_turn(self) -> list[Event]:
        """Answers what was heard, without waiting for the predictor. Raises ValueError where there is nothing, and
        RuntimeError while a reply is running: until its end has been told."""
        if not self.history.open:
            raise ValueError("nothing was heard since the last turn: there is nothing to answer")
        self._finish_told()
        self._finish_reading()
        self._floor.take()
        return self._take()

    @torch.inference_mode()
    def typed(self, text: str) -> list[Event]:
        """The user types: the text goes on with the open turn, which `take_turn` answers. Sound without a voice that
        the turn began with is forgotten. Raises ValueError for a text that is empty, too long or cannot be read."""
        ids = steps.readable(self.tokenizer, text)
        opened = len(self.history.open) if self.voiced else 0
        if opened + len(ids) >= self._longest:
            raise ValueError(
                f"the turn would take {opened + len(ids)} positions, and {self._longest} are too many: say less at once"
            )
        if not self.voiced:
            self.clear()
        self._finish_opening()
        self._branches.type(ids)
        return []

    @torch.inference_mode()
    def clear(self) -> list[Event]:
        """Forgets the open turn: what was said or typed since the last one was taken."""
        self._branches.clear()
        self._onset.new_turn()
        return []

    @torch.inference_mode()
    def remove(self, number: int) -> list[Event]:
        """Forgets the exchange of the reply with that number. Raises ValueError where it is not remembered, and while
        that reply is running: until its end has been told."""
        answer = self._answer
        if answer is not None and answer.number == number and not answer.told:
            raise ValueError(f"reply {number} is running: stop it before its exchange is removed")
        self.history.remove(number)
        if answer is None:
            self._floor.correct()
            self._branches.reread()
        else:
            self._changed = True
            self._finish_told()
        return []

    @torch.inference_mode()
    def stop(self) -> list[Event]:
        """Cuts the reply, as if the user had. Raises RuntimeError where none is running."""
        self._floor.give_way()
        return self._cut(by_user=False)

    @torch.inference_mode()
    def flush(self) -> list[Event]:
        """Sends what has been made of the reply without waiting for its time, and takes it as heard: for a user whose
        sound has ended, so that nothing can interrupt it."""
        answer = self._answer
        if answer is None:
            return []
        events = self._send(self._playback.rest(self._now))
        self._finish_told()
        return events

    @torch.inference_mode()
    def played(self, reply: int, ms: float, last: bool = False) -> None:
        """The client has played so much of a reply; `last`: and will play no more of it. Of one that was cut it may
        still say so, and the last of one that was not, until the next turn is taken: the context is then read again
        with less of it. Other replies do not matter any more.

        Raises ValueError for more than was sent.
        """
        if last:
            self._finish_told()
        answer = self._answer or self._over
        if answer is None or answer.number != reply or not (last or answer.cut or answer is self._answer):
            return
        if last:
            self._playback.acknowledged = None  # whatever was said before
        self._playback.acknowledge(int(ms * self.rate / 1e3))
        if answer is self._over and (tokens := self._tokens_heard(answer)) < len(answer.exchange.reply):
            answer.exchange.reply = answer.ids[:tokens]
            self._floor.correct()
            self._branches.reread()

    def check(self) -> None:
        """Raises RuntimeError in a thread that must not use the engine."""
        self._seats.check()

    def close(self) -> None:
        """Ends the conversation; its rows are free."""
        self._seats.leave()
        self._fault = self._fault or "it was closed"

    # The clock.

    def _ticked(
        self, samples: np.ndarray, position: Tensor, hidden: Tensor, decision: list[float], bands: np.ndarray
    ) -> list[Event]:
        """position, hidden (1, dim): the tick's, which the listening row has read; bands (n_mels,): its log-mel."""
        answer, stop = decision
        self._samples += TICK
        self._sounds.append(samples.copy())  # the caller's array may be used again
        self._branches.hear(position, hidden)
        if answer != answer or stop != stop:
            return self._fail(steps.PREDICTOR_FAULT)
        events = self._heard_voice(bands)
        changed = self._floor.hear(answer, stop)
        events.append(Decision(self.now_ms, answer, stop, self.phase))
        if changed and self.phase is Phase.TAKING:
            events += self._take()
        elif changed:
            events += self._cut(by_user=True)
        else:
            events += self._send(self._playback.send(self._now))
            if (reply := self._answer) is not None and reply.told and self._playback.over(self._now):
                self._finished(reply)
        # A turn that is taken by request may be spoken too softly to be noticed.
        patient = self.voiced or self.turn_taking.answer is None
        longest = self._longest if patient else min(LONGEST_SILENCE, self._longest)
        if len(self.history.open) >= longest and self._branches.reading is None:
            self._trim(self._longest // 2 if self.voiced else KEPT_SILENCE)
        return events

    def _make_room(self) -> None:
        """Before a tick: the beginning has been read, and the open turn has room for one more position."""
        self._finish_opening()
        if len(self.history.open) >= self._longest:
            self._finish_reading()
            self._trim(self._longest // 2)

    def _heard_voice(self, bands: np.ndarray) -> list[Event]:
        """Stamps the begin and the end of a voice. A turn begins with its first one, also while a reply is running;
        where turns are taken by request all that is said since the last one is of it."""
        events, onset = list[Event](), self._onset
        if onset.hear(bands, replying=self._answer is not None and not self.turn_taking.by_request):
            began = SpeechStarted(self.now_ms, _ms(onset.began))
            events.append(began if onset.voice else SpeechStopped(self.now_ms, _ms(onset.ended)))
        free = self._branches.reading is None and not self.history.typed
        if free and (keep := onset.begun()) is not None:
            self._begin_turn(keep)
        return events

    def _begin_turn(self, keep: int) -> None:
        """The open turn consists of its last positions, as if nothing had been heard before: what the encoder remembers
        of earlier turns is no part of a turn that the LLM was trained on."""
        keep = min(keep, len(self.history.open), max(1, self._longest // 2))
        if keep > len(self._sounds):
            self._trim(keep)
            return
        hearing, rows = self._state.hearing, self._seats.rows[:1]
        hearing.reset(rows)
        audio = torch.from_numpy(np.concatenate(list(self._sounds)[-keep:]))[None].to(self.model.device)
        flows = torch.zeros(1, dtype=torch.bool, device=audio.device)
        positions, _, _ = steps.hear(self.model, hearing, rows, audio, full_lengths(audio), flows, self.timings)
        self._branches.replace(positions[0].clone())

    def _trim(self, keep: int) -> None:
        """Forgets all but the last positions of the open turn, of which no more than half a longest turn stays."""
        self._branches.trim(min(keep, max(1, self._longest // 2)))

    # Turns.

    def _take(self) -> list[Event]:
        """The open turn is answered: both branches begin."""
        hidden, positions = torch.cat(self._branches.hidden)[None], torch.cat(self.history.open)[None]
        exchange, begins, last = self._branches.part(self._replies)
        seed = self.settings.seeds(1)[0]
        if self.settings.speak:
            # Speech tokens, mel frames and samples count from 0 in every reply, so each reply has a seed of its own.
            seeds = torch.tensor([_wrapped(seed + (self._replies << 32))], device=self.model.device)
            query = (hidden, positions, full_lengths(hidden))
            steps.start_speaking(self.model, self._state.speaking, self._seats.rows[:1], seeds, self.settings, query)
        self._answer = _Answer(
            self._replies,
            self.settings,
            seed,
            self._playback.begin(),
            begins,
            last,
            exchange,
            Clock(self.timings, self.model.device),
            TextStream(self.tokenizer),
            self.model.config.flow.first_frames,
        )
        self._over = None
        self._replies += 1
        spoken = self._onset.turn is not None and self._onset.last and not exchange.typed
        ended = _ms(self._onset.last) if spoken else self.now_ms
        self._onset.new_turn()
        return [TurnTaken(self.now_ms, self._answer.number, ended)]

    def _cut(self, by_user: bool) -> list[Event]:
        """The reply stops here: what the user heard of it stays, and nothing more of it is written, spoken or sent."""
        answer, playback = self._answer, self._playback
        if answer is None:
            return []
        heard = 1e3 * playback.heard / self.rate
        playback.drop()
        self._end(answer, self._tokens_heard(answer))
        answer.cut = True
        since: list[float | None] = [None, None, None]
        if self._onset.voice:
            sounded = playback.last_sent is not None
            times = (self._now, playback.last_sent if sounded else None, playback.ends if sounded else None)
            since = [None if t is None else max(0.0, 1e3 * t / self.rate - _ms(self._onset.began)) for t in times]
        text = self.tokenizer.decode(answer.exchange.reply)
        return [Interrupted(self.now_ms, answer.number, by_user, text, heard, *since)]

    def _tokens_heard(self, answer: _Answer) -> int:
        """How many text tokens of a cut reply were heard; of one without sound, all."""
        if not answer.settings.speak:
            return len(answer.ids)
        heard = 1e3 * self._playback.heard / self.rate
        return heard_tokens(len(answer.ids), heard, answer.total_ms, self.history.ms_per_token)

    def _finished(self, answer: _Answer) -> None:
        """The reply was heard to its end."""
        self._floor.give_way()
        self._end(answer, len(answer.ids))
        if not self.turn_taking.by_request:
            self._onset.reply_over()

    def _end(self, answer: _Answer, tokens: int) -> None:
        """The reply is over; so many of its tokens were heard, and go into the context."""
        answer.exchange.reply = answer.ids[:tokens]
        if self._changed:
            self._branches.reread()
        else:
            self._branches.rejoin(answer.begins + tokens)
        answer.block = answer.tokens = answer.mel = None  # nothing more of it is made
        self._answer, self._changed, self._over = None, False, answer

    def _fail(self, why: str) -> list[Event]:
        self._fault = why
        self._answer = self._branches.reading = None
        self._playback.drop()
        return [Fault(self.now_ms, why)]

    # The reply.

    def _wrote(self, answer: _Answer, block: steps.Block, entry: int, drawn: int) -> list[Event]:
        """The next tokens of a reply are an entry of a block; `drawn` counts all tokens since the beginning."""
        self._drawn = drawn
        if block.broken[entry]:
            return self._fail(steps.TEXT_FAULT)
        ids, ended = block.ids[entry], block.ended[entry]
        hidden, embeddings = (v[entry : entry + 1] for v in block.vectors)
        answer.ids += ids
        answer.last, answer.written = block.last[entry : entry + 1], ended
        answer.block = (hidden, embeddings, len(ids)) if answer.settings.speak and (ids or ended) else None
        if ids:
            answer.clock.mark(T.TO_TEXT)
        text = answer.text.push(ids) + (answer.text.flush() if ended else "")
        events: list[Event] = [TextDelta(self.now_ms, answer.number, text)] if text else []
        if ended and not answer.settings.speak:
            events.append(self._tell(answer))
            self._finished(answer)
        return events

    def _spoke(self, answer: _Answer, tokens: Tensor, finished: bool) -> list[Event]:
        """tokens (n,): of a block, and whether it is the reply's last."""
        answer.block, answer.spoken = None, finished
        answer.tokens = tokens if len(tokens) or finished else None
        return []

    def _flowed(self, answer: _Answer, mel: Tensor, empty: bool) -> list[Event]:
        """mel (frames, n_mels): of one chunk at most, and whether no token is left in the flow."""
        answer.flowed = answer.spoken and empty
        assert answer.tokens is not None
        answer.tokens = answer.tokens[:0] if answer.spoken and not empty else None
        answer.mel = mel if len(mel) or answer.flowed else None
        return []

    def _sounded(self, answer: _Answer, sound: np.ndarray, finished: bool) -> list[Event]:
        if len(sound):
            answer.clock.mark(T.TO_AUDIO)
        assert answer.mel is not None
        rest = answer.mel[len(answer.piece) :]
        answer.mel = rest if len(rest) or (answer.flowed and not finished) else None
        self._playback.put(answer.generation, sound, finished)
        if answer is not self._answer:
            return []
        if finished:
            answer.clock.mark(T.TOTAL)
            answer.total_ms = 1e3 * (self._playback.sent + self._playback.queued) / self.rate
            self.history.spoken(len(answer.ids), answer.total_ms)
        return self._send(self._playback.send(self._now))

    def _send(self, sound: np.ndarray) -> list[Event]:
        """Sound (n,) of the running reply goes to the user, and the reply's end with its last."""
        answer, events = self._answer, list[Event]()
        if answer is None:
            return events
        if len(sound):
            if self.phase is Phase.TAKING:
                self._floor.speak()
            events.append(Sound(self.now_ms, answer.number, self._playback.sent - len(sound), sound))
        if self._playback.all_sent and not answer.told:
            events.append(self._tell(answer))
        return events

    def _tell(self, answer: _Answer) -> ReplyDone:
        answer.told = True
        whole = len(answer.ids) < answer.settings.max_text_tokens
        return ReplyDone(self.now_ms, answer.number, self.tokenizer.decode(answer.ids), whole)

    def _finish_told(self) -> None:
        """Nobody waits for the last moments of a reply whose end has been told: they count as heard."""
        if self._answer is not None and self._answer.told:
            self._finished(self._answer)

    def _finish_reading(self) -> None:
        while self._branches.reading is not None:
            _given(batch.read([self]))

    def _finish_opening(self) -> None:
        if not self.opened:
            self._finish_reading()

    def _has_read(self, reading: Reading, hidden: Tensor) -> list[Event]:
        if self._branches.has_read(reading, hidden) and self.phase is Phase.YIELDING:
            self._floor.listen()
        return []

    @property
    def _state(self) -> MinMoState:
        return self._seats.state

    @property
    def _now(self) -> int:
        """The clock in samples of the reply's rate."""
        return self._samples * self.rate // SAMPLE_RATE


def _given(outcomes: list[batch.Outcome]) -> list[Event]:
    """What came of a step for the only conversation in it."""
    (outcome,) = outcomes
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _ms(samples: int | None) -> float:
    return 1e3 * (samples or 0) / SAMPLE_RATE


def _wrapped(seed: int) -> int:
    """As a 64-bit integer."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
