"""A placement for people: the map in the terminal, the figure, notebooks."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from dcres.api.placement import HOST_COLORS, Placement, heat, host_color
from dcres.api.vm import Vm
from dcres.cli.memory_map import MOST_LINES, MemoryMap
from dcres.errors import ConfigError, UnsupportedHost
from tests.support.placement import placement

ROOT = Path(__file__).parents[2]
STRETCHES = b"m" * 64 + b"a" * 64 + b"." * 64 + b"b" * 32 + b"~" * 32


def lines(shown: Placement, width: int = 80) -> list[str]:
    text = StringIO()
    Console(file=text, width=width, color_system=None).print(MemoryMap(shown))
    return text.getvalue().splitlines()


def colored(shown: Placement, *, no_color: bool = False) -> str:
    text = StringIO()
    console = Console(
        file=text, width=80, force_terminal=True, color_system="truecolor", no_color=no_color
    )
    console.print(MemoryMap(shown))
    return text.getvalue()


def escape(color: str) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"38;2;{red};{green};{blue}m"


class TestMap:
    def test_letters_without_colors(self) -> None:
        assert lines(placement(STRETCHES, age_s=60)) == [
            "      0 " + "m" * 64,
            "256 KiB " + "a" * 64,
            "512 KiB " + "·" * 64,
            "768 KiB " + "b" * 32 + "~" * 32,
            "m h0 (main) 256 KiB   a h1 256 KiB   b h2 128 KiB   ~ not yet brought 128 KiB",
            "· never touched 256 KiB",
            "a capital: last touched within 10 s; a cell is 4 KiB",
        ]

    def test_capitals_are_hot(self) -> None:
        assert lines(placement(b"maab", age_s=1))[0].strip() == "0 MAAB"

    def test_most_of_a_cell_decides_unless_it_is_nothing(self) -> None:
        first, *_ = lines(placement(b"mmabaaam...b...." * 1, 60, buckets=4))
        assert first.split() == ["0", "mab·"]

    @pytest.mark.parametrize("width", [20, 40, 80, 100, 160, 400])
    @pytest.mark.parametrize("page_count", [1, 100, 5000, 100_000])
    def test_any_width_and_size(self, width: int, page_count: int) -> None:
        found = lines(placement(b"m" * page_count), width)
        rows = [line for line in found if "M" in line and "MiB" not in line.split()[-1]]
        assert 1 <= len(rows) <= MOST_LINES
        assert all(len(line) <= width for line in found)

    def test_colors_and_shades(self) -> None:
        for age_s, shade in ((0.5, "█"), (5, "▓"), (50, "▒"), (500, "░")):
            text = colored(placement(STRETCHES, age_s))
            assert f"{escape(HOST_COLORS[0])}{shade * 64}" in text
            assert f"{escape(HOST_COLORS[2])}{shade * 32}" in text
        assert "M" * 8 not in text

    def test_no_color_means_letters(self) -> None:
        assert "M" * 64 in colored(placement(STRETCHES), no_color=True)

    def test_many_hosts_take_turns_but_the_main_hosts_color_is_its_own(self) -> None:
        colors = [host_color(index) for index in range(200)]
        assert set(colors) == set(HOST_COLORS)
        assert colors.count(HOST_COLORS[0]) == 1


def pixels(path: Path) -> npt.NDArray[np.float64]:
    from matplotlib.image import imread

    image: npt.NDArray[np.float64] = imread(path)[:, :, :3]
    return image


def count(image: npt.NDArray[np.float64], color: str) -> int:
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return int((np.abs(image - wanted).max(axis=2) < 0.01).sum())


class TestFigure:
    def test_png_shows_every_host_in_its_place(self, tmp_path: Path) -> None:
        placement(STRETCHES).save(tmp_path / "box.png")
        image = pixels(tmp_path / "box.png")
        main, a, b = (count(image, host_color(index)) for index in range(3))
        assert min(main, a, b) > 10_000
        assert main == pytest.approx(a, rel=0.05)
        assert main == pytest.approx(2 * b, rel=0.1), "half as much memory"
        left, right = np.hsplit(image, [image.shape[1] // 2])
        assert count(left, HOST_COLORS[2]) < 2000 < count(right, HOST_COLORS[2])

    def test_cold_is_pale(self, tmp_path: Path) -> None:
        placement(STRETCHES, age_s=10_000).save(tmp_path / "box.png")
        assert count(pixels(tmp_path / "box.png"), HOST_COLORS[1]) < 2000, "only its mark"

    def test_svg(self, tmp_path: Path) -> None:
        placement(STRETCHES).save(str(tmp_path / "box.SVG"))
        text = (tmp_path / "box.SVG").read_text()
        assert text.count("<image") == 5, "four lanes and the scale"
        assert len(text) < 300_000

    def test_words(self) -> None:
        axes = placement(STRETCHES).figure().axes[0]
        titles = [axes.get_title(loc) for loc in ("left", "right")]
        assert titles == [
            "Memory of VM box",
            "768 KiB of 1 MiB in use  ·  2026-01-02 03:04:05 UTC",
        ]
        words = [text.get_text() for text in axes.texts]
        assert words == [
            *("h0", "main host", "256 KiB"),
            *("h1", "sub host", "256 KiB"),
            *("h2", "sub host", "128 KiB"),
            *("not yet brought", "128 KiB"),
        ]
        assert axes.get_xticklabels()[-1].get_text() == "1 MiB"

    def test_nothing_of_it_is_global(self) -> None:
        """In a process of its own: another test may have imported what is global."""
        script = (
            "import sys; from tests.support.placement import placement; placement(b'm').figure(); "
            "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
        )
        run = [sys.executable, "-c", script]
        done = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
        assert done.stdout.split() == ["True", "False"]

    @pytest.mark.parametrize(("letter", "shown"), [(b"m", True), (b".", False)])
    def test_one_page(self, tmp_path: Path, letter: bytes, shown: bool) -> None:
        placement(letter, 0.0).save(tmp_path / "box.png")
        image = pixels(tmp_path / "box.png")
        assert (count(image, host_color(0)) > 10_000) == shown

    def test_other_endings(self, tmp_path: Path) -> None:
        for name in ("box.pdf", "box"):
            with pytest.raises(ConfigError, match=r"\.png or \.svg"):
                placement(b"m").save(tmp_path / name)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot write .*nix/box\.png: No such file"):
            placement(b"m").save(tmp_path / "nix" / "box.png")

    def test_heat(self) -> None:
        assert heat(np.array([0.1, 1, 10, 1000, 1e9, np.nan])) == pytest.approx(
            [1, 1, 2 / 3, 0, 0, 0]
        )


class TestNotebook:
    def test_shows_the_figure(self) -> None:
        shown = placement(STRETCHES)
        assert "<svg" in str(shown._repr_svg_())
        assert shown._repr_html_().startswith("<svg")
        assert repr(shown) == (
            "<Placement of box: h0 256 KiB, h1 256 KiB, h2 128 KiB, not yet brought 128 KiB>"
        )

    def test_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        shown = placement(b"m")
        assert shown._repr_svg_() is None
        assert "&lt;Placement of box: h0 4 KiB&gt;" in shown._repr_html_()
        with pytest.raises(UnsupportedHost, match="pip install matplotlib"):
            shown.save(tmp_path / "box.png")

    def test_too_many_buckets(self) -> None:
        no_session: Any = None
        for buckets in (0, 4097):
            with pytest.raises(ConfigError, match="give 1 to 4096"):
                Vm(no_session, "box").placement(buckets)
