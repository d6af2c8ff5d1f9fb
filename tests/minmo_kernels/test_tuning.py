"""Launch tables, and the tuner that rewrites them, with a clock that the test holds."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from minmo.config import load_config
from minmo.info import kernel_dims
from minmo_kernels import tuning
from minmo_kernels.launch import launches
from minmo_kernels.tuning import tune


def test_a_bucket_without_an_entry_is_an_error(monkeypatch):
    monkeypatch.setattr(tuning, "table", lambda sm: {"rms_norm": [[{"rows": 1}, {"BLOCK": 8}]]})
    assert tuning._config.__wrapped__("rms_norm", 90, rows=1) == {"BLOCK": 8}
    with pytest.raises(LookupError, match="no launch configuration of rms_norm for sm 90"):
        tuning._config.__wrapped__("rms_norm", 90, rows=2)


def test_a_newer_gpu_takes_the_newest_table():
    assert tuning.path_of(89).name == "sm80.json"
    assert tuning.path_of(100).name == "sm90.json"


def test_the_tuner_keeps_the_fastest_and_writes_it_first(tmp_path, monkeypatch):
    for path in tuning.FOLDER.glob("*.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)

    def clock(spec, case):
        """Wide tiles are fast; 16 warps do not work."""
        (record,) = launches(spec.function, {**spec.make(case)}, 90)
        if record.options["num_warps"] == 8:
            return None
        return 1.0 / record.constants["BLOCK_N"]

    parts = kernel_dims(load_config("nano"))
    found = tune.tuned(parts, 90, clock, ["linear_residual"], time.monotonic() + 1e6)
    assert found["linear_residual"]
    buckets = [bucket for bucket, _ in found["linear_residual"]]
    assert len(buckets) == len({json.dumps(b) for b in buckets})
    for bucket, values in found["linear_residual"]:
        before = tuning.config("linear_residual", 90, **bucket)
        assert values["BLOCK_N"] == 2 * before["BLOCK_N"]
        assert values["num_warps"] != 8
    assert tune.write(90, found, tuning.table(90), {"gpu": "none"}) == "sm90.json"
    written = json.loads((tmp_path / "sm90.json").read_text())
    assert written["linear_residual"][0] == list(found["linear_residual"][0])
    assert written["measured"] == {"gpu": "none"}
    assert written["append_kv"] == [list(e) for e in tuning.table(90)["append_kv"]]


def test_the_tuner_varies_each_phase_of_a_decode_step():
    values = tuning.config("decoder_step", 90, rows=1, bits=16, head=True)
    tried = list(tune.neighbours(values))
    moved = {name for one in tried for name in values if one[name] != values[name]}
    assert moved == set(values), "every number of the table"
    for name in tune.ALONE:
        changed = [one for one in tried if one[name] != values[name]]
        assert all(sum(one[k] != values[k] for k in values) == 1 for one in changed)
        assert {one[name] for one in changed} == {2 * values[name], values[name] // 2} - {0}


def test_the_tuner_goes_on_where_it_stopped():
    asked, finished = [], []

    def clock(spec, case):
        asked.append(json.dumps(case))
        return 1.0

    parts = kernel_dims(load_config("nano"))
    keep = lambda found, bucket: finished.append(bucket)  # noqa: E731
    tune.tuned(parts, 90, clock, ["sample_token"], time.monotonic() + 1e6, keep)
    assert finished
    assert asked
    asked.clear()
    tune.tuned(parts, 90, clock, ["sample_token"], time.monotonic() + 1e6, done=finished)
    assert asked == []


def test_without_time_nothing_changes():
    found = tune.tuned(kernel_dims(load_config("nano")), 90, lambda *_: 1.0, ["linear_residual"], 0.0)
    assert found == {}
