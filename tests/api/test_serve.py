"""`transformers serve` with an attached folder, and the official openai client in front: the plain target's text."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attached import write_attached
from chatty import END, make_tokenizer
from transformers import AutoModelForCausalLM
from zoo import make

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

NEW = 16
WAIT = 180  # seconds, for the server to answer


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """(model, its folder with a head attached)."""
    root = tmp_path_factory.mktemp("served")
    model = make("llama").float()
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.do_sample, settings.top_k = END, 0, True, 0
    write_attached(model, make_tokenizer(stop_strings=True), root)
    return AutoModelForCausalLM.from_pretrained(root / "target").eval(), root / "both"


@pytest.fixture(scope="module")
def client(target, tmp_path_factory):
    folder = target[1]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("log") / "server"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    made = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=WAIT, max_retries=0)
    try:
        for _ in range(WAIT):
            try:
                made.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None, log.read_text()
                time.sleep(1)
        yield made
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def ask(client, target):
    def answer(text, **options):
        return client.chat.completions.create(
            model=str(target[1]),
            messages=[{"role": "user", "content": text}],
            **{"max_tokens": NEW, "temperature": 0, **options},
        )

    return answer


def expected(target, text):
    tokenizer = make_tokenizer(stop_strings=True)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
    out = target[0].generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
    return tokenizer.decode(out, skip_special_tokens=True)


def content(answer):
    return answer.choices[0].message.content


def wait_for_calls(log, number):
    """The lines of so many calls: the server's end of a streamed one may come after the client has all of its text."""
    end = time.monotonic() + 30
    while len(calls := log.read_text().split()) < number:
        assert time.monotonic() < end, f"{calls} after half a minute, of {number} calls"
        time.sleep(0.05)
    return calls


def test_whole_and_streamed(ask, target):
    text = expected(target, "w9 w30")
    answer = ask("w9 w30")
    assert content(answer) == text
    assert answer.usage.completion_tokens <= NEW
    chunks = [chunk.choices[0].delta.content or "" for chunk in ask("w9 w30", stream=True) if chunk.choices]
    assert "".join(chunks).split() == text.split()
    assert len(chunks) > 2
    calls = wait_for_calls(target[1].parent / "calls", 2)
    assert all(int(each) > 0 for each in calls), "decoded without the head"


def test_eight_at_once(ask, target):
    texts = [f"w{number} w30" for number in range(9, 17)]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda text: content(ask(text)), texts))
    assert answers == [expected(target, text) for text in texts]


def test_stop(ask, target):
    words = expected(target, "w9 w30").split()
    answer = ask("w9 w30", stop=[words[3]])
    assert answer.choices[0].finish_reason == "stop"
    assert words[2] in content(answer).split()
    assert words[4] not in content(answer).split()[4:]


def test_seeds(ask):
    first, again, other = (content(ask("w9 w30", temperature=1.5, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_an_aborted_stream(ask, target):
    stream = ask("w9 w64", stream=True, max_tokens=400)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    assert content(ask("w9 w30")) == expected(target, "w9 w30")
