"""Gradients through attention over slots: right where a forward attends to its own tokens only, refused elsewhere.

Slots hold values without a graph, and evict. A stock cache, too, has gradients only for what one graph holds.
"""

import torch

from ..attention import slots as attention


def attend_alone(q, k, v, real_BT, scaling, softcap, s_aux) -> torch.Tensor:
    """Causal attention of T tokens over themselves, [B, Q, T, D], with gradients.

    Args:
        q: [B, Q, T, D]; k, v: [B, H, T, D].
        real_BT: bool, False for padding; None = no padding.
    """
    mask = attention.causal_mask(q.shape[2], k.shape[2], q.device)[None, None]
    if real_BT is not None:
        real_BT = real_BT.to(q.device)
        mask = (mask & real_BT[:, None, None, :]) | ~real_BT[:, None, :, None]
    return attention.attend(q, k, v, mask, scaling, softcap, s_aux)


def refuse_backward(out, *inputs) -> torch.Tensor:
    """``out`` as it is, whose gradients are refused when somebody asks for them."""
    return _Refused.apply(out, *inputs)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, *inputs):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "a bounded cache has no gradients beyond its first chunk: call the model without a cache to train it, or "
            "under torch.no_grad() (trimkv train makes retention gates)"
        )
