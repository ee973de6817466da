"""Contrastive pairs of texts: what CAA and `direction` are fitted from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from methods import caa
from server.fit_methods.base import DataText, OnePassSpec, Options, Part, Text, Wanted


class Pair(Part):
    """Two texts that differ in the property to steer: more of it, less of it."""

    positive: Text
    negative: Text


class PairOptions(Options):
    pooling: caa.Pooling = "last"


class PairsSpec(OnePassSpec):
    """The base of methods that read the residual stream of both texts of each pair."""

    pairs: Annotated[list[Pair], Field(min_length=2)]
    options: PairOptions = PairOptions()

    def texts(self) -> list[DataText]:
        """The positive and the negative text of every pair in turn."""
        return [
            DataText(f"pairs.{index}.{side}", getattr(pair, side))
            for index, pair in enumerate(self.pairs)
            for side in ("positive", "negative")
        ]

    def wanted(self) -> Wanted:
        return Wanted(("resid_post",), self.options.pooling)
