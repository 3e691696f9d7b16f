"""The whole tree of errors, and an example of each."""

from __future__ import annotations

from dcres.errors import DcresError, OperationFailed


def _tree(cls: type[DcresError]) -> list[type[DcresError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in _tree(child))]


ALL_ERRORS = _tree(DcresError)


def example(cls: type[DcresError]) -> DcresError:
    """An instance with the arguments that its class takes."""
    if issubclass(cls, OperationFailed):
        return cls("the checkpoint of demo failed", {"h1": "the disk is full"})
    return cls(f"{cls.__name__} of VM demo; try again")
