"""Idle states: bounded by count and bytes, least recently used first, and never in use twice, whatever ends a call."""

import gc
import sys
import threading
from collections import Counter

import pytest
import torch
from decoders import decoder, prompt, rebuilt, stock

from eagle_fast.decoding.round import Round
from eagle_fast.decoding.states import MAX_IDLE

NEW = 8


def decode(model, batch=1, method="eagenerate", **options):
    ids = prompt(9, model.target.device).expand(batch, -1)
    return getattr(model, method)(ids, **{"max_new_tokens": NEW, **options})


def batches(model):
    return [lease.state.batch for lease in model.states.idle]


def test_many_batch_sizes_leave_a_few_states(device):
    model = rebuilt(decoder("llama", device))
    for batch in range(1, MAX_IDLE + 4):
        decode(model, batch)
    assert batches(model) == list(range(4, MAX_IDLE + 4))
    assert model.states.num_bytes == sum(lease.num_bytes for lease in model.states.idle) <= model.states.max_bytes
    decode(model, 5)
    decode(model, 1, "naivegenerate")
    assert batches(model) == [*range(6, MAX_IDLE + 4), 5, 1], "the one used last goes last"
    model.states.max_count = 2
    decode(model, 8)
    assert batches(model) == [1, 8]
    model.states.clear()
    assert model.states.num_bytes == 0


def test_bytes_are_bounded_too(device):
    model = rebuilt(decoder("llama", device))
    decode(model, 2)
    one = model.states.num_bytes
    model.states.max_bytes = int(2.6 * one)
    for batch in (3, 1, 2):
        decode(model, batch)
    assert batches(model) == [1, 2]
    model.states.max_bytes = 1
    for _ in range(2):
        decode(model, 4)
        assert batches(model) == [4], "the one used last stays"
    model.states.max_count = 0
    decode(model, 4)
    assert batches(model) == []


@pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # looking at every object there is
def test_bytes_are_those_of_all_tensors(device):
    model = rebuilt(decoder("phi3_longrope", device))
    for head in (model.ea_layer, None):
        gc.collect()
        before = {id(each) for each in gc.get_objects() if isinstance(each, torch.Tensor)}
        state = Round(model.target, head, model.tree, 3, 100)
        gc.collect()
        new = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and id(each) not in before]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in new}
        assert 0.99 <= state.num_bytes / sum(storages.values()) <= 1.0  # a few index tensors lie in tuples


@pytest.mark.gpu
def test_graphs_are_counted_and_given_back(device):
    model = rebuilt(decoder("llama", device))

    def reserved():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    decode(model, max_new_tokens=40)  # what the first call leaves, as compiled kernels
    model.states.clear()
    before = reserved()
    for batch in (1, 2):
        decode(model, batch, max_new_tokens=40)
    assert all(lease.step.graphs and lease.step.num_bytes > 0 for lease in model.states.idle)
    assert sum(lease.step.num_bytes for lease in model.states.idle) <= reserved() - before
    model.states.clear()
    assert reserved() <= before


@pytest.mark.gpu
def test_states_share_a_stream_to_capture_on(device):
    """cuBLAS keeps 32 MB for each stream that it ever ran on: states after states must not use new ones."""
    model = rebuilt(decoder("llama", device))

    def allocated():
        model.states.clear()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    decode(model, max_new_tokens=40)
    before = allocated()
    for batch in range(2, 9):
        decode(model, batch, max_new_tokens=40)
    steps = [step for lease in model.states.idle for step in lease.step.of_trees.values()]
    assert len({id(stream) for step in steps for stream in step.streams}) == 1
    del steps
    assert allocated() - before < 2**23


def test_a_state_in_use_is_not_dropped(device):
    model = rebuilt(decoder("llama", device))
    expected = stock(model, prompt(9, device), max_new_tokens=NEW)
    model.states.max_count = 1
    streams = [model.ea_generate(prompt(9, device), max_new_tokens=NEW) for _ in range(3)]
    seen = [next(stream) for stream in streams]
    model.states.clear()
    decode(model, 2)
    for stream in streams:
        seen = list(stream)[-1]
        assert torch.equal(seen, expected)
    assert batches(model) == [1]


def test_bounds_stay_where_the_model_changes_and_old_states_go(device):
    model = rebuilt(decoder("llama", device))
    model.states.max_count = 3
    states, stream = model.states, model.ea_generate(prompt(9, device), max_new_tokens=NEW)
    expected = decode(model)
    next(stream)
    decode(model, 2)
    old = [lease.step for lease in states.idle]
    handle = model.base_model.model.layers[0].register_forward_hook(lambda *_: None)
    decode(model, 3)
    assert model.states is states
    assert batches(model) == [3]
    assert torch.equal(list(stream)[-1], expected)
    assert batches(model) == [3], "what belongs to the model of before doesn't stay"
    assert not any(step.graphs or step.of_trees for step in old), "closed"
    handle.remove()
    assert model.states.max_count == 3


def test_no_state_is_leased_twice(device):
    """Threads that are many, bounds that are tight, and someone who clears."""
    model = rebuilt(decoder("llama", device))
    model.states.max_count = 2
    expected = {batch: decode(model, batch) for batch in (1, 2, 3)}
    in_use, wrong, lease = Counter(), [], model.states.lease

    def watched(*args):
        context = lease(*args)

        class Watched:
            def __enter__(self):
                self.state, *rest = context.__enter__()
                in_use[id(self.state)] += 1
                if in_use[id(self.state)] > 1:
                    wrong.append("leased twice")
                return self.state, *rest

            def __exit__(self, *error):
                in_use[id(self.state)] -= 1
                return context.__exit__(*error)

        return Watched()

    model.states.lease = watched

    def work(seed):
        for n in range(6):
            batch = 1 + (n + seed) % 3
            if not torch.equal(decode(model, batch, reuse_cache=bool((n + seed) % 2)), expected[batch]):
                wrong.append("text")
            if n == seed:
                model.states.clear()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(model.states.idle) <= 2


# -- interrupts ------------------------------------------------------------------------------------------------------


def interrupted(function, count):
    """Run a function and interrupt it where it calls the `count`-th function of ours, as a signal does; returns
    whether it got that far."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        name = frame.f_code.co_filename
        if "/eagle_fast/" in name or name.endswith("contextlib.py"):
            seen += 1
            if seen == count:
                sys.settrace(None)
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return seen >= count  # one in a finalizer is ignored


def negate(module, args, output):
    return -output


def is_free(lock):
    """Whether another thread can have it."""
    found = []

    def take():
        found.append(lock.acquire(timeout=5))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt in a finalizer
def test_interrupts_anywhere(device):
    """The turn is free again, no state is lent twice or kept half-done, and the text is right, with reuse too."""
    model, ids = rebuilt(decoder("llama", device)), prompt(9, device)
    longer = torch.cat([ids, prompt(4, device, 3)], 1)
    layer, expected = model.base_model.model.layers[0], {}
    for changed in (True, False):
        handle = layer.register_forward_hook(negate) if changed else None
        expected[changed] = stock(model, longer, max_new_tokens=NEW)
        if handle:
            handle.remove()
    count, got_there, rounds = 1, True, 0
    while got_there:
        changed = rounds % 4 == 1  # the target is made anew within the call
        handle = layer.register_forward_hook(negate) if changed else None
        got_there = interrupted(lambda: model.eagenerate(ids, max_new_tokens=NEW, reuse_cache=True), count)
        assert is_free(model.target.turn.lock), f"the turn is still taken, call {count}"
        assert len({id(lease.state) for lease in model.states.idle}) == len(model.states.idle)
        out = model.eagenerate(longer, max_new_tokens=NEW, reuse_cache=True)
        assert torch.equal(out, expected[changed]), f"text after an interrupt in call {count}"
        if handle:
            handle.remove()
        count, rounds = count + 83, rounds + 1
    assert rounds > 8
