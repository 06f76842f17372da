"""Numbers print as TGI's serializer prints 32-bit floats."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tgi_router.float32 import raw, shortest

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(floats)
def test_the_digits_are_the_shortest_that_give_the_same_float(value: float) -> None:
    text = shortest(value)
    assert struct.unpack("f", struct.pack("f", float(text)))[0] == value

    def digits(number: str) -> str:
        return number.lstrip("-").partition("e")[0].replace(".", "").strip("0")

    assert digits(text) == digits(np.format_float_scientific(np.float32(value), unique=True))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.34, "-0.34"),
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (1.0, "1.0"),
        (1e-7, "1e-7"),
        (1e-6, "0.000001"),
        (1e-5, "0.00001"),
        (-1.1920929e-07, "-1.1920929e-7"),
        (-1.0728842e-06, "-0.0000010728842"),
        (123456789.0, "123456790.0"),
        (1e12, "1000000000000.0"),
        (1e13, "1e13"),
        (3.4028235e38, "3.4028235e38"),
        (math.nan, "null"),
        (math.inf, "null"),
        (-math.inf, "null"),
    ],
)
def test_the_layout_is_that_of_rusts_ryu(value: float, text: str) -> None:
    value = struct.unpack("f", struct.pack("f", value))[0]
    assert shortest(value) == text
    assert bytes(raw(value)) == text.encode()
