"""Changes to a file's bytes, for the tests that nothing but clear errors comes of them."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

INTERESTING = [0, 1, 2, 7, 8, 9, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Changes to a file's bytes, most of them in its header."""
    kind = draw(st.sampled_from(["flip", "number", "cut", "insert", "repeat", "digits"]))
    near = draw(st.sampled_from([64, 512, 4096, 1 << 20]))
    position, length = draw(st.integers(0, near)), draw(st.integers(1, 64))
    filling, number = draw(st.binary(min_size=1, max_size=16)), draw(st.sampled_from(INTERESTING))
    backwards = draw(st.booleans())

    def mutate(raw: bytes) -> bytes:
        at = position % (len(raw) + 1)
        if backwards:
            at = len(raw) - at
        if kind == "flip":
            return raw[:at] + filling + raw[at + len(filling) :]
        if kind == "number":
            packed = number.to_bytes(8, "little")[: 4 if number < 1 << 32 else 8]
            return raw[:at] + packed + raw[at + len(packed) :]
        if kind == "cut":
            return raw[:at] + raw[at + length :]
        if kind == "insert":
            return raw[:at] + filling + raw[at:]
        if kind == "digits":
            return raw[:at].replace(b"48", str(number).encode()) + raw[at:]
        return raw[:at] + raw[at : at + length] * 3 + raw[at + length :]

    return mutate
