"""Whose a VM's name in a store is, for every kind of life that the store may tell of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcres.model.ownership import (
    Claimant,
    Life,
    Standing,
    files_refusal,
    judge,
    judge_files,
    refusal,
)

ME = Claimant("mine", "h0", "this machine", "this boot")
THEIRS = Claimant("theirs", "h7", "that machine", "that boot")


def life(owner: Claimant = THEIRS, generation: int = 3, held: bool = False) -> Life:
    return Life(generation, owner, "2026-01-01T00:00:00Z", held)


@pytest.mark.parametrize(
    ("lives", "standing"),
    [
        ([], Standing.FREE),
        ([life(ME)], Standing.OURS),
        ([life(ME, held=True)], Standing.OURS),
        ([life(replace(THEIRS, cluster="mine"))], Standing.OURS),
        ([life()], Standing.UNCERTAIN),
        ([life(replace(THEIRS, boot="this boot"))], Standing.ENDED),
        ([life(replace(THEIRS, machine="this machine"))], Standing.ENDED),
        ([life(held=True)], Standing.ALIVE),
        ([life(replace(THEIRS, boot="this boot"), held=True)], Standing.ALIVE),
        # A life that was cut off, and one that came after it: both count.
        ([life(generation=3, held=True), life(ME, 4)], Standing.ALIVE),
        ([life(ME, 3, held=True), life(replace(THEIRS, boot="this boot"), 4)], Standing.ENDED),
        ([life(ME, 3), life(generation=4)], Standing.UNCERTAIN),
        ([life(generation=3), life(ME, 4)], Standing.OURS),
        ([life(Claimant("", "", "", ""))], Standing.UNCERTAIN),
    ],
)
def test_standing(lives: list[Life], standing: Standing) -> None:
    assert judge(lives, ME)[0] is standing
    assert judge(list(reversed(lives)), ME)[0] is standing
    refused = bool(refusal("box", lives, ME, take_over=False))
    assert refused == (standing in (Standing.ALIVE, Standing.UNCERTAIN))
    assert bool(refusal("box", lives, ME, take_over=True)) == (standing is Standing.ALIVE)


def test_what_is_not_known_proves_nothing() -> None:
    """A machine without an id, and one like it elsewhere."""
    nameless = replace(ME, machine="", boot="")
    assert judge([life(replace(THEIRS, machine="", boot=""))], nameless)[0] is Standing.UNCERTAIN
    of_nobody = replace(ME, cluster="")
    assert judge([life(replace(THEIRS, cluster=""))], of_nobody)[0] is Standing.UNCERTAIN


def test_the_refusal_names_who_has_it_and_the_remedy() -> None:
    alive = refusal("box", [life(held=True)], ME, take_over=True)
    assert "h7 since 2026-01-01T00:00:00Z" in alive
    assert "take-over" not in alive
    assert "--take-over" in refusal("box", [life()], ME, take_over=False)


NOBODY = Claimant("", "", "", "")


@pytest.mark.parametrize(
    ("kept", "standing"),
    [
        (life(ME), Standing.OURS),
        (life(ME, held=True), Standing.OURS),
        (life(replace(THEIRS, cluster="mine"), held=True), Standing.OURS),
        (life(NOBODY), Standing.OURS),  # an earlier dcres's
        (life(NOBODY, held=True), Standing.ALIVE),  # somebody is just taking it
        (life(), Standing.UNCERTAIN),
        (life(replace(THEIRS, boot="this boot")), Standing.ENDED),
        (life(replace(THEIRS, machine="this machine")), Standing.ENDED),
        (life(replace(THEIRS, machine="", boot="")), Standing.UNCERTAIN),
        (life(held=True), Standing.ALIVE),
        (life(replace(THEIRS, boot="this boot"), held=True), Standing.ALIVE),
        (life(replace(THEIRS, machine="this machine"), held=True), Standing.ALIVE),
    ],
)
@pytest.mark.parametrize("take_over", [False, True])
def test_files(kept: Life, standing: Standing, take_over: bool) -> None:
    assert judge_files(kept, ME) is standing
    why = files_refusal("box", "/run/box (DCRES_RUN)", "DCRES_RUN", kept, ME, take_over)
    refused = standing is Standing.ALIVE or (standing is Standing.UNCERTAIN and not take_over)
    assert bool(why) == refused
    if why:
        assert f"host {kept.owner.host or 'h0'} since 2026" in why
        assert "files in /run/box (DCRES_RUN)" in why
        assert "another DCRES_RUN" in why
        assert "`dcres stop box`" in why
        assert ("--take-over" in why) == (standing is Standing.UNCERTAIN)


def test_files_for_one_whose_cluster_is_not_known() -> None:
    of_nobody = replace(ME, cluster="")
    assert judge_files(life(NOBODY, held=True), of_nobody) is Standing.OURS
    assert judge_files(life(held=True), of_nobody) is Standing.ALIVE
    assert judge_files(life(), of_nobody) is Standing.UNCERTAIN
