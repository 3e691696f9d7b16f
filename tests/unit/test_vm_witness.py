"""Reading the witness's console."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcres.vm.witness import WitnessReport, parse, read

CONSOLE = (
    "SeaBIOS (version 1.16.2)\r\n[    0.5] something WITNESS tick=\r\n"
    "WITNESS start\r\n"
    "WITNESS ready bytes=4194304 files=4\r\n"
    "WITNESS tick=1 checks=2 failures=0\r\n"
    "WITNESS tick=2 checks=3 failures=0\r\n"
)


def test_a_good_run() -> None:
    report = parse(CONSOLE)
    assert report == WitnessReport(ready_bytes=4194304, tick=2, checks=3, boots=1)
    assert report.ready


def test_nothing_yet() -> None:
    assert parse("") == WitnessReport()
    assert not parse("WITNESS start\r\nWITNESS ready bytes=41").ready


@pytest.mark.parametrize("cut", ["W", "WITNESS tick=3", "WITNESS tick=3 checks=55 failures=1"])
def test_a_line_that_is_not_complete_does_not_count(cut: str) -> None:
    assert parse(CONSOLE + cut) == parse(CONSOLE)


def test_every_cut_of_the_text_is_read_without_harm() -> None:
    for length in range(len(CONSOLE)):
        report = parse(CONSOLE[:length])
        assert report.tick <= 2
        assert report.ready_bytes in (None, 4194304)


def test_noise_in_a_line_hides_that_line_only() -> None:
    noisy = CONSOLE + "WITNESS tick=3 che[  9.1] noise\r\nWITNESS tick=4 checks=6 failures=0\r\n"
    report = parse(noisy)
    assert (report.tick, report.checks, report.ticks_lost) == (4, 6, 1)


def test_failures() -> None:
    words = "file=3 generation=2 expected=aa got=bb"
    report = parse(f"{CONSOLE}WITNESS FAILURE {words}\r\nWITNESS tick=3 checks=4 failures=1\r\n")
    assert (report.failures, report.failed) == (1, (words,))


def test_a_restore_goes_back_and_loses_nothing() -> None:
    assert parse(CONSOLE + "WITNESS tick=2 checks=3 failures=0\r\n").ticks_lost == 0
    assert parse(CONSOLE + "WITNESS tick=1 checks=2 failures=0\r\n").ticks_lost == 0


def test_a_second_boot_is_noticed() -> None:
    assert parse(CONSOLE + CONSOLE).boots == 2


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    assert read(console) == WitnessReport()
    console.write_bytes(b"\xff\xfe\x00" + CONSOLE.encode())
    assert read(console).tick == 2
