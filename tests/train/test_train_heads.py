"""Training of the baselines' heads: their targets against loops, and what any training owes."""

import json
import math

import pytest
import torch
from transformers import TrainerCallback

import hopper
import interpreter
import tiny
import trimkv
from trimkv.cache.rotation import rotation_of
from trimkv.gates.head_sets import PLACES, attach_heads, new_heads
from trimkv.gates.heads import BlockGate
from trimkv.hf.model import full_attention_modules
from trimkv.train.head_losses import QUERIES, Documents, LocretTask, SeerTask
from trimkv.train.heads import HeadConfig, HeadStudent, before_rotation, train_heads

KINDS = list(PLACES)
CONTEXT = 24
INTERPRETED = interpreter.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_the_kernels_in_the_interpreter")


class Samples(torch.utils.data.Dataset):
    """Rows of random tokens: one document, two documents, or one and padding."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        ids = tiny.tokens(1, CONTEXT, seed=index % 7)[0]
        start, mask = torch.zeros(CONTEXT, dtype=torch.long), torch.ones(CONTEXT, dtype=torch.bool)
        if index % 3 == 1:
            start[15:] = 15
        if index % 3 == 0:
            start[20:] = torch.arange(20, CONTEXT)
            mask[20:] = False
        return {"input_ids": ids, "labels": ids, "start": start, "mask": mask}


def settings(kind, **changes):
    base = {"context": CONTEXT, "steps": 40, "batch_size": 2, "width": 8, "warmup_steps": 2, "learning_rate": 1e-2}
    return getattr(HeadConfig, kind)(**{**base, "block_size": 4, **changes})


def batch(*indices):
    from trimkv.train.data import collate

    return collate([Samples()[i] for i in indices])


def documents(row):
    """(first, end) of each document of a sample."""
    edges = [int(s) for s in row["start"].unique()]
    used = int(row["mask"].sum())
    return [(a, b) for a, b in zip(edges, [*edges[1:], used], strict=True) if a < used][: len(edges)]


def attention_inputs(B=3, H=2, G=3, D=8):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, H * G, CONTEXT, D, generator=g)
    return q, torch.randn(B, H, CONTEXT, D, generator=g), torch.randn(B, H, CONTEXT, generator=g)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_locrets_target_is_the_largest_logit_of_an_answer(softcap, monkeypatch):
    monkeypatch.setitem(QUERIES, "cpu", 5)
    inputs = batch(0, 1, 2)
    q, k, scores = attention_inputs()
    task = LocretTask(Documents.of(inputs["input_ids"], inputs["start"], inputs["mask"]), share=0.25)
    got = task.target(q, k, 0.3, softcap)
    expect, gaps, steps = torch.full_like(got, -math.inf), [], []
    for b in range(3):
        row = {name: t[b] for name, t in inputs.items()}
        for first, end in documents(row):
            cut = first + math.floor(0.75 * (end - first))
            for h in range(2):
                for i in range(first, cut):
                    x = [0.3 * float(q[b, h * 3 + g, t] @ k[b, h, i]) for g in range(3) for t in range(cut, end)]
                    x = x if softcap is None else [softcap * math.tanh(y / softcap) for y in x]
                    expect[b, h, i] = max(x)
                    gap = abs(max(x) - float(scores[b, h, i]))
                    gaps.append(gap * gap / 2 if gap < 1 else gap - 0.5)
                    if i + 1 < cut:
                        steps.append(float(scores[b, h, i + 1] - scores[b, h, i]) ** 2)
    torch.testing.assert_close(got, expect, atol=1e-5, rtol=1e-4)
    losses = task.losses(scores, got)
    assert losses["regression"].item() == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
    assert losses["smoothness"].item() == pytest.approx(sum(steps) / len(steps), rel=1e-4)


def test_seers_target_is_the_pooled_attention(monkeypatch):
    monkeypatch.setitem(QUERIES, "cpu", 5)
    inputs, size, H, G, D = batch(0, 1, 2), 4, 2, 3, 8
    q, k, _ = attention_inputs(H=H, G=G, D=D)
    plain_q, plain_k = q + 1, k - 1
    gate = BlockGate(H, G, D, width=6, block_size=size)
    gate.initialise(std=0.5)
    task = SeerTask(Documents.of(inputs["input_ids"], inputs["start"], inputs["mask"]), size)
    got = task.losses(gate, q, k, plain_q, plain_k, 0.3)
    kls = []
    for b in range(3):
        row = {name: t[b] for name, t in inputs.items()}
        for first, end in documents(row):
            blocks = [range(s, min(s + size, end)) for s in range(first, end, size)]
            for h in range(H):
                pooled = torch.stack(
                    [
                        torch.cat([x.max(0).values, x.min(0).values, x.mean(0)])
                        for x in (plain_k[b, h, list(block)] for block in blocks)
                    ]
                )
                both = pooled[None, None].expand(1, H, -1, -1)
                summary = gate.summary(both, torch.tensor([[block[0] - first for block in blocks]]))[0, h]
                for t in range(first + math.floor(0.5 * (end - first)), end):
                    seen = [block for block in blocks if block[0] <= t]
                    weights = [(q[b, h * G + g, t] @ k[b, h, first : t + 1].T * 0.3).softmax(-1) for g in range(G)]
                    best = torch.stack([max(w[p - first] for w in weights for p in block if p <= t) for block in seen])
                    target = best / best.sum()
                    own = gate.query(plain_q[b : b + 1, :, t : t + 1], torch.tensor([[t - first]]))[0, h, 0]
                    logp = (summary[: len(seen)] @ own * 6**-0.5).log_softmax(-1)
                    kls.append(torch.xlogy(target, target).sum().item() - (target * logp).sum().item())
    assert got["kl"].item() == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert task.index.shape[1] == 7  # of 15 + 9 tokens, the most
    assert got["distillation"].item() == pytest.approx(10 * sum(kls) / len(kls) / 7, rel=1e-4)


def target_errors(B, H, G, T, D, size, dtype, device="cpu", softcap=None, aux=False):
    """Relative RMS of the kernel's loss and of its gradients, on packed documents of odd lengths and padding."""
    torch.manual_seed(T + D)
    first = torch.rand(B, T) < 5 / T
    first[:, 0] = True
    first[0, T // 2 : T // 2 + 3] = True  # documents of one token
    start = torch.where(first, torch.arange(T), 0).cummax(1).values
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[-1, -T // 5 :], start[-1, -T // 5 :] = False, torch.arange(T)[-T // 5 :]
    if B > 1:  # padding to the left
        mask[0, :4], start[0, :4] = False, torch.arange(4)
        start[0, 4:] = start[0, 4:].clamp_min(4)
    q = torch.randn(B, T, H * G, D, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(B, H, T, D, device=device).to(dtype)
    s_aux = torch.randn(H * G, device=device) if aux else None
    gate = BlockGate(H, G, D, width=8, block_size=size).to(device)
    gate.initialise(std=0.5)
    documents = Documents.of(start.to(device), start.to(device), mask.to(device))
    found = []
    for name, given in (("torch", (q.float(), k.float())), ("triton", (q, k))):
        task = SeerTask(documents, size, implementation=name)
        kl = task.losses(gate, *given, q.float() + 1, k.float() - 1, 0.5 * D**-0.5, softcap, s_aux)["kl"]
        found.append([kl, *torch.autograd.grad(kl, list(gate.parameters()))])
    return [((a - b).norm() / b.norm()).item() for b, a in zip(*found, strict=True)]


@interpreted
@pytest.mark.parametrize(
    "shape, dtype, options",
    [
        ((2, 2, 3, 77, 16, 4), torch.float32, {}),
        ((3, 1, 1, 130, 24, 16), torch.float32, {"softcap": 0.4}),
        ((2, 1, 2, 150, 64, 64), torch.float16, {"aux": True}),
        ((1, 2, 1, 70, 80, 1), torch.float32, {}),
    ],
)
def test_interpreted_shares_are_those_of_torch(shape, dtype, options, monkeypatch):
    monkeypatch.setattr("trimkv.train.head_losses.FUSED_QUERIES", 32)
    errors = target_errors(*shape, dtype, **options)
    assert max(errors) < (1e-4 if dtype == torch.float32 else 1e-3), errors


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    interpreter.run_interpreted_tests(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape, options",
    [
        ((2, 3, 3, 2048, 64, 16), {}),
        ((3, 2, 4, 1000, 128, 64), {"softcap": 0.4}),
        ((2, 1, 8, 777, 256, 128), {"aux": True}),
        ((2, 2, 1, 515, 80, 32), {"aux": True, "softcap": 0.4}),
        ((2, 2, 1, 300, 96, 1), {}),
    ],
)
def test_shares_on_a_gpu_are_those_of_torch(shape, options, dtype):
    errors = target_errors(*shape, dtype, "cuda", **options)
    assert max(errors) < (1e-4 if dtype == torch.float32 else 1e-3), errors


@pytest.mark.parametrize("stages, kilobytes", [(1, 99), (2, 227)])
def test_the_largest_blocks_fit_in_shared_memory(stages, kilobytes):
    pytest.importorskip("triton")
    from trimkv.train import head_losses_triton as kernels

    pointers = {name: "*fp32" for name in ("q", "k", "s_aux", "shares")}
    pointers |= {name: "*i32" for name in ("index", "start", "block")}
    numbers = {name: "i32" for name in ("q_b", "q_h", "q_t", "H", "T", "N", "t0", "t1")}
    numbers |= {"scaling": "fp32", "softcap": "fp32"}
    sizes = {"G": 4, "D": 256, "BD": 256, "S": kernels.LARGEST_BLOCK, "BM": 32, "BN": kernels.LARGEST_BLOCK}
    constants = {**sizes, "HAS_CAP": True, "HAS_AUX": True}
    options = {"num_warps": 4, "num_stages": stages}
    kernel = hopper.compiled(kernels._shares_kernel, pointers | numbers, constants, **options)
    assert kernel.metadata.shared <= kilobytes * 1024


def test_the_kernel_says_what_it_cannot_do():
    ids = tiny.tokens(1, CONTEXT)
    q, k, _ = attention_inputs(B=1)
    for size, problem in ((4, "CUDA"), (12, "power of two")):
        gate = BlockGate(2, 3, 8, width=6, block_size=size)
        task = SeerTask(Documents.of(ids, None, None), size, implementation="triton")
        with pytest.raises(ValueError, match=problem):
            task.losses(gate, q, k, q, k, 0.3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "glm4", "stablelm", "gpt_oss"])
def test_training_and_decoding_agree_on_what_was_before_rotation(name):
    model = tiny.build(name)
    module = list(full_attention_modules(model).values())[-1]
    q, k, position = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.arange(9)[None]
    rotary = model.get_decoder().rotary_emb
    back_q, back_k = before_rotation(module, q, k, *rotary(q, position))
    rotation = rotation_of(model, module)
    for ours, theirs in (
        (back_q, rotation.turn(q, -position[:, None])),
        (back_k, rotation.turn(k, -position[:, None])),
    ):
        ratio = ours.norm() / theirs.norm()  # a constant factor is no matter to a normalised gate
        torch.testing.assert_close(ours, theirs * ratio, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_learn_from_the_stock_model_and_nothing_else_learns(kind, name):
    model = tiny.build(name)
    stock = {k: v.clone() for k, v in model.state_dict().items()}
    ids = tiny.tokens(2, CONTEXT)
    want = model(ids).logits
    attach_heads(model, new_heads(model, kind, 8, 4))
    student = HeadStudent(model, settings(kind))
    student.train()
    student(**batch(0, 1, 2))["loss"].backward()
    for parameter_name, parameter in model.named_parameters():
        learns = f".{PLACES[kind]}." in parameter_name
        assert parameter.requires_grad == learns
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == learns, parameter_name
    with torch.no_grad():
        hidden = model.get_decoder()
        student.task, student.losses = SeerTask(Documents.of(ids, None, None), 4), []
        if kind == "locret":
            student.task = LocretTask(Documents.of(ids, None, None))
        student.start = None
        torch.testing.assert_close(model(ids, use_cache=False).logits, want, atol=2e-5, rtol=1e-4)
        assert hidden is model.get_decoder()
    student.release()
    torch.testing.assert_close(model(ids).logits, want)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in stock.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_losses_are_those_of_plain_steps(kind):
    found = []
    for compile in (False, True):
        model = tiny.build("llama").cuda()
        attach_heads(model, new_heads(model, kind, width=8, block_size=4))
        student = HeadStudent(model, settings(kind, compile=compile))
        student.train()
        out = student(**{name: t.cuda() for name, t in batch(0, 1).items()})
        out["loss"].backward()
        found.append([out["loss"].detach(), *(p.grad for p in student.head_parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_sample_do_not_know_each_other(kind):
    model = tiny.build("llama")
    attach_heads(model, new_heads(model, kind, 8, 4))
    student = HeadStudent(model, settings(kind))
    packed = batch(1)
    parts = [{name: t[:, part] for name, t in packed.items()} for part in (slice(0, 15), slice(15, CONTEXT))]
    parts[1]["start"] = parts[1]["start"] - 15
    name, weights = ("regression", (11, 6)) if kind == "locret" else ("kl", (8, 5))
    both, one, two = (student(**inputs)[name] for inputs in (packed, *parts))
    expect = (one * weights[0] + two * weights[1]) / sum(weights)
    torch.testing.assert_close(both, expect, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_writes_heads_alone(kind, tmp_path):
    model = tiny.build("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config = settings(kind, save_steps=40)
    result = train_heads(model, Samples(), config, tmp_path, meta={"data": "random tokens"})
    losses = [entry["loss"] for entry in result["history"]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert result["steps"] == 40 and result["tokens"] == 40 * 2 * CONTEXT and result["method"] == kind
    meta = json.loads((tmp_path / "heads.json").read_text())
    assert meta["kind"] == kind and meta["steps"] == 40 and meta["data"] == "random tokens"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)
    held = {path.name for path in (tmp_path / "checkpoint-40").iterdir()}
    assert "heads.safetensors" in held and "model.safetensors" not in held and "gates.safetensors" not in held
    assert model.config._attn_implementation == "eager"
    other = attach_heads(tiny.build("llama"), tmp_path)
    cache = trimkv.bounded_cache(other, kind, 8)
    other(tiny.tokens(1, 40), past_key_values=cache)
    assert cache.held_tokens == (8 if kind == "locret" else 40)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_same_losses(kind, tmp_path):
    config = settings(kind, steps=8, save_steps=4, accumulation=2)
    whole = train_heads(tiny.build("llama"), Samples(), config, tmp_path / "whole")

    class Kill(Exception):
        pass

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise Kill

    with pytest.raises(Kill):
        train_heads(tiny.build("llama"), Samples(), config, tmp_path / "killed", callbacks=[Killer()])
    resumed = train_heads(tiny.build("llama"), Samples(), config, tmp_path / "killed", resume=True)
    assert [entry["step"] for entry in resumed["history"]] == [5, 6, 7, 8]
    for ours, theirs in zip(resumed["history"], whole["history"][4:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="width is 8 there, 6 here"):
        train_heads(tiny.build("llama"), Samples(), settings(kind, width=6), tmp_path / "killed", resume=True)


def test_steps_and_settings_are_the_published_ones():
    locret, seer = HeadConfig.locret(), HeadConfig.seer_attention_r()
    assert (locret.learning_rate, locret.warmup_steps, locret.steps, locret.clip_value) == (5e-4, 2000, 3000, 0.5)
    assert (seer.learning_rate, seer.warmup_steps, seer.steps, seer.block_size) == (1e-3, 20, 800, 64)
    with pytest.raises(ValueError, match="share"):
        HeadConfig.locret(share=1.0)
    with pytest.raises(ValueError, match="no checkpoint"):
        train_heads(tiny.build("llama"), Samples(), settings("locret"), "/nowhere", resume=True)
