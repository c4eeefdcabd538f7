"""Calls side by side on one GPU, and masks that are looked at without waiting for it."""

import threading

import pytest
import torch

import tiny
import trimkv
from tiny import generate
from trimkv.hf.calls import with_cache

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model():
    return tiny.gated("qwen3").cuda()


def test_threads_get_what_single_runs_get(model):
    policies = ["trimkv", "streaming_llm", "h2o", "snapkv", "locret", None]

    def run(i: int):
        ids = tiny.tokens(1, 20 + i % 7, seed=i).cuda()
        policy = policies[i % 6]
        return generate(model, ids, policy and trimkv.bounded_cache(model, policy, 20, chunk=8), new=8)[0]

    alone = [run(i) for i in range(18)]
    wrong, todo = [], list(range(90))

    def work():
        while todo:
            i = todo.pop()
            try:
                if not torch.equal(run(i % 18), alone[i % 18]):
                    wrong.append(i)
            except Exception as error:
                wrong.append(f"{i}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("fast_start", [True, False])
def test_generate_beside_an_engine_that_captures_and_replays_graphs(fast_start):
    """Another thread's calls run while fused layers are captured and replayed."""
    model = tiny.build("llama").cuda()
    ids = [tiny.tokens(1, 16, seed=i).cuda() for i in range(4)]
    plain = [generate(model, one)[0] for one in ids]
    kept = [generate(model, one, trimkv.bounded_cache(model, "streaming_llm", 12))[0] for one in ids]
    prompts = [one[0].tolist() for one in ids]
    params = trimkv.SamplingParams(30, ignore_eos=True)
    with trimkv.Engine(model, "streaming_llm", 12, rows=2, chunk=8, fast_start=fast_start) as engine:
        expected = [request.tokens for request in engine.generate(prompts, params)]
    with trimkv.Engine(model, "streaming_llm", 12, rows=2, chunk=8, fast_start=fast_start) as engine:
        engine.start()
        requests = [engine.add(prompt, params) for prompt in prompts * 6]
        for _ in range(2):
            for one, stock, bounded in zip(ids, plain, kept, strict=True):
                assert torch.equal(generate(model, one)[0], stock)
                assert torch.equal(generate(model, one, trimkv.bounded_cache(model, "streaming_llm", 12))[0], bounded)
        assert [request.result().tokens for request in requests] == expected * 6


def test_a_wrong_mask_in_decode_steps_is_refused_by_a_later_one(model):
    """A step doesn't wait for the device, so that it can't know at once."""
    ids, mask = tiny.tokens(2, 60).cuda(), torch.ones(2, 60, dtype=torch.long, device="cuda")
    cache = trimkv.bounded_cache(model, "streaming_llm", 64)
    with torch.no_grad():
        model(ids[:, :20], attention_mask=mask[:, :20], **with_cache(model, cache))
        for t in range(20, 30):
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], **with_cache(model, cache))
        mask[1, 3:9] = 0
        with pytest.raises(ValueError, match="leaves out"):
            for t in range(30, 60):
                model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], **with_cache(model, cache))


def test_looking_at_masks_of_decode_steps_waits_for_nothing(model):
    ids, mask = tiny.tokens(2, 60).cuda(), torch.ones(2, 60, dtype=torch.long, device="cuda")
    cache = trimkv.bounded_cache(model, "streaming_llm", 24)
    with torch.no_grad():
        model(ids[:, :30], attention_mask=mask[:, :30], **with_cache(model, cache))
        position = torch.arange(60, device="cuda").expand(2, -1)
        try:
            for t in range(30, 60):
                torch.cuda.set_sync_debug_mode("error" if t > 35 else "default")
                given = {"attention_mask": mask[:, : t + 1], "position_ids": position[:, t : t + 1]}
                model(ids[:, t : t + 1], **given, **with_cache(model, cache))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_cache_that_was_filled_in_inference_mode_serves_outside_of_it(model):
    ids = tiny.tokens(1, 60).cuda()
    for policy in ("trimkv", "h2o", "streaming_llm"):
        expected = generate(model, ids, trimkv.bounded_cache(model, policy, 24, chunk=8))[0]
        with torch.inference_mode():
            cache = trimkv.bounded_cache(model, policy, 24, chunk=8)
            trimkv.prefill(model, cache, ids[:, :56], chunk=8)
        assert torch.equal(generate(model, ids, cache)[0], expected)
