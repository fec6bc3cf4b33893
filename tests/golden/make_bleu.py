#!/usr/bin/env python3
"""Writes bleu.json: words that sacrebleu's tokenizer 13a makes of texts meant to trip a second implementation, and corpus BLEU by
sacrebleu's defaults, with all that it is made of.

    pip install sacrebleu==2.6.0 && python3 tests/golden/make_bleu.py
"""
import json
import pathlib
import random

from sacrebleu.metrics import BLEU

TEXTS = [
    "", " ", "one", "It's a well-known fact, isn't it?", "Hello, world.", "a,b.c", "1,234.56 and 1. 2, 3.", "pi is 3.14159.", ".5 and ,5 and 5.",
    "5.a a.5 5,a a,5", "...", "a...b", "1...2", "wait.., what", "10-20 pages, a-b, 3-", "-5 - 5-", "pre-\nfix and a\nline", "ends in a dash-\n",
    "ends in a dash-\n\n x", "<skipped> text<skipped>", "&quot;Hi&quot; &amp; &lt;b&gt; &amp;lt; &amp;amp;", "&apos; &", "$100.50, 50% (or #7)!",
    "[x]{y}<z>|~`^_\\/@*+=;:\"'", "na\u00efve caf\u00e9, d\u00e9j\u00e0 vu.", "\u041c\u043e\u0441\u043a\u0432\u0430, \u0420\u043e\u0441\u0441\u0438\u044f.",
    "\u6771\u4eac\u3002\u5927\u962a\u3001\u4eac\u90fd\u3000x", "no\u00a0break\u2003em\u2009thin\u202fnarrow\u205fmath\u1680ogham",
    "zero\u200bwidth\ufeffmark", "line\u2028separator\u2029paragraph\u0085next", "unit\x1fseparator\x1cfile\x1dgroup\x1erecord", "tab\tfeed\x0bform\x0c",
    "\u201cquotes\u201d \u2013 dashes \u2014 \u2026", "emoji \U0001f600.\U0001f600, \U0001f600", "\u0663.\u0664 \uff11.\uff12", "e.g. U.S.A., i.e. Mr. X",
    "  spaces   all  around  ", "a.\u00e9 \u00e9.a \u00e9,\u00e9", "1.\u00e9 \u00e9.1", "1,2,3,,4..5", "trailing.\u00a0\u3000", "\x7f del",
]

# Each: hypotheses, and a list of references for each of them.
CORPORA = [
    (["the cat sat on the mat"], [["the cat sat on the mat"]]),
    (["the cat sat on the mat"], [["a dog lay under the rug"]]),
    (["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]]),
    (["It is a guide to action which ensures that the military always obeys the commands of the party."],
     [["It is a guide to action that ensures that the military will forever heed Party commands.",
       "It is the guiding principle which guarantees the military forces always being under the command of the Party.",
       "It is the practical guide for the army always to heed the directions of the party."]]),
    ([""], [["something"]]),
    ([""], [[""]]),
    (["something"], [[""]]),
    (["", "the cat sat on the mat"], [["a b c d"], ["the cat sat on the mat today"]]),
    (["a"], [["a"]]), (["a b c"], [["a b c"]]), (["a b c d"], [["a b c d"]]), (["a b c d"], [["a b d c"]]),
    (["a b", "c d e"], [["a b"], ["c d e"]]),
    (["a b", "c d e f"], [["a b"], ["c d e f"]]),
    (["The Cat Sat On The Mat"], [["the cat sat on the mat"]]),
    (["one two three four five six"], [["one two three four", "one two three four five six seven eight"]]),
    (["1,234.5 dollars, not 1234.5."], [["1,234.5 dollars , not 1234.5 ."]]),
    (["\u6771\u4eac \u3068 \u5927\u962a \u306e \u5929\u6c17"], [["\u6771\u4eac \u3068 \u5927\u962a \u306e \u5929\u6c17 \u306f"]]),
    (["x y z w", "p q r s t"], [["x y z w", "x y"], ["p q r t s"]]),
    (["x"], [["y"]]),
]

rng = random.Random(5)
WORDS = ["the", "cat", "dog", "sat,", "ran.", "1.5", "2,000", "mat", "It's", "well-known", "(see", "below)", "caf\u00e9", "3-4", "&amp;", "THE", "\u6771\u4eac"]
for lines, most in [(1, 6), (3, 9), (10, 14), (40, 20)]:
    hypotheses, references = [], []
    for _ in range(lines):
        text = [rng.choice(WORDS) for _ in range(rng.randint(1, most))]
        def noisy():
            return " ".join(rng.choice(WORDS) if rng.random() < 0.25 else w for w in text if rng.random() > 0.1)
        hypotheses.append(" ".join(text))
        references.append([noisy() for _ in range(rng.randint(1, 3))])
    CORPORA.append((hypotheses, references))


def corpus(hypotheses, references):
    most = max(len(r) for r in references)
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    score = BLEU().corpus_score(hypotheses, streams)
    return {"hypotheses": hypotheses, "references": references, "score": score.score, "precisions": score.precisions, "matched": score.counts,
            "total": score.totals, "brevity_penalty": score.bp, "hypothesis_words": score.sys_len, "reference_words": score.ref_len}


bleu = BLEU()
result = {"texts": [{"text": t, "words": bleu._preprocess_segment(t).split()} for t in TEXTS],
          "corpora": [corpus(h, r) for h, r in CORPORA]}
path = pathlib.Path(__file__).parent / "bleu.json"
path.write_text(json.dumps(result, indent=0, ensure_ascii=True) + "\n")
