"""LoRA on packed projections: nothing changes at first, only A and B train, merging keeps what was learnt."""

from __future__ import annotations

import copy

import pytest
import torch

from minmo.config import BackboneConfig, load_config
from minmo.modules.backbone import Backbone
from minmo.training.lora import AdaptedLinear, LoRA, adapters, attach, merge

GROUPED = BackboneConfig(dim=24, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=32, vocab=11)
SINGLE = BackboneConfig(dim=24, layers=2, heads=3, kv_heads=1, head_dim=64, ffn=32, vocab=11, tied=True)
RULE = LoRA(rank=4, alpha=8, dropout=0.0, targets=("q", "v"))


def pair(config=GROUPED, lora=RULE, dtype=torch.float32):
    """A backbone and the same one with adapters."""
    torch.manual_seed(0)
    plain = Backbone(config).to(dtype)
    adapted = copy.deepcopy(plain)
    attach(adapted, lora)
    return plain, adapted


def learn(model, std=0.3):
    """Stands for training: B is no longer zero."""
    for parameter in adapters(model).values():
        parameter.data.normal_(std=std)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [GROUPED, SINGLE], ids=["grouped", "one kv head"])
def test_a_new_adapter_changes_no_bit(config, dtype):
    plain, adapted = pair(config, LoRA(4, 8, 0.5, ("q", "v")), dtype)
    x = torch.randn(2, 7, config.dim, dtype=dtype)
    assert adapted.training
    assert torch.equal(adapted(x), plain(x))
    learn(adapted)
    assert not torch.equal(adapted(x), plain(x))


@pytest.mark.parametrize("target", ["q", "k", "v"])
@torch.no_grad()
def test_an_adapter_moves_its_rows_alone(target):
    plain, adapted = pair(lora=LoRA(4, 8, 0.0, (target,)))
    learn(adapted)
    own, layer = plain.layers[0].qkv, adapted.layers[0].qkv
    x = torch.randn(3, 24)
    parts = (256, 128, 128)
    for name, before, after in zip("qkv", own(x).split(parts, -1), layer(x).split(parts, -1), strict=True):
        if name == target:
            a, b = adapters(layer)[f"{name}_a"], adapters(layer)[f"{name}_b"]
            torch.testing.assert_close(after, before + 8 / 4 * (x @ a.T @ b.T))
        else:
            assert torch.equal(after, before)


def test_only_a_and_b_train():
    plain, adapted = pair(dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    expected = [f"layers.{i}.qkv.{target}_{part}" for i in range(2) for target in "qv" for part in "ab"]
    assert list(trained) == expected == list(adapters(adapted))
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert adapted.state_dict().keys() - set(expected) == plain.state_dict().keys()
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(2):  # A has a gradient once B is not zero
        adapted(torch.randn(2, 5, 24).bfloat16()).square().sum().backward()
        optimizer.step()
    for name, p in adapted.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name
        assert (p.grad is None) == (name not in trained)


@torch.no_grad()
def test_dropout_is_on_the_adapters_input_and_in_training_alone():
    plain, adapted = pair(lora=LoRA(4, 8, 0.5, ("q", "v")))
    learn(adapted)
    x = torch.randn(2, 24)
    own, layer = plain.layers[0].qkv, adapted.layers[0].qkv
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    a, b = adapters(layer)["q_a"], adapters(layer)["q_b"]
    q = own(x)[:, :256] + 2 * (torch.nn.functional.dropout(x, 0.5) @ a.T @ b.T)
    torch.testing.assert_close(got[:, :256], q)
    assert torch.equal(got[:, 256:384], own(x)[:, 256:384])  # the base sees all of x
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and not torch.equal(layer(x), got)


@pytest.mark.parametrize("config", [GROUPED, SINGLE], ids=["grouped", "one kv head"])
@torch.no_grad()
def test_merging_keeps_the_output(config):
    """In fp32 to 2e-6 of outputs of size 1: the same sums in another order."""
    plain, adapted = pair(config)
    learn(adapted, 0.1)
    x = torch.randn(2, 9, config.dim)
    expected = adapted(x)
    merge(adapted)
    assert not adapters(adapted) and type(adapted.layers[0].qkv) is torch.nn.Linear
    assert adapted.state_dict().keys() == plain.state_dict().keys()
    assert not any(p.requires_grad for p in adapted.parameters())
    got = adapted(x)
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert (plain(x) - expected).abs().max() > 0.01


@torch.no_grad()
def test_merged_bf16_weights_are_rounded_once():
    plain, adapted = pair(dtype=torch.bfloat16)
    learn(adapted)
    a, b = adapters(adapted)["layers.0.qkv.v_a"].clone(), adapters(adapted)["layers.0.qkv.v_b"].clone()
    merge(adapted)
    got, own = adapted.layers[0].qkv.weight, plain.layers[0].qkv.weight
    assert torch.equal(got[384:], (own[384:].float() + 2.0 * b @ a).bfloat16())
    assert torch.equal(got[256:384], own[256:384]) and got.dtype == torch.bfloat16


@pytest.mark.parametrize("name, count", [("nano", 40_960), ("minmo-8b", 5_046_272)])
def test_sizes_of_the_presets(name, count):
    """28 layers of 16 (3584 + 3584) for q and 16 (3584 + 512) for v; nano: 4 of 16 (192 + 192) and 16 (192 + 64)."""
    config = load_config(name).llm
    with torch.device("meta"):
        layer = torch.nn.Linear(config.dim, (config.heads + 2 * config.kv_heads) * config.head_dim)
        sizes = adapters(AdaptedLinear(layer, config, LoRA(16, 32, 0.05, ("q", "v")))).values()
    assert config.layers * sum(p.numel() for p in sizes) == count


def test_what_cannot_be_is_named():
    plain, adapted = pair()
    with pytest.raises(ValueError, match="merge them first"):
        attach(adapted, RULE)
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge(plain)
    with pytest.raises(ValueError, match="no decoder layers"):
        attach(torch.nn.Linear(2, 2), RULE)
    for wrong in ((0, 8, 0.0, ("q",)), (4, 0, 0.0, ("q",)), (4, 8, 1.0, ("q",)), (4, 8, 0.0, ("o",)), (4, 8, 0.0, ())):
        with pytest.raises(ValueError, match="must"):
            LoRA(*wrong)
