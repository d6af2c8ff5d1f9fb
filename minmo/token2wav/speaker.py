"""The voice of a recording as a vector: CAM++ (arXiv 2303.00332), as CosyVoice 2 conditions its flow matching.

The network is the public `campplus.onnx`, run by onnxruntime on Kaldi's log mel energies, whose mean over time is taken
off. The flow scales the vector to length 1 itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minmo.config import SAMPLE_RATE

N_MELS = 80
SHORTEST, LONGEST = 1.0, 120.0
"""Seconds of voice that say whose it is, and more than anybody needs."""


class SpeakerEncoder:
    """Loads `campplus.onnx`. Raises ValueError, in one sentence, without its packages and for another network."""

    def __init__(self, path: str | Path) -> None:
        try:
            import kaldi_native_fbank
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"speaker embeddings need {error.name}: pip install 'minmo[speaker]'") from None
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}: give the campplus.onnx of CosyVoice 2")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # a class for every status, all of them onnxruntime's own
            raise ValueError(f"{path} is cut, or no onnx network ({str(error):.100}): fetch it again") from None
        self._fbank: Any = kaldi_native_fbank
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape if inputs else []
        if len(inputs) != 1 or len(outputs) != 1 or len(shape) != 3 or shape[2] != N_MELS:
            raise ValueError(
                f"{path} takes {', '.join(str(i.shape) for i in inputs)}, and CAM++ takes (1, frames, {N_MELS}): "
                "give the campplus.onnx of CosyVoice 2"
            )
        self._path, self._input = path, inputs[0].name

    def __call__(self, samples: NDArray[np.float32]) -> Tensor:
        """Sound (samples,) 16 kHz, within -1 .. 1 -> the voice, (192,) for the released network.

        Raises ValueError for less than a second, more than two minutes, silence, and a network that gives no numbers.
        """
        seconds = len(samples) / SAMPLE_RATE
        if not SHORTEST <= seconds <= LONGEST:
            raise ValueError(
                f"a voice is taken from {SHORTEST:g} to {LONGEST:g} s of speech, and this sound has {seconds:.1f} s"
            )
        if not np.isfinite(samples).all() or not np.abs(samples).max() > 0:
            raise ValueError("this sound is silent, or holds NaN: there is no voice in it")
        features = self.features(samples)
        (out,) = self._session.run(None, {self._input: features[None]})
        vector = torch.from_numpy(np.asarray(out, np.float32).reshape(-1))
        if not bool(vector.isfinite().all()):
            raise ValueError(f"{self._path} gave NaN or infinity for this sound: fetch it again")
        return vector

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sound (samples,) -> (frames, 80): 25 ms every 10 ms, Povey's window, log energies less their mean."""
        options = self._fbank.FbankOptions()
        options.frame_opts.samp_freq = SAMPLE_RATE
        options.frame_opts.dither = 0.0
        options.mel_opts.num_bins = N_MELS
        fbank = self._fbank.OnlineFbank(options)
        fbank.accept_waveform(SAMPLE_RATE, samples)
        fbank.input_finished()
        frames = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
        return frames - frames.mean(axis=0, keepdims=True)
