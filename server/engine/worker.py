"""What the API process may ask of a worker, by method name over vLLM's `collective_rpc`.

The seam `worker_rpc` gives these methods to vLLM's worker class. Calls run between steps, in order with the requests
around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from server.engine.edits import Point
from server.engine.operands import Piece
from server.engine.sites import Installation


class WorkerExtension:
    """Every name starts with `polyhelm_`, since vLLM refuses names that the worker has."""

    model_runner: Any

    def _polyhelm(self) -> Installation:
        return self.model_runner.get_model().polyhelm

    def polyhelm_describe(self) -> dict[str, Any]:
        installation = self._polyhelm()
        return {
            "layers": installation.layers,
            "hidden_size": installation.hidden_size,
            "runner": _runner(self.model_runner),
            "points": {point: asdict(info) for point, info in installation.points.items()},
            "captures": installation.captures,
        }

    def polyhelm_write(self, start: int, data: bytes) -> None:
        """Put little-endian float32 numbers into the bank, `start` numbers from its beginning."""
        self._polyhelm().bank.write(start, data)

    def polyhelm_bind(self, key: str, start: int, width: int, pieces: Sequence[Sequence[Any]], point: Point) -> None:
        """Make the operand that was written at `start` readable at a point; `pieces` are those of the `Operand`."""
        installation = self._polyhelm()
        places = [Piece(layer, role, first, tuple(shape)) for layer, role, first, shape in pieces]
        installation.bank.bind(key, start, width, places, installation.shard(point))

    def polyhelm_drop(self, keys: list[str]) -> None:
        """Forget operands whose place was given away. No request reads them any more."""
        for key in keys:
            self._polyhelm().bank.drop(key)

    def polyhelm_receipts(self, receipts: list[str]) -> list[dict[str, Any] | None]:
        """For each receipt `touched` [edits][layers of the edit] and `cached` [edits]; None for one that never ran."""
        counts = [self._polyhelm().router.receipt(receipt) for receipt in receipts]
        return [
            each and {"touched": [edit.tolist() for edit in each.touched], "cached": each.cached.tolist()}
            for each in counts
        ]

    def polyhelm_captured(self, receipt: str, tokens: int | None = None) -> bytes | dict[str, Any] | None:
        """What was captured under a receipt (`Capture.collect`); None where nothing ran."""
        capture = self._polyhelm().router.captured(receipt)
        return None if capture is None else capture.collect(tokens)

    def polyhelm_drop_captured(self, receipt: str) -> None:
        """Let go of what was captured under a receipt, if anything was."""
        capture = self._polyhelm().router.captured(receipt)
        if capture is not None:
            capture.close()


def _runner(model_runner: Any) -> str:
    """Which of vLLM's model runners it is, also where a platform has a class of its own."""
    modules = {each.__module__ for each in type(model_runner).__mro__}
    return "V2" if "vllm.v1.worker.gpu.model_runner" in modules else "V1"
