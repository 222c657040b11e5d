"""Records, the tables made from them, and the benches' behaviour where something that they need is missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "bench"
ROUND = {
    "round_ms": 9.0,
    "plain_ms": 6.0,
    "floor_ms": 6.5,
    "plain_floor_ms": 4.5,
    "hardware": "NVIDIA X",
    "commit": "c1",
}


def script(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def test_the_readme_says_what_the_records_say():
    done = script(BENCH / "report.py", "--check")
    assert done.returncode == 0, f"run bench/report.py:\n{done.stdout}{done.stderr}"


def test_every_record_says_where_it_comes_from():
    paths = list((BENCH / "results").glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        assert record["hardware"], path.name
        assert record["commit"] not in ("", "unknown"), path.name


def test_a_changed_record_changes_the_readme(bench, tmp_path):
    report = bench("report")
    text = report.render(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n", tmp_path)
    assert text == f"above\n{report.BEGIN}\n\n{report.END}\nbelow\n"
    (tmp_path / f"{report.ROUND}.json").write_text(json.dumps(ROUND))
    text = report.render(text, tmp_path)
    assert "| round, 8B | 9.00 ms | ≤ 8.2 ms | 6.50 ms | X | c1 |\n" in text
    assert "in `eagenerate`'s loop" not in text, "the record has no such field"
    (tmp_path / f"{report.ROUND}-32k.json").write_text(
        json.dumps({**ROUND, "round_ms": 12.0, "floor_ms": 8.5, "commit": "c2"})
    )
    changed = report.render(text, tmp_path)
    assert "| context 32k, over its bytes' time | 1.50 x | ≤ 1.25 x |  | X | c2 |\n" in changed
    assert report.render(changed, tmp_path) == changed
    with pytest.raises(ValueError, match="must have this line once"):
        report.render("no markers", tmp_path)


def test_benches_of_record_want_a_gpu():
    done = script(BENCH / "suite.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "need a CUDA GPU" in done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commits_are_those_of_the_checkout(bench, tmp_path):
    records = bench("lib.records")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    assert records.git_commit(tmp_path / "nowhere") == ""
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "code.py").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    commit = records.git_commit(tmp_path)
    assert len(commit) >= 7
    (tmp_path / "README.md").write_text("new, and not code")
    assert records.git_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("2")
    assert records.git_commit(tmp_path) == commit + "+"
    (tmp_path / "copy").mkdir()
    assert records.git_commit(tmp_path / "copy") == "", "a folder inside another checkout has no commit of its own"
    assert records.environment("given")["commit"] == "given"


def upstream_arguments(folder, python):
    settings = {"shape": "smollm2-135m", "tree": [60, 7, 10], "context": 512, "temperature": 0.0}
    return SimpleNamespace(upstream=folder, upstream_python=python, **settings)


def test_upstream_is_timed_by_a_python_of_its_own(bench, tmp_path, capsys):
    """The one given here stands for an environment with the checkout's dependencies, and prints what it was asked."""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys\nprint('loading')\nprint(sys.argv[3])\n")
    python.chmod(0o755)
    record = bench("round").upstream(upstream_arguments(tmp_path, str(python)))
    assert (record["checkout"], record["tree"], record["draft_vocab"]) == (tmp_path.name, [60, 7, 10], 32000)
    assert record["shape"]["num_hidden_layers"] == 30
    bench("round").show_upstream({"checkout": "c", "round_ms": 66.5, "plain_ms": 50.0, "rounds": 32})
    assert "round 66.50 ms, plain token 50.00 ms, over 32 rounds" in capsys.readouterr().out


def test_upstream_without_its_dependencies_says_so(bench, tmp_path, capsys):
    model = tmp_path / "eagle" / "model"
    model.mkdir(parents=True)
    (model / "cnets.py").write_text("import a_package_of_long_ago")
    record = bench("round").upstream(upstream_arguments(tmp_path, sys.executable))
    assert record["error"] == "ModuleNotFoundError: No module named 'a_package_of_long_ago'"
    bench("round").show_upstream(record)
    shown = capsys.readouterr().out
    assert "did not run: ModuleNotFoundError" in shown
    assert "--upstream-python" in shown
    done = script(BENCH / "round.py", "smollm2-135m", "--upstream", tmp_path)
    assert done.returncode == 2
    assert "no checkout of SafeAILab/EAGLE there" in done.stderr


def test_the_suite_runs_every_bench_and_completes_its_record(bench, monkeypatch, tmp_path):
    """On a machine with two GPUs that are not there: each bench writes an empty record."""
    suite, report = bench("suite"), bench("report")
    for name, value in {"is_available": True, "device_count": 2, "get_device_name": "NVIDIA X"}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    for name in ("README.md", f"cache/{suite.SMOLLM2}/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{report.BEGIN}\n{report.END}\n")
    commands = []

    def run(script, *arguments):
        commands.append(script)
        out = Path(arguments[arguments.index("--out") + 1])
        record = {"ops.py": out / "ops.json", "decode.py": out / "decode.json"}.get(script, out)
        record.write_text(json.dumps({"rows": []}))
        if script == "decode.py":
            (out / "decode.png").write_text("")
        return script != "lossless.py"

    stand_ins = {
        "run": run,
        "RESULTS": tmp_path,
        "README": tmp_path / "README.md",
        "user_cache": lambda: tmp_path / "cache",
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(suite, name, value)
    monkeypatch.setattr(sys, "argv", ["suite.py", "--prompts", "some.jsonl", "--commit", "c1"])
    assert suite.main() == 1, "three of them failed"
    assert commands == ["round.py"] * 19 + [
        *["bits.py"] * 2,
        "exchange.py",
        "batch.py",
        "ops.py",
        "decode.py",
        *["lossless.py"] * 3,
        "int8_head.py",
        "batch.py",
        "placements.py",
    ]
    for name in ("ops", "decode-smollm2-135m", "int8-head-smollm2-135m", "placements-smollm2-135m-2gpus"):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert (record["commit"], record["hardware"]) == ("c1", "NVIDIA X")


def test_requests_of_many_kinds(bench):
    """The soak in short: two parts, each on another change of the model, nothing wrong and nothing left behind."""
    soaking = bench("lib.soaking")
    soak, progress = soaking.Soak("cpu", 0, num_cases=10), []
    points = []
    for part in range(3):
        soak.run(40, 3, part, lambda: progress.append(1))
        points.append(soak.measure())
    assert soak.wrong == []
    assert len(progress) == sum(soak.kinds.values()) == points[-1]["requests"] == 120
    assert {"whole", "stream", "interrupted", "raised", "closed", "conversation"} <= set(soak.kinds)
    assert soak.most_idle <= soak.model.states.max_count
    assert len({point["threads"] for point in points}) == len({point["files"] for point in points}) == 1


def test_growth_is_told_from_noise(bench):
    verdict = bench("lib.soaking").verdict
    flat = [{"requests": n, "resident": 500_000_000 + 10_000 * n, "threads": 2, "files": 6} for n in range(26)]
    assert verdict(flat) == []
    assert verdict([{**each, "resident": each["resident"] + 10**6 * each["requests"]} for each in flat]) == [
        "resident 507,070,000 -> 523,230,000"
    ]
    assert verdict([{**each, "files": each["requests"]} for each in flat]) == ["files 7 -> 23"]


def test_kernels_are_compared_with_what_pytorch_does(bench, monkeypatch):
    """The table of bench/ops.py at small sizes: the first case of every op, its kernel by the twin in PyTorch."""
    cases, ops = bench("lib.op_cases"), bench("ops")
    small = {"HIDDEN": 256, "INTERMEDIATE": 512, "LAYERS": 2, "VOCAB": 2000, "DRAFT_VOCAB": 500}
    for name, value in {**small, "STREAM": 1, "DEVICE": "cpu"}.items():
        monkeypatch.setattr(cases, name, value)
    for name, found in cases.CASES.items():
        case = next(found())
        assert name.startswith(case.op)
        assert case.num_bytes > 0
        ours, theirs = case.kernel(0), case.pytorch(0)
        assert case.tolerance is None or ops.agree(ours, theirs, case.tolerance), name
