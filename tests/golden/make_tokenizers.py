#!/usr/bin/env python3
"""Writes tokenizers/<name>/tokenizer.json and tokenizers/cases.json: BPE of two kinds, trained here on a few lines, and the ids that the
`tokenizers` package gives to texts meant to trip a second implementation. Byte-level by that package, with the pre-tokenizers of GPT-2,
SmolLM, Llama 3, Qwen2 and Falcon; by sentencepiece, with the parts that Llama 2's and Mistral's files are made of. The former is written as
llama2/tokenizer.gguf too, for which llama.cpp's rule, written down here, and sentencepiece itself must find the same ids.

    pip install tokenizers==0.23.3 sentencepiece==0.2.3 gguf==0.19.0 && python3 tests/golden/make_tokenizers.py
"""
import io
import json
import pathlib
import random
import re

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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
    "falcon": pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation(behavior="contiguous"), byte_level(True), pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated", invert=False)]),
}
MARK = "\u2581"


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


def train_pieces():
    """(text, score, type) of every piece; types as in the proto: 1 normal, 2 unknown, 3 control, 6 byte, which are GGUF's too."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, model_type="bpe", vocab_size=680, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, split_digits=True,
        allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    kind = lambda i: 6 if model.is_byte(i) else 3 if model.is_control(i) else 2 if model.is_unknown(i) else 1
    return model, [(model.id_to_piece(i), model.get_score(i), kind(i)) for i in range(model.get_piece_size())]


def metaspace(scheme, split):
    return pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme=scheme, split=split)


def make_sentencepiece(name, pieces):
    """Merges are every pair that makes a piece, in the order of the pieces' scores."""
    if name == "mistral":  # control tokens stand before the bytes
        pieces = pieces[:3] + [("[INST]", 0.0, 3), ("[/INST]", 0.0, 3)] + pieces[3:]
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = [(score, piece[:cut], piece[cut:]) for piece, score, kind in pieces if kind == 1 for cut in range(1, len(piece))
              if piece[:cut] in vocab and piece[cut:] in vocab]
    merges = [(left, right) for _, left, right in sorted(merges, key=lambda merge: -merge[0])]
    if name == "metaspace":  # a word that no sequence of merges makes
        assert MARK + "hello" in vocab
        merges = [merge for merge in merges if "".join(merge) != MARK + "hello"]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=name == "metaspace"))
    if name in ("llama", "llama2"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    else:
        tokenizer.pre_tokenizer = metaspace("first", False) if name == "mistral" else metaspace("always", True)
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (name != "metaspace"))
    tokenizer.add_special_tokens([AddedToken(piece, normalized=name == "llama", special=True) for piece, _, kind in pieces if kind in (2, 3)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def write_gguf(path, pieces):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_ids(text, pieces):
    """The tokenizer "llama" of llama.cpp: special tokens first; each text between them gets a space in front; the neighbours whose union
    scores highest are joined, the leftmost of equals, until none is in the vocabulary; what is no token is spelled in bytes."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    special = {piece for piece, _, kind in pieces if kind in (2, 3, 4)}
    ids = []
    for part in re.split("(" + "|".join(re.escape(s) for s in sorted(special, key=len, reverse=True)) + ")", text):
        if part in special:
            ids.append(vocab[part])
            continue
        symbols = list((" " + part).replace(" ", MARK)) if part else []
        while True:
            unions = [(-pieces[vocab[a + b]][1], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in vocab]
            if not unions:
                break
            at = min(unions)[1]
            symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            ids += [vocab[symbol]] if symbol in vocab else [vocab["<0x%02X>" % byte] for byte in symbol.encode()]
    return ids


def texts():
    rng = random.Random(20240511)
    pieces = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "'s", "'S", "'ll", "'LL", "'\u017f", "'x", "'", "''", "hello", " hello",
              "World", "don't", "1", "12", "123", "1234", "\u0664\u0665", "\u00b2", "\u2167", "x1y2", ".", ",", "...", "!?", "(", ")", "--", "$",
              "\u20ac", "\u00e9", "e\u0301", "\u1100\u1161\u11a8", "\uac01", "a\u0323\u0307", "a\u0307\u0323", "\u212b", "\u0928\u0940",
              "\u65e5\u672c", "\U0001f600", "\U0001f468\u200d\U0001f469", "\ufeff", "\u200b", "\u0000", "\u007f", "<|im_start|>", "<|im_end|>",
              "<tool>", "<|im_start", "<tool", "\u0085", "\u2028", "_", "__init__", "A", "\u01c5", "\u02b0", "\u0300", "<s>", "</s>",
              "[INST]", MARK, "\u00bd", "12345", "x\u00b312", "\u00bf", "\u00a7", "\u3002", "\u2e52", "=>", "the ", " of"]
    fixed = LINES + ["", " ", "\n", "   ", " \n", "\n ", "a", "'", "' ", " '", "'s", "  's", "x  ", "x \n\n  y", "\r\r\n\n z", "123456789", "1 2 3",
                     "a1b22c333d4444", "...\n\n...", " ...\r\n\r\n", "\n\n\n", "\t\thello", "hello\u00a0world", "'\u017f'S'\u212a"]
    return fixed + ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 12))) for _ in range(160)]


def write(name, tokenizer, config):
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    blob = json.loads(tokenizer.to_str())
    if name == "llama2":  # as releases before 2024 wrote them
        blob["model"]["merges"] = [" ".join(merge) for merge in blob["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(blob, ensure_ascii=False, separators=(",", ":")) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode(tokenizer, texts):
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def main():
    cases = {"texts": texts(), "ids": {}, "sentencepiece": {}}
    for name in KINDS:
        tokenizer = write(name, make(name), {"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>", "special": True}})
        cases["ids"][name] = encode(tokenizer, cases["texts"])
    model, pieces = train_pieces()
    for name in ("llama", "llama2", "mistral", "metaspace"):  # the first: as Llama was converted first, its special tokens normalized
        tokenizer = write(name, make_sentencepiece(name, pieces), {"bos_token": "<s>", "eos_token": "</s>"})
        ids = encode(tokenizer, cases["texts"])
        decoded = [tokenizer.decode(one, skip_special_tokens=False) for one in ids]
        cases["sentencepiece"][name] = {"ids": ids, "decoded": [None if a == b else a for a, b in zip(decoded, cases["texts"])]}
    pieces.append(("<tool>", 0.0, 4))
    write_gguf(HERE / "llama2" / "tokenizer.gguf", pieces)
    for text, ids in zip(cases["texts"], cases["sentencepiece"]["llama2"]["ids"]):
        assert llama_cpp_ids(text, pieces) == ids, text
        if not re.search("<tool>|</?s>", text):
            assert model.encode(text) == ids, text
    (HERE / "cases.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
