"""What the calls of `api_calls.py` are made of: methods, and for each of their arguments ordinary and odd values.

Every value comes from a function, so that a call can be made again with fresh ones: tensors that nobody wrote to, hooks
without a past.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from decoders import batch_of, prompt
from transformers import (
    BatchEncoding,
    DynamicCache,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TextStreamer,
)

CPU, NAN, INF = torch.device("cpu"), float("nan"), float("inf")
# what may be meant as a length is small or beyond any memory, so that no call takes long
NUMBERS = (
    -1, 0, 1, 2, 3, 100, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 10**5000, 0.0, -0.0, -0.5, 0.5, 1.0, 2.5,
    7.0, 1e-45, 1e-300, 1e-5, 1e39, 1e300, NAN, INF, -INF, True, False, np.int64(5), np.int8(3), np.uint8(2),
    np.float32(0.5), np.float64(0.25), np.float16(1.0), np.bool_(True), np.longdouble(0.5), np.array(4), np.array([4]),
    torch.tensor(5), torch.tensor(0.5), torch.tensor([5]), torch.tensor(True), torch.tensor(5, device="meta"),
    torch.tensor(1j),
)  # fmt: skip
OTHERS = (
    None,
    "",
    "1",
    "x" * 500,
    b"1",
    [],
    [1],
    (),
    (2, 2),
    {},
    {"a": 1},
    {1},
    1j,
    object,
    int,
    len,
    range(3),
    ...,
    CPU,
)


class Own(Exception):
    """What a user's own code raises: it has to come out as it is."""


def raising(error: type[BaseException]) -> Callable:
    def hook(ids, scores):
        raise error("of the user's own code")

    return hook


def returning(value) -> Callable:
    return lambda ids, scores: value


class Slow:
    """A processor with a state: bans what was said three tokens ago."""

    def __init__(self):
        self.seen: list[int] = []

    def __call__(self, ids, scores):
        self.seen.append(int(ids[0, -1]))
        scores = scores.clone()
        scores[:, self.seen[-3:]] = -INF
        return scores


class Until:
    def __init__(self, length: int):
        self.length = length

    def __call__(self, ids, scores, **options):
        return torch.full((len(ids),), ids.shape[1] >= self.length)


class Streamer:
    def put(self, value):
        assert value.device.type == "cpu"

    def end(self):
        pass


class BadStreamer(Streamer):
    def put(self, value):
        raise Own("of the user's own code")


def changed(tensor: torch.Tensor, place, value) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def in_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


IDS = {
    "int32": lambda x: x.int(), "int16": lambda x: x.short(), "uint8": lambda x: x.to(torch.uint8),
    "uint16": lambda x: x.to(torch.uint16), "uint64": lambda x: x.to(torch.uint64), "float": lambda x: x.float(),
    "half": lambda x: x.half(), "bool": lambda x: x > 3, "complex": lambda x: x + 0j, "one dimension": lambda x: x[0],
    "none": lambda x: x[0, 0], "three": lambda x: x[None], "empty": lambda x: x[:, :0], "no rows": lambda x: x[:0],
    "list": lambda x: x.tolist(), "array": lambda x: x.numpy(), "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(), "csr": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.quint8),
    "too large": lambda x: changed(x, (0, 1), 131), "huge": lambda x: changed(x, (0, -1), 2**62),
    "negative": lambda x: changed(x, (-1, -1), -1), "encoding": lambda x: BatchEncoding({"input_ids": x}),
    "column major": lambda x: x.T.contiguous().T, "expanded": lambda x: x[:1].expand(3, -1),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False), "inference": in_inference_mode,
    "flipped": lambda x: x.flip(1), "one token": lambda x: x[:, -1:], "gradient": lambda x: x.float().requires_grad_(),
    "string": lambda x: "Hello", "None": lambda x: None, "special": lambda x: torch.zeros_like(x),
}  # fmt: skip
MASKS = {
    "None": lambda x: None, "ones": torch.ones_like, "bool": lambda x: torch.ones_like(x) > 0,
    "float": lambda x: torch.ones_like(x).float(), "int8": lambda x: torch.ones_like(x).to(torch.int8),
    "left": lambda x: changed(torch.ones_like(x), (0, slice(3)), 0),
    "right": lambda x: changed(torch.ones_like(x), (-1, slice(-3, None)), 0),
    "both": lambda x: changed(changed(torch.ones_like(x), (0, 0), 0), (0, -1), 0),
    "hole": lambda x: changed(torch.ones_like(x), (0, 2), 0), "zeros": torch.zeros_like,
    "last row": lambda x: changed(torch.ones_like(x), -1, 0), "twos": lambda x: torch.ones_like(x) * 2,
    "nan": lambda x: torch.ones_like(x) * NAN, "additive": lambda x: torch.zeros_like(x) - 1e9,
    "short": lambda x: torch.ones_like(x)[:, 1:], "row": lambda x: torch.ones_like(x)[0],
    "four": lambda x: torch.ones_like(x)[:, None, None], "complex": lambda x: torch.ones_like(x) + 0j,
    "sparse": lambda x: torch.ones_like(x).to_sparse(), "meta": lambda x: torch.ones_like(x, device="meta"),
    "nested": lambda x: torch.nested.nested_tensor(list(torch.ones_like(x))),
    "list": lambda x: torch.ones_like(x).tolist(), "array": lambda x: np.ones(x.shape), "number": lambda x: 1,
}  # fmt: skip
SCORES = (
    None, [1.0], True, 1, 0.5, "x", 1j, torch.zeros(1, 131, dtype=torch.long), torch.zeros(1, 131, dtype=torch.bool),
    torch.zeros(1, 131, dtype=torch.complex64), torch.zeros(131), torch.zeros(2, 131), torch.zeros(1, 130),
    torch.zeros(1, 131).to_sparse(), torch.zeros(1, 131, device="meta"), torch.full((1, 131), NAN),
    torch.full((1, 131), -INF), np.zeros((1, 131)), torch.zeros(0), torch.zeros(()),
)  # fmt: skip
VERDICTS = (
    None, "yes", 1, 0, 2, 0.5, [], [True], 1j, torch.tensor([1]), torch.tensor([0.5]), torch.tensor([True, False]),
    torch.tensor([NAN]), torch.zeros(0, dtype=torch.bool), torch.zeros(1, device="meta"), np.array([True]),
    np.bool_(True), True, False, torch.tensor(True), torch.tensor([False]), torch.tensor([[True]]),
)  # fmt: skip
ERRORS = (
    Own,
    StopIteration,
    ValueError,
    KeyError,
    RuntimeError,
    GeneratorExit,
    NotImplementedError,
    StopAsyncIteration,
)

PROCESSORS: list[Callable[[torch.Tensor], Any]] = [
    *(lambda x, value=value: [returning(value)] for value in SCORES),
    *(lambda x, value=value: [returning(value), lambda ids, scores: scores * 2] for value in SCORES[:3]),
    *(lambda x, error=error: [raising(error)] for error in ERRORS),
    lambda x: [Slow()], lambda x: [RepetitionPenaltyLogitsProcessor(1.7), Slow()], lambda x: (Slow(),),
    lambda x: [MinPLogitsWarper], lambda x: [len], lambda x: [lambda ids: ids], lambda x: Slow(), lambda x: Slow,
    lambda x: ["a"], lambda x: [None], lambda x: [lambda ids, scores: scores.double()],
    lambda x: [lambda ids, scores: scores.half()], lambda x: [lambda ids, scores: scores.roll(1, -1)],
    lambda x: [lambda ids, scores: scores.mul_(-1)], lambda x: [lambda ids, scores, more: scores],
    lambda x: [EncoderRepetitionPenaltyLogitsProcessor(2.0, x)], lambda x: [],
    lambda x: iter([]),
]  # fmt: skip
CRITERIA: list[Callable[[torch.Tensor], Any]] = [
    *(lambda x, value=value: [returning(value)] for value in VERDICTS),
    *(lambda x, error=error: [raising(error)] for error in ERRORS),
    lambda x: [Until(14)], lambda x: (Until(13), Until(15)), lambda x: StoppingCriteriaList([Until(14)]),
    lambda x: [MaxLengthCriteria(14)], lambda x: [MaxLengthCriteria], lambda x: [len], lambda x: Until(14),
    lambda x: [], lambda x: [lambda ids: True], lambda x: ["a"],
]  # fmt: skip
FLAGS = (True, False, None, 0, 1, 2, "x", "", [], torch.tensor(True), torch.tensor([True, False]), np.bool_(False), NAN)


def constant(values) -> list[Callable[[torch.Tensor], Any]]:
    return [lambda x, value=value: value for value in values]


NUMBER, FLAG = constant(NUMBERS + OTHERS), constant(FLAGS)
LENGTH = constant([1, 3, 6, 20, np.int64(6), torch.tensor(6)]) + NUMBER
STOPS = [
    *constant([[], [104], 104, [3, 104, 20], (20,), {20}, np.int64(104), np.array([104, 3]), torch.tensor([104])]),
    *constant([[2.0], [True], [-1], [2**63], [10**400], [[104]], [None], "104", ["104"], torch.tensor([1.5]), 500]),
    *constant([torch.tensor([104], device="meta"), {104: 1}, b"h"]), *NUMBER,
]  # fmt: skip
SEEDS = [
    *constant([0, 7, [7], (7,), [7, 8], torch.tensor([7]), np.array([7, 8]), torch.Generator(), range(2), "7", [7.0]]),
    *constant([[None], [True], [-1], [2**63], np.int64(7)]), *NUMBER,
]  # fmt: skip
UNKNOWN = ("max_tokens", "num_beams", "do_sample", "streamer", "stop", "tempreature", "prompt", "n", "inputs", "target")
OURS: dict[str, list[Callable[[torch.Tensor], Any]]] = {
    "input_ids": list(IDS.values()), "attention_mask": list(MASKS.values()), "temperature": NUMBER, "top_p": NUMBER,
    "top_k": NUMBER, "min_p": NUMBER, "seed": SEEDS, "max_new_tokens": LENGTH, "max_length": LENGTH, "log": FLAG,
    "is_llama3": FLAG, "shared_noise": FLAG, "return_dict_in_generate": FLAG, "use_distributed": FLAG,
    "eos_token_id": STOPS, "logits_processor": PROCESSORS, "stopping_criteria": CRITERIA,
    **{name: constant([1, None, True]) for name in UNKNOWN},
}  # fmt: skip
CONFIGS = [
    *constant([{}, "greedy", 1, GenerationConfig, None, [], {"max_new_tokens": 3}]),
    lambda x: GenerationConfig(max_new_tokens=5, pad_token_id=0), lambda x: GenerationConfig(stop_strings=["w7"]),
    lambda x: GenerationConfig(repetition_penalty=1.5, max_new_tokens=4), lambda x: GenerationConfig(num_beams=2),
]  # fmt: skip
STREAMERS = [
    *constant([None, TextStreamer, Streamer, 1, "x", print, object(), []]), lambda x: Streamer(),
    lambda x: BadStreamer(),
]  # fmt: skip
SETTINGS = (
    "do_sample", "num_beams", "num_return_sequences", "repetition_penalty", "encoder_repetition_penalty", "typical_p",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens", "sequence_bias", "guidance_scale",
    "exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values", "watermarking_config",
    "max_time", "prefix_allowed_tokens_fn", "negative_prompt_ids", "use_cache", "cache_implementation", "output_scores",
    "use_model_defaults",
    "penalty_alpha", "assistant_model", "prompt_lookup_num_tokens", "pad_token_id", "bos_token_id", "epsilon_cutoff",
    "synced_gpus", "stop_strings", "tokenizer", "past_key_values", "position_ids", "token_type_ids", "logits_to_keep",
)  # fmt: skip
FITTING: dict[str, list[Callable[[torch.Tensor], Any]]] = {
    "repetition_penalty": constant([1.7, 0.5, np.float32(1.5)]), "encoder_repetition_penalty": constant([2.0, 0.5]),
    "no_repeat_ngram_size": constant([1, 2, 50, 0, -1, 1.0, "x", True]),
    "encoder_no_repeat_ngram_size": constant([1, 2, 50, 0, -1, 1.0, "x", True]),
    "bad_words_ids": constant([[[100], [98, 6]], [[]], [100]]), "suppress_tokens": constant([[3, 4, 5, 104]]),
    "sequence_bias": constant([[[[11], 9.0]], {(11,): 9.0}]), "watermarking_config": constant([{"bias": 4.0}]),
    "prefix_allowed_tokens_fn": constant([lambda row, ids: [5, 6, 7], lambda row, ids: [], lambda row, ids: None]),
    "negative_prompt_ids": [lambda x: x[:, -3:]], "guidance_scale": constant([1.5, 1.0]),
    "stop_strings": constant(["w7"]),
    "exponential_decay_length_penalty": constant([(2, 1.5), (2,)]), "forced_eos_token_id": constant([7, [7, 8]]),
    "past_key_values": [lambda x: DynamicCache()], "position_ids": [lambda x: torch.arange(x.shape[1])[None]],
    "token_type_ids": [torch.zeros_like, torch.ones_like],
}  # fmt: skip
OF_GENERATE: dict[str, list[Callable[[torch.Tensor], Any]]] = {
    **{name: OURS[name] for name in OURS if name not in ("log", "is_llama3", "use_distributed", *UNKNOWN)},
    **{name: [*FITTING.get(name, ()), *(() if "ngram" in name else NUMBER)] for name in SETTINGS},
    "generation_config": CONFIGS, "streamer": STREAMERS, "max_tokens": constant([1]),
}  # fmt: skip
CACHES = [*constant([None, (), [], "x", 1, {}]), lambda x: DynamicCache()]
POSITIONS = [
    lambda x: None, lambda x: torch.arange(x.shape[1])[None], lambda x: torch.arange(x.shape[1]), lambda x: x.float(),
    lambda x: x - 200, lambda x: x.tolist(), lambda x: x[:, 1:], lambda x: torch.arange(x.shape[1]).expand_as(x),
    lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: 5,
]  # fmt: skip
METHODS: dict[str, dict[str, list[Callable[[torch.Tensor], Any]]]] = {
    **dict.fromkeys(("eagenerate", "naivegenerate", "ea_generate", "naive_generate"), OURS),
    **dict.fromkeys(("generate", "custom_generate"), OF_GENERATE),
    "forward": {
        "input_ids": list(IDS.values()), "attention_mask": list(MASKS.values()), "past_key_values": CACHES,
        "output_orig": FLAG, "position_ids": POSITIONS,
    },
    "warmup": {"batch": NUMBER, "max_length": LENGTH},
    "TreeConfig": {"total_token": NUMBER, "depth": NUMBER, "top_k": NUMBER},
}  # fmt: skip
WEIGHTS = {
    "eagenerate": 8,
    "naivegenerate": 3,
    "ea_generate": 3,
    "naive_generate": 2,
    "generate": 8,
    "custom_generate": 2,
}


def base_prompt(dice: random.Random) -> dict[str, torch.Tensor]:
    """input_ids, with an attention_mask where prompts differ in length."""
    kind = dice.choice(("one", "one", "two", "padded"))
    if kind == "padded":
        ids, mask = batch_of([11, 4], CPU)
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": torch.cat([prompt(9, CPU, seed) for seed in range(1, 2 + (kind == "two"))])}


def base_call(method: str, dice: random.Random) -> dict[str, Any]:
    """Arguments of a valid call."""
    if method == "TreeConfig":
        return {}
    if method == "warmup":
        return {"batch": 1, "max_length": 64}
    call = base_prompt(dice)
    if method == "forward":
        return call
    sampled = dice.random() < 0.3
    if method in ("generate", "custom_generate"):
        return call | {"max_new_tokens": 6, "do_sample": sampled, "pad_token_id": 0} | ({"seed": 3} if sampled else {})
    return call | {"max_new_tokens": 6, "max_length": 64} | ({"temperature": 0.8, "seed": 3} if sampled else {})


def make_call(seed: int, number: int) -> tuple[str, dict[str, Any], list[str]]:
    """(method, arguments, the names of those that were changed), the same for the same numbers."""
    dice = random.Random(f"{seed}/{number}")
    method = dice.choices(list(METHODS), [WEIGHTS.get(name, 1) for name in METHODS])[0]
    call, pools = base_call(method, dice), METHODS[method]
    ids = call.get("input_ids", torch.zeros(1, 9, dtype=torch.long))
    names = dice.sample(list(pools), min(len(pools), dice.choice((1, 1, 1, 2, 3))))
    for name in names:
        call[name] = dice.choice(pools[name])(ids)
    return method, call, names
