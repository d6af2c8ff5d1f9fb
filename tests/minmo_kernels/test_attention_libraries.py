"""The adapters to attention libraries, without the libraries: each is called with a stand-in that does in plain PyTorch
what the library documents, and must give the reference's result. The GPU lane runs the real ones.
"""

from __future__ import annotations

import sys
import types
from typing import NamedTuple

import pytest
import torch

import minmo_kernels as mk
from minmo_kernels.dispatch import Request, intercept
from minmo_kernels.ops.streaming_attention import backends
from minmo_kernels.ops.streaming_attention.reference import reference
from minmo_kernels.ops.streaming_attention.spec import FORMS, make
from minmo_kernels.testing import assert_as_good_as_reference

LIBRARIES = {b.name: b for b in backends.BACKENDS if b.name not in ("torch", "flex")}
FLASH_FORMS = ["full", "causal", "window"]


def attend(q, k, v, scale, first_position, left, causal):
    """One sequence: q (T, heads, dim), its keys k, v (n, kv_heads, dim) -> out (T, heads, dim), lse (T, heads)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for x in (k, v))
    scores = torch.einsum("thd,shd->ths", q.float(), k) * scale
    query = first_position + torch.arange(len(q))[:, None]
    key = torch.arange(len(k))[None]
    hidden = (key > query) & causal if left < 0 else (key > query) | (key < query - left)
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    return torch.einsum("ths,shd->thd", torch.softmax(scores, dim=-1), v).to(q.dtype), lse


def flash_attn_with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, cache_batch_idx, softmax_scale, causal, window_size, return_softmax_lse
):
    """Causal is bottom-right; window_size[0] keys before the query's own; nothing seen gives zeros and +inf."""
    assert return_softmax_lse
    assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
    outs, lses = [], []
    for b, (end, row) in enumerate(zip(cache_seqlens.tolist(), cache_batch_idx.tolist(), strict=True)):
        out, lse = torch.zeros_like(q[b]), torch.full(q.shape[1:3], float("inf"))
        if end:
            kv = (k_cache[row, :end], v_cache[row, :end])
            out, lse = attend(q[b], *kv, softmax_scale, end - q.shape[1], window_size[0], causal)
        outs.append(out)
        lses.append(lse.T)
    return torch.stack(outs), torch.stack(lses)


class AuxRequest(NamedTuple):
    lse: bool = False


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa, seqused_k,
    block_table,
):  # fmt: skip
    """Pages of keys by block table; (-1, 0) is causal, (W, 0) causal with W keys before the query's own. The
    log-sum-exp is (heads, queries), as in torch 2.13's fake function (its documentation has it the other way round)."""
    assert cu_seq_k is None
    assert return_aux.lse
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert max_k == key.shape[1]
    outs, lses = [], []
    for b, end in enumerate(seqused_k.tolist()):
        q = query[int(cu_seq_q[b]) : int(cu_seq_q[b + 1])]
        assert len(q) <= max_q
        kv = (x[block_table[b].long()].flatten(0, 1)[:end] for x in (key, value))
        out, lse = attend(q, *kv, scale, end - len(q), window_size[0], window_size[1] == 0)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses).T


class GappyKeysMask:
    causal = False

    def __init__(self, q_seqlen, kv_seqstarts, kv_seqlen):
        self.blocks, self.total = list(zip(q_seqlen, kv_seqstarts[:-1], kv_seqlen, strict=True)), kv_seqstarts[-1]

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, *, device):
        assert all(isinstance(x, list) for x in (q_seqlen, kv_seqstarts, kv_seqlen))
        return cls(q_seqlen, kv_seqstarts, kv_seqlen)


class CausalGappyKeysMask(GappyKeysMask):
    causal = True


def memory_efficient_attention(query, key, value, *, attn_bias, scale):
    """One batch entry holds all sequences; (1, length, kv_heads, group, dim), keys repeated by the caller."""
    assert query.shape[0] == 1
    assert key.shape[1] == attn_bias.total
    assert key.shape[2:] == query.shape[2:]
    outs, at = [], 0
    for count, start, length in attn_bias.blocks:
        q = query[0, at : at + count].flatten(1, 2)
        k, v = (x[0, start : start + length].flatten(1, 2) for x in (key, value))
        outs.append(attend(q, k, v, scale, length - count, -1, attn_bias.causal)[0])
        at += count
    return torch.cat(outs).view(query.shape)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    flash = types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    biases = types.SimpleNamespace(
        BlockDiagonalGappyKeysMask=GappyKeysMask, BlockDiagonalCausalWithOffsetGappyKeysMask=CausalGappyKeysMask
    )
    fmha = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention, attn_bias=biases)
    varlen = types.SimpleNamespace(varlen_attn=varlen_attn, AuxRequest=AuxRequest)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)


def call(form, lse, seed, **changes):
    """Schema-order arguments of a drawn call."""
    case = {
        "form": form, "dtype": "float16", "batch": 3, "queries": 2, "heads": (4, 2), "dim": 64, "capacity": 12,
        "int8": False, "scale": None, "all_queries": True, "seed": seed, **changes,
    }  # fmt: skip
    arguments = {**make(case), "return_lse": lse}
    return intercept(mk.streaming_attention, **arguments)[1]


def assert_same(actual, arguments):
    expected = reference(*arguments)
    exact = reference(*(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments))
    for a, r, e in zip(actual, expected, exact, strict=True):
        assert_as_good_as_reference(a, r, e)


@pytest.mark.parametrize(
    "name,form", [(n, f) for n in LIBRARIES for f in FLASH_FORMS if (n, f) != ("xformers", "window")]
)
def test_an_adapter_gives_the_references_result(name, form):
    for seed in range(5):
        arguments = call(form, name != "xformers", seed)
        assert_same(LIBRARIES[name].run(*arguments), arguments)


@pytest.mark.parametrize("form", FORMS)
def test_flex_attention_takes_every_form(form, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(backends, "_flex_attention", lambda: flex_attention)
    flex = next(b for b in backends.BACKENDS if b.name == "flex")
    for seed in range(3):
        arguments = call(form, True, seed, all_queries=False, dtype="float32")
        assert_same(flex.run(*arguments), arguments)


def request(**changes):
    features = {"mask": "causal", "window": False, "ring": False, "dim": 64, "ragged": False, "paged": True,
                "lse": False, "partials": False}  # fmt: skip
    given = {"device": "cuda", "capability": (9, 0), "dtypes": (torch.bfloat16,), "contiguous": True, "grad": False,
             "current": True}  # fmt: skip
    for key, value in changes.items():
        (given if key in given else features)[key] = value
    return Request(**given, forced=False, features=features)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    "change,reason",
    [
        ({"device": "cpu"}, "GPU only"),
        ({"capability": (7, 5)}, "8.0 or newer"),
        ({"dim": 320}, "up to 256"),
        ({"dtypes": (torch.float32,)}, "fp16 and bf16"),
        ({"dtypes": (torch.bfloat16, torch.int8)}, "int8"),
        ({"mask": "chunk"}, "chunked"),
        ({"ring": True}, "ring"),
        ({"ragged": True}, "same number of queries"),
        ({"partials": True}, "merged"),
        ({"grad": True}, "backward"),
    ],
)
def test_what_a_library_does_not_serve_is_said(name, change, reason, monkeypatch):
    monkeypatch.setattr(backends, "INSTALLED", dict.fromkeys(LIBRARIES, True))
    assert LIBRARIES[name].refuses(request()) is None
    assert reason in LIBRARIES[name].refuses(request(**change))
    monkeypatch.setattr(backends, "INSTALLED", dict.fromkeys(LIBRARIES, False))
    assert LIBRARIES[name].refuses(request()) is not None


def test_explain_names_every_library():
    arguments = (torch.zeros(1, 1, 1, 64), torch.zeros(1, 4, 1, 64), torch.zeros(1, 4, 1, 64))
    row, length = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    text = str(mk.explain(mk.streaming_attention, *arguments, row, length))
    for name in ("triton", "torch", "flash_attn", "varlen", "xformers", "flex", "reference"):
        assert f" {name}: " in text
