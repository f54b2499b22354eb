# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for GPUs that are not here; run by ``test_triton`` without the interpreter.

What it shows: the compiler takes their types, masks and tiles, and the shared memory that they ask for is there.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mindformers_ext.pt.ops import triton_experts as experts
from mindformers_ext.pt.ops import triton_kernels as between

KILO = 1024
# compute capability -> shared memory of one program: CUDA C++ Programming Guide, technical specifications
MEMORY = {80: 163 * KILO, 90: 227 * KILO}
# capability -> (mean rows per expert, type, bytes of an element)
TILES = {80: ((1, "bf16", 2),), 90: ((1, "bf16", 2), (1, "fp32", 4), (64, "bf16", 2), (1000, "bf16", 2))}
SMALL_MEMORY = 99 * KILO  # of capability 8.6, 8.9 and 12.0: decoding must fit there too
TYPES = {
    "token_of": "*i64",
    "order": "*i64",
    "row_of": "*i64",
    "offs": "*i32",
    "kept": "*u8",
    "weight": "*fp32",
    "slots": "*fp32",
    "dweight": "*fp32",
}
TENSORS = {"x", "w", "h", "out", "rows", "dout", "drows", "both", "dboth"}


def compiled(
    kernel: triton.JITFunction, capability: int, dtype: str, constants: dict[str, int | bool], options: dict[str, int]
) -> int:
    """Bytes of shared memory that the compiled kernel wants; pointers and widths are multiples of 16."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}" if name in TENSORS else "i32")
        for name in names
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in {*constants, "experts"}}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return int(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared)


def main() -> None:
    for capability, memory in MEMORY.items():
        for mean, dtype, itemsize in TILES[capability]:
            tile = experts.tile_of(16 * mean, 16, itemsize)
            constants = {**experts._constants(tile), "EXPERTS": 16}
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            for kernel in (experts._gather_swiglu, experts._down_scatter):
                wanted = compiled(kernel, capability, dtype, constants, options)
                assert wanted <= (memory if mean > 1 else SMALL_MEMORY), (kernel, tile, wanted)
                print(f"compiled {kernel.__name__} {capability} {dtype} {tile} {wanted} bytes")
    others = {
        between._combine: {"K": 2, "WEIGHTED": True},
        between._combine_backward: {},
        between._swiglu_forward: {},
        between._swiglu_backward: {},
        experts._sum_slots: {"K": 2, "PARTS": 4},
    }
    for kernel, constants in others.items():
        compiled(kernel, 90, "bf16", {**constants, "BLOCK": 1024}, {})
        print(f"compiled {kernel.__name__} 90")
    print("all kernels compile")


if __name__ == "__main__":
    main()
