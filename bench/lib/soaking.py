"""What `bench/soak.py` runs: requests of many kinds, their right texts, what goes wrong on purpose, and measuring."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lib.shapes import build_head
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from eagle_fast import EaModel, TreeConfig

VOCAB = 41  # few tokens, so that a head with random weights is sometimes right
NUM_CASES = 40
TREE = TreeConfig(total_token=6, depth=1, top_k=3)
# what a request does, and how often: the rest are whole texts with the head
KINDS = {
    "plain": 0.10, "generate": 0.10, "stream": 0.15, "conversation": 0.05, "closed": 0.07, "raised": 0.05,
    "interrupted": 0.05, "cleared": 0.001,
}  # fmt: skip
LONGEST_CALL = 0.03  # seconds within which an interrupt comes; one that comes later is waited for
SLACK_BYTES, SLACK = 8 * 2**20, 0.02


class Case(NamedTuple):
    """A request of B prompts, and what is right for it with each change of the model."""

    ids: Tensor  # [B, L], padded in front
    mask: Tensor
    options: dict[str, Any]
    texts: dict[str, Tensor]  # change -> [B, L + longest]


class Planned(Exception):
    """Raised out of a processor, and to come back out of the call."""


class Soak:
    """A model, cases with their right texts, and counts of what was found.

    most_idle, most_bytes: the most idle states at the end of a part, and their memory. graphs_dropped: those that were
    let go of at the ends of parts, of all that were captured. wrong: what was not right.
    """

    def __init__(self, device: str, seed: int, num_cases: int = NUM_CASES):
        self.device, self.rng = torch.device(device), random.Random(seed)
        self.model = self._make(seed)
        self.cases = [self._case(number) for number in range(num_cases)]
        self.changes: dict[str, Callable[[PreTrainedModel], Callable[[], None]]] = {
            "none": lambda model: lambda: None, "hook": _hook, "adapter": _adapter, "weight": _weight,
        }  # fmt: skip
        self.change = "none"
        for name in self.changes:
            self._with_change(name, self._fill_table)
        self.kinds: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.most_idle = self.most_bytes = self.graphs_dropped = 0

    # -- once ------------------------------------------------------------------------------------------------------

    def _make(self, seed: int) -> EaModel:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.3, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        base = (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(self.device).eval().requires_grad_(False)
        )
        return EaModel(base, build_head(base, int8=False), tree=TREE)

    def _case(self, number: int) -> Case:
        """The n-th: long prompts are rare; every other one is sampled; some have a processor, a stop token."""
        rng = self.rng
        batch = rng.choice([1, 1, 1, 1, 1, 2, 2, 3, 4])
        longest = 1100 if number % 40 == 39 else rng.choice([6, 20, 60])
        lengths = [longest, *(rng.randint(1, longest) for _ in range(batch - 1))]
        ids, mask = torch.zeros(batch, longest, dtype=torch.long), torch.zeros(batch, longest, dtype=torch.long)
        for row, length in enumerate(lengths):
            ids[row, longest - length :] = torch.tensor([rng.randrange(3, VOCAB) for _ in range(length)])
            mask[row, longest - length :] = 1
        options: dict[str, Any] = {"max_new_tokens": rng.randint(2, 9), "eos_token_id": []}
        if number % 2:
            options |= {"temperature": rng.choice([0.7, 1.0]), "top_p": 0.9, "seed": rng.randrange(1000)}
        if number % 5 == 4:
            options["logits_processor"] = [RepetitionPenaltyLogitsProcessor(1.2)]
        if number % 3 == 2:
            options["eos_token_id"] = [rng.randrange(3, VOCAB), rng.randrange(3, VOCAB)]
        return Case(ids.to(self.device), mask.to(self.device), options, {})

    def _with_change(self, name: str, function: Callable[[], None]) -> None:
        undo = self.changes[name](self.model.base_model)
        self.change = name
        try:
            function()
        finally:
            undo()

    def _fill_table(self) -> None:
        """The right texts of all cases: plain decoding's, which for greedy texts must be stock `generate`'s."""
        for case in self.cases:
            text = self.model.naivegenerate(case.ids, attention_mask=case.mask, **case.options)
            case.texts[self.change] = text
            for row in range(len(text)) if "temperature" not in case.options else ():
                prompt, width = case.ids[row][case.mask[row].bool()], case.ids.shape[1]
                stock = self.model.base_model.generate(
                    prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False,
                    max_new_tokens=case.options["max_new_tokens"], eos_token_id=case.options["eos_token_id"] or None,
                    logits_processor=case.options.get("logits_processor"),
                )[0, len(prompt) :]  # fmt: skip
                if not torch.equal(text[row, width : width + len(stock)], stock):
                    raise AssertionError(f"plain decoding parts from stock generate: {case}, row {row}")

    # -- requests --------------------------------------------------------------------------------------------------

    def run(self, count: int, num_threads: int, part: int, done: Callable[[], object]) -> None:
        """`count` requests out of several threads: a fifth of the cases, on one change of the model."""
        if part % 3 == 1:
            self.model.states.clear()
        name = list(self.changes)[part % len(self.changes)]
        cases = self.rng.sample(self.cases, max(1, len(self.cases) // 5))
        orders = [(self.rng.choice(cases), random.Random(self.rng.randrange(2**32))) for _ in range(count)]
        self._with_change(name, lambda: self._run_all(orders, num_threads, done))

    def _run_all(self, orders: list[tuple[Case, random.Random]], num_threads: int, done: Callable[[], object]) -> None:
        def work() -> None:
            while True:
                try:
                    case, rng = orders.pop()
                except IndexError:
                    return
                try:
                    self._request(case, rng)
                except BaseException as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                done()

        threads = [threading.Thread(target=work) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _request(self, case: Case, rng: random.Random) -> None:
        kind = rng.choices([*KINDS, "whole"], [*KINDS.values(), 1 - sum(KINDS.values())])[0]
        if kind == "generate" and "temperature" in case.options:
            kind = "whole"
        self.kinds[kind] += 1
        getattr(self, f"_{kind}")(case, rng)

    def _call(self, method: str, case: Case, **options: Any) -> Any:
        return getattr(self.model, method)(case.ids, attention_mask=case.mask, **case.options | options)

    def _check(self, case: Case, found: Tensor, kind: str) -> None:
        if not torch.equal(found, case.texts[self.change]):
            self.wrong.append(f"{kind}, {self.change}, {case.options}: {found.tolist()}")

    def _whole(self, case: Case, rng: random.Random) -> None:
        self._check(case, self._call("eagenerate", case), "whole")

    def _plain(self, case: Case, rng: random.Random) -> None:
        self._check(case, self._call("naivegenerate", case), "plain")

    def _generate(self, case: Case, rng: random.Random) -> None:
        options = case.options | {"eos_token_id": case.options["eos_token_id"] or None, "do_sample": False}
        found = self.model.generate(case.ids, attention_mask=case.mask, pad_token_id=0, **options)
        self._check(case, found, "generate")

    def _stream(self, case: Case, rng: random.Random) -> None:
        *_, last = self._call(rng.choice(["ea_generate", "naive_generate"]), case)
        self._check(case, last, "stream")

    def _closed(self, case: Case, rng: random.Random) -> None:
        stream = self._call("ea_generate", case, reuse_cache=rng.random() < 0.1)
        for _ in range(rng.randint(0, 3)):
            next(stream, None)
        stream.close()

    def _conversation(self, case: Case, rng: random.Random) -> None:
        """A second turn that is the first one and half of its answer: the rest of the answer is what follows."""
        self._check(case, self._call("eagenerate", case, reuse_cache=True), "first turn")
        text, width = case.texts[self.change], case.ids.shape[1]
        if len(text) > 1:
            return
        half = (text.shape[1] - width) // 2
        ids = text[:, : width + half]
        options = case.options | {"max_new_tokens": case.options["max_new_tokens"] - half, "reuse_cache": True}
        self._check(case, self.model.eagenerate(ids, **options), "second turn")

    def _raised(self, case: Case, rng: random.Random) -> None:
        """Out of a processor, or out of a criterion, after some tokens."""
        calls = rng.randint(1, 4)

        def fail(text: Tensor, scores: Tensor | None) -> Any:
            nonlocal calls
            calls -= 1
            if calls <= 0:
                raise Planned
            return torch.zeros(1, dtype=torch.bool) if scores is None else scores

        options = {rng.choice(["logits_processor", "stopping_criteria"]): [fail], "reuse_cache": rng.random() < 0.1}
        with suppress(Planned):  # not where the text ends earlier
            self._call("eagenerate", case, **options)

    def _interrupted(self, case: Case, rng: random.Random) -> None:
        """At any moment of a call, or right after it."""
        method = rng.choice(["eagenerate", "naivegenerate"])
        timer = threading.Timer(rng.uniform(0, LONGEST_CALL), _interrupt_thread, [threading.get_ident()])
        try:
            timer.start()
            self._call(method, case, reuse_cache=rng.random() < 0.1)
            timer.join()
            time.sleep(1)  # it comes here, unless a finalizer was interrupted
        except KeyboardInterrupt:
            pass
        finally:
            timer.join()

    def _cleared(self, case: Case, rng: random.Random) -> None:
        self.model.states.clear()

    # -- measuring -------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, int]:
        """Bytes, threads and files of this process, once idle states are let go of."""
        states = self.model.states
        self.most_idle, self.most_bytes = max(self.most_idle, len(states.idle)), max(self.most_bytes, states.num_bytes)
        self.graphs_dropped += sum(len(lease.step.graphs) for lease in states.idle)
        states.clear()
        gc.collect()
        point = {"requests": sum(self.kinds.values())}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            point["allocated"] = torch.cuda.memory_allocated(self.device)
            point["reserved"] = torch.cuda.memory_reserved(self.device)
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        point["resident"] = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        point["threads"] = len(list(Path("/proc/self/task").iterdir()))
        point["files"] = len(list(Path("/proc/self/fd").iterdir()))
        return point


def _interrupt_thread(ident: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(KeyboardInterrupt))


# -- changes of the model: each returns what takes it back -----------------------------------------------------------


def _hook(model: PreTrainedModel) -> Callable[[], None]:
    def push(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 1.7

    return model.model.layers[1].mlp.register_forward_hook(push).remove


class Adapted(nn.Module):
    """A linear layer and what an adapter adds to it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.scale = linear, 0.5
        self.down = nn.Linear(linear.in_features, 2, bias=False, device=linear.weight.device)
        self.up = nn.Linear(2, linear.out_features, bias=False, device=linear.weight.device)
        generator = torch.Generator().manual_seed(0)
        for each in (self.down, self.up):
            each.weight.data.copy_(torch.randn(each.weight.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * self.up(self.down(x))


def _adapter(model: PreTrainedModel) -> Callable[[], None]:
    attention = model.model.layers[0].self_attn
    stock = attention.v_proj
    attention.v_proj = Adapted(stock).requires_grad_(False)
    return lambda: setattr(attention, "v_proj", stock)


def _weight(model: PreTrainedModel) -> Callable[[], None]:
    down = model.model.layers[1].mlp.down_proj
    down.weight.mul_(-1)

    def undo() -> None:
        down.weight.mul_(-1)

    return undo


# -- the verdict -----------------------------------------------------------------------------------------------------


def verdict(points: list[dict[str, int]]) -> list[str]:
    """What has grown, of points in order; see bench/soak.py for the rule."""
    fifth = max(1, len(points) // 5)
    grown = []
    for name in points[0]:
        if name == "requests":
            continue
        before, after = (
            statistics.median(point[name] for point in part) for part in (points[fifth : 2 * fifth], points[-fifth:])
        )
        slack = 0 if name in ("threads", "files") else max(SLACK * before, SLACK_BYTES)
        if after - before > slack:
            grown.append(f"{name} {before:,.0f} -> {after:,.0f}")
    return grown
