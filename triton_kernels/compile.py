"""``make kernels-compile``: every shipped launch compiled for sm_80 and sm_90, without a GPU.

The wrappers run on small tensors with their launches recorded; each recorded launch is compiled as it would be on the
device. Registers and what spills out of them are read from the binary, tensor-core instructions from its machine code.
Exits with 1 where registers spill or a compilation fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ._launch import Launch, recorded

OPERATIONS = (
    "attention_rows",
    "block_map",
    "block_means",
    "block_sparse_attention",
    "compact",
    "counting_sort",
    "greedy_diversity",
    "greedy_dpp",
    "kmeans_assign",
    "nearest",
    "permute_tokens",
    "quota",
    "received_attention",
    "segmented_topk",
    "softmax_merge",
    "tile_list",
    "weighted_merge",
)
"""Modules of this package that hold an operation."""

TARGETS = (80, 90)

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compiled:
    """What became of one launch.

    Attributes:
        operation: Module that makes it.
        kernel: Its kernel.
        launch: Element types and tile sizes, in words.
        target: 80 or 90.
        registers: Per thread.
        spilled: Bytes per thread that did not fit into registers.
        shared: Bytes of shared memory per program.
        tensor_cores: Its machine code multiplies matrices on tensor cores.
    """

    operation: str
    kernel: str
    launch: str
    target: int
    registers: int
    spilled: int
    shared: int
    tensor_cores: bool


@lru_cache
def launches(operation: str) -> list[Launch]:
    """Every distinct launch that an operation's specimens make."""
    module = importlib.import_module(f"{__package__}.{operation}")
    distinct: dict[Any, Launch] = {}
    for _, call in module.specimens():
        with recorded() as found:
            call()
        for launch in found:
            key = (launch.kernel.name, str(_signature(launch)), launch.config.warps, launch.config.stages)
            distinct.setdefault(key, launch)
    return list(distinct.values())


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Types by parameter, values compiled in, and the parameters known to be multiples of 16: as Triton's own."""
    types, constants, aligned = {}, {}, []
    fixed = {p.name for p in launch.kernel.jit.params if p.is_constexpr}
    for name in launch.kernel.parameters:
        value = launch.arguments[name]
        if name in fixed or value is None:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            aligned.append(name)
        elif isinstance(value, bool):
            types[name] = "u1"
        elif isinstance(value, float):
            types[name] = "fp32"
        elif name not in launch.kernel.sizes and value == 1:
            types[name], constants[name] = "constexpr", 1
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if name not in launch.kernel.sizes and value % 16 == 0:
                aligned.append(name)
    return types, constants, aligned


def compiled(operation: str, launch: Launch, target: int) -> Compiled:
    """Compile one launch for a target.

    Raises:
        RuntimeError: The kernels were loaded for the interpreter.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if launch.kernel.interpreted:
        raise RuntimeError("the kernels were loaded under TRITON_INTERPRET=1, and cannot be compiled. Unset it.")
    types, constants, aligned = _signature(launch)
    place = {name: (index,) for index, name in enumerate(launch.kernel.parameters)}
    source = ASTSource(
        launch.kernel.jit,
        signature=types,
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    used, code = _inspected(made.asm["cubin"])
    return Compiled(
        operation=operation,
        kernel=launch.kernel.name,
        launch=_in_words(types, constants, launch),
        target=target,
        registers=used["REG"],
        spilled=used["LOCAL"] + used["STACK"],
        shared=made.metadata.shared,
        tensor_cores=any(name in code for name in ("HMMA", "HGMMA", "IMMA", "DMMA")),
    )


def _in_words(types: dict[str, str], constants: dict[str, Any], launch: Launch) -> str:
    pointers = " ".join(dict.fromkeys(kind for kind in types.values() if kind.startswith("*")))
    values = " ".join(f"{name}={value}" for name, value in constants.items() if value is not None)
    return f"{pointers} {values} warps={launch.config.warps} stages={launch.config.stages}"


def _inspected(binary: bytes) -> tuple[dict[str, int], str]:
    """Resource usage by name, and the machine code, of a binary with one kernel."""
    from triton.backends import nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, *flags, file.name], check=True, capture_output=True, text=True).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    line = next(line for line in usage.splitlines() if "REG:" in line)
    words = (word.split(":") for word in line.split())
    return {name: int(value) for name, value in words if value.isdigit()}, code


def _compiled(operation: str, index: int, target: int) -> Compiled:
    return compiled(operation, launches(operation)[index], target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("operations", nargs="*", default=list(OPERATIONS))
    parser.add_argument("--targets", nargs="+", type=int, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, help="write what was found as JSON")
    arguments = parser.parse_args()
    wanted = [
        (operation, index, target)
        for operation in arguments.operations
        for index in range(len(launches(operation)))
        for target in arguments.targets
    ]
    found = []
    # Not forked: torch has threads by now, whose locks a fork would inherit.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for one in pool.map(_compiled, *zip(*wanted, strict=True)):
            found.append(one)
            print(
                f"sm_{one.target}  {one.registers:>3} registers  {one.spilled:>3} B spilled  {one.shared:>6} B shared  "
                f"{'tensor cores' if one.tensor_cores else '            '}  {one.operation}.{one.kernel}  {one.launch}",
                flush=True,
            )
    spilling = [one for one in found if one.spilled]
    print(f"{len(found)} compiled, {len(spilling)} spill registers")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    sys.exit(bool(spilling))


if __name__ == "__main__":
    main()
