"""What gates are trained on: staying close to the full cache, and needing no more than the budget (arXiv 2512.03324).

Shapes: B rows, T tokens, E hidden size, V vocabulary, H KV heads (of one layer, or of all), L layers.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from .. import device

KINDS = ("kl", "ntp", "reverse_kl")
IGNORED = -100
Project = Callable[[torch.Tensor], torch.Tensor]


def logits_of(model) -> Project:
    """The map from a causal model's last hidden states to its logits, with what the model does to them at the end.

    Gemma caps them (``final_logit_softcapping``), Granite divides them (``logits_scaling``), Cohere multiplies them
    (``logit_scale``), and so does Falcon-H1 (``lm_head_multiplier``).

    Raises:
        ValueError: if the model's own logits for a few tokens are others: it does something unknown to them.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    factor *= getattr(config, "lm_head_multiplier", None) or 1.0

    def project(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        if factor != 1.0:
            logits = logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    _check_projection(model, project)
    return project


def _check_projection(model, project: Project) -> None:
    ids = torch.tensor([[0, 1, 2]], device=model.get_input_embeddings().weight.device)
    training = model.training
    model.eval()  # dropout would make two runs differ
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits.float()
        ours = project(model.get_decoder()(ids, use_cache=False).last_hidden_state).float()
    model.train(training)
    if (ours - theirs).norm() > 0.02 * theirs.norm():
        raise ValueError(f"{type(model).__name__} changes its logits in a way that training does not know")


def distillation_losses(
    student_hidden_BTE: torch.Tensor,
    teacher_hidden_BTE: torch.Tensor | None,
    project: Project,
    labels_BT: torch.Tensor,
    kinds: Sequence[str] = ("kl",),
    chunk: int = 1024,
    count: torch.Tensor | int | None = None,
    weight_B: torch.Tensor | None = None,
    static: bool = False,
) -> dict[str, torch.Tensor]:
    """Losses of the student's predictions, in nats, as a mean over the positions that count.

    Position t predicts token t + 1: it counts where ``labels[t + 1]`` is not -100; a row's last position never does.
    No more than ``chunk`` positions have logits at any time.
    Gradients reach the student's hidden states only: the weights behind ``project`` are frozen.

    In trimkv 0.1.5, the authors' package, "ntp" is the same, but its "fwkl" and "rvkl" (here "kl" and "reverse_kl")
    count position t where ``labels[t]`` is not -100. Labels shifted right by one give its values.

    Args:
        teacher_hidden_BTE: last hidden states of the same model without gates; None if only "ntp" is asked for.
        project: hidden states -> logits, see ``logits_of``.
        labels_BT: token ids, -100 where a token shall not be learnt.
        kinds: of "kl", KL(teacher || student); "ntp", cross entropy of the next token; "reverse_kl", KL(student ||
            teacher).
        chunk: positions at a time; each costs a few fp32 rows of V.
        count: the number to divide by, instead of this batch's own: that of all batches that share an optimizer step.
        weight_B: a factor on each row's losses.
        static: the work does not depend on the labels, as a CUDA graph needs it: positions that do not count have
            logits too, and weigh nothing. Otherwise they never have any.

    Returns:
        an fp32 scalar for each kind; 0, with zero gradients, if nothing counts.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"unknown loss {', '.join(unknown) or 'of no name'}; known losses: {', '.join(KINDS)}")
    assert teacher_hidden_BTE is not None or set(kinds) == {"ntp"}, "kl and reverse_kl need a teacher"
    targets = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
    weight = (targets != IGNORED).float()
    number = weight.sum() if count is None else torch.as_tensor(count, device=weight.device)
    if weight_B is not None:
        weight = weight * weight_B.repeat_interleave(labels_BT.shape[1])
    positions = torch.arange(len(weight), device=weight.device) if static else (targets != IGNORED).nonzero()[:, 0]
    student = student_hidden_BTE.flatten(0, 1)
    teacher = None if teacher_hidden_BTE is None else teacher_hidden_BTE.detach().flatten(0, 1)
    wants_grad = student.requires_grad and torch.is_grad_enabled()
    sums = _Sums.apply(
        student, teacher, project, targets.clamp(min=0), weight, positions, tuple(kinds), chunk, wants_grad
    )
    return dict(zip(kinds, (sums / number.clamp(min=1)).unbind(), strict=True))


class _Sums(torch.autograd.Function):
    """Summed losses, one for each kind. Gradients are taken in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx, student, teacher, project, targets, weight, positions, kinds, chunk, wants_grad):
        sums = torch.zeros(len(kinds), device=student.device)
        grads = [torch.zeros_like(student) for _ in kinds] if wants_grad else []
        fused = _fused(student, kinds) if wants_grad else None
        for index in positions.split(chunk):
            with torch.no_grad():
                logits = None if teacher is None else project(teacher[index])
            hidden = student[index].requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                given = project(hidden)
            for i, kind in enumerate(kinds):
                if fused:
                    other = given if logits is None else logits
                    loss, grad = fused(kind, given.detach(), other, targets[index], weight[index])
                    sums[i] += loss @ weight[index]
                else:
                    with torch.set_grad_enabled(wants_grad):
                        loss = _loss(kind, given, logits, targets[index]) @ weight[index]
                    sums[i] += loss.detach()
                    grad = None
                if wants_grad:
                    more = i + 1 < len(kinds)
                    (grads[i][index],) = torch.autograd.grad(given if fused else loss, hidden, grad, retain_graph=more)
        ctx.save_for_backward(*grads)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sums):
        weighted = (g.to(grad) * grad for g, grad in zip(grad_sums, ctx.saved_tensors, strict=True))
        return sum(weighted), None, None, None, None, None, None, None, None


def _fused(student: torch.Tensor, kinds: Sequence[str]):
    """The kernel that does it all at once, where it can."""
    if not student.is_cuda or student.dtype == torch.float64 or not device.has_triton():
        return None
    from . import losses_triton

    return losses_triton.loss_and_gradient if set(kinds) <= set(losses_triton.KINDS) else None


def _loss(kind: str, logits: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """One loss for each position."""
    log_q = logits.float().log_softmax(-1)
    if kind == "ntp":
        return F.nll_loss(log_q, targets, reduction="none")
    log_p = teacher.float().log_softmax(-1)
    first, second = (log_p, log_q) if kind == "kl" else (log_q, log_p)
    return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)


def capacity_loss(
    sums: torch.Tensor | Sequence[torch.Tensor],
    budget: float | torch.Tensor,
    start_BT: torch.Tensor | None = None,
    mask_BT: torch.Tensor | None = None,
    normaliser: str = "paper",
    scope: str = "head",
) -> torch.Tensor:
    """How far the retained mass exceeds the budget: a hinge on S_t - M.

    t counts the tokens of the document so far, from 1. Let x = max(0, S_t - M). Then
        "paper" is the mean of x / t over all tokens, heads and layers (section 4.3);
        "released" is the mean over those with x > 0 only, as the authors' package has it: there positions count from 0
        and the divisor is max(1, t - 1 - M). Under scope "global" its sums over all N heads are divided by N here, so
        that the least divisor is 1 / N.

    "released" was compared with trimkv 0.1.5 from PyPI, from log retention to loss: 200 random inputs, both scopes, one
    and several documents in a row (tests/peers/authors/parity.sh). That code knows no mask, and for scope "head" no
    more than one row; several rows share one mean here, as they do there for scope "global".

    Args:
        sums: retention sums S, see ``attention.retention_sum``: [B, H, T], or [L, B, H, T], or a list of L [B, H, T].
        budget: M, tokens per KV head; or [B], one for each row.
        start_BT: index of the first token of each token's document; None if each row is one document.
        mask_BT: False on padding, which does not count; None if there is none.
        scope: "head" holds every head of every layer to M; "global" holds their mean to M (that is, their sum to
            M * L * H), so heads may borrow from each other.
    """
    assert normaliser in ("paper", "released") and scope in ("head", "global"), (normaliser, scope)
    S_BHT = _all_heads(sums)
    least = 1.0
    if scope == "global":
        least = 1.0 / S_BHT.shape[1]
        S_BHT = S_BHT.mean(1, keepdim=True)
    M_B11 = _as_tensor(budget, S_BHT).reshape(-1, 1, 1)
    t_BT = torch.arange(1, S_BHT.shape[-1] + 1, device=S_BHT.device).expand(S_BHT.shape[0], -1)
    t_B1T = (t_BT if start_BT is None else t_BT - start_BT)[:, None].to(S_BHT.dtype)
    divisor = t_B1T if normaliser == "paper" else (t_B1T - 1 - M_B11).clamp(min=least)
    excess = (S_BHT - M_B11).relu() / divisor
    counted = torch.ones_like(t_B1T, dtype=torch.bool) if mask_BT is None else mask_BT.bool()[:, None]
    if normaliser == "released":
        counted = counted & (excess > 0)
    return _mean(excess, counted)


def occupancy(
    sums: torch.Tensor | Sequence[torch.Tensor],
    budget: float | torch.Tensor,
    mask_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of S_t / M, for the log: how much of the budget the gates ask for. Arguments as ``capacity_loss``."""
    with torch.no_grad():
        S_BHT = _all_heads(sums)
        share = S_BHT / _as_tensor(budget, S_BHT).reshape(-1, 1, 1)
        return _mean(share, torch.ones_like(share, dtype=torch.bool) if mask_BT is None else mask_BT.bool()[:, None])


def combine(
    losses: Mapping[str, torch.Tensor], capacity: torch.Tensor, weight: float = 1.0, average: bool = False
) -> torch.Tensor:
    """The sum of the losses plus ``weight`` times the capacity loss, as the paper has it.

    ``average`` takes the mean of the losses instead of their sum, as trimkv 0.1.5, the authors' package, does.
    """
    total = sum(losses.values())
    return (total / len(losses) if average else total) + weight * capacity


def _as_tensor(budget: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Made on the device: a copy from the host has no place in a CUDA graph."""
    return budget.to(like) if isinstance(budget, torch.Tensor) else like.new_full((1,), budget)


def _all_heads(sums: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, heads of all layers, T]."""
    if isinstance(sums, torch.Tensor):
        return sums if sums.ndim == 3 else sums.transpose(0, 1).flatten(1, 2)
    return torch.cat(list(sums), 1)


def _mean(x_BHT: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    counted = counted.expand_as(x_BHT)
    return x_BHT.where(counted, 0.0).sum() / counted.sum().clamp(min=1)
