"""How often do answers go round in circles or break off? Prompts longer than the budget, many of them.

    python benchmarks/chat_fluency.py --text novels/valid.jsonl.gz      # half a minute on a GPU, long on a CPU

A small model loops without any eviction too, so every share is to be read beside that of the full cache. A prompt is a
task about a passage of a novel; it goes through in chunks, and the answer is written with no more than the budget.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from chat_examples import repeated
from record import RESULTS, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimkv
from trimkv import embedded
from trimkv.gates.head_sets import attach_heads
from trimkv.texts import read_texts

TASKS = (
    "Tell me in a few sentences what happens here.\n\n{}",
    "{}\n\nList the people in this passage and say what each of them wants.",
    "Write a friendly reply to the person who tells this.\n\n{}",
    "{}\n\nWhat would you advise them to do? Give three pieces of advice.",
    "Write the next paragraph of this story.\n\n{}",
    "{}\n\nWhere and when does this take place? Explain how you know.",
    "Retell this passage to a child.\n\n{}",
    "{}\n\nAsk five questions about this text and answer them.",
)
CHARACTERS = (1100, 1400, 1700, 2200)
LOOP, SHORT = (
    0.5,
    12,
)  # share of 4-grams said before, above which a text goes round; tokens of an answer that breaks off


def prompts(texts: list[str], number: int) -> list[str]:
    """The same for everyone."""
    draw = random.Random(0)
    made = []
    for i in range(number):
        text, size = draw.choice(texts), draw.choice(CHARACTERS)
        start = draw.randrange(len(text) - size)
        made.append(TASKS[i % len(TASKS)].format(text[start : start + size].strip()))
    return made


@torch.inference_mode()
def measure(model, tokenizer, inputs, policy: str, temperature: float, args) -> dict:
    begin = time.perf_counter()
    torch.manual_seed(0)
    cache = trimkv.bounded_cache(model, policy, args.budget, chunk=args.chunk)
    how = {"do_sample": True, "temperature": temperature, "top_p": args.top_p, "top_k": 0} if temperature else {}
    how = {"do_sample": False, "repetition_penalty": args.repetition_penalty, **how}
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.new_tokens, **how)
    answers, ended = [], 0
    for tokens in out[:, inputs.input_ids.shape[1] :].tolist():
        if tokenizer.eos_token_id in tokens:
            ended += 1
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        answers.append(tokens)
    number = len(answers)
    return {
        "policy": policy,
        "budget": None if policy == "full" else args.budget,
        "temperature": temperature,
        "top_p": args.top_p if temperature else None,
        "repetition_penalty": args.repetition_penalty,
        "loops": round(sum(repeated(tokens) > LOOP for tokens in answers) / number, 3),
        "repeated_4grams": round(sum(map(repeated, answers)) / number, 3),
        "broken_off": round(sum(len(tokens) < SHORT for tokens in answers) / number, 3),
        "ended": round(ended / number, 3),
        "mean_tokens": round(sum(map(len, answers)) / number, 1),
        "peak_decode_tokens_per_head": cache.peak_decode_tokens,
        "seconds": round(time.perf_counter() - begin, 1),
        "first_answers": [tokenizer.decode(tokens).strip() for tokens in answers[:3]],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="novels: .txt or .jsonl with `text`, also .gz")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--gates", default="bundled")
    parser.add_argument(
        "--heads", default="", help="bundled names or folders of trained baselines, with commas between"
    )
    parser.add_argument("--policies", default="full,streaming_llm,trimkv")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--temperatures", default="0,0.7")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--name", default="chat_fluency")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    args = parser.parse_args()
    place = embedded.resolve(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).to(device).eval()
    model.config._name_or_path = str(args.model)
    trimkv.attach(model, args.gates)
    for heads in filter(None, args.heads.split(",")):
        attach_heads(model, heads)
    texts = [text.text for text in read_texts([args.text])]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts(texts, args.prompts)]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(device)
    lengths = inputs.attention_mask.sum(1)
    assert int(lengths.min()) > args.budget, "every prompt has to be longer than the budget"
    rows = []
    for temperature in map(float, args.temperatures.split(",")):
        for policy in args.policies.split(","):
            rows.append(measure(model, tokenizer, inputs, policy, temperature, args))
            print({name: value for name, value in rows[-1].items() if name != "first_answers"}, flush=True)
    facts = {"model": args.model, "prompts": args.prompts, "new_tokens": args.new_tokens, "chunk": args.chunk}
    facts |= {"prompt_tokens": [int(lengths.min()), int(lengths.max())]}
    save(args.name, {**facts, "rows": rows}, args.folder)


if __name__ == "__main__":
    main()
