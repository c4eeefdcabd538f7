"""Compiling kernels for a Hopper GPU where there is none: what the interpreter cannot run can be looked at at least."""

import re
from types import SimpleNamespace

import pytest
import torch

DIVISIBLE = [["tt.divisibility", 16]]


def compiled(kernel, signature: dict[str, str], constants: dict, **options):
    """A kernel of Triton or Gluon for compute capability 9.0.

    Args:
        signature: type of every argument that is no constant; pointers, strides and widths (K, N...) are multiples of
            16.
        constants: the others.
        options: of the launch.
    """
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], values[(i,)] = "constexpr", constants[name]
        else:
            types[name] = signature[name]
            if types[name].startswith("*") or re.search("_[a-z]$|^K$|^N", name):
                attributes[(i,)] = DIVISIBLE
    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    return triton.compile(source(kernel, types, values, attributes), target=GPUTarget("cuda", 90, 32), options=options)


class Launch:
    """Stands in for a kernel on a machine that cannot launch it: checks that every argument has got a value."""

    def __init__(self, kernel):
        self.names, self.calls = list(kernel.arg_names), []

    def __getitem__(self, grid):
        def launch(*values, **named):
            given = dict(zip(self.names, values, strict=False))
            options = {name: named.pop(name) for name in ("num_warps", "launch_pdl") if name in named}
            assert not set(given) & set(named) and len(values) <= len(self.names)
            given |= named | {name: options[name] for name in self.names if name in options}
            assert set(given) == set(self.names), set(given) ^ set(self.names)
            self.calls.append((grid, given))

        return launch


def without_a_gpu(monkeypatch, module, kernel: str, multiprocessors: int = 132) -> Launch:
    """Lets a module's launches run into a ``Launch``."""
    launch = Launch(getattr(module, kernel))
    monkeypatch.setattr(module, kernel, launch)
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return launch


def between(ptx: str, first: str, then: str) -> list[str]:
    """What stands between the last ``first`` and the next ``then`` in the text of a kernel."""
    lines = ptx.splitlines()
    end = next(i for i in range(len(lines) - 1, -1, -1) if then in lines[i])
    begin = max(i for i in range(end) if first in lines[i])
    return lines[begin:end]
