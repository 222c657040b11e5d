"""A process forked while another thread decodes: the child decodes too, or is told why not."""

import os
import pickle
import signal
import threading
import time
import warnings

import pytest
import torch
from decoders import decoder, prompt, rebuilt, stock

from eagle_fast.target.turns import ForkedProcessError

NEW = 24
SECONDS = 60
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


def in_child(function):
    """What `function` returns or raises in a forked process; a failure where it takes too long."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads, which is the case that is tested
        child = os.fork()
    if child == 0:
        try:
            answer = function()
        except Exception as error:
            answer = error
        os.write(writer, pickle.dumps(answer))
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    with os.fdopen(reader, "rb") as pipe:
        return pickle.loads(pipe.read())


@pytest.fixture
def busy():
    """Call with a function that another thread then runs again and again, until the test is over."""
    over, threads = threading.Event(), []

    def start(function):
        def loop():
            while not over.is_set():
                function()

        threads.append(threading.Thread(target=loop))
        threads[-1].start()

    yield start
    over.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("method", ["eagenerate", "naivegenerate"])
def test_a_child_decodes_beside_a_busy_parent(method, busy):
    cpu = torch.device("cpu")
    model, ids = rebuilt(decoder("llama", cpu)), prompt(20, cpu)
    expected = stock(model, ids, max_new_tokens=NEW).tolist()
    busy(lambda: getattr(model, method)(ids, max_new_tokens=NEW))

    def decode():
        return [getattr(model, method)(ids, max_new_tokens=NEW).tolist() for _ in range(2)]

    for _ in range(4):
        assert in_child(decode) == [expected, expected]
        time.sleep(0.013)


def test_a_child_goes_on_with_the_forking_threads_own_stream():
    cpu = torch.device("cpu")
    model, ids = rebuilt(decoder("llama", cpu)), prompt(20, cpu)
    expected = stock(model, ids, max_new_tokens=NEW).tolist()
    stream = model.ea_generate(ids, max_new_tokens=NEW)
    next(stream)
    assert in_child(lambda: list(stream)[-1].tolist()) == expected
    assert list(stream)[-1].tolist() == expected


def test_a_fork_out_of_a_processor():
    """In the middle of a turn, whose lock the forking thread holds."""
    cpu = torch.device("cpu")
    model, ids = rebuilt(decoder("llama", cpu)), prompt(20, cpu)
    expected, found = stock(model, ids, max_new_tokens=NEW).tolist(), []

    def fork(text, scores):
        if text.shape[1] == 22:
            found.append(in_child(lambda: model.eagenerate(ids, max_new_tokens=NEW).tolist()))
        return scores

    assert model.eagenerate(ids, max_new_tokens=NEW, logits_processor=[fork]).tolist() == expected
    assert found == [expected]


def test_workers_of_a_data_loader(busy):
    cpu = torch.device("cpu")
    model, ids = rebuilt(decoder("llama", cpu)), prompt(20, cpu)
    busy(lambda: model.eagenerate(ids, max_new_tokens=NEW))

    class Answers(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return model.eagenerate(prompt(9 + index, cpu), max_new_tokens=NEW)[0, -NEW:]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = torch.utils.data.DataLoader(
            Answers(), num_workers=2, batch_size=2, multiprocessing_context="fork", timeout=SECONDS
        )
        found = torch.cat(list(loader))
    assert torch.equal(
        found, torch.cat([stock(model, prompt(9 + n, cpu), max_new_tokens=NEW)[:, -NEW:] for n in range(4)])
    )


@pytest.mark.gpu
def test_cuda_in_a_child_is_refused_in_words():
    device = torch.device("cuda", 0)
    model, ids = rebuilt(decoder("llama", device)), prompt(20, device).cpu()
    model.eagenerate(ids, max_new_tokens=4)
    for call in (model.eagenerate, model.generate, model.states.clear):
        answer = in_child(lambda call=call: call() if call == model.states.clear else call(ids, max_new_tokens=4))
        assert isinstance(answer, ForkedProcessError)
        assert "start processes by spawn" in str(answer)
    model.eagenerate(ids, max_new_tokens=4)
