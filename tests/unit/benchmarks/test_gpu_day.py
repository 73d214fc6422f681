"""What benchmarks/gpu_day.sh leaves, also of parts that a time limit has cut off."""

import json
import os
import subprocess

from repository import ROOT

from benchmarks.gpu_parts import report


def test_numbers_of_a_part_that_was_cut_off_are_kept_and_it_is_named(tmp_path):
    (tmp_path / "parts.tsv").write_text(
        "rates\t0\t3\t30\ndecode\t124\t60\t60\ntests-engine\t1\t9\t60\nsmoke\t0\t7\t40\n"
    )
    (tmp_path / "decode.log").write_text('noise\nRESULT {"slots": 64, "step_ms": 1.5}\nRESULT {"slots": 256, "st')
    (tmp_path / "tests-engine.log").write_text("PASSED tests/gpu/a.py::b\nFAILED tests/gpu/a.py::c - AssertionError\n")
    (tmp_path / "smoke.log").write_text("memory of each rank: 0.5 GiB at most, while updating (weights 0.2)\n")
    (tmp_path / "smoke" / "run").mkdir(parents=True)
    (tmp_path / "smoke" / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "memory/peak_gib": 0.4}) + "\n")
    found = report(tmp_path)
    assert [(p["name"], p["exit_code"], p["in_time"]) for p in found["parts"]] == [
        ("rates", 0, True), ("decode", 124, False), ("tests-engine", 1, True), ("smoke", 0, True)]  # fmt: skip
    assert found["results"] == {"decode": [{"slots": 64, "step_ms": 1.5}]}
    assert found["tests"]["tests-engine"] == {"tests/gpu/a.py::b": "PASSED", "tests/gpu/a.py::c": "FAILED"}
    assert found["runs"]["smoke"] == {"steps": [{"step": 1, "memory/peak_gib": 0.4}], "forecast_gib": 0.5}


def parts(folder, **environment):
    """Run the script with another program in the place of python -> exit codes of its parts."""
    command = ["bash", "benchmarks/gpu_day.sh", folder]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, timeout=60)
    return [line.split("\t")[1] for line in (folder / "parts.tsv").read_text().splitlines()]


def test_nothing_stops_what_follows_and_nothing_begins_when_no_time_is_left(tmp_path):
    failed, late = parts(tmp_path, PYTHON="false"), parts(tmp_path, PYTHON="true", TOTAL="0")
    assert len(failed) == len(late) >= 14 and set(failed) == {"1"} and set(late) == {"125"}
