"""MinMo Kernels: the operations of a streaming voice language model behind one dispatch layer.

Each operation is a function whose docstring is its contract; `explain` says which backend serves a call and why,
`use_backend` forces one, `strict` forbids the slow reference, `invariant` makes rows independent of their batch to the
bit, `warmup` compiles ahead.
"""

from minmo_kernels.dispatch import BackendError, Fault, explain, strict, use_backend
from minmo_kernels.launch import warmup
from minmo_kernels.ops.append_kv import append_kv
from minmo_kernels.ops.decoder_step import decoder_step
from minmo_kernels.ops.fsmn import fsmn
from minmo_kernels.ops.fsq_encode import fsq_encode
from minmo_kernels.ops.gate_up_swiglu import gate_up_swiglu
from minmo_kernels.ops.linear_residual import linear_residual
from minmo_kernels.ops.log_mel import log_mel
from minmo_kernels.ops.merge_linear_residual import merge_linear_residual
from minmo_kernels.ops.mix_semantic_speech import mix_semantic_speech
from minmo_kernels.ops.rms_norm import rms_norm
from minmo_kernels.ops.rms_norm_qkv_rope_append import rms_norm_qkv_rope_append
from minmo_kernels.ops.sample_token import sample_token
from minmo_kernels.ops.streaming_attention import streaming_attention
from minmo_kernels.philox import philox_normal, philox_uniform
from minmo_kernels.tuning import invariant

__all__ = [
    "BackendError",
    "Fault",
    "append_kv",
    "decoder_step",
    "explain",
    "fsmn",
    "fsq_encode",
    "gate_up_swiglu",
    "invariant",
    "linear_residual",
    "log_mel",
    "merge_linear_residual",
    "mix_semantic_speech",
    "philox_normal",
    "philox_uniform",
    "rms_norm",
    "rms_norm_qkv_rope_append",
    "sample_token",
    "streaming_attention",
    "strict",
    "use_backend",
    "warmup",
]
