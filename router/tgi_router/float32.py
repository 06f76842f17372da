"""32-bit floats as JSON text: the shortest digits that give the same float, in the layout TGI's serializer used.

The wire carries log-probabilities as 32-bit floats; printed as Python's doubles, -0.34 would be -0.3400000035762787.
Not a number and infinities are `null`; subnormal numbers get up to six digits. Pure; takes about a microsecond.
"""

import struct

import msgspec

_pack = struct.Struct("f").pack
_unpack = struct.Struct("f").unpack
_FORMATS = ("%.6g", "%.7g", "%.8g")  # any float of up to 6 digits survives the first, any at all "%.9g"


def shortest(value: float) -> str:
    """The JSON text of `value`, a 32-bit float."""
    for form in _FORMATS:
        text = form % value
        try:
            if _unpack(_pack(float(text)))[0] == value:
                break
        except OverflowError:  # rounded up beyond the largest float
            continue
    else:
        text = f"{value:.9g}"
    if "." in text and "e" not in text:
        return text
    if "n" in text:  # nan, inf
        return "null"
    return _layout(text)


def _layout(text: str) -> str:
    """C's `%g` layout -> exponents only below -6 and from 13 on, without `+` and zeros; else a decimal point."""
    sign, text = ("-", text[1:]) if text.startswith("-") else ("", text)
    mantissa, _, exponent = text.partition("e")
    digits = mantissa.replace(".", "")
    point = (mantissa.find(".") if "." in mantissa else len(mantissa)) + int(exponent or 0)
    stripped = digits.lstrip("0")
    if not stripped:
        return sign + "0.0"
    point -= len(digits) - len(stripped)
    digits = stripped.rstrip("0")
    if 0 < point <= 13:
        whole = digits[:point].ljust(point, "0")
        return f"{sign}{whole}.{digits[point:] or '0'}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{fraction}e{point - 1}"


def raw(value: float) -> msgspec.Raw:
    """The same, to put into a struct."""
    return msgspec.Raw(shortest(value).encode())
