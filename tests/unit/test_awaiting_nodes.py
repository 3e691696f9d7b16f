"""What is said while Ray's nodes start, and of one that has ended."""

from __future__ import annotations

import pytest

from dcres.actors.ray.awaiting_nodes import last_words, waiting_for

TRACEBACK = """\
2026-12-01 21:30:08,296	INFO scripts.py:1043 -- Local node IP: 127.92.79.1
Traceback (most recent call last):
  File "/usr/lib/python3.11/site-packages/ray/_private/node.py", line 420, in __init__
    raise Exception(
          ^^^^^^^^^^
Exception: The current node timed out during startup.
"""
RAYLET = """\
[2026-12-01 21:30:08,296 I 77 77] (raylet) main.cc:226: Setting cluster ID
[2026-12-01 21:30:09,296 E 77 77] (raylet) agent.cc:12: One Ray agent failed
[2026-12-01 21:30:09,297 I 77 77] (raylet) main.cc:400: Shutting down
"""
REMARKS = "2026-12-01 21:30:08,296	INFO scripts.py:1043 -- Local node IP: 127.92.79.1\n"


@pytest.mark.parametrize(
    ("names", "load", "sentence"),
    [
        (
            ["h1"],
            31.2,
            "waiting for Ray's node h1, 40 s so far; the machine is busy (load 31 on 2 processors)",
        ),
        (
            ["head", "h0", "h1"],
            0.4,
            "waiting for Ray's nodes head, h0 and h1, 40 s so far; "
            "the machine is not busy (load 0 on 2 processors)",
        ),
    ],
)
def test_what_is_waited_for(names: list[str], load: float, sentence: str) -> None:
    assert waiting_for(names, 40.4, load, 2) == sentence


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        ([TRACEBACK], "Exception: The current node timed out during startup."),
        (
            [REMARKS, RAYLET],
            "[2026-12-01 21:30:09,296 E 77 77] (raylet) agent.cc:12: One Ray agent failed",
        ),
        ([REMARKS + "Killed\n"], "Killed"),
        ([REMARKS], "none of its logs says why"),
        (["", "\n"], "none of its logs says why"),
    ],
)
def test_the_last_words_of_a_node(logs: list[str], words: str) -> None:
    assert last_words(*logs) == words
