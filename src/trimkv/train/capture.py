"""A training step as one CUDA graph: thousands of small kernels without a launch each."""

from collections.abc import Callable, Mapping, Sequence

import torch

Values = Mapping[str, torch.Tensor]


class CapturedStep:
    """Runs ``compute`` and its gradients as a replayed CUDA graph; to autograd it is one function of the parameters.

    ``compute`` must do the same work for all inputs of the same shapes, and read nothing on the host. The first call
    runs it a few times and captures it; a call with other shapes captures again.

    Args:
        compute: tensors by name -> scalars by name, of which "loss" is differentiated.
        parameters: what gets gradients.
    """

    def __init__(self, compute: Callable[..., Values], parameters: Sequence[torch.nn.Parameter]):
        self.compute, self.parameters, self.shapes = compute, list(parameters), None

    def __call__(self, inputs: Values) -> Values:
        shapes = {name: (t.shape, t.dtype) for name, t in inputs.items()}
        if shapes != self.shapes:
            self.graph = None  # frees the memory of the old one first
            self._capture(inputs)
            self.shapes = shapes
        for name, t in inputs.items():
            self.inputs[name].copy_(t)
        self.graph.replay()
        out = {name: t.clone() for name, t in self.outputs.items()}
        return {**out, "loss": _Graphed.apply(self, out["loss"], *self.parameters)}

    def _capture(self, inputs: Values) -> None:
        self.inputs = {name: t.clone() for name, t in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and tuned, and libraries get their workspaces
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs, self.gradients = self._run()

    def _run(self) -> tuple[Values, list[torch.Tensor]]:
        with torch.enable_grad():
            out = self.compute(**self.inputs)
            gradients = torch.autograd.grad(out["loss"], self.parameters)
        return {name: t.detach() for name, t in out.items()}, list(gradients)


class _Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step: CapturedStep, loss, *parameters):
        ctx.step = step
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, None, *torch._foreach_mul(ctx.step.gradients, grad)
