"""Times decoding with the authors' package (PyPI: trimkv 0.1.5), which has our import name: run it in an environment of
its own, see README.md. Weights and tokens are random.

    python decode.py --shape qwen3-4b --budget 1024        # one GPU, about a minute
"""

import argparse
import importlib.machinery
import json
import statistics
import sys
import time
import types

import torch

SHAPES = {
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151_936),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151_936),
    "tiny": (64, 96, 2, 4, 2, 16, 128),
}


def without_flash_attn() -> None:
    """The package imports flash-attn at its start and does not use it with sdpa."""

    def missing(*args, **kwargs):
        raise RuntimeError("flash-attn is not installed")

    whole, part = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    part.flash_attn_varlen_func = part.flash_attn_with_kvcache = missing
    for module in (whole, part):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--prompt", type=int, help="tokens  [default: twice the budget]")
    parser.add_argument("--steps", type=int, default=256)
    args = parser.parse_args()
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        without_flash_attn()
    import transformers

    from trimkv.cache_utils import TrimKVCache
    from trimkv.models.qwen3 import TrimKVQwen3Config, TrimKVQwen3ForCausalLM

    hidden, intermediate, layers, queries, heads, dim, vocabulary = SHAPES[args.shape]
    config = TrimKVQwen3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=queries,
        num_key_value_heads=heads,
        head_dim=dim,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        memory_size=args.budget,
        buffer_size=args.buffer,
        compress_memory=True,
        retention_gate="rg",
    )
    config._attn_implementation = "sdpa"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = TrimKVQwen3ForCausalLM(config).eval()
    prompt = args.prompt or 2 * args.budget
    ids = torch.randint(0, vocabulary, (1, prompt), device=device)  # rows of a batch need flash-attn there
    cache, times, held = TrimKVCache(memory_size=args.budget, buffer_size=args.buffer), [], 0
    with torch.inference_mode():
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:]
        for step in range(args.steps + 16):
            begin = time.perf_counter()
            where = torch.tensor([prompt + step], device=device)
            logits = model(
                input_ids=logits.argmax(-1),
                position_ids=where[None],
                cache_position=where,
                past_key_values=cache,
                use_cache=True,
            ).logits
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
            held = max(held, cache.key_cache[0].shape[-2])
    ms = statistics.fmean(times[16:])  # a mean, as evictions come in some steps only
    result = {
        "system": "trimkv 0.1.5 (the authors')",
        "shape": args.shape,
        "batch": 1,
        "budget": args.budget,
        "buffer": args.buffer,
        "prompt": prompt,
        "steps": args.steps,
        "ms": round(ms, 3),
        "tokens_per_second": round(1e3 / ms, 1),
        "held_tokens_per_head": held,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
