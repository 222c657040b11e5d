"""`python -m eagle_fast.compat SCRIPT` is `python SCRIPT` to the script: names, files, exit codes, processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments, folder, stdin=""):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, input=stdin, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


SCRIPT = """
import os, pickle, sys

def function(x: int) -> int:
    return x

os.chdir("/")
print(sys.argv, os.path.abspath(__file__), __name__, __package__, __spec__, __doc__, function.__annotations__)
print(sys.stdin.read(), pickle.loads(pickle.dumps(function)) is function, sys.modules["__main__"].function is function)
sys.exit(7)
"""


def test_a_script_sees_what_python_shows_it(tmp_path):
    (tmp_path / "a script.py").write_text(SCRIPT)
    started = ["a script.py", "-m", "--accept-lengths", "--help"]
    here, plain = (python(*way, *started, folder=tmp_path, stdin="äb") for way in (["-m", "eagle_fast.compat"], []))
    assert here.returncode == plain.returncode == 7
    assert here.stdout == plain.stdout


@pytest.mark.parametrize("start", [["nothing.py"], ["-m", "nothing"], ["-m", "nothing.inside"]])
def test_what_is_not_there_is_a_sentence(start, tmp_path):
    done = python("-m", "eagle_fast.compat", *start, folder=tmp_path)
    assert done.returncode == 2
    assert start[-1] in done.stderr
    assert len(done.stderr.splitlines()) == 1


SPAWNING = """
import multiprocessing, sys
from eagle.model.ea_model import EaModel

def name(number):
    from model.ea_model import EaModel as again
    return number, EaModel.__module__, again.__name__

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(*pool.map_async(name, [3]).get(60)[0])
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("start", [["script.py"], ["-m", "script"]])
def test_spawned_processes_have_it_too(start, method, tmp_path):
    """With --accept-lengths, which is told by the class, they have that as well."""
    (tmp_path / "script.py").write_text(SPAWNING)
    done = python("-m", "eagle_fast.compat", "--accept-lengths", *start, method, folder=tmp_path)
    assert done.stdout.split() == ["3", "eagle_fast.upstream.variants", "AcceptLengths"], done.stderr
