#!/usr/bin/env python3
"""Writes chat/cases.json: what the chat templates of chat/templates.json make of conversations, by jinja2 with the settings that
transformers' apply_chat_template has. The templates are the models' own (chat_template of their tokenizer_config.json); from those marked
"shortened" the branches for tools, which plain conversations do not reach, are left out.

    pip install jinja2==3.1.6 && python3 tests/golden/make_chat.py
"""
import json
import pathlib

import jinja2.sandbox

HERE = pathlib.Path(__file__).parent / "chat"


def fail(message):
    raise ValueError(message)


def turns(*contents, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CONVERSATIONS = [
    turns("Hi"),
    turns("Hi", system="Be brief."),
    turns("What is 1 + 1?", "2.", "And 2 + 2?"),
    turns("What is 1 + 1?", "2.", "And 2 + 2?", "4.", "Thanks", system="You count."),
    turns("  spaces around \n", " \t an answer\u00a0\u3000\n", "\x1f\u2028odd spaces\x85", system=" \n a system \t"),
    turns("a\r\nb\n\nc\n\n\n\nd", "e\n\n\nf\r\n\r\ng", "h"),
    turns("", "", ""),
    turns("Größe, 東京, \U0001f600 'quoted' \"twice\" {braces} {{more}} {% no %}", "\\n is no line", "</s> [INST] <|im_end|> <|eot_id|>"),
    turns("Hi", "Hello!"),
    [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
    [{"role": "user", "content": "one"}, {"role": "system", "content": " late "}, {"role": "user", "content": "two"}],
]


def main():
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = fail
    templates = json.loads((HERE / "templates.json").read_text())
    cases = {"conversations": CONVERSATIONS, "texts": {}}
    for entry in templates:
        if entry["name"] is None:
            continue
        compiled = environment.from_string(entry["template"])
        texts = []
        for messages in CONVERSATIONS:
            both = []
            for prompt in (False, True):
                try:
                    both.append(compiled.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=prompt))
                except ValueError:
                    both.append(None)  # the template refuses it
            texts.append(both)
        cases["texts"][entry["model"]] = texts
    (HERE / "cases.json").write_text(json.dumps(cases, indent=0) + "\n")


if __name__ == "__main__":
    main()
