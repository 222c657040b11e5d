"""bench/bits.py and bench/lossless.py: they count what differs, and say so in record and exit status."""

import copy
import itertools
import json
import random
import sys

import pytest
import torch
from chatty import make_tokenizer
from decoders import decoder
from often_right import write_often_right_head
from zoo import make

from eagle_fast import EaModel
from eagle_fast.config import MAX_DEPTH
from eagle_fast.target.target import Verified


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return module.main()


# -- bits --------------------------------------------------------------------------------------------------------------


def test_bits_of_a_tiny_model_are_counted(bench, monkeypatch, tmp_path, capsys):
    out = tmp_path / "bits.json"
    arguments = ["--shape", "tiny", "--layers", 2, "--rounds", 12, "--contexts", 7, 63, 64, "--device", "cpu"]
    assert run(bench("bits"), monkeypatch, *arguments, "--out", out) == 0, "on a CPU nothing is promised"
    record = json.loads(out.read_text())
    assert (record["rounds"], record["layers"], record["hardware"]) == (12, 2, "cpu")
    for name in ("batch", "context"):
        rows = [row for row in record["table"] if name in row]
        assert sum(row["rounds"] for row in rows) == 12
        assert sum(row["rows"] for row in rows) == record["rows"] > 0
        assert sum(row["differ"] for row in rows) == record["differ"]
    assert f"{record['rows']:,}" in capsys.readouterr().out


def test_a_row_counts_if_any_bit_of_it_differs(bench):
    tree_bits = bench("lib.tree_bits")
    one = torch.tensor([[1.0, 0.0], [2.0, 3.0], [4.0, 5.0]], dtype=torch.bfloat16)
    other = one.clone()
    assert tree_bits.compare(one, other) == (3, 0, 0.0)
    other[0, 1], other[2, 0] = -0.0, 4.25
    assert tree_bits.compare(one, other) == (3, 2, 0.25)


def test_trees_are_trees_of_all_depths(bench):
    tree_bits, rng = bench("lib.tree_bits"), random.Random(0)
    depths = set()
    for _ in range(200):
        parents = tree_bits.random_parents(rng.randint(2, 64), rng)
        assert parents[0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(parents) if node)
        path = tree_bits.paths_of(parents)[tree_bits.random_leaf(parents, rng)]
        assert all(parents[node] == before for before, node in itertools.pairwise(path))
        assert path[-1] not in parents
        depths.add(len(path))
    assert {2, 3, 5, 10} <= depths
    assert max(depths) == MAX_DEPTH + 1


def test_what_depends_on_the_other_rows_is_found(bench, monkeypatch):
    """A target that says what a token's own path and position are, and one that adds how many rows there are."""
    target, tree_bits = copy.copy(decoder("llama", torch.device("cpu")).target), bench("lib.tree_bits")
    rng, extra = random.Random(1), 0

    def verify(tokens, step, cache):
        values = tokens * 3 + step.positions(tokens.device) + extra * tokens.numel()
        return Verified((values[..., None] * torch.arange(1, 5)).float(), None)

    monkeypatch.setattr(target, "verify", verify, raising=False)
    contexts = tree_bits.MadeUpContexts(target, 2, 40)
    parents = [tree_bits.random_parents(9, rng) for _ in range(2)]
    for extra, share in ((0, 0), (1, 1)):  # noqa: B007  # `verify` reads it
        leaf = tree_bits.random_leaf(parents[1], rng)
        found = contexts.compare([3, 40], parents, 1, leaf, rng)
        assert found.rows == len(tree_bits.paths_of(parents[1])[leaf])
        assert found.differ == share * found.rows


# -- lossless ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Arguments that name a tiny model, its head and three chats, the last of one turn only."""
    folder = tmp_path_factory.mktemp("pair")
    model = make("llama")
    write_often_right_head(copy.deepcopy(model), folder / "head")
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    turns = [["w5 w9 w7", "w8"], ["w11 w30 w12 w4 w77", "w6 w6"], ["w50"]]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    names = {"--model": folder / "model", "--head": folder / "head", "--prompts": folder / "chats.jsonl"}
    return [each for pair in names.items() for each in pair]


@pytest.fixture
def lossless(bench, monkeypatch, pair, tmp_path):
    """Run bench/lossless.py on the pair, for an `exactness`: (exit status, record)."""

    def run_it(exactness, *arguments):
        monkeypatch.setattr(EaModel, "exactness", exactness, raising=False)
        out = tmp_path / "record.json"
        options = ["--max-new-tokens", 9, "--batch", 1, 2, "--device", "cpu", "--out", out]
        status = run(bench("lossless"), monkeypatch, *pair, *options, *arguments)
        return status, json.loads(out.read_text())

    return run_it


def test_every_batch_is_held_against_each_prompt_alone(lossless, bench, monkeypatch, capsys):
    module, calls = bench("lossless"), []
    answers = module.answers

    def noted(generate, prompts, seeds, *arguments, **options):
        calls.append((generate.__name__, len(prompts), tuple(seeds), bool(options)))
        return answers(generate, prompts, seeds, *arguments, **options)

    monkeypatch.setattr(module, "answers", noted)
    status, record = lossless("rounding", "--chat")
    assert status == 0
    assert [(row["temperature"], row["batch"], row["prompts"], row["same"]) for row in record["rows"]] == [
        (0.0, 1, 3, 3), (0.0, 2, 3, 3), (1.0, 1, 3, 3), (1.0, 2, 3, 3)
    ]  # fmt: skip
    assert [(row["temperature"], row["batch"], row["prompts"], row["same"]) for row in record["chat"]] == [
        (0.0, 1, 3, 3), (1.0, 1, 3, 3)
    ]  # fmt: skip
    assert all(row["reused"] > 0.4 for row in record["chat"])
    assert (record["exactness"], record["hardware"]) == ("rounding", "cpu")
    alone = [(0,), (1,), (2,)]
    per_temperature = [
        *(("naivegenerate", 1, seeds, False) for seeds in alone),  # once for both sizes of the batch
        *(("eagenerate", 1, seeds, False) for seeds in alone),
        *[("eagenerate", 2, (0, 1), False), ("eagenerate", 1, (2,), False)],
        *(("naivegenerate", 1, seeds, True) for seeds in alone for _ in range(2)),
        *(("eagenerate", 1, seeds, True) for seeds in alone for _ in range(2)),
    ]
    assert calls == per_temperature * 2
    assert "two turns" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.* runs from its packed weights")
def test_a_pair_whose_target_is_rounded(lossless, bench, monkeypatch, capsys):
    """Both texts are the rounded model's."""
    status, record = lossless("rounding", "--target-bits", 4, "--lm-head-bits", 8, "--temperature", 0)
    assert status == 0
    assert (record["target_bits"], record["lm_head_bits"]) == (4, 8)
    assert [(row["batch"], row["prompts"], row["same"]) for row in record["rows"]] == [(1, 3, 3), (2, 3, 3)]
    assert "float32, 4 bits, rounding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "exactness", "status"),
    [("float32", "rounding", 1), ("bfloat16", "bitwise", 1), ("bfloat16", "rounding", 0)],
)
def test_a_text_that_parts_fails_where_none_may(dtype, exactness, status, lossless, bench, monkeypatch):
    """Of two prompts at once the second's fourth token is another, and of a conversation's second turn the first."""
    module = bench("lossless")
    answers = module.answers

    def altered(generate, prompts, *arguments, **options):
        texts, reused = answers(generate, prompts, *arguments, **options)
        if generate.__name__ == "eagenerate":
            if len(prompts) == 2:
                texts[1][3] += 1
            if options and len(prompts[0]) > 12:
                texts[0][0] += 1
        return texts, reused

    monkeypatch.setattr(module, "answers", altered)
    found, record = lossless(exactness, "--chat", "--dtype", dtype, "--temperature", 0)
    assert found == status
    if dtype == "float32":
        one, two = record["rows"]
        assert (one["same"], two["same"], record["chat"][0]["same"]) == (3, 2, 0)
        assert (two["widest"][0]["prompt"], two["median_token"]) == (1, 3)
        assert record["chat"][0]["largest_token"] == 0
