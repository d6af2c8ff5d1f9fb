"""Public checkpoints read as parts of a MinMo: the same numbers, and one sentence for each way a file can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import zipfile

import public_files as public
import pytest
import torch
from safetensors.torch import load_file, save_file

from minmo import cli
from minmo.config import from_fields
from minmo.state import full_lengths
from minmo.token2wav.vocoder import Vocoder
from minmo.weights import manifest
from minmo.weights.importers import cosyvoice, cosyvoice_hift, cosyvoice_llm, qwen2
from minmo.weights.importers.table import IMPORTERS
from minmo.weights.parts import build, open_parts, save_parts
from minmo.weights.stored import CheckpointError, pickled
from minmo.weights.written import whole


def command(monkeypatch, capsys, *arguments):
    """A command's output and its exit code."""
    monkeypatch.setattr(sys, "argv", ["minmo", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    return shown.out + shown.err, stop.value.code or 0


@pytest.mark.parametrize("tied,shard", [(False, "300KB"), (True, "1GB"), (True, "300KB")])
def test_qwen_gives_the_logits_of_transformers(tmp_path, tied, shard):
    theirs = public.qwen(tmp_path / "hf", tied=tied, shard=shard)
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file() == (shard == "300KB")
    save_parts(qwen2.open_folder(tmp_path / "hf"), tmp_path / "out")
    (part,) = open_parts(tmp_path / "out")
    ours = build(part)
    assert ours.config.tied == tied and ours.config.rope_theta == 5e4
    ids = torch.randint(0, 1024, (2, 9))
    with torch.no_grad():
        logits = ours.logits(ours(ours.embed(ids), full_lengths(ids)))
        torch.testing.assert_close(logits, theirs(ids).logits, atol=2e-5, rtol=1e-4)
    assert part.tokenizer == public.TOKENIZER.read_text("utf-8")


def test_the_command_and_its_manifest(tmp_path, monkeypatch, capsys):
    theirs = public.qwen(tmp_path / "hf", dtype=torch.bfloat16)
    shown, code = command(monkeypatch, capsys, "import", "qwen2", tmp_path / "hf", "-o", tmp_path / "out")
    assert code == 0 and "written" in shown and "bfloat16" in shown
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["llm.embedding.weight"], theirs.model.embed_tokens.weight)
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content["parts"]["llm"]["importer"] == "qwen2" and content["parts"]["llm"]["dtype"] == "as stored"
    sources = {source["file"]: source for source in content["parts"]["llm"]["sources"]}
    assert {"config.json", "tokenizer.json"} < set(sources) and len(sources) > 4
    assert sources["config.json"]["sha256"] == manifest.sha256(tmp_path / "hf" / "config.json")
    shown, code = command(monkeypatch, capsys, "info", tmp_path / "out", "--verify")
    assert code == 0 and "3 files" in shown and "imported" in shown
    data = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(data)
    shown, code = command(monkeypatch, capsys, "info", tmp_path / "out", "--verify")
    assert code == 2 and "model.safetensors is not the file that was written" in shown
    shown, code = command(monkeypatch, capsys, "import", "qwen3", tmp_path / "hf", "-o", tmp_path / "no")
    assert code == 2 and "there is no importer 'qwen3'" in shown
    shown, code = command(monkeypatch, capsys, "talk", "x.wav", "--preset", tmp_path / "out")
    assert code == 2
    shown, code = command(monkeypatch, capsys, "info", tmp_path / "out", "--rows", "2")
    assert "parts of a MinMo" in " ".join(shown.split())


@pytest.mark.parametrize("norms", [cosyvoice_hift.PARAMETRIZED, cosyvoice_hift.WEIGHT_NORM])
def test_cosyvoice_gives_its_three_parts(tmp_path, norms):
    folded = public.cosyvoice(tmp_path, norms)
    save_parts(cosyvoice.open_folder(tmp_path), tmp_path / "out")
    decoder, flow, vocoder = open_parts(tmp_path / "out")
    assert decoder.config["codes"] == 27 and decoder.config["fill"] == 29 and "llm_dim" not in decoder.config
    assert not any(name.startswith("output_projector") for name in decoder.tensors)
    released = torch.load(tmp_path / "llm.pt")
    assert torch.equal(decoder.tensors["head.bias"].read(), released["llm_decoder.bias"])
    gate = released["llm.model.model.layers.0.mlp.gate_proj.weight"]
    assert torch.equal(decoder.tensors["lm.layers.0.gate_up.weight"].read()[0::2], gate)
    assert decoder.dropped == cosyvoice_llm.DROPPED and "chunks of 25" in flow.notes[0]
    assert build(flow).config == public.FLOW
    made = build(vocoder)
    assert from_fields(type(public.VOCODER), dict(vocoder.config), "v") == public.VOCODER and isinstance(made, Vocoder)
    for name, tensor in folded.items():
        torch.testing.assert_close(made.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_cosyvoices_body_without_its_config(tmp_path):
    public.cosyvoice(tmp_path)
    with_config = cosyvoice_llm.open_file(tmp_path / "llm.pt", tmp_path / "CosyVoice-BlankEN" / "config.json")
    assert with_config.config["lm"]["rope_theta"] == 5e4
    alone = cosyvoice_llm.open_file(tmp_path / "llm.pt").config["lm"]
    assert alone == {**with_config.config["lm"], "rope_theta": 1e6}


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def last_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[-1]


def cut(path, share=0.5):
    os.truncate(path, int(share * path.stat().st_size))


BAD_QWEN = {
    "cut shard": (lambda f: cut(last_shard(f)), r"model-0000\d-of-0000\d.safetensors is not a readable"),
    "missing shard": (lambda f: last_shard(f).unlink(), r"lacks model-0000\d-of-0000\d.safetensors"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "has no model.safetensors and no"),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is not JSON"),
    "index elsewhere": (
        lambda f: public.edit_json(f / "model.safetensors.index.json", weight_map={"a": "../b.safetensors"}),
        "names '../b.safetensors'",
    ),
    "lacking tensor": (
        lambda f: rewrite(last_shard(f), lambda t: t.pop("model.norm.weight")), "lacks the tensor 'model.norm.weight'",
    ),
    "extra tensor": (
        lambda f: rewrite(last_shard(f), lambda t: t.update(extra=torch.zeros(1))), "no place for, such as 'extra'",
    ),
    "another size": (lambda f: public.edit_json(f / "config.json", intermediate_size=97), "'model.layers.0.mlp"),
    "fewer layers": (lambda f: public.edit_json(f / "config.json", num_hidden_layers=1), "such as 'model.layers.1."),
    "another family": (lambda f: public.edit_json(f / "config.json", model_type="llama"), "model_type is 'llama'"),
    "scaled rope": (
        lambda f: public.edit_json(f / "config.json", rope_scaling={"rope_type": "yarn"}), "rope_scaling is not null",
    ),
    "rope in a list": (lambda f: public.edit_json(f / "config.json", rope_parameters=[1]), "rope_parameters is"),
    "lacking field": (lambda f: public.edit_json(f / "config.json", hidden_size=None), "lacks the field 'hidden_size'"),
    "hostile field": (
        lambda f: public.edit_json(f / "config.json", num_hidden_layers=10**9), "config.json: llm.layers must lie",
    ),
    "small vocabulary": (lambda f: public.edit_json(f / "config.json", vocab_size=1000), "1024 ids and the embedding"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "no tokenizer's": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is not a tokenizer.json"),
    "not a number": (
        lambda f: rewrite(last_shard(f), lambda t: t["model.norm.weight"].fill_(torch.nan)),
        "'llm.norm.weight' holds NaN or infinite",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    public.qwen(folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize("kind", BAD_QWEN)
def test_a_bad_qwen_is_one_sentence(good_qwen, tmp_path, kind):
    public.shutil.copytree(good_qwen, tmp_path / "hf")
    spoil, sentence = BAD_QWEN[kind]
    spoil(tmp_path / "hf")
    with pytest.raises(ValueError, match=sentence) as error:
        save_parts(IMPORTERS["qwen2"].open(tmp_path / "hf"), tmp_path / "out")
    assert str(tmp_path / "hf") in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not [path for path in tmp_path.iterdir() if path.name != "hf"], "something is left"


def test_an_overflow_names_its_tensor_and_leaves_nothing(good_qwen, tmp_path):
    public.shutil.copytree(good_qwen, tmp_path / "hf")
    rewrite(last_shard(tmp_path / "hf"), lambda t: t["model.norm.weight"].fill_(1e5))
    with pytest.raises(CheckpointError, match=r"'llm.norm.weight' reaches 1e\+05, and float16 ends at 6.55e\+04"):
        save_parts(qwen2.open_folder(tmp_path / "hf"), tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    save_parts(qwen2.open_folder(tmp_path / "hf"), tmp_path / "out", torch.bfloat16)
    with pytest.raises(CheckpointError, match="out is there already"):
        save_parts(qwen2.open_folder(tmp_path / "hf"), tmp_path / "out")


def test_no_folder_of_the_users_is_removed_or_replaced(good_qwen, tmp_path):
    parts, out = qwen2.open_folder(good_qwen), tmp_path / "out"
    (part := tmp_path / "out.tmp").mkdir()
    (part / "thesis.tex").write_text("all of it")
    with pytest.raises(CheckpointError, match="out.tmp holds 'thesis.tex', which is no weights"):
        save_parts(parts, out)
    (part / "thesis.tex").rename(part / "model-00001-of-00002.safetensors")  # as a killed run leaves it
    out.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="out is there already"):
        save_parts(parts, out)
    out.unlink()
    save_parts(parts, out)
    assert not part.exists() and {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_folder_that_appears_meanwhile_stays_and_nothing_is_left(tmp_path):
    with pytest.raises(CheckpointError, match="out could not be written"), whole(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "theirs").exists()


HOSTILE = {
    "a path": (lambda m: m["files"][0].update(file="../../secret"), "'../../secret'"),
    "an absolute path": (lambda m: m["files"][0].update(file="/etc/hostname"), "'/etc/hostname'"),
    "a number": (lambda m: m["files"][0].update(file=5), "5 is no line"),
    "escapes": (lambda m: m["parts"]["llm"].update(notes=["\x1b[2J all is well"]), "is no line of text"),
    "no text": (lambda m: m["parts"]["llm"].update(dropped=[7]), "7 is no line"),
    "no source": (lambda m: m["parts"]["llm"].update(sources=[5]), "must be a mapping"),
}


def test_a_hostile_manifest_is_one_sentence_and_no_markup(good_qwen, tmp_path, monkeypatch, capsys):
    save_parts(qwen2.open_folder(good_qwen), tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    good = path.read_text()
    for change, sentence in HOSTILE.values():
        change(content := json.loads(good))
        path.write_text(json.dumps(content))
        for read in (manifest.verify, open_parts):
            with pytest.raises(CheckpointError, match=f"manifest.json is no manifest.*{sentence}"):
                read(tmp_path / "out")
    content = json.loads(good)
    content["parts"]["llm"]["state"] = "[/red]"
    path.write_text(json.dumps(content))
    shown, code = command(monkeypatch, capsys, "info", tmp_path / "out")
    assert code == 0 and "[/red]" in shown
    path.write_text(good)
    (tmp_path / "out" / "parts.json").write_text('{"llm": null}')
    with pytest.raises(CheckpointError, match="parts.json: 'llm' is no object"):
        open_parts(tmp_path / "out")


def test_names_of_public_files_are_lines_in_a_manifest(good_qwen, tmp_path):
    (part,) = qwen2.open_folder(good_qwen)
    noted = dataclasses.replace(part, notes=("a name\x1b[2J\nof two lines",))
    save_parts([noted], tmp_path / "out")
    assert open_parts(tmp_path / "out")[0].notes == ("a name\ufffd[2J of two lines",)


def test_an_errors_text_commands_no_terminal(tmp_path, monkeypatch, capsys):
    shown, code = command(monkeypatch, capsys, "import", "qwen2", tmp_path / "a\x1b[2Jb", "-o", tmp_path / "out")
    assert code == 2 and "cannot be read" in shown and "\x1b" not in shown


class Code:
    """What a pickle would run."""

    def __reduce__(self):
        return os.system, ("echo never",)


BAD_COSYVOICE = {
    "code": ("llm.pt", lambda p: torch.save({"a": Code()}, p), r"llm.pt holds more than tensors \(.*system"),
    "cut": ("flow.pt", cut, "flow.pt is cut, or no file of torch.save"),
    "missing": ("hift.pt", lambda p: p.unlink(), "there is no .*hift.pt"),
    "no dict": ("hift.pt", lambda p: torch.save([torch.zeros(1)], p), "hift.pt holds no state dict, but a list"),
    "no tensor": ("flow.pt", lambda p: torch.save({"epoch": 3}, p), "flow.pt: 'epoch' is no tensor"),
    "a swap": ("flow.pt", lambda p: p.write_bytes((p.parent / "hift.pt").read_bytes()), "flow.pt lacks the tensor"),
    "a hift swap": (
        "hift.pt",
        lambda p: p.write_bytes((p.parent / "flow.pt").read_bytes()),
        "hift.pt lacks the tensor",
    ),
    "an llm swap": ("llm.pt", lambda p: p.write_bytes((p.parent / "flow.pt").read_bytes()), "llm.pt lacks the tensor"),
}


def deflated(path):
    """A small file that would fill memory."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries.items():
            target.writestr(name, data + bytes(1 << 22) * name.endswith("data.pkl"))


HOSTILE_TENSORS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "without data": lambda: torch.empty(3, device="meta"),
    "repeated": lambda: torch.zeros(1).expand(10**13),
}


@pytest.mark.parametrize("kind", [*HOSTILE_TENSORS, "compressed"])
def test_files_that_claim_more_than_they_hold_are_not_read(tmp_path, kind):
    path = tmp_path / "llm.pt"
    deflated(path) if kind == "compressed" else torch.save({"a": HOSTILE_TENSORS[kind]()}, path)
    with pytest.raises(CheckpointError, match="llm.pt.* (is sparse|without data|too few bytes|is compressed)"):
        pickled(path)


@pytest.mark.parametrize("kind", BAD_COSYVOICE)
def test_a_bad_cosyvoice_is_one_sentence(tmp_path, kind, capfd):
    public.cosyvoice(tmp_path)
    name, spoil, sentence = BAD_COSYVOICE[kind]
    spoil(tmp_path / name)
    with pytest.raises(ValueError, match=sentence) as error:
        cosyvoice.open_folder(tmp_path)
    assert "\n" not in str(error.value) and "never" not in capfd.readouterr().out


@pytest.mark.parametrize("name,key", [("llm.pt", "llm_decoder.bias"), ("flow.pt", "encoder_proj.bias")])
def test_cosyvoices_keys_and_shapes_are_held_strictly(tmp_path, name, key):
    public.cosyvoice(tmp_path)
    state = torch.load(tmp_path / name)
    for change, sentence in (
        ({**state, "strange": torch.zeros(1)}, f"{name} holds 1 tensors .* 'strange'"),
        ({**state, key: state[key][:-1]}, f"{name}: '{key}' has the shape"),
        ({k: v for k, v in state.items() if k != key}, f"{name} lacks the tensor '{key}'"),
    ):
        torch.save(change, tmp_path / name)
        with pytest.raises(CheckpointError, match=sentence):
            cosyvoice.open_folder(tmp_path)
