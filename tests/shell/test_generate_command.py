"""`eagle-fast generate`: prompts as arguments, files and stdin; texts, JSON lines, and plain decoding beside."""

import json
import re

import pytest
import torch
from shell_pairs import eagle_fast, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle_fast.cli import main

NEW = 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def stock(pair):
    """The text of transformers alone after a prompt's ids."""
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    tokenizer = AutoTokenizer.from_pretrained(pair[1])

    def text(prompt):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return text


def run(pair, *arguments, stdin=""):
    return eagle_fast("generate", *arguments, *pair, "--max-new-tokens", NEW, stdin=stdin)


def test_texts_on_stdout_and_all_else_on_stderr(pair, stock):
    done = run(pair, "w5 w17", "-", stdin="w7\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{stock('w5 w17')}\n{stock('w7')}\n"
    assert done.stderr.count("tokens/s, tau") == 2
    assert "\x1b" not in done.stderr
    assert run(pair, stdin="w7\n").stdout == stock("w7") + "\n"


def test_files_to_json_lines_beside_plain_decoding(pair, stock, tmp_path):
    chat = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w9"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"prompt": "w5 w17"}, {"messages": chat}])))
    done = run(pair, "--file", file, "--json", "--compare")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["prompt"] for each in records] == ["w5 w17", chat]
    for each in records:
        assert each["text"] == each["plain"]["text"] == stock(each["prompt"])
        assert each["same"] is True
        assert each["tau"] > 1.3
        assert each["plain"]["tau"] == 1
        assert each["speedup"] == pytest.approx(
            each["tokens_per_second"] / each["plain"]["tokens_per_second"], rel=0.05
        )
        assert all(0 <= share <= 1 for share in each["acceptance"])


def test_sampled_texts_are_plain_decodings_too(pair):
    done = run(pair, "w5 w17", "--temperature", 1, "--top-k", 5, "--seed", 3, "--compare")
    assert done.returncode == 0, done.stderr
    assert "the same text" in done.stderr
    again, other = (run(pair, "w5 w17", "--temperature", 1, "--top-k", 5, "--seed", seed).stdout for seed in (3, 4))
    assert done.stdout == again != other


def test_raw_text_is_continued_without_a_template(pair):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pair[1]), AutoTokenizer.from_pretrained(pair[1])
    ids = tokenizer("w5 w17", return_tensors="pt").input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=NEW)
    assert run(pair, "--raw", "w5 w17").stdout == tokenizer.decode(out[0, 2:], skip_special_tokens=True) + "\n"


def here(capsys, pair, *arguments):
    """The same in this process: (exit code, stdout, stderr)."""
    code = main(["generate", *map(str, arguments), *pair, "--max-new-tokens", str(NEW)])
    return code, *capsys.readouterr()


def test_several_prompts_at_once(pair, stock, tmp_path, capsys):
    """Each with the text, and with the seed the sample, that it has alone."""
    prompts = ["w5 w17 w40 w9", "w7", "w9 w30"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    expected = [stock(prompt) for prompt in prompts]
    code, out, error = here(capsys, pair, "--file", file, "--batch", 2)
    assert code == 0
    assert out.splitlines() == expected
    assert re.findall(r"--- (\d) of 3", error) == ["1", "2", "3"]
    assert error.count("2 together: ") == 1
    sampled = ["--file", file, "--temperature", 1, "--top-k", 5, "--seed", 3]
    code, out, _ = here(capsys, pair, *sampled, "--batch", 3, "--json", "--compare")
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [(each["prompt"], each["batch"], each["same"]) for each in records] == [(each, 3, True) for each in prompts]
    assert "".join(each["text"] + "\n" for each in records) == here(capsys, pair, *sampled)[1]
    assert max(each["tokens"] for each in records) <= NEW
    assert len({each["tokens_per_second"] for each in records}) == 1, "of all together"


@pytest.mark.parametrize("batch", [1, 2])
def test_stop_strings(batch, stock, tmp_path, capsys):
    words, other = (stock(prompt).split() for prompt in ("w5 w17", "w7"))
    pair = write_pair(tmp_path, stop_strings=True)
    arguments = ["w5 w17", "w7", "--batch", batch, "--compare", "--stop", words[6], "nowhere"]
    code, out, error = here(capsys, pair, *arguments)
    assert code == 0, error
    first, second = out.splitlines()
    assert first.split() == words[: words.index(words[6]) + 1]
    assert second.split() == other[: other.index(words[6]) + 1 if words[6] in other else None]


def test_texts_that_differ_are_told_by_the_exit_code(monkeypatch, capsys, pair):
    from eagle_fast.shell import generate

    inner = generate.answer

    def worse(*args, with_head=True, **options):
        found = inner(*args, with_head=with_head, **options)
        return found if with_head else found._replace(ids=found.ids[::-1])

    monkeypatch.setattr(generate, "answer", worse)
    assert main(["generate", "w5 w17", "--compare", *pair, "--max-new-tokens", "5"]) == 1
    assert "1 of 1 texts are not those of plain decoding" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--file", "absent.jsonl"], "absent.jsonl cannot be read"), ([""], "a prompt is empty"),
        (["w5", "--temperature", "-1"], "temperature=-1"), (["w5", "--dtype", "int"], "--dtype int"),
        (["w5", "--load", "nonsense=1"], "takes no 'nonsense'"), (["w5", "--load", "nonsense"], "write NAME=VALUE"),
        (["w5", "--load", "dtype=float16", "--dtype", "float32"], "--load dtype"),
        (["w5", "--raw", "--chat-template-kwargs", '{"loud": true}'], "--chat-template-kwargs would change nothing"),
        (["w5", "--chat-template-kwargs", '{"messages": []}'], "the chat template cannot use messages="),
        (["w5", "--stop", "w9"], "--stop=['w9']: transformers cannot tell how"),
        (["w5", "w6 \udcff"], "the text is no UTF-8"), (["w5", "w6 \udcff", "--raw"], "the text is no UTF-8"),
        (["w5", "--batch", "0"], "batch=0"), (["w5", "--stop", ""], "--stop: a text is empty"),
        (["w5", "--device-map", "{"], "--device-map {: not JSON"), (["w5", "--model", "absent/"], "--model 'absent/'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(arguments, reason, capsys, pair):
    assert main(["generate", *pair, *arguments]) == 2
    answers, error = capsys.readouterr()
    assert answers == ""
    assert error.startswith("eagle-fast generate: ")
    assert reason in error


def test_a_reader_that_leaves_is_no_error(pair):
    """As in `eagle-fast generate ... | head -1`."""
    import os
    import subprocess

    from shell_pairs import COMMAND, ENVIRONMENT

    command = [*COMMAND, "generate", "w5", "w6", *pair, "--max-new-tokens", "5"]
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=300)
    os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
