"""`minmo`: talk, serve, transcribe, translate, ask, say, chat-text, info, import, voice, assemble, export, profile,
doctor, train, tokenize, evaluate and data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import minmo
from minmo import console
from minmo import doctor as doctor_report
from minmo.config import load_config
from minmo.console import err
from minmo.conversation import verbs
from minmo.conversation.command import with_a_file, with_the_microphone
from minmo.conversation.front import FRONTS
from minmo.conversation.session import Piece
from minmo.conversation.text_chat import open_chat
from minmo.conversation.timings import RESAMPLER
from minmo.conversation.turn_taking import EAGERNESS
from minmo.conversation.turn_taking import eagerness as turn_taking_of
from minmo.evaluation.command import evaluate
from minmo.fast import profile as measuring
from minmo.fast.engine import MAX_VOICE_POSITIONS, MOST_ROWS
from minmo.fast.linear import WEIGHTS
from minmo.fast.profile import STEPS
from minmo.info import engine_rows, state_rows
from minmo.info import rows as info_rows
from minmo.model import MAX_POSITIONS, MOST_POSITIONS, concerns
from minmo.serving.command import serve
from minmo.serving.loadtest import loadtest
from minmo.tokenizer.text import CHAT, READ_ALOUD, TRANSCRIBE, translation
from minmo.training.command import add_to as add_training
from minmo.weights import manifest, pick_device
from minmo.weights.command import add_to as add_weights
from minmo.weights.command import dtype_of, show_origins, show_parts
from minmo_kernels.dispatch import OPS, backends_in_use

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="MinMo: talk with a voice model."
)
add_training(app)
add_weights(app)
app.command()(evaluate)
app.command()(serve)
app.command()(loadtest)
out = Console()

Sound = Annotated[str, typer.Argument(help="A sound file: 1 to 768 kHz, any number of channels.")]
SoundOrText = Annotated[str, typer.Argument(help="A sound file, or words.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write the reply's sound (.wav, .flac).")]
Preset = Annotated[str, typer.Option(help="A preset, or a checkpoint directory.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … (default: a GPU where there is one).")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Same seed, same reply.")]
Temperature = Annotated[float, typer.Option(help="Of the text; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus of the text.")]
TopK = Annotated[int, typer.Option(help="Most likely tokens kept for the text; 0 = all.")]
VoiceTemperature = Annotated[float, typer.Option(help="Of the speech tokens; 0 is greedy.")]
VoiceTopP = Annotated[float, typer.Option(help="Nucleus of the speech tokens.")]
VoiceTopK = Annotated[int, typer.Option(help="Most likely speech tokens kept; 0 = all.")]
MaxSpeech = Annotated[int, typer.Option(help="Longest speech, in speech tokens of 40 ms a text token.")]
MaxText = Annotated[int, typer.Option(help="Longest reply, in text tokens.")]
Realtime = Annotated[bool, typer.Option("--realtime", help="Feed the sound at the speed of speech.")]
Repeat = Annotated[int, typer.Option(min=1, help="Take the turn this often; the latency table then has percentiles.")]
Duplex = Annotated[
    bool,
    typer.Option("--duplex", help="Hold a conversation with the file: OUT in stereo, and a log beside it (.jsonl)."),
]
Mic = Annotated[
    bool, typer.Option("--mic", help="Talk with this machine's microphone and loudspeaker; Ctrl-C ends it.")
]
BeforeIt = Annotated[
    str, typer.Option("--front", help=f"With --duplex and --mic, what hears the microphone first: {', '.join(FRONTS)}.")
]
Fast = Annotated[bool, typer.Option("--fast", help="With --duplex: as fast as possible, not at the speed of speech.")]
Eagerness = Annotated[str, typer.Option(help=f"With --duplex: how eager to speak, {', '.join(EAGERNESS)}.")]
Instruction = Annotated[str | None, typer.Option(help="Put before the user's words (default: the task's own).")]


@app.command()
def talk(
    sound: Annotated[str | None, typer.Argument(help="A sound file: 1 to 768 kHz, any number of channels.")] = None,
    output: Output = None,
    preset: Preset = "nano",
    realtime: Realtime = False,
    repeat: Repeat = 1,
    duplex: Duplex = False,
    mic: Mic = False,
    fast: Fast = False,
    eagerness: Eagerness = "auto",
    front: BeforeIt = "none",
    instruction: Instruction = None,
    seed: Seed = 0,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    voice_temperature: VoiceTemperature = 1.0,
    voice_top_p: VoiceTopP = 0.8,
    voice_top_k: VoiceTopK = 25,
    max_text_tokens: MaxText = 32,
    max_speech_ratio: MaxSpeech = 20,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """A spoken turn in, a spoken turn out, with text as it comes and a latency table.

    With --duplex a conversation: the file is the user's side, who may interrupt, and turns are taken as they come. With
    --mic one with you: wear headphones, or give --front echo.
    """
    settings = minmo.Settings(
        seed, temperature, top_k, top_p, voice_temperature, voice_top_k, voice_top_p, max_text_tokens, max_speech_ratio
    )
    if front not in FRONTS:
        raise ValueError(f"--front must be one of {', '.join(FRONTS)}, got {front!r}")
    if (duplex or mic) and (realtime or repeat > 1 or instruction is not None):
        raise ValueError("--duplex and --mic hold one conversation: leave --realtime, --repeat, --instruction")

    def load() -> minmo.MinMo:
        return _load(preset, device, dtype)

    if mic:
        if sound is not None or output is not None or duplex or fast:
            raise ValueError("--mic talks with you, and records nothing: leave the file, -o, --duplex, --fast")
        with_the_microphone(load, settings, turn_taking_of(eagerness), front)
        return
    if sound is None:
        raise ValueError("talk needs a sound file, or --mic")
    if duplex:
        if output is None:
            raise ValueError("--duplex writes both sides into a file: give -o OUT.wav")
        heard = np.asarray(_input(sound, words=False))
        file = _check_target(sound, output)
        with_a_file(load, heard, file, settings, turn_taking_of(eagerness), front, realtime=not fast)
        return
    if front != "none":
        raise ValueError("--front is of --duplex and --mic")
    _run(sound, output, preset, settings, _given(instruction, CHAT), device, dtype, realtime, repeat, words=False)


@app.command()
def transcribe(
    sound: Sound,
    preset: Preset = "nano",
    instruction: Instruction = None,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    max_text_tokens: MaxText = 128,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """What was said, as text."""
    settings = minmo.Settings(seed, temperature, top_k, top_p, max_text_tokens=max_text_tokens, speak=False)
    _run(sound, None, preset, settings, _given(instruction, TRANSCRIBE), device, dtype, words=False)


@app.command()
def translate(
    turn: SoundOrText,
    source: Annotated[str, typer.Option("--from", help="Language of the input, in words.")] = "English",
    target: Annotated[str, typer.Option("--to", help="Language of the output, in words.")] = "Spanish",
    output: Output = None,
    preset: Preset = "nano",
    instruction: Instruction = None,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    voice_temperature: VoiceTemperature = 1.0,
    voice_top_p: VoiceTopP = 0.8,
    voice_top_k: VoiceTopK = 25,
    max_text_tokens: MaxText = 128,
    max_speech_ratio: MaxSpeech = 20,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """What was said or written in one language, in another; spoken too with -o."""
    settings = minmo.Settings(
        seed, temperature, top_k, top_p, voice_temperature, voice_top_k, voice_top_p, max_text_tokens,
        max_speech_ratio, speak=output is not None,
    )  # fmt: skip
    _run(turn, output, preset, settings, _given(instruction, translation(source, target)), device, dtype)


@app.command()
def ask(
    question: SoundOrText,
    output: Output = None,
    preset: Preset = "nano",
    instruction: Instruction = None,
    seed: Seed = 0,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    voice_temperature: VoiceTemperature = 1.0,
    voice_top_p: VoiceTopP = 0.8,
    voice_top_k: VoiceTopK = 25,
    max_text_tokens: MaxText = 32,
    max_speech_ratio: MaxSpeech = 20,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """A question, spoken or typed, answered in text; spoken too with -o."""
    settings = minmo.Settings(
        seed, temperature, top_k, top_p, voice_temperature, voice_top_k, voice_top_p, max_text_tokens,
        max_speech_ratio, speak=output is not None,
    )  # fmt: skip
    _run(question, output, preset, settings, _given(instruction, CHAT), device, dtype)


@app.command()
def chat_text(
    folder: Annotated[Path, typer.Argument(help="What `minmo import` made of a language model.")],
    prompt: Annotated[
        str | None, typer.Argument(help="One question; without it a conversation, ended by Ctrl-D.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first (default: its template's).")] = None,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    max_text_tokens: MaxText = 256,
    max_positions: Annotated[int, typer.Option(min=1, max=MOST_POSITIONS, help="The longest conversation.")] = 2048,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Types with an imported language model, before a voice is put around it."""
    settings = minmo.Settings(seed, temperature, top_k, top_p, max_text_tokens=max_text_tokens, speak=False)
    numbers = dtype_of(dtype) or torch.float32
    chat = open_chat(folder, system=system, max_positions=max_positions, device=pick_device(device), dtype=numbers)
    if prompt is not None:
        _type(chat.say(prompt, settings))
        return
    while True:
        try:
            typed = input("> ")
        except EOFError:
            print()
            return
        if typed.strip():
            _type(chat.say(typed, settings))


def _type(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def say(
    text: Annotated[str, typer.Argument(help="What to say.")],
    output: Output = Path("speech.wav"),
    preset: Preset = "nano",
    instruction: Instruction = None,
    seed: Seed = 0,
    voice_temperature: VoiceTemperature = 1.0,
    voice_top_p: VoiceTopP = 0.8,
    voice_top_k: VoiceTopK = 25,
    max_speech_ratio: MaxSpeech = 20,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Reads text aloud into a sound file."""
    settings = minmo.Settings(
        seed, voice_temperature=voice_temperature, voice_top_k=voice_top_k, voice_top_p=voice_top_p,
        max_speech_ratio=max_speech_ratio,
    )  # fmt: skip
    if output is not None:
        minmo.audio.check_output(output)
    model = _load(preset, device, dtype)
    reply = minmo.say(model, text, settings, instruction=_given(instruction, READ_ALOUD))
    _finish(model, reply, output, reply.timings)


@app.command()
def info(
    preset: Annotated[str, typer.Argument(help="A preset, or a checkpoint directory.")] = "nano",
    rows: Annotated[int, typer.Option(min=0, help="Also the memory of a FastMinMo's state with so many rows.")] = 0,
    max_positions: Annotated[int, typer.Option(min=1, max=MOST_POSITIONS, help="LLM context of each.")] = MAX_POSITIONS,
    max_voice_positions: Annotated[
        int, typer.Option(min=1, max=MOST_POSITIONS, help="Voice token LM context.")
    ] = MAX_VOICE_POSITIONS,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file's sha256 with the manifest's.")] = False,
) -> None:
    """Parameters of every module beside the paper's Table 1, the memory of a session's states, where weights are from.

    Also for a folder that minmo import wrote."""
    name = escape(preset)
    if verify:
        count = manifest.verify(Path(preset))
        out.print(f"{count} files of {preset} are as they were written", highlight=False, markup=False, soft_wrap=True)
    if show_parts(Path(preset)):
        return
    if rows:
        title = f"{name}: memory of {rows} rows, {max_positions} positions, {max_voice_positions} of speech"
        table = Table("state", "fp32: bytes", "bf16: bytes", title=title)
        for part, wide, narrow in engine_rows(preset, rows, max_positions, max_voice_positions):
            table.add_row(part, f"{wide:,}", f"{narrow:,}")
        out.print(table)
        return
    table = Table("module", "what", "parameters", "paper (quoted)", title=f"{name}: parameters")
    for module, what, count, paper in info_rows(preset):
        table.add_row(module, what, f"{count:,}", paper)
    out.print(table)
    table = Table("state", "what it holds", "bytes a session", title=f"{name}: memory of one session, float32")
    for part, what, size in state_rows(preset):
        table.add_row(part, what, f"{size:,}")
    out.print(table)
    show_origins(Path(preset))


@app.command()
def profile(
    preset: Annotated[str, typer.Option(help="A preset, or a checkpoint directory: its sizes.")] = "nano",
    part: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(STEPS)}; repeat for more (all).")] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, max=MOST_POSITIONS, help="Positions in the caches; repeat for more.")
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(min=1, max=MOST_ROWS, help="Sessions in a step; repeat for more.")
    ] = None,
    weights: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(WEIGHTS)}; repeat for more.")] = None,
    tokens: Annotated[
        int, typer.Option(min=10, max=1_000_000, help="Tokens that are counted, after the warm-up.")
    ] = 60,
    threads: Annotated[int, typer.Option(min=0, help="Threads of a CPU; 0 = PyTorch's choice.")] = 0,
    backend: Annotated[str | None, typer.Option(help="Force one backend of the operations.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A folder for profile.json and plots.")] = None,
    device: Device = None,
) -> None:
    """Per-token latency of every step of the engine, beside what the memory's bandwidth allows."""
    where = pick_device(device)
    gpu = where.type == "cuda"
    backends = sorted({b.name for op in OPS.values() for b in op.backends})
    for name, given, known in (
        ("part", part, list(STEPS)),
        ("weights", weights, list(WEIGHTS)),
        ("backend", [backend] if backend else None, backends),
    ):
        if unknown := set(given or ()) - set(known):
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if output is not None:  # now, not after everything has been measured
        measuring.figures()
        _check_folder(output)
    if threads:
        torch.set_num_threads(threads)
    lines: list[measuring.Measured] = []
    machine = {"machine": doctor_report.machine(where), "threads": torch.get_num_threads(), "torch": torch.__version__}
    out.print(", ".join(f"{k} {v}" for k, v in machine.items()), highlight=False, soft_wrap=True)
    out.print(f"{escape(preset)}: random weights, as no step's time depends on what they say", highlight=False)
    for form in weights or (["bf16"] if gpu else ["fp32", "int8"]):
        found = measuring.profile(
            load_config(preset), part or list(STEPS), weights=form, device=where, tokens=tokens, backend=backend,
            contexts=context or ([128, 512, 2048, 8192] if gpu else [128, 1024]),
            rows=rows or ([1, 2, 4, 8, 16, 32, 64] if gpu else [1, 4]),
        )  # fmt: skip
        for line in found:
            if isinstance(line, str):
                err.print(f"not measured: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
                continue
            lines.append(line)
            if output is not None:  # as it comes: what was measured outlives an interruption
                (output / "profile.json").write_text(json.dumps(measuring.as_json(lines, machine), indent=1) + "\n")
            err.print(
                f"{line.step} {line.weights} {line.rows} x {line.context}: {1e3 * line.p50:.2f} ms", highlight=False
            )
    if not lines:
        raise ValueError("nothing was measured; the lines above say why")
    joules = any(m.energy is not None for m in lines)
    columns = ("step", "weights", "rows", "context", "p50 ms", "p95", "p99", "first", "floor", "%", "a second")
    table = Table(*columns, *(["J"] if joules else []), title=f"{escape(preset)}: latency of a unit", padding=(0, 0))
    for m in lines:
        ms = [f"{1e3 * seconds:#.3g}" for seconds in (m.p50, m.p95, m.p99, m.first, m.floor)]
        energy = [] if m.energy is None else [f"{m.energy:.3g}"]
        share = f"{100 * m.floor / m.p50:.0f}"
        table.add_row(m.step, m.weights, str(m.rows), str(m.context), *ms, share, f"{m.rate:.0f}", *energy)
    out.print(table)
    for name, unit in {m.step: m.unit for m in lines}.items():
        out.print(f"{name}: a unit is {unit}", highlight=False)
    out.print(
        f"floor: its weights and context, read once, at the {lines[0].bandwidth / 1e9:.1f} GB/s of a plain copy in "
        "this run; %: of that reached; first: the first call of a line (its sizes are new, the weights are not); a "
        f"second: units of all rows; at least {tokens} units and {measuring.FEWEST} calls are counted, after a "
        "warm-up; percentiles are of calls, so of whole blocks where a unit is a part of one. Steps without a context "
        "(encoder, flow, vocoder) run once for each number of rows",
        highlight=False,
    )
    if output is not None:
        title = f"{preset}, {machine['machine']}"
        for path in (output / "profile.json", *measuring.plot(lines, title, output)):
            out.print(f"written: {path}", highlight=False, markup=False, soft_wrap=True)


def _check_folder(folder: Path) -> None:
    """Raises ValueError where nothing can be written into a folder, which is made where it is not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").write_text("{}\n")
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}; give -o a folder that can be written") from None


@app.command()
def export(
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder that is not there yet.")],
    preset: Annotated[str, typer.Argument(help="A preset, or a checkpoint directory.")] = "nano",
    dtype: Dtype = "float16",
) -> None:
    """Writes a model in another dtype: config.json, model.safetensors, tokenizer.json."""
    if output.exists():
        raise ValueError(f"{output} is there already: name a new folder, so that no model is overwritten")
    model = minmo.load(preset, "cpu", dtype)
    if not model.trained:
        raise ValueError(f"{preset} has {model.provenance}: there is nothing to export")
    part = output.with_name(f"{output.name}.tmp")
    minmo.save(model, part)
    part.rename(output)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    out.print(f"written: {output} ({size:.1f} MB, {model.provenance})", highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Versions, devices, and backends with their reasons: what a bug report needs."""
    print(doctor_report.report())


def _run(
    turn: str,
    output: Path | None,
    preset: str,
    settings: minmo.Settings,
    instruction: str,
    device: str | None,
    dtype: str,
    realtime: bool = False,
    repeat: int = 1,
    words: bool = True,
) -> None:
    """One turn (or several of the same), printed as it comes."""
    heard = _input(turn, words)
    if output is not None:
        _check_target(turn, output)
    model = _load(preset, device, dtype)
    timings = minmo.conversation.Timings()
    if not isinstance(heard, str) and (delay := minmo.audio.resampling_delay_ms(turn)):
        timings.add(RESAMPLER, delay / 1e3)

    def show(pieces: list[Piece]) -> None:
        print(pieces[0].text, end="", flush=True)

    for _ in range(repeat):
        print("reply: ", end="", flush=True)
        reply = verbs.talk(model, heard, settings, instruction=instruction, realtime=realtime, on_pieces=show)
        print()
        timings.merge(reply.timings)
    _finish(model, reply, output, timings)


def _check_target(turn: str, output: Path) -> Path:
    """The file to write. Raises ValueError where the reply would be written over its input."""
    file = minmo.audio.check_output(output)
    if output.exists() and os.path.exists(turn) and output.samefile(turn):
        raise ValueError(f"{output} is the input; write the reply to another file")
    return file


def _input(turn: str, words: bool) -> np.ndarray | str:
    """A sound file's samples; with `words`, anything that does not look like a file is the turn itself."""
    named_like_one = PurePath(turn).suffix.lower() in minmo.audio.SUFFIXES and len(turn.split()) == 1
    if words and not named_like_one and not os.path.isfile(turn):
        return turn
    samples = minmo.load_audio(turn)
    for concern in minmo.audio.concerns(samples):
        err.print(f"minmo: {turn}: {concern}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return samples


def _given(instruction: str | None, default: str) -> str:
    return default if instruction is None else instruction


def _load(preset: str, device: str | None, dtype: str) -> minmo.MinMo:
    model = minmo.load(preset, device, dtype)
    if not model.trained:
        out.print(
            f"[bold yellow]UNTRAINED:[/] {escape(model.config.name)} has {escape(model.provenance)}. "
            "Its text and sound mean nothing; only the machinery and its speed are real."
        )
        return model
    for concern in concerns(model.origins):
        err.print(f"minmo: {preset}: {concern}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return model


def _finish(model: minmo.MinMo, reply: minmo.Reply, output: Path | None, timings: minmo.conversation.Timings) -> None:
    if output is not None:
        minmo.save_audio(output, reply.audio, reply.sample_rate)
        seconds = len(reply.audio) / reply.sample_rate
        out.print(f"sound: {seconds:.2f} s at {reply.sample_rate} Hz -> {output}", markup=False, soft_wrap=True)
    table = Table("stage", "n", "p50 ms", "p95 ms", title="latency (compute, first run cold)")
    for stage, count, p50, p95 in timings.table():
        table.add_row(stage, str(count), f"{p50:.1f}", f"{p95:.1f}")
    out.print(table)
    served = ", ".join(f"{op}: {'/'.join(names)}" for op, names in backends_in_use().items())
    out.print(f"machine: {doctor_report.machine(model.device)}", highlight=False, soft_wrap=True)
    weights = f"weights: {model.config.name}, {model.provenance}, {str(model.dtype)[6:]}"
    out.print(weights, highlight=False, markup=False, soft_wrap=True)
    out.print(f"backend: {served}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point."""
    console.run(app)


if __name__ == "__main__":
    main()
