"""`python -m fastddpm.kernels.report`: its output, its exit codes and its bounds."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from fastddpm.kernels import report
from fastddpm.kernels.aot import VARIANTS, measure

KEYS = ["kernel", "variant", "target", "sass_per_element", "registers", "spill_bytes", "shared_bytes", "vector_bits"]
KEYS += ["bytes_per_element"]


@pytest.fixture
def few(monkeypatch):
    """Only three variants, for tests of the report itself."""
    monkeypatch.setattr(report, "VARIANTS", VARIANTS[:3])


def check_json(text, variants):
    rows = json.loads(text)
    assert len(rows) == len(variants)
    assert all(list(row) == KEYS for row in rows)
    assert {row["target"] for row in rows} == {"sm_90"}
    assert all(value is not None for row in rows for value in row.values())


def test_json(few, capsys):
    assert report.main(["--json", "--target", "sm_90"]) == 0
    check_json(capsys.readouterr().out, VARIANTS[:3])


@pytest.mark.slow
def test_json_as_a_program():
    command = [sys.executable, "-m", "fastddpm.kernels.report", "--json", "--target", "sm_90"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    check_json(run.stdout, VARIANTS)


def test_table_says_that_its_times_are_bounds(few, capsys):
    assert report.main(["--target", "sm_90", "--bandwidth", "2", "--elements", "1000000"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "bounds for 1,000,000 elements at 2 TB/s" in printed
    assert "not measurements" in printed
    assert "All static bars are met." in printed


@pytest.mark.parametrize(("option", "rows"), [([], 1), (["--all"], 3)], ids=["README's variants", "all"])
def test_the_table_is_short_and_narrow(few, capsys, option, rows):
    assert report.main(["--target", "sm_90", *option]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.lstrip().startswith("p_sample") for line in lines) == rows
    assert max(map(len, lines)) <= 100
    assert ("--all shows the other variants." in lines[-1]) == (rows == 1)


def test_the_rows_are_in_order(few):
    pairs = report.measure_all(VARIANTS[:2], ["sm_90", "sm_80"])
    assert [(variant.dtype, row.variant, row.target) for variant, row in pairs] == [
        (variant.dtype, variant.name, target) for target in ("sm_90", "sm_80") for variant in VARIANTS[:2]
    ]


def test_bounds():
    row = replace(measure(VARIANTS[0], "sm_90"), bytes_per_element=10.0, sass_per_element=40.0)
    assert report.bound_microseconds(row, 3_000_000, 3.0, 30.0) == pytest.approx((10.0, 4.0))


def test_a_missed_bar_fails_the_program(few, monkeypatch, capsys):
    real = report.measure
    monkeypatch.setattr(report, "measure", lambda variant, target: replace(real(variant, target), spill_bytes=4))
    assert report.main(["--json", "--target", "sm_90"]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 3
    assert err.count("spill_bytes must be at most 0, got 4") == 3


def test_without_a_compiler_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("fastddpm.kernels.aot.HAS_TRITON", False)
    assert report.main(["--target", "sm_90"]) == 2
    assert (
        capsys.readouterr().err
        == "measure: triton must be able to compile, but it is not installed; pip install triton\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_91"], "invalid choice: 'sm_91'"),
        (["--elements", "0"], "must be a whole number of at least 1, got 0"),
        (["--bandwidth", "nan"], "must be a number above 0, got nan"),
        (["--bandwidth", "-1"], "must be a number above 0, got -1"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
