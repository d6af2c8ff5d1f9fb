"""The text tokenizer: exact round trips, text that is only text, streams that equal `decode`, and the turn's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minmo.config import load_config
from minmo.tokenizer.text import CHAT, READ_ALOUD, TRANSCRIBE, TextStream, TextTokenizer, translation

ASSETS = Path(__file__).parents[2] / "minmo" / "assets"
FILE = ASSETS / "nano" / "tokenizer.json"
NANO = TextTokenizer.from_file(FILE)
LIBRARY = Tokenizer.from_file(str(FILE))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
"""Any Unicode text; only lone surrogates are no characters."""
IDS = st.lists(st.integers(0, NANO.size - 1), max_size=40)


def whole(prefix_and_suffix: tuple[list[int], list[int]], content: str = "") -> str:
    """The layout as text, with its control tokens spelt out."""
    prefix, suffix = prefix_and_suffix
    spelt = {NANO.start_of_turn: "<|im_start|>", NANO.end_of_turn: "<|im_end|>"}
    ids = [*prefix, *NANO.encode(content), *suffix]
    return b"".join(spelt[i].encode() if i in spelt else NANO.token_bytes(i) for i in ids).decode()


@settings(max_examples=50)
@given(TEXTS)
def test_round_trip_of_any_text(text: str) -> None:
    assert NANO.decode(NANO.encode(text)) == text


@settings(max_examples=50)
@given(IDS, st.randoms(use_true_random=False))
def test_stream_equals_decode(ids: list[int], draw) -> None:
    """Whatever the ids, broken UTF-8 and control tokens included, and however they are handed over."""
    stream, text = TextStream(NANO), ""
    rest = list(ids)
    while rest:
        n = draw.randint(0, 3)
        text += stream.push(rest[:n])
        rest = rest[n:]
    assert text + stream.flush() == NANO.decode(ids)
    assert stream.push(NANO.encode("five")) == "five"


def test_stream_holds_an_incomplete_character_back() -> None:
    ids = NANO.encode("日")
    stream = TextStream(NANO)
    assert len(ids) == 3
    assert [stream.push([i]) for i in ids] == ["", "", "日"]
    stream.push(ids[:2])
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


@settings(max_examples=50)
@given(IDS)
def test_decode_parity_with_the_tokenizers_library(ids: list[int]) -> None:
    assert NANO.decode(ids) == LIBRARY.decode(ids, skip_special_tokens=True)


@settings(max_examples=50)
@given(
    TEXTS, st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>system\n"]), TEXTS
)
def test_text_never_becomes_a_control_token(before: str, token: str, after: str) -> None:
    text = before + token + after
    ids = NANO.encode(text)
    assert not set(ids) & set(NANO.special_ids)
    assert NANO.decode(ids) == text
    prefix, _ = NANO.turn(text, history=[(text, text)])
    assert prefix.count(NANO.start_of_turn) == 4 and prefix.count(NANO.end_of_turn) == 3


def test_non_special_added_tokens_are_text_too() -> None:
    """Qwen2.5 has added tokens such as <tool_call> that are not marked special: text may not spell those either."""
    spec = json.loads(FILE.read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 1024, "content": "<tool_call>", "special": False})
    tokenizer = TextTokenizer(json.dumps(spec))
    assert tokenizer.size == 1025
    assert 1024 not in tokenizer.encode("<tool_call>")
    assert tokenizer.decode([1024]) == "<tool_call>"


def test_layout_of_a_first_and_a_later_turn() -> None:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    assert whole(NANO.turn(TRANSCRIBE)) == f"{system}<|im_start|>user\nSpeech Transcription{answer}"
    assert whole(NANO.turn(CHAT, first=False)) == f"<|im_end|>\n<|im_start|>user\n{answer}"
    typed = whole(NANO.turn(translation("English", "French"), typed=True), "Good morning")
    assert typed == f"{system}<|im_start|>user\nTranslate English into French\nGood morning{answer}"
    assert whole(NANO.turn(typed=True), "Hello") == f"{system}<|im_start|>user\nHello{answer}"
    history = "<|im_start|>user\none plus one<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    assert whole(NANO.turn(history=[("one plus one", "two")])) == f"{system}{history}<|im_start|>user\n{answer}"


def test_layout_parity_with_encoding_the_whole_template() -> None:
    """The pieces that are encoded one by one are where the pre-tokenizer cuts the whole text, too."""
    prefix, suffix = NANO.turn(READ_ALOUD, typed=True)
    ids = [*prefix, *NANO.encode("two plus three"), *suffix]
    assert ids == LIBRARY.encode(whole((prefix, suffix), "two plus three")).ids


def test_nano_tokenizer_fits_its_preset() -> None:
    assert NANO.size == load_config("nano").llm.vocab == 1024
    assert {NANO.start_of_turn, NANO.end_of_turn} < set(NANO.special_ids) and len(NANO.special_ids) == 3


def test_save_keeps_the_file(tmp_path: Path) -> None:
    NANO.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == FILE.read_bytes()


def test_ids_without_a_token_have_no_text() -> None:
    """An LLM's table may have more rows than the tokenizer has ids (Qwen2.5: 152064 and 151665)."""
    assert NANO.decode([NANO.size, 10**6, NANO.end_of_turn]) == ""
    with pytest.raises(ValueError, match="never negative"):
        NANO.decode([-1])


def broken(change) -> str:
    spec = json.loads(FILE.read_text())
    change(spec)
    return json.dumps(spec)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not a tokenizer.json"),
        ("[1, 2]", "is not a tokenizer.json"),
        ('{"model": {}}', "is not a tokenizer.json"),
        (broken(lambda s: s.update(decoder=None)), "is not a byte-level BPE"),
        (broken(lambda s: s.update(added_tokens=s["added_tokens"][:1])), "has no control token <|im_start|>"),
        (broken(lambda s: s["added_tokens"][2].update(special=False)), r"has no control token <|im_end|>"),
    ],
)
def test_unusable_files_say_so_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        TextTokenizer.from_file(path)
    assert sentence in str(error.value) and "use the tokenizer.json of" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_binary_files_say_so_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no readable tokenizer.json at .*; use the tokenizer.json of"):
        TextTokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text; use the tokenizer.json of"):
        TextTokenizer.from_file(tmp_path / "tokenizer.json")


def test_half_a_character_says_so() -> None:
    with pytest.raises(ValueError, match="lone surrogate\\) at index 2; decode its bytes"):
        NANO.encode("hi\udc80")


def test_translation_needs_two_languages() -> None:
    with pytest.raises(ValueError, match="names of two languages"):
        translation("English", " ")
