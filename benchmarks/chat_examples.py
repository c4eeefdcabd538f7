"""What a small budget does to answers: five prompts longer than the budget, with the full cache and with bounded ones.

    python benchmarks/chat_examples.py        # about 3 minutes on 2 cores
    python benchmarks/chat_examples.py --temperature 0.2 --top-p 0.9 --repetition-penalty 1.1 --chunk 512 \
        --name chat_examples_chat             # as `trimkv chat` decodes

The prompts lie in examples/chat. Decoding is greedy if nothing else is asked for. The prompt goes through in chunks of
64 tokens, so that no query ever attends to more than budget + 64 tokens in it and to no more than the budget in the
answer.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from record import save
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimkv
from trimkv import embedded

PROMPTS = Path(__file__).parents[1] / "examples" / "chat"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--gates", default="bundled")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of every answer")
    parser.add_argument("--name", default="chat_examples")
    args = parser.parse_args()
    folder = embedded.resolve("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config._name_or_path = "smollm2"
    trimkv.attach(model, args.gates)
    how = {"do_sample": False, "repetition_penalty": args.repetition_penalty}
    if args.temperature:
        how |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    examples = []
    for path in sorted(PROMPTS.glob("*.txt")):
        turn = [{"role": "user", "content": path.read_text(encoding="utf-8").strip()}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answers = {}
        for policy in ("full", "streaming_llm", "trimkv"):
            cache = trimkv.bounded_cache(model, policy, args.budget, chunk=args.chunk)
            ids = inputs.input_ids
            torch.manual_seed(args.seed)
            out = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.new_tokens, **how)
            new = out[0, ids.shape[1] :].tolist()
            answers[policy] = {
                "text": tokenizer.decode(new, skip_special_tokens=True).strip(),
                "tokens": len(new),
                "ended": new[-1] == tokenizer.eos_token_id,
                "repeated_4grams": round(repeated(new), 3),
            }
            print(f"\n## {path.stem}, {ids.shape[1]} tokens, {policy}\n{answers[policy]['text']}", flush=True)
        examples.append({"prompt": path.name, "prompt_tokens": ids.shape[1], "answers": answers})
    asked = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    asked["repetition_penalty"] = args.repetition_penalty
    save(args.name, {"model": "smollm2", **asked, "budget": args.budget, "chunk": args.chunk, "examples": examples})


def repeated(tokens: list[int], n: int = 4) -> float:
    """Share of n-grams that were there before: above a half, a text goes round in circles."""
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


if __name__ == "__main__":
    main()
