"""torch.compile for the parts of a layer between its matrix products: norms, and what lies within the MLP."""

import torch

from ..ranks import sharded


def compile_parts(model) -> list[torch.nn.Module]:
    """Compiles them in place, for any number of rows. Returns what to give to ``undo``.

    An MLP that is sharded over processes runs as it is: its sums over processes are not for the compiler.
    """
    parts = []
    for layer in model.get_decoder().layers:
        for name, module in layer.named_modules():
            last = name.rsplit(".", 1)[-1]
            if last.endswith("norm") or last == "mlp" and not sharded(module):
                module.compile(dynamic=True)
                parts.append(module)
    return parts


def undo(parts: list[torch.nn.Module]) -> None:
    """The modules run as they did before."""
    for module in parts:
        module._compiled_call_impl = None
