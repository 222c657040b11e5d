"""bench/batch.py on a CPU, with a tiny pair: what it measures, and what it makes of given times and acceptance."""

import copy
import importlib.util
import json
import sys

import pytest
from chatty import make_tokenizer
from often_right import write_often_right_head
from zoo import make

from eagle_fast import TreeConfig
from eagle_fast.config import ROOT_ALONE
from eagle_fast.decoding.worth import USUAL


@pytest.fixture
def batch(bench):
    return bench("batch")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Arguments that name a tiny model, its head and three prompts."""
    folder = tmp_path_factory.mktemp("pair")
    model = make("llama")
    write_often_right_head(copy.deepcopy(model), folder / "head")
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    turns = [["w5 w9 w7"], ["w11 w30 w12 w4 w77"], ["w50"]]
    (folder / "some.jsonl").write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    names = {"--model": folder / "model", "--head": folder / "head", "--prompts": folder / "some.jsonl"}
    return [str(each) for pair in names.items() for each in pair]


def run(batch, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["batch.py", *map(str, arguments)])
    batch.main()


def test_all_of_it_with_a_tiny_pair(batch, pair, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(batch, "FIXED", batch.FIXED[::4])
    monkeypatch.setattr(batch, "RANDOM_TOKENS", 24)
    out = tmp_path / "batch.json"
    small = ["--batch", 2, 1, "--min-prompts", 2, "--max-new-tokens", 12, "--repeats", 2, "--context", 20]
    run(batch, monkeypatch, *pair, *small, "--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--out", out)
    record = json.loads(out.read_text())
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert out.with_suffix(".png").is_file() == drawn
    assert [(row["batch"], row["temperature"]) for row in record["pair"]] == [(1, 0), (2, 0), (1, 1)]
    names = {"plain", *map(batch.name_of, batch.FIXED), "adaptive"}
    for row in record["pair"]:
        assert set(row["tokens_per_second"]) == set(row["tau"]) == names
        assert set(row["sets"]["some"]) == names
        assert row["tau"]["plain"] == 1
        assert row["tau"]["60/7/10"] > 1.2
        speeds = row["tokens_per_second"]
        assert row["over_plain"] == pytest.approx(speeds["adaptive"] / speeds["plain"], abs=2e-3)
        assert row["over_best_fixed"] <= row["over_default"]
        assert sum(row["adaptive_rounds"].values()) > 0
    shapes = record["shapes"]
    assert [row["batch"] for row in shapes["rows"]] == [1, 2]
    assert shapes["random_head_over_plain"] > 0.3
    for row, of_pair in zip(shapes["rows"], record["pair"], strict=False):
        assert row["tau"] == {name: of_pair["tau"][name] for name in row["tau"]}, "the pair's acceptance"
    shown = capsys.readouterr().out
    assert shown.count("over plain") == 2
    assert json.loads(shown.splitlines()[-1]) == record


def test_a_run_that_is_stopped_leaves_the_rows_it_had(batch, monkeypatch, tmp_path):
    row = {
        "batch": 1,
        "tokens_per_second": {name: 1.0 for name in ("plain", "adaptive", *map(batch.name_of, batch.FIXED))},
    }

    def rows(args):
        yield batch.with_ratios(row)
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run_pair", rows)
    out = tmp_path / "batch.json"
    names = [str(each) for each in ("--model", "target", "--head", "head", "--prompts", "some.jsonl", "--out", out)]
    with pytest.raises(KeyboardInterrupt):
        run(batch, monkeypatch, *names)
    assert [each["batch"] for each in json.loads(out.read_text())["pair"]] == [1]


def test_given_times_decide_at_the_shapes(batch, monkeypatch):
    """At one sequence size costs nothing, at eight as much as the rows; tokens are the pair's."""
    tau = {batch.name_of(tree): 1 + tree.total_token**0.4 for tree in batch.FIXED} | {"plain": 1.0}
    row = {"tau": tau, "chances": USUAL[:8, :10].tolist()}
    args = batch.argparse.Namespace(device="cuda")
    for size, slope, chosen in ((1, 0.0, "60/7/10"), (8, 1.0, "plain")):
        times = {tree: 10 + slope * size * (tree.total_token - 1) for tree in (*batch.FIXED, ROOT_ALONE)}
        monkeypatch.setattr(batch, "times_of_shape", lambda *_, times=times: times)
        found = batch.with_ratios(batch.measure_shape(None, size, row, USUAL, args))
        assert found["chosen"] == chosen
        tree = TreeConfig(16, 5, 4)
        expected = 1e3 * size * tau["16/5/4"] / times[tree]
        assert found["tokens_per_second"]["16/5/4"] == pytest.approx(expected, abs=0.06)
        assert found["tokens_per_second"]["adaptive"] == found["tokens_per_second"][chosen]
    assert found["over_plain"] == 1.0


def test_arguments_that_do_not_go_together(batch, monkeypatch, capsys):
    for arguments, reason in ((["--model", "x"], "belong together"), (["--batch", 0], "one sequence or more")):
        with pytest.raises(SystemExit):
            run(batch, monkeypatch, *arguments)
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(batch, monkeypatch, "--help")
    assert "tokens/s = batch * tokens per round / time" in capsys.readouterr().out
