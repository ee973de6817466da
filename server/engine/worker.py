"""What the API process may ask of a worker, by method name over vLLM's `collective_rpc`.

Mixed into vLLM's worker class (`worker_extension_cls`). Calls run between steps, in order with the requests around
them.
"""

from __future__ import annotations

from typing import Any

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
            "runner": type(self.model_runner).__name__,
        }

    def polyhelm_load(self, key: str, slot: int, layers: list[int], data: bytes) -> None:
        self._polyhelm().bank.load(key, slot, layers, data)

    def polyhelm_receipts(self, receipts: list[str]) -> list[dict[str, Any] | None]:
        """For each receipt `touched` [edits][sites] and `cached` [edits]; None for one that never ran."""
        counts = [self._polyhelm().router.receipt(receipt) for receipt in receipts]
        return [each and {"touched": each.touched.T.tolist(), "cached": each.cached.tolist()} for each in counts]

    def polyhelm_captures(self, receipts: list[str]) -> list[dict[str, Any]]:
        """Means over the captured tokens: `mean` is float32 [sites, hidden], `norm` float32 [sites], as bytes."""
        captures = [self._polyhelm().router.captured(receipt) for receipt in receipts]
        return [
            {
                "tokens": capture.tokens.tolist(),
                "mean": (capture.total / capture.tokens[:, None]).cpu().numpy().tobytes(),
                "norm": (capture.norm_total / capture.tokens).cpu().numpy().tobytes(),
            }
            for capture in captures
        ]
