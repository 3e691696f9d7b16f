"""The ioctl numbers, held against those that the kernel's headers give."""

from __future__ import annotations

import pytest

from dcres.linux import abi


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (abi.UFFDIO_API, 0xC018AA3F),
        (abi.UFFDIO_REGISTER, 0xC020AA00),
        (abi.UFFDIO_WAKE, 0x8010AA02),
        (abi.UFFDIO_COPY, 0xC028AA03),
        (abi.UFFDIO_ZEROPAGE, 0xC020AA04),
        (abi.UFFDIO_WRITEPROTECT, 0xC018AA06),
        (abi.PAGEMAP_SCAN, 0xC0606610),
    ],
)
def test_ioctl_numbers_match_the_kernels_headers(number: int, expected: int) -> None:
    assert number == expected
