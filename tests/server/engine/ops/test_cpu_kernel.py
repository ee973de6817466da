"""How the CPU kernel is compiled. What it computes is in kernel_cases.py."""

from __future__ import annotations

import logging

import pytest

from server.engine.ops import cpu_kernel


def test_what_can_be_kept_nowhere_is_compiled_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    made: dict[str, object] = {}
    exec("def twice(x): return 2 * x", made)  # of no file, beside which Numba could keep it
    with caplog.at_level(logging.INFO):
        assert cpu_kernel._compiled(made["twice"])(21) == 42  # type: ignore[arg-type]
    assert "compiled at every start" in caplog.text


def test_other_failures_of_the_compiler_are_not_taken_for_a_missing_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: object) -> object:
        raise RuntimeError("broken")

    monkeypatch.setattr(cpu_kernel, "njit", broken)
    with pytest.raises(RuntimeError, match="broken"):
        cpu_kernel._compiled(len)
