"""What commands read: files of JSON lines, and lists of layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def layers_named(text: str, option: str = "--layers") -> list[int]:
    """`10-12,20` is [10, 11, 12, 20]."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        layers = []
    if not layers:
        raise typer.BadParameter(f"{text!r} names no layers: write them as 10-19 or 12,13", param_hint=option)
    return layers


def read_rows(file: Path, option: str) -> list[Any]:
    """The values of a file of JSON lines. BadParameter naming the line that is none."""
    rows = []
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8: {error.reason}", param_hint=option) from None
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise typer.BadParameter(f"{file}, line {number}, is not JSON: {error}", param_hint=option) from None
    return rows
