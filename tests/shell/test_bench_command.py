"""`eagle-fast bench`: a table, a record and a plot of the speed-up on this machine."""

import importlib.util
import json
import subprocess
import sys

import pytest
from shell_pairs import eagle_fast, write_pair

from eagle_fast.cli import main
from eagle_fast.shell import bench, figures
from eagle_fast.shell.own_prompts import PROMPTS

NEW = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "some.txt"
    file.write_text("w5 w17\nw7\nw8 w9\n")
    return file


def test_ranks_have_no_stock_generate(pair, prompts):
    """Their base_model is a skeleton."""
    given = [*pair[:-2], "--tensor-parallel", "cpu,cpu", "--prompts", prompts, "--limit", 1, "--max-new-tokens", NEW]
    done = eagle_fast("bench", *given, "--json")
    assert done.returncode == 0, done.stderr
    assert "no stock generate: base_model's layers are cut over several GPUs" in " ".join(done.stderr.split())
    (row,) = json.loads(done.stdout)["rows"]
    assert row["same"]
    assert "stock" not in row


def test_table_and_record(pair, prompts, tmp_path):
    out = tmp_path / "bench.json"
    given = ["--prompts", prompts, "--temperature", 0, 1, "--stock", 2, "--max-new-tokens", NEW, "--out", out]
    done = eagle_fast("bench", *pair, *given)
    assert done.returncode == 0, done.stderr
    assert "tokens/s at T=0" in done.stdout
    assert "tokens/s at T=1" in done.stdout
    assert "3 of 3" in done.stdout
    record = json.loads(out.read_text())
    assert (record["dtype"], record["tree"]) == ("float32", [16, 3, 4])
    assert [(row["prompt"], row["temperature"]) for row in record["rows"]] == [
        (prompt, temperature) for temperature in (0, 1) for prompt in ("w5 w17", "w7", "w8 w9")
    ]
    for row in record["rows"]:
        assert row["same"] is True
        assert row["head"]["tokens"] == row["plain"]["tokens"] > 0
        assert row["head"]["seconds"] > 0
        assert row["tau"] >= 1
        assert ("stock" in row) == (row["prompt"] != "w8 w9")
    greedy = [row for row in record["rows"] if row["temperature"] == 0]
    assert greedy[0]["stock"]["tokens"] == greedy[0]["head"]["tokens"]


def test_json_alone(pair, prompts):
    done = eagle_fast(
        "bench", *pair, "--prompts", prompts, "--limit", 1, "--stock", 0, "--json", "--max-new-tokens", NEW
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert "stock" not in row


def test_speeds_are_tokens_over_seconds_of_all():
    rows = [
        {"head": {"tokens": 10, "seconds": 1.0}, "plain": {"tokens": 10, "seconds": 4.0}, "tau": 5.0},
        {"head": {"tokens": 30, "seconds": 1.0}, "plain": {"tokens": 30, "seconds": 4.0}, "tau": 2.0,
         "stock": {"tokens": 15, "seconds": 5.0}},
    ]  # fmt: skip
    assert figures.speed(rows, "head") == 20
    assert figures.speedup(rows, "plain") == 4
    assert figures.speedup(rows, "stock") == 10  # 30 tokens/s over 3: of those that were decoded by both
    assert figures.speedup(rows[:1], "stock") is None
    assert figures.mean_tau(rows) == 40 / (2 + 15)


def test_own_prompts_are_few_and_different():
    assert len(set(PROMPTS)) == 12
    assert all(20 < len(each) < 200 for each in PROMPTS)


def test_a_text_that_differs_is_told(pair, prompts, monkeypatch, capsys):
    inner = bench._ways

    def other(model, settings):
        ways = inner(model, settings)
        return ways | {"plain": lambda ids: ([1, 2, 3], ways["plain"](ids)[1])}

    monkeypatch.setattr(bench, "_ways", other)
    given = ["--prompts", str(prompts), "--limit", "1", "--stock", "0", "--max-new-tokens", "4"]
    assert main(["bench", *pair, *given]) == 1
    assert "NO" in capsys.readouterr().out


def test_a_plot_without_matplotlib_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert main(["bench", "--model", "absent/absent", "--head", "absent/absent", "--plot", "bench.png"]) == 2
    assert "pip install 'matplotlib>=3.9'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bench", "bench.xyz", "bench.txt"])
def test_a_plot_of_no_kind_is_refused_before_anything_is_loaded(name, capsys):
    assert main(["bench", "--model", "absent/absent", "--head", "absent/absent", "--plot", name]) == 2
    assert f"--plot {name}: name a file that ends in .png" in capsys.readouterr().err


def test_matplotlib_is_not_imported_without_a_plot():
    code = "import sys, eagle_fast.shell.bench; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_plot(tmp_path):
    way = {"tokens": 10, "seconds": 1.0}
    rows = [
        {"prompt": "one", "temperature": 0, "tau": 2.0, "acceptance": [0.8, 0.5], "head": way, "plain": way},
        {
            "prompt": r"$\frac$ costs",
            "temperature": 1,
            "tau": 2.0,
            "acceptance": [0.7],
            "head": way,
            "plain": way,
            "stock": way,
        },
    ]
    for name in ("bench.png", "bench.svg"):
        figures.plot({"model": "m", "dtype": "float32", "hardware": "cpu", "rows": rows}, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    figure = figures.draw({"model": "m", "dtype": "float32", "hardware": "cpu", "rows": rows})
    figure.draw_without_rendering()
    left = figure.axes[0]
    assert sorted(text.get_text() for text in left.texts) == ["10.0"] * 3 + ["10.0, 1.00x"] * 2, "a number on every bar"
    assert all(text.get_window_extent().x1 <= left.get_window_extent().x1 for text in left.texts)
    assert left.get_legend() is None, "it would lie over bars"
    assert "1.00x plain" in left.get_title()
    with pytest.raises(ValueError, match=r"--plot .*bench\.nothing"):
        figures.plot({"model": "m", "dtype": "float32", "hardware": "cpu", "rows": rows}, tmp_path / "bench.nothing")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--limit", "0"], "limit=0"), (["--stock", "-1"], "--stock -1"), (["--max-new-tokens", "0"], "max_new_tokens=0"),
     (["--temperature", "-1"], "temperature=-1"), (["--out", "no/such/folder/x.json"], "there is no folder"),
     (["--prompts", "absent.txt"], "absent.txt cannot be read"), (["--out", "/"], "--out / is a folder")],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(arguments, reason, capsys):
    assert main(["bench", "--model", "absent/absent", "--head", "absent/absent", *arguments]) == 2
    assert reason in capsys.readouterr().err
