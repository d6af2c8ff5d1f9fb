"""Speech tokens of a text, block by block: voice-lm, t2s-projector, t2s and s2s (paper section 3.2).

The LLM reads a conversation whose assistant's text is known; each token pairs its embedding with the hidden state that
predicted it. With a spoken turn the user's positions come first, as query embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minmo.model import MinMo
from minmo.state import join, take
from minmo.training.objectives import ModelObjective
from minmo.training.objectives.sound import sound_of_tokens
from minmo.training.objectives.text import TextBatch
from minmo_kernels.ops.mix_semantic_speech.schedule import is_bistream


@dataclass(frozen=True)
class VoiceBatch:
    """turn: the conversation, whose last `after` id (the end of the turn) is not spoken. prefix_lengths (batch,): ids
    of `before` that are not the user's own words. speech (batch, m) int32 with lengths; blocks (batch,) bool: in blocks
    of 5:15 where the speech is long enough, else the text first."""

    turn: TextBatch
    prefix_lengths: Tensor
    speech: Tensor
    speech_lengths: Tensor
    blocks: Tensor


class VoiceObjective(ModelObjective):
    """Cross entropy of speech tokens, of `fill` after each block and of end of speech. query: put the user's turn
    before the text."""

    weights = {"speech": 1.0}

    def __init__(self, model: MinMo, query: bool) -> None:
        super().__init__(model)
        self.query = query

    def counts(self, batch: VoiceBatch) -> dict[str, float]:
        """Every speech token, the end of speech and, in blocks, a fill a block are targets."""
        config = self.model.config.voice_decoder
        text = batch.turn.after_lengths - batch.turn.asked - 1
        fills = torch.where(self._in_blocks(batch), torch.div(text, config.semantic_block, rounding_mode="floor"), 0)
        return {"speech": float((batch.speech_lengths + 1 + fills).sum())}

    def forward(self, batch: VoiceBatch) -> dict[str, Tensor]:
        logits, targets = self.logits(batch)
        return {
            "speech": F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
            )
        }

    def logits(self, batch: VoiceBatch) -> tuple[Tensor, Tensor]:
        """As `VoiceDecoder.forward`."""
        hidden, embedding, queries, texts = self.vectors(batch)
        return self.model.voice_decoder(
            hidden, embedding, queries, texts, batch.speech, batch.speech_lengths, self._in_blocks(batch)
        )

    def sound(self, batch: VoiceBatch) -> dict[str, Tensor]:
        """Of the first entry: its own tokens, and the most likely token at the place of each, the others being given:
        a bound of what it can say."""
        size, codes = int(batch.speech_lengths[0]), self.model.config.voice_decoder.codes
        logits, targets = self.logits(batch)
        speech = (targets[0] >= 0) & (targets[0] < codes)
        likely = logits[0, speech, :codes].argmax(dim=-1)[None]
        return {
            "most likely tokens": sound_of_tokens(self.model, likely),
            "own tokens": sound_of_tokens(self.model, batch.speech[:1, :size]),
        }

    @torch.no_grad()
    def vectors(self, batch: VoiceBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States and embeddings (batch, n, dim) of query and text, and the lengths of both; the LLM is frozen."""
        model, turn = self.model, batch.turn
        x, lengths = model.llm.embed(turn.before), turn.before_lengths
        if turn.mel is not None and turn.mel_lengths is not None:
            x, lengths = join(x, lengths, *model.projector(*model.encoder(turn.mel, turn.mel_lengths)))
        content = lengths
        x, lengths = join(x, lengths, model.llm.embed(turn.after), turn.after_lengths)
        hidden = model.llm(x[:, : int(lengths.max())], lengths, shared=turn.shared)
        asked = turn.asked
        texts = (turn.after_lengths - asked - 1).to(torch.int32)
        size, first = int(texts.max()), content + asked
        hidden, x = (F.pad(t, (0, 0, 0, size)) for t in (hidden, x))
        said = (take(hidden, first - 1, size), take(x, first, size))
        if not self.query:
            return *said, torch.zeros_like(texts), texts
        queries = (content - batch.prefix_lengths).to(torch.int32)
        longest = int(queries.max())
        asking = (take(hidden, batch.prefix_lengths, longest), take(x, batch.prefix_lengths, longest))
        joined = [join(q, queries, t, texts)[0] for q, t in zip(asking, said, strict=True)]
        return joined[0], joined[1], queries, texts

    def _in_blocks(self, batch: VoiceBatch) -> Tensor:
        config = self.model.config.voice_decoder
        texts = batch.turn.after_lengths - batch.turn.asked - 1
        return batch.blocks & is_bistream(texts, batch.speech_lengths, config.semantic_block, config.speech_block)
