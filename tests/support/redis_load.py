"""A database that numbers its own writes, the clients that load it, and what they have seen.

Every write goes through one script, which Redis runs as a whole or not at all: it counts the
write, does it, and continues a chain of digests over all writes. So a database tells by itself
which writes are in it: those numbered 1 … n; and the digest that Redis reported for n says
whether they are the same ones, in the same order.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support.redis_guest import Redis, RedisError
from tests.support.speed import patience
from tests.support.wait import until

REPEATS = 200  # of a token of 40 characters: a key holds 8000 bytes
NOBODY = -1  # in the place of a client: the writes that filled the database
_SCRIPT = f"""
local n = redis.call('INCR', 'n')
local chain = redis.call('GET', 'chain') or ''
if ARGV[1] == 'set' then
    redis.call('SET', KEYS[1], string.rep(ARGV[2], {REPEATS}))
else
    redis.call('INCRBY', KEYS[1], ARGV[2])
end
chain = redis.sha1hex(chain .. ' ' .. n .. ' ' .. ARGV[1] .. ' ' .. KEYS[1] .. ' ' .. ARGV[2])
redis.call('SET', 'chain', chain)
return {{n, chain}}
"""
_SHA = hashlib.sha1(_SCRIPT.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Command:
    """A write before it has a number: ``set KEY TOKEN`` or ``add KEY AMOUNT``."""

    do: str
    key: str
    value: str

    @property
    def request(self) -> tuple[str | int, ...]:
        return ("EVALSHA", _SHA, 1, self.key, self.do, self.value)


@dataclass(frozen=True, slots=True)
class Write:
    """A write that Redis has acknowledged with its number and the chain up to it.

    `client` is the seed of the client that wrote. Times are this machine's monotonic clock, in
    seconds.
    """

    number: int
    chain: str
    command: Command
    client: int
    sent_s: float
    acked_s: float


@dataclass(frozen=True, slots=True)
class Trip:
    """One request and its answer, of whatever kind."""

    sent_s: float
    acked_s: float

    @property
    def seconds(self) -> float:
        return self.acked_s - self.sent_s

    def touches(self, began_s: float, ended_s: float) -> bool:
        """Whether it was under way at any time between the two."""
        return self.sent_s < ended_s and self.acked_s > began_s


def prepare(redis: Redis) -> None:
    """Teach the script to an empty Redis."""
    assert redis.call("SCRIPT", "LOAD", _SCRIPT) == _SHA


@dataclass(frozen=True, slots=True)
class State:
    """A database at one moment: its last write, the chain up to it, Redis's digest of all."""

    number: int
    chain: str
    digest: str


def state_of(redis: Redis) -> State:
    """What the database holds now."""
    # Sent in one go: Redis serves no other connection in between.
    (number, chain), digest = redis.calls([("MGET", "n", "chain"), ("DEBUG", "DIGEST")])
    return State(int(number), chain, digest)


def write_all(redis: Redis, commands: Sequence[Command], batch: int = 64) -> list[Write]:
    """Many writes, several on their way at a time."""
    done: list[Write] = []
    for first in range(0, len(commands), batch):
        some = commands[first : first + batch]
        sent = time.monotonic()
        replies = redis.calls([command.request for command in some])
        acked = time.monotonic()
        done += [
            Write(number, chain, command, NOBODY, sent, acked)
            for (number, chain), command in zip(replies, some, strict=True)
        ]
    return done


def token(rng: random.Random) -> str:
    return f"{rng.getrandbits(160):040x}"


def chain_of(commands: Iterable[Command], chain: str = "", after: int = 0) -> str:
    """What the chain must be after `commands`, computed here.

    `chain` is the one up to the write numbered `after`, which came before them.
    """
    for number, command in enumerate(commands, start=after + 1):
        text = f"{chain} {number} {command.do} {command.key} {command.value}"
        chain = hashlib.sha1(text.encode()).hexdigest()
    return chain


def commands_of(writes: Iterable[Write]) -> list[Command]:
    return [write.command for write in writes]


def value_after(command: Command, before: str | None) -> str:
    """What the command's key holds after it."""
    if command.do == "set":
        return command.value * REPEATS
    return str(int(before or 0) + int(command.value))


def values_after(commands: Iterable[Command]) -> dict[str, str]:
    """Key → what it holds after `commands`, the first of which went to an empty database."""
    values: dict[str, str] = {}
    for command in commands:
        values[command.key] = value_after(command, values.get(command.key))
    return values


class Client:
    """One connection that reads and writes without a pause, in a thread.

    No other client writes its keys, so it knows what each must hold and compares what it reads.
    """

    def __init__(
        self, address: tuple[str, int], keys: Sequence[str], values: dict[str, str], seed: int
    ) -> None:
        self.trips: list[Trip] = []
        self.writes: list[Write] = []
        self.failure = ""
        self._keys = keys
        self._counters = [f"{keys[0]}-count-{number}" for number in range(50)]
        own = {*keys, *self._counters}
        self._values = {key: value for key, value in values.items() if key in own}
        self._seed = seed
        self._rng = random.Random(seed)
        self._redis = Redis(address)
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"client-{seed}", daemon=True)

    @property
    def thread(self) -> int:
        """What gettid(2) says in the client's thread; it has started."""
        assert self._thread.native_id is not None
        return self._thread.native_id

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the request under way, then leave."""
        self._unwanted.set()
        self._thread.join(patience(60))
        self._redis.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._unwanted.is_set():
                self._act()
        except (OSError, RedisError, AssertionError) as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _act(self) -> None:
        dice, rng = self._rng.random(), self._rng
        if dice < 0.5:
            self._read(rng.choice(self._keys))
        elif dice < 0.9:
            self._write(Command("set", rng.choice(self._keys), token(rng)))
        else:
            self._write(Command("add", rng.choice(self._counters), str(rng.randint(1, 9))))

    def _read(self, key: str) -> None:
        sent = time.monotonic()
        found = self._redis.call("GET", key)
        self.trips.append(Trip(sent, time.monotonic()))
        assert found == self._values.get(key), f"{key} holds {found!r:.60}"

    def _write(self, command: Command) -> None:
        sent = time.monotonic()
        number, chain = self._redis.call(*command.request)
        acked = time.monotonic()
        self.trips.append(Trip(sent, acked))
        self.writes.append(Write(number, chain, command, self._seed, sent, acked))
        self._values[command.key] = value_after(command, self._values.get(command.key))


def work(clients: Sequence[Client], requests: int, timeout_s: float = 120.0) -> None:
    """Wait until every client has had answers to `requests` more."""
    wanted = [(client, len(client.trips) + requests) for client in clients]

    def done() -> bool:
        failures = [client.failure for client in clients if client.failure]
        assert not failures, failures
        return all(len(client.trips) >= count for client, count in wanted)

    until(done, timeout_s, f"{requests} answers to every client")


@contextmanager
def loading(
    address: tuple[str, int], shares: Sequence[Sequence[str]], values: dict[str, str], seed: int
) -> Iterator[list[Client]]:
    """A client for each share of the keys, at work until the ``with`` block ends."""
    clients = [Client(address, keys, values, seed + place) for place, keys in enumerate(shares)]
    try:
        for client in clients:
            client.start()
        yield clients
    finally:
        for client in clients:
            client.stop()
