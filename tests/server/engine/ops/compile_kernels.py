"""Compiles the kernels for a CUDA GPU that need not be there: `compile_kernels.py CAPABILITY`, such as 90 for Hopper.

Prints a line per variant. Fails where a thread would need so many registers that they spill, at the width of an 8B
Llama.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from server.engine.banks import Bank
from server.engine.ops import kernel, map_kernels
from server.engine.ops.tables import Tables

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorded:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.launches.append((args, options))

    def compile(self, target: GPUTarget) -> Iterator[tuple[str, Any]]:
        for args, options in self.launches:
            names = self.function.arg_names
            fixed = {name: value for name, value in options.items() if name in names}
            signature = {
                name: "i32" if isinstance(arg, int) else TYPES[arg.dtype]
                for name, arg in zip(names, args, strict=False)
            }
            signature |= dict.fromkeys(fixed, "constexpr")
            # As the launcher finds for strides and addresses that are multiples of 16.
            attributes = {(index,): [["tt.divisibility", 16]] for index in range(len(args))}
            source = ASTSource(fn=self.function, signature=signature, constexprs=fixed, attrs=attributes)
            compiler = {name: value for name, value in options.items() if name not in names}
            yield f"{self.function.__name__} {fixed}", triton.compile(source, target=target, options=compiler)


def main(capability: int) -> None:
    edit, multiply = Recorded(kernel._edit), Recorded(map_kernels._multiply)
    kernel._edit, map_kernels._multiply = edit, multiply
    for width, dtype, pair, maps in (
        (4096, torch.bfloat16, True, True),
        (4096, torch.float32, False, False),
        (14336, torch.bfloat16, False, False),
        (28672, torch.bfloat16, False, False),
    ):
        map_sites = frozenset({0}) if maps else frozenset()
        tables = Tables(Bank(1), 160, {0: width}, max_rows=1, max_tokens=2, map_sites=map_sites)
        residual, hidden = torch.zeros(2, 2, width, dtype=dtype)
        kernel.launch(tables, torch.zeros(1, dtype=torch.int32), residual, hidden if pair else None)
    target = GPUTarget("cuda", capability, 32)
    for name, compiled in (*edit.compile(target), *multiply.compile(target)):
        registers, spilled = resources(compiled.asm["ptx"], capability)
        print(f"{name}: {registers} registers, {spilled} bytes spilled")
        assert not spilled or "'WIDTH': 4096" not in name


def resources(ptx: str, capability: int) -> tuple[int, int]:
    assembler, architecture = get_ptxas(capability).path, sm_arch_from_capability(capability)
    command = [assembler, "-v", f"--gpu-name={architecture}", "-o", "/dev/null", "/dev/stdin"]
    report = subprocess.run(command, input=ptx, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    assert registers is not None and spilled is not None, report
    return int(registers[1]), int(spilled[1])


if __name__ == "__main__":
    main(int(sys.argv[1]))
