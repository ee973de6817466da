"""Artifact vectors resident on the device, and who is using them.

`Bank` lives in the worker: one float32 row per slot and site, read by the op. `BankDirectory` lives in the API process:
it gives out slots, uploads what is missing once, counts the requests that use a slot and evicts the least recently used
idle one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch


class Bank:
    """`vectors` [sites, slots, hidden] float32 and `inverse_norms` [sites, slots] float32 (0 where the vector is 0)."""

    def __init__(self, sites: int, slots: int, hidden_size: int, device: torch.device | str = "cpu") -> None:
        self.vectors = torch.zeros(sites, slots, hidden_size, dtype=torch.float32, device=device)
        self.inverse_norms = torch.zeros(sites, slots, dtype=torch.float32, device=device)
        self._slots: dict[str, int] = {}
        self._layers: dict[str, frozenset[int]] = {}

    @property
    def device(self) -> torch.device:
        return self.vectors.device

    def load(self, key: str, slot: int, layers: Iterable[int], data: bytes) -> None:
        """Put `key`'s vectors, little-endian float32 [layers, hidden], into `slot`, in place of what was there."""
        sites, slots, hidden_size = self.vectors.shape
        layers = list(layers)
        if not 0 <= slot < slots or not layers or not all(0 <= layer < sites for layer in layers):
            raise ValueError(f"slot {slot} or layers {layers} are outside the bank of {slots} slots and {sites} layers")
        rows = torch.from_numpy(np.frombuffer(data, "<f4").reshape(len(layers), hidden_size).copy())
        for old in [old for old, taken in self._slots.items() if taken == slot]:
            del self._slots[old], self._layers[old]
        self.vectors[:, slot] = 0
        self.vectors[layers, slot] = rows.to(self.vectors.device)
        norms = self.vectors[:, slot].norm(dim=1)
        self.inverse_norms[:, slot] = torch.where(norms > 0, 1 / norms, 0)
        self._slots[key] = slot
        self._layers[key] = frozenset(layers)

    def slot(self, key: str, layers: Iterable[int]) -> int:
        """The slot of `key`; RuntimeError when it isn't resident or lacks one of `layers`."""
        if key not in self._slots:
            raise RuntimeError(f"bank has no {key!r}: a request reached the engine before its artifact")
        if missing := set(layers) - self._layers[key]:
            raise RuntimeError(f"bank has no layers {sorted(missing)} of {key!r}")
        return self._slots[key]


class BankFull(Exception):
    """Every slot is in use by a running request."""


@dataclass(slots=True)
class _Entry:
    slot: int
    users: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    failed: bool = False


class BankDirectory:
    """Slots by key. Not thread-safe: it belongs to one event loop."""

    def __init__(self, slots: int) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))
        self.slots = slots

    @property
    def resident(self) -> list[str]:
        """Keys on the device, least recently used first."""
        return list(self._entries)

    async def acquire(self, key: str, upload: Callable[[int], Awaitable[None]]) -> None:
        """Hold `key` for one request, calling `upload(slot)` when it isn't resident. Pair with `release`.

        Raises BankFull, or whatever `upload` raises.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(self._take_slot(), users=1)
            try:
                await upload(entry.slot)
            except BaseException:
                entry.failed = True
                del self._entries[key]
                self._free.append(entry.slot)
                raise
            finally:
                entry.ready.set()
            return
        entry.users += 1
        self._entries.move_to_end(key)
        try:
            await entry.ready.wait()
        except BaseException:
            entry.users -= 1
            raise
        if entry.failed:
            # The upload failed for its owner; each waiter tries again and so gets the reason itself.
            await self.acquire(key, upload)

    def release(self, key: str) -> None:
        self._entries[key].users -= 1

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        for key, entry in self._entries.items():
            if entry.users == 0:
                del self._entries[key]
                return entry.slot
        raise BankFull(f"all {self.slots} bank slots are in use by running requests; retry, or raise --bank-slots")
