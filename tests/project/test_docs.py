"""What README and pages say of the code: commands, options, files, names, figures, links, and Python that runs."""

import inspect
import json
import re
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
from chatty import END, make_tokenizer
from decoders import TREE
from often_right import write_often_right_head
from zoo import make

import eagle_fast
import eagle_fast.train
from eagle_fast import EaModel
from eagle_fast.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
OURS = ("bench", "docs", "eagle_fast", "examples", "kernels", "tests", ".ci", "constraints")  # first parts of a path
ROOMS = ("commands", "decoding", "doctor", "head", "layers", "shell", "target", "train", "upstream")
TO_BE_WRITTEN, BUILT = {"kernels/my_op.py", "tests/ops/test_my_op.py"}, {"build/site"}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
# options of other programs, by a word of the line that they stand in
OTHERS = ("pip", "sglang", "vllm", "transformers serve", "lm_eval", "ruff", "webui.py")


def options_of(name: str) -> set[str]:
    parser = ArgumentParser()
    import_module(f"eagle_fast.commands.{name}").add_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


def options_in(path: Path) -> set[str]:
    """Of a script, and of the options that its benches share."""
    return set(OPTION.findall(path.read_text(encoding="utf-8")))


def lines_of(text: str) -> list[str]:
    """With what a backslash continues."""
    return re.sub(r"\\\n\s*", " ", text).splitlines()


@pytest.mark.parametrize("page", TEXTS)
def test_commands_take_the_options_that_pages_give_them(page):
    shared = set().union(*(options_in(path) for path in (ROOT / "bench" / "lib").glob("*.py")))
    for line in lines_of(TEXTS[page]):
        for name, rest in re.findall(r"eagle-fast (\w+)((?:[^`#|<>]|<(?=\w+>))*)", line):
            if name in COMMANDS:
                assert set(OPTION.findall(rest)) <= options_of(name), line
        for script, rest in re.findall(r"((?:bench|examples)/\w+\.py)([^`#|<>]*)", line):
            taken = options_in(ROOT / script) | shared | options_of("bench")
            assert set(OPTION.findall(rest)) <= taken, line


@pytest.mark.parametrize("page", TEXTS)
def test_every_option_that_pages_name_is_one(page):
    folders = ("bench", "bench/lib", "examples", "tests/fuzz", "eagle_fast", "eagle_fast/upstream")
    scripts = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    known = set().union(*map(options_of, COMMANDS), *map(options_in, scripts))
    for line in lines_of(TEXTS[page]):
        if not any(other in line for other in OTHERS):
            assert set(OPTION.findall(line)) <= known, line


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_pages_name_are_there(page):
    for path in re.findall(r"`([\w./]+/[\w./]*)`", TEXTS[page]):
        if path.split("/")[0] in (*OURS, *ROOMS) and path not in TO_BE_WRITTEN | BUILT:
            parents = (ROOT, ROOT / "eagle_fast")
            assert any((parent / f"{path}{end}").exists() for parent in parents for end in ("", ".py")), path


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "kernels/README.md"])
def test_links_lead_somewhere(page):
    """mkdocs does the same for the pages of docs/."""
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_in_the_menu_and_in_the_readme():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert re.search(rf"\b{path.name}\b", menu.split("nav:")[1]), path.name
        if path.stem not in ("index", "reference", "kernels", "contributing"):
            assert f"(docs/{path.name})" in TEXTS["README.md"], path.name


def test_the_reference_has_every_public_name():
    named = set(re.findall(r"^::: (\S+)$", TEXTS["docs/reference.md"], re.MULTILINE))
    public = {f"eagle_fast.{name}" for name in eagle_fast.__all__}
    public |= {f"eagle_fast.train.{name}" for name in eagle_fast.train.__all__}
    assert named == public
    (listed,) = re.findall(r"^      members: \[(.*)\]$", TEXTS["docs/reference.md"], re.MULTILINE)
    for name in listed.split(", "):
        assert hasattr(EaModel, name), name


def test_what_is_not_on_an_index_is_not_installed_from_one():
    """Extras of this package are those of a checkout: '.[web]'."""
    for path in [*PAGES, *(ROOT / "eagle_fast").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "eagle-fast[" not in text, path
        for extra in re.findall(r"pip install (?:-e )?'\.\[([\w,]+)\]'", text):
            for each in extra.split(","):
                assert re.search(rf"^{each} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), (path, each)
    asked = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("web.py", "shell/bench.py"):
        (wanted,) = re.findall(r"pip install '([^'.][^']*)'", (ROOT / "eagle_fast" / name).read_text(encoding="utf-8"))
        assert f'"{wanted}"' in asked, f"{name} asks for {wanted}"


def record(name: str) -> dict:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def test_figures_in_pages_are_those_of_the_records():
    made = record("round-llama-3.1-8b")
    round_ms, plain_ms = f"{made['round_ms']:.2f}", f"{made['plain_ms']:.2f}"
    (row,) = re.findall(r"^\| eagle_fast \| tree 60.*$", TEXTS["docs/comparison.md"], re.MULTILINE)
    assert row.split(" | ")[2:] == [round_ms, f"{plain_ms} |"]
    said = f"{round_ms} ms against {plain_ms} ms, so c = {made['round_ms'] / made['plain_ms']:.2f}"
    assert said in TEXTS["docs/statistics.md"]
    for bits in ("8bits", "4bits", "4bits-lm-head"):
        made = record(f"round-llama-3.1-8b-{bits}")
        peak = made["memory_gib"]["cuda:0"]["peak"]
        figures = f"| {made['plain_ms']:.2f} ms | {made['round_ms']:.2f} ms | {peak:.1f} GiB |"
        assert figures in TEXTS["docs/quantised.md"], bits
    speeds = {name: [row[name] for row in record("decode-smollm2-135m")["rows"] if row["temperature"] == 0]
              for name in ("tokens_per_second", "plain_tokens_per_second")}  # fmt: skip
    fast, plain = (f"{min(each):,.0f} to {max(each):,.0f}" for each in speeds.values())
    words = " ".join(TEXTS["README.md"].split())
    assert f"writes {fast} tokens a second, where plain decoding writes {plain}" in words


def test_missed_aims_have_a_reason():
    """Every row of the README's table that missed its aim is spoken of below it."""
    table, below = TEXTS["README.md"].split("<!-- end of results -->")
    missed = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[2][:1] in ("≤", "≥") and "floor" not in cells[2]:
            value, aim = (float(re.search(r"[\d.]+", cell)[0]) for cell in cells[1:3])
            if value > aim if cells[2][0] == "≤" else value < aim:
                missed.append(cells[0])
    reasons = below.split("missed, and why:")[1].split("\n\n`bench")[0].lower()
    words = {
        "32k": "32k", "batch": "batch of 8", "bits": "4 and 8 bits", "two GPUs": "two gpus",
        "acceptance": "pair's acceptance",
    }  # fmt: skip
    for name in missed:
        assert any(word in name and reason in reasons for word, reason in words.items()), name


# -- Python ------------------------------------------------------------------------------------------------------------

NEEDS_MORE = ("from eagle.", "AutoModelForCausalLM", "lm_eval")  # tests/api has these: compat, attach, lm_eval
BLOCKS = [
    pytest.param(page, block, id=f"{page}-{number}")
    for page, text in TEXTS.items()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    if not any(each in block for each in NEEDS_MORE)
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a tiny pair."""
    root = tmp_path_factory.mktemp("pair")
    model = make("llama", eos_token_id=END)
    model.save_pretrained(root / "target")
    make_tokenizer().save_pretrained(root / "target")
    write_often_right_head(model, root / "head")
    return root


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_of_pages_runs(page, block, pair, monkeypatch):
    """With a tiny pair in place of the named one, on a CPU. What it loads with has to be options."""
    here = {"base_model_path": pair / "target", "ea_model_path": pair / "head"}
    load, model = EaModel.from_pretrained, EaModel.from_pretrained(**here, **TREE)

    def tiny(**options):
        taken = inspect.signature(load).parameters
        assert options.keys() <= taken.keys() | {"dtype", "device_map"}, options
        return load(**here, **TREE)

    monkeypatch.setattr(EaModel, "from_pretrained", staticmethod(tiny))
    chat = [{"role": "user", "content": "w5 w17 w33"}]
    ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    block = re.sub(r"max_new_tokens=\d+", "max_new_tokens=8", block)
    exec(compile(block, page, "exec"), {"model": model, "ids": ids, "chat": chat, "torch": torch, "EaModel": EaModel})
