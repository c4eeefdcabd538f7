"""Every causal language model class of transformers, tiny and random, over slots: what works, what is refused and why.

    python tests/architectures.py                      # all: about five minutes
    python tests/architectures.py llama gpt2 opt       # some
    make architectures                                 # all, with two releases, and docs/architectures.md

A model works if its text is that of the stock cache and its logits agree, with a budget above the length: prompts in
one chunk and in several, batches with left padding, and policy trimkv with random gates.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import trimkv
from trimkv.gates.attach import new_gates
from trimkv.hf.calls import with_cache
from trimkv.hf.model import cache_layers, is_full_attention

LAYERS = 4
# Small values for the fields that many configurations share.
SIZES = {
    **dict.fromkeys(("vocab_size", "n_words"), 128),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "dim_model", "embed_dim", "hidden_dim"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "dim_ff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_key_value_groups"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "kv_channels", "v_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "q_lora_rank", "kv_lora_rank", "index_head_dim", "adaptor_hidden_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "index_n_heads", "encoder_layers"), 2),
    **dict.fromkeys(("moe_num_active_primary_experts", "mamba_expand", "num_codebooks"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("rotary_dim", "rotary_ndims", "qk_rope_head_dim", "sliding_window", "attention_window_size"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_d_conv", "block_size"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input", "num_kv_shared_layers", "num_nextn_predict_layers"), 0),
    "vocab_size_per_layer_input": 128,
    "audio_vocab_size": 64,
    "index_topk": 64,
    "image_size": 28,
    "patch_size": 14,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # multi-head latent attention
DECODER = {"is_decoder": True}
HALF = {"encoder_layers": LAYERS, "is_decoder": True, "is_encoder_decoder": False}  # the decoder of a pair
ALSO = {
    **dict.fromkeys("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4".split(), LATENT),
    **dict.fromkeys("minicpm3 youtu".split(), LATENT),
    **dict.fromkeys("bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart".split(), HALF),
    **dict.fromkeys("trocr whisper".split(), HALF),
    **dict.fromkeys(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert".split(), DECODER
    ),
    **dict.fromkeys(
        "rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl".split(), DECODER
    ),
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": None},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT, "layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {**LATENT, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "n_routed_experts": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": 4096},  # beyond the context, as in published files
    "starcoder2": {"sliding_window": None},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    **dict.fromkeys(("dots3_note_text", "dots3_note"), {"num_key_value_heads": 4}),
    "sarvam_mla": LATENT,
    "reformer": {**DECODER, "axial_pos_embds": False, "attn_layers": ["local"] * LAYERS},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
LARGEST = 60_000_000  # parameters
KINDS = ("works", "refused", "differs", "not built")


@dataclass
class Verdict:
    """What became of a model type.

    Attributes:
        kind: "works", "refused", "differs", or "not built" where this file has no tiny configuration of it.
        reason: why, or what is special.
        engine: whether a static cache, as the engine needs it, can be made.
        slots: layers that have slots, of how many.
    """

    model_type: str
    name: str
    kind: str
    reason: str = ""
    engine: bool = False
    slots: str = ""


def tiny_config(model_type: str, cls=None):
    """A small configuration of a model type, its parts made small too."""
    cls = cls or CONFIG_MAPPING[model_type]
    known = cls.__dataclass_fields__
    values = {name: value for name, value in SIZES.items() if name in known}
    if "sliding_window" in known and known["sliding_window"].default is None:
        del values["sliding_window"]
    values |= ALSO.get(model_type, {})
    parts = [name for name in getattr(cls, "sub_configs", None) or {} if name in known]
    if parts:
        whole = cls()
        for name in (name for name in parts if name not in values):
            part = getattr(whole, name, None)
            if hasattr(part, "__dataclass_fields__"):
                values[name] = tiny_config(part.model_type, type(part))
    return cls(**values)


def build(model_type: str, gain: float = 3.0):
    """A random model; matrices scaled up, so that attention is not nearly uniform and hides nothing."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters even so")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.is_floating_point() and "embed" not in name:
                parameter.mul_(gain)
    return model


def check(model_type: str) -> Verdict:
    """Compares a model over slots with itself over the stock cache."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        model = build(model_type)
        ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
        stock = generate(model, ids)
    except Exception as error:  # transformers' own: no configuration, or a forward that needs more than text
        return Verdict(model_type, name, "not built", _line(error))
    try:
        trimkv.bounded_cache(model, "streaming_llm", 64)
    except ValueError as error:
        return Verdict(model_type, name, "refused", str(error).removeprefix(f"a bounded cache can't serve {name}: it "))
    layers = cache_layers(model)
    slots = f"{sum(is_full_attention(layer) for layer in layers)} of {len(layers)}"
    try:
        note = compare(model, ids, stock)
    except Exception as error:
        return Verdict(model_type, name, "differs", _line(error), slots=slots)
    try:
        trimkv.bounded_cache(model, "streaming_llm", 64, rows=1)
        engine = True
    except ValueError:
        engine = False
    return Verdict(model_type, name, "works", note, engine, slots)


def compare(model, ids, stock) -> str:
    """Raises where slots and the stock cache differ. Returns what a user has to know."""
    for chunk in (512, 7):
        same(
            generate(model, ids, trimkv.bounded_cache(model, "streaming_llm", 64, chunk=chunk)), stock, f"chunk {chunk}"
        )
    if padding_agrees(model, ids):
        mask = torch.ones_like(ids)
        mask[1, :9] = 0
        padded = generate(model, ids * mask, None, mask)
        same(generate(model, ids * mask, trimkv.bounded_cache(model, "streaming_llm", 64), mask), padded, "padding")
        note = ""
    else:
        note = "a padded row differs from its single run with the stock cache too"
    try:
        trimkv.attach(model, new_gates(model, intermediate_size=16))
    except ValueError as error:
        return f"{note}; no gates: {error}".removeprefix("; ")
    same(generate(model, ids, trimkv.bounded_cache(model, "trimkv", 64, chunk=7)), stock, "gates")
    text, _ = generate(model, ids, trimkv.bounded_cache(model, "trimkv", 12, chunk=7))
    if text.shape != stock[0].shape:
        raise AssertionError("an evicting run is of another length")
    trimkv.detach(model)
    same(generate(model, ids), stock, "after detach")
    return note


def padding_agrees(model, ids) -> bool:
    """Whether the stock model gives a left-padded row what it gives the row alone."""
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    padded, alone = generate(model, ids * mask, None, mask), generate(model, ids[1:, 9:])
    return torch.equal(padded[0][1, 9:], alone[0][0])


def generate(model, ids, cache=None, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy text and its logits."""
    given = {} if cache is None else with_cache(model, cache)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **given,
    )
    return out.sequences, torch.stack(out.logits, 1)


def same(found, expected, what: str) -> None:
    scale = expected[1].float().std()
    error = float((found[1] - expected[1]).abs().max() / scale)
    if not torch.equal(found[0], expected[0]) or not error < 1e-3:
        raise AssertionError(f"{what}: logits differ by {error:.2g} of their spread")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else text[:157] + "..."


def page(results: list[dict]) -> str:
    """The page of the documentation.

    Args:
        results: what ``--save`` has written, one for each release of transformers, oldest first.
    """
    releases = [result["transformers"] for result in results]
    found = [{one["model_type"]: Verdict(**one) for one in result["verdicts"]} for result in results]
    names = sorted(set().union(*found))
    lines = [
        "# Architectures",
        "",
        "Every causal language model class of transformers, tiny and random, over slots. A model **works** if its text",
        "and logits are those of the stock cache with more budget than tokens: in one chunk, in several, with left",
        "padding and with retention gates. It is **refused** in one line when the cache is made; reasons are below.",
        "**engine** says that a static cache can be made too, which `Engine` and CUDA graphs need. Models with sliding",
        "windows or linear attention have slots in their full-attention layers only.",
        "",
        "`make architectures` makes this page: `tests/architectures.py` in an environment with the tested releases and",
        "in one with the newest.",
        "",
        "| transformers | " + " | ".join(KINDS) + " |",
        "|---|" + "---|" * len(KINDS),
    ]
    for release, verdicts in zip(releases, found, strict=True):
        counts = (str(sum(v.kind == kind for v in verdicts.values())) for kind in KINDS)
        lines.append(f"| {release} | {' | '.join(counts)} |")
    heads = " | ".join(releases)
    lines += [
        "",
        f"| model type | class | {heads} | layers with slots | note |",
        "|---|---|" + "---|" * (len(found) + 2),
    ]
    for name in names:
        known = [verdicts.get(name) for verdicts in found]
        last = next(v for v in reversed(known) if v is not None)
        if not any(v is not None and v.kind in ("works", "differs") for v in known):
            continue
        cells = ("" if v is None else "works, engine" if v.engine else v.kind for v in known)
        notes = dict.fromkeys(v.reason for v in known if v is not None and v.reason)
        lines.append(f"| {name} | {last.name} | {' | '.join(cells)} | {last.slots} | {'; '.join(notes)} |")
    for kind, title in (("refused", "Refused"), ("not built", "Not checked")):
        lines += ["", f"## {title}", ""]
        if kind == "not built":
            lines += ["transformers could not generate text with the tiny model that the script makes of these.", ""]
        for name in names:
            known = [verdicts.get(name) for verdicts in found]
            if all(v is None or v.kind not in ("works", "differs") for v in known):
                last = next(v for v in reversed(known) if v is not None)
                if last.kind == kind:
                    lines.append(f"- {name} ({last.name}): {'it ' if kind == 'refused' else ''}{last.reason}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types  [default: all]")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="write what was found")
    parser.add_argument("--page", type=Path, nargs="+", metavar="FILE.json", help="print the page of saved results")
    args = parser.parse_args()
    if args.page:
        print(page([json.loads(path.read_text()) for path in args.page]), end="")
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    verdicts = []
    for model_type in args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        begin = time.perf_counter()
        verdicts.append(check(model_type))
        v = verdicts[-1]
        seconds = time.perf_counter() - begin
        print(f"{v.model_type:24} {v.kind:10} {v.slots:8} {v.reason}  ({seconds:.1f} s)", flush=True)
    if args.save:
        found = {"transformers": transformers.__version__, "verdicts": [asdict(v) for v in verdicts]}
        args.save.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(v.kind == "differs" for v in verdicts))


if __name__ == "__main__":
    main()
