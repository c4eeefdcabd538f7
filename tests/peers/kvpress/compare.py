"""In our environment: the same weights and token ids through our policies, and are the same tokens kept?

    python compare.py FOLDER        # what dump.py wrote; exit status 1 if anything differs

One prefill with chunk=None: every token attends in full, then the best M of all stay. What is expected is either the
press's kept set, or what our rules make of the press's own scores (``newest_of_ties``, ``half_recent``); the README
beside this file says why. Two scores that differ by less than TOLERANCE count as equal: then either token may stay.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

import trimkv
from trimkv.cache.policies import Policy, make

MODELS = ("llama", "qwen3")
TOLERANCE = 1e-5  # relative; the two environments have different versions of transformers


@dataclass(frozen=True)
class Data:
    kept: torch.Tensor  # bool [L, B, H, S]
    scores: torch.Tensor  # fp32 [L, B, H, S]


@dataclass(frozen=True)
class Case:
    """A policy to set beside a press, and what its kept set should be, given what the press kept and scored."""

    policy: Callable[[], Policy]
    expected: Callable[[Data, int], torch.Tensor]
    dumped: str = ""


def the_same(peer: Data, M: int) -> torch.Tensor:
    return peer.kept


def newest_of_ties(peer: Data, M: int) -> torch.Tensor:
    """The M best of the press's scores; among equal ones the newest. (torch.topk leaves that open.)"""
    return _best(peer.scores.double(), M)


def half_recent(peer: Data, M: int) -> torch.Tensor:
    """The newest M / 2 tokens, and the best of the press's scores among the others."""
    scores = peer.scores.double()
    scores[..., -(M // 2) :] = float("inf")
    return _best(scores, M)


def _best(scores: torch.Tensor, M: int) -> torch.Tensor:
    newest_first = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :M]
    index = scores.shape[-1] - 1 - newest_first
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)


def bare(policy: Policy) -> Policy:
    """Without the share of the budget that the method reserves for the newest tokens."""
    policy.recent_share = 0.0
    return policy


CASES = {
    "knorm": Case(lambda: make("knorm"), the_same),
    "keydiff": Case(lambda: make("keydiff"), the_same),
    "tova": Case(lambda: make("tova"), the_same),
    "streaming_llm": Case(lambda: make("streaming_llm"), the_same),
    "snapkv": Case(lambda: make("snapkv", window=8), the_same),
    "snapkv_kernel_7": Case(lambda: make("snapkv", window=20, kernel=7), the_same),
    "expected_attention": Case(lambda: make("expected_attention"), the_same),
    "expected_attention_epsilon": Case(lambda: make("expected_attention", epsilon=1e-2), the_same),
    "expected_attention_mean": Case(
        lambda: make("expected_attention", future=64, covariance=False, value_norm=False), the_same
    ),
    "lagkv": Case(lambda: make("lagkv", lag=8), the_same),
    "lagkv_ties": Case(lambda: make("lagkv", lag=8), newest_of_ties),
    "lagkv_small_budget": Case(lambda: make("lagkv", lag=8), newest_of_ties),
    "lagkv_default": Case(lambda: make("lagkv"), newest_of_ties),
    "observed_attention": Case(lambda: bare(make("h2o", age_normalised=True)), the_same),
    "h2o_age_normalised": Case(lambda: make("h2o", age_normalised=True), half_recent, "observed_attention"),
}


def ours(model, ids: torch.Tensor, policy: Policy, M: int) -> torch.Tensor:
    """bool [L, B, H, S]: what stays of the prompt."""
    cache = trimkv.bounded_cache(model, policy, M, chunk=None)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    position = torch.stack([layer.store.view().position for layer in cache.slot_layers]).long()
    assert position.shape[-1] == M and (position >= 0).all()
    return torch.zeros(*position.shape[:3], ids.shape[1], dtype=torch.bool).scatter(3, position, True)


def excused(kept: torch.Tensor, expected: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """bool [L, B, H]: heads where the sets differ only in tokens whose scores are the same but for rounding."""
    differ = kept != expected
    low = scores.masked_fill(~differ, float("inf")).amin(-1)
    high = scores.masked_fill(~differ, float("-inf")).amax(-1)
    return differ.any(-1) & (high - low <= TOLERANCE * high.abs())


def main() -> int:
    folder = Path(sys.argv[1])
    transformers.utils.logging.disable_progress_bar()
    print(f"peer: {(folder / 'versions.txt').read_text().strip()}")
    print(f"ours: trimkv {trimkv.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'case':28}{'model':8}{'M':>5}{'heads':>7}{'press':>7}{'expected':>10}{'rounding':>10}{'differ':>8}")
    failed = False
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        data = np.load(folder / f"{name}.npz")
        ids = torch.from_numpy(data["ids"])
        _check_inputs(model, ids, torch.from_numpy(data["keys"]))
        unknown = {key.split("/")[0] for key in data if "/" in key} - set(CASES)
        assert not unknown, f"presses with nothing beside them: {unknown}"
        for case, how in CASES.items():
            for M in _budgets(data, how.dumped or case):
                row = _row(model, ids, data, case, M)
                failed |= row[-1] > 0
                print(f"{case:28}{name:8}{M:5}{row[0]:7}{row[1]:7}{row[2]:10}{row[3]:10}{row[4]:8}")
        failed |= _control(model, ids, data)
    print("FAILED" if failed else "all kept sets as expected")
    return int(failed)


def _row(model, ids, data, case: str, M: int) -> tuple[int, ...]:
    """Layers x rows x heads, how many keep the press's set, the expected set, one that rounding excuses, another."""
    how = CASES[case]
    peer = _peer(data, how.dumped or case, M, ids.shape[1])
    kept, expected = ours(model, ids, how.policy(), M), how.expected(peer, M)
    same = (kept == expected).all(-1)
    rounding = excused(kept, expected, peer.scores)
    as_press = (kept == peer.kept).all(-1)
    return tuple(int(t.sum()) for t in (torch.ones_like(same), as_press, same, rounding, ~(same | rounding)))


def _peer(data, case: str, M: int, S: int) -> Data:
    kept, scores = (torch.from_numpy(data[f"{case}/{M}/{what}"]) for what in ("kept", "scores"))
    if scores.shape[2] != kept.shape[2]:  # one score for all heads
        scores = scores.expand(*kept.shape[:3], S)
    return Data(torch.zeros(*kept.shape[:3], S, dtype=torch.bool).scatter(3, kept, True), scores)


def _budgets(data, case: str) -> list[int]:
    return sorted(int(key.split("/")[1]) for key in data if key.startswith(f"{case}/") and key.endswith("/kept"))


def _check_inputs(model, ids, keys) -> None:
    """Both environments must see the same keys, else nothing below means anything."""
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    torch.testing.assert_close(torch.stack([layer.keys for layer in layers]), keys, rtol=1e-4, atol=1e-5)


def _control(model, ids, data) -> bool:
    """A wrong score must show: knorm is not keydiff, in no head."""
    equal = (ours(model, ids, make("knorm"), 48) == _peer(data, "keydiff", 48, ids.shape[1]).kept).all(-1)
    if equal.any():
        print("control: knorm keeps what keydiff keeps; this check would not see a wrong score")
    return bool(equal.any())


if __name__ == "__main__":
    sys.exit(main())
