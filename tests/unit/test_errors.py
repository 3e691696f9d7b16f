"""Every error of dcres survives being sent to another process, and its tree is drawn right."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from dcres import errors
from dcres.errors import (
    ClusterError,
    DcresError,
    HostFailure,
    NoRoom,
    OperationFailed,
    VmLost,
    VmOff,
)
from tests.support.errors import ALL_ERRORS, example


@pytest.mark.parametrize("cls", ALL_ERRORS, ids=lambda cls: cls.__name__)
def test_pickling_keeps_type_arguments_and_text(cls: type[DcresError]) -> None:
    error = example(cls)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert copy.args == error.args
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("cls", ALL_ERRORS, ids=lambda cls: cls.__name__)
def test_the_constructor_takes_exactly_the_stored_arguments(cls: type[DcresError]) -> None:
    error = example(cls)
    assert cls(*error.args).args == error.args
    parameters = inspect.signature(cls.__init__).parameters.values()
    assert not [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def test_the_docstring_draws_the_tree() -> None:
    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│ ]*(?:[├└]── )?)([A-Z]\w+)\b", line)
        if match:
            drawn.append((len(match[1]) // 4, match[2]))
    parents = {}
    path: list[str] = []
    for depth, name in drawn:
        path = [*path[:depth], name]
        parents[name] = path[-2] if depth else "Exception"
    assert parents == {cls.__name__: cls.__bases__[0].__name__ for cls in ALL_ERRORS}


def test_a_failed_operation_says_which_host_failed_and_why() -> None:
    error = OperationFailed("the checkpoint failed", {"h1": "disk full", "h0": "gone"})
    assert str(error) == "the checkpoint failed (h0: gone; h1: disk full)"
    assert str(OperationFailed("the checkpoint failed", {})) == "the checkpoint failed"


@pytest.mark.parametrize("cls", ALL_ERRORS, ids=lambda cls: cls.__name__)
def test_a_host_and_a_class_survive_as_plain_values(cls: type[DcresError]) -> None:
    failure = HostFailure.of("h1", example(cls))
    copy = pickle.loads(pickle.dumps(failure.error))
    assert type(copy) is cls
    assert str(copy) == f"h1: {example(cls)}"
    assert copy.failed_on == (failure,)
    assert copy.to_dict()["failures"] == [
        {"host": "h1", "type": cls.__name__, "message": str(example(cls))}
    ]


def test_what_no_host_did_names_none() -> None:
    error = HostFailure.of("", NoRoom("no host has room")).error
    assert (type(error), str(error), error.failed_on) == (NoRoom, "no host has room", ())
    assert error.to_dict() == {"error": "NoRoom", "message": "no host has room"}


def test_a_failure_knows_what_it_is() -> None:
    off = HostFailure.of("h0", VmOff("it was told to end"))
    assert off.is_a(VmLost)
    assert not HostFailure.of("h0", VmLost("it is gone")).is_a(VmOff)
    foreign = HostFailure.of("h0", RuntimeError("of Ray itself"))
    assert (type(foreign.error), foreign.message) == (ClusterError, "RuntimeError: of Ray itself")


def test_a_failed_operation_keeps_the_class_of_each_failure() -> None:
    failed = [HostFailure("h1", "StoreFull", "disk full"), HostFailure("h0", "VmLost", "gone")]
    error = OperationFailed.of("the checkpoint failed", failed)
    assert error.failures == {"h1": "disk full", "h0": "gone"}
    copy = pickle.loads(pickle.dumps(error))
    assert set(copy.failed_on) == set(failed)
