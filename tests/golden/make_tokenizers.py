#!/usr/bin/env python3
"""Writes tokenizers/<name>/tokenizer.json and tokenizers/cases.json: byte-level BPE by the `tokenizers` package, trained here on a few lines,
with the pre-tokenizers of GPT-2, SmolLM, Llama 3 and Qwen2, and the ids that package gives to texts meant to trip a second implementation.

    pip install tokenizers==0.23.3 && python3 tests/golden/make_tokenizers.py
"""
import json
import pathlib
import random

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent / "tokenizers"

LINES = [
    "It's a library: they've built it, we'll use it, I'd say; you're welcome, I'm sure, don't worry.",
    "IT'S LOUD, THEY'VE SHOUTED, WE'LL SEE. In 2024 there were 1234567 of them, 42 here, 7 there.",
    "def f(x):\n    return x ** 2  # a comment\n\n\tif x > 10: print('done')\r\n",
    "Größe, naïve, café, señor, déjà vu; Москва и Петербург; 東京と大阪; 한국어 문장; नमस्ते दुनिया; مرحبا بالعالم",
    "a b  c   d    e\n\n\nf \n g\t\th   \n",
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs; the night is long and the stars are bright.",
    "hello hello hello world world, say hello to the world of words and worlds",
]

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False), byte_level(False)])


KINDS = {
    "gpt2": byte_level(True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]),
    "llama3": split(LLAMA3),
    "qwen2": split(QWEN2),
}


def make(name):
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    tokenizer.pre_tokenizer = KINDS[name]
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(LINES * 3, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if name == "llama3":
        # A word that no sequence of merges makes: whole words go first.
        blob = json.loads(tokenizer.to_str())
        vocab = blob["model"]["vocab"]
        blob["model"]["merges"] = [m for m in blob["model"]["merges"] if "".join(m) != "hello"]
        assert "hello" in vocab
        tokenizer = Tokenizer.from_str(json.dumps(blob))
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B",
                                          special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]),
        ])
    return tokenizer


def texts():
    rng = random.Random(20240511)
    pieces = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "'s", "'S", "'ll", "'LL", "'\u017f", "'x", "'", "''", "hello", " hello",
              "World", "don't", "1", "12", "123", "1234", "\u0664\u0665", "\u00b2", "\u2167", "x1y2", ".", ",", "...", "!?", "(", ")", "--", "$",
              "\u20ac", "\u00e9", "e\u0301", "\u1100\u1161\u11a8", "\uac01", "a\u0323\u0307", "a\u0307\u0323", "\u212b", "\u0928\u0940",
              "\u65e5\u672c", "\U0001f600", "\U0001f468\u200d\U0001f469", "\ufeff", "\u200b", "\u0000", "\u007f", "<|im_start|>", "<|im_end|>",
              "<tool>", "<|im_start", "<tool", "\u0085", "\u2028", "_", "__init__", "A", "\u01c5", "\u02b0", "\u0300"]
    fixed = LINES + ["", " ", "\n", "   ", " \n", "\n ", "a", "'", "' ", " '", "'s", "  's", "x  ", "x \n\n  y", "\r\r\n\n z", "123456789", "1 2 3",
                     "a1b22c333d4444", "...\n\n...", " ...\r\n\r\n", "\n\n\n", "\t\thello", "hello\u00a0world", "'\u017f'S'\u212a"]
    return fixed + ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 12))) for _ in range(160)]


def main():
    cases = {"texts": texts(), "ids": {}}
    for name in KINDS:
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = make(name)
        blob = json.loads(tokenizer.to_str())
        (folder / "tokenizer.json").write_text(json.dumps(blob, ensure_ascii=False, separators=(",", ":")) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>", "special": True}}, indent=1) + "\n")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        cases["ids"][name] = [tokenizer.encode(text, add_special_tokens=False).ids for text in cases["texts"]]
    (HERE / "cases.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
