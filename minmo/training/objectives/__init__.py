"""What each stage minimises: modules around a MinMo that turn a batch into sums of losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from minmo.model import MinMo
from minmo.training.contract import Objective


class ModelObjective(Objective):
    """An objective whose parameters are those of `model`, and heads of training's own beside it."""

    def __init__(self, model: MinMo) -> None:
        super().__init__()
        self.model = model

    def blocks(self) -> Sequence[nn.Module]:
        """The layers of all stacks; what a stage does not run stays sharded."""
        m = self.model
        stacks = (m.encoder.blocks, m.speech_tokenizer.encoder.blocks, m.projector.layers, m.llm.layers)
        return [block for stack in (*stacks, m.voice_decoder.lm.layers) for block in stack]
