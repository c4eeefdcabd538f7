"""Compiling kernels for a Hopper GPU where there is none: what the interpreter cannot run can be looked at at least."""

import re

import pytest

DIVISIBLE = [["tt.divisibility", 16]]


def compiled(kernel, signature: dict[str, str], constants: dict, num_warps: int):
    """A Gluon kernel for compute capability 9.0.

    Args:
        signature: type of every argument that is no constant; pointers and what is named in ``aligned`` are multiples
            of 16.
        constants: the others.
    """
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    types, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], values[(i,)] = "constexpr", constants[name]
        else:
            types[name] = signature[name]
            if types[name].startswith("*") or re.search("_[a-z]$|^K$|^N", name):
                attributes[(i,)] = DIVISIBLE
    source = GluonASTSource(kernel, types, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def between(ptx: str, first: str, then: str) -> list[str]:
    """What stands between the last ``first`` and the next ``then`` in the text of a kernel."""
    lines = ptx.splitlines()
    end = next(i for i in range(len(lines) - 1, -1, -1) if then in lines[i])
    begin = max(i for i in range(end) if first in lines[i])
    return lines[begin:end]
