"""A tokenizer of bytes with a chat template, and model folders that use it: the command line without a download."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tiny import build

SPECIAL = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 256 + len(SPECIAL)


def byte_tokenizer(chat_template: str | None = CHATML, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; ``bos`` puts <s> before every text, as Llama's tokenizers do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
    )


def chat_model(architecture: str = "llama", seed: int = 0, **changes):
    """A tiny random model that ends its turns with <|im_end|>."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    return build(architecture, seed=seed, **{"vocab_size": VOCABULARY, **ids, **changes})


def save_model(folder: Path, tokenizer=None, **changes) -> Path:
    """A folder that ``--model`` takes."""
    chat_model(**changes).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder
