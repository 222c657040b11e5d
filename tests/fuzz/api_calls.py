"""Calls of the public decoding methods with one to three odd arguments: each is refused with a sentence that helps, or
right. All else is a fault.

    python tests/fuzz/api_calls.py --calls 5000 --seed 1 --jobs 2
    python tests/fuzz/api_calls.py --seed 1 --only 1234          # that one alone, in this process

    refused   ValueError, NaNLogitsError, UnsupportedModel; TypeError for an unknown name; in words, with the argument
    right     greedy: each sequence is what stock `generate` makes of it alone. Sampled: with and without a head the
              same. What the user's own code raises comes out as it is. A fixed call gives its text afterwards
    vague     refused, but without the name of an argument
    raw       any other exception
    wrong     another text, or the fixed call's text has changed
    hung      no end within the time; crashed: the process died

Calls run in worker processes, so that those that hang or end theirs are found. Float32, on the CPU.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "support"))

import torch
import transformers
from api_cases import CPU, SETTINGS, Own, make_call
from decoders import decoder, prompt, stock
from workers import Outcome, main

from eagle_fast import EaModel, NaNLogitsError, TreeConfig, UnsupportedModel
from eagle_fast.config import plain_number
from eagle_fast.messages import shown

NOT_OF_STOCK = ("seed", "shared_noise", "input_ids", "generation_config")


# -- one call ----------------------------------------------------------------------------------------------------------


def outcome(seed: int, number: int) -> Outcome:
    """Make a call and judge it."""
    method, call, _ = make_call(seed, number)
    model = decoder("llama", CPU)
    note = describe(seed, number)[1]
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(model, method, call)
            verdict, said = judge(model, method, call, result, (seed, number))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        verdict, said = judge_error(error, method, call)
    if method != "TreeConfig" and not is_sound(model):
        verdict, said = "wrong", "the fixed call gives another text afterwards"
    return Outcome(verdict, method, f"{note}: {said}")


def run(model: EaModel, method: str, call: dict[str, Any]):
    """The result of a call: of streams, the last item."""
    if method == "TreeConfig":
        return TreeConfig(**call)
    if method == "custom_generate":
        return model.base_model.generate(custom_generate=model.custom_generate, **call)
    result = getattr(model, method)(**call)
    if inspect.isgenerator(result):
        *_, result = result
    return result


def judge_error(error: BaseException, method: str, call: dict[str, Any]) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}"
    if "of the user's own code" in str(error) or isinstance(error, Own):
        return "right", text
    if isinstance(error, TypeError) and "() takes no '" in text and any(f"takes no {name!r}" in text for name in call):
        return "refused", text
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if method == "custom_generate" and not any("/eagle_fast/" in name for name in files):
        return "right", "transformers' own: " + text
    if not isinstance(error, (ValueError, NaNLogitsError, UnsupportedModel)):
        return "raw", text + "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
    named = any(
        name.replace("_", " ") in text.lower().replace("_", " ")
        for name in [*call, *SETTINGS, "attention_mask", "cache", "processor", "criterion"]
    )
    return ("refused" if named and len(text.split()) > 4 else "vague"), text


def judge(model: EaModel, method: str, call: dict[str, Any], result, numbers: tuple[int, int]) -> tuple[str, str]:
    """Of a call that came to an end."""
    _, again, _ = make_call(*numbers)
    torch.manual_seed(0)
    if method == "TreeConfig":
        return ("right" if type(result.depth) is int else "wrong"), repr(result)
    if method == "warmup":
        return "right", ""
    if method == "forward":
        again.pop("output_orig", None)
        again["input_ids"] = again["input_ids"].long()
        with torch.no_grad():
            expected = model.base_model.get_decoder()(**again)[0]
        same = torch.allclose(result[-1], expected, atol=1e-5, equal_nan=True)
        return ("right" if same else "wrong"), "the last hidden states"
    text = text_of(result)
    if method in ("generate", "custom_generate"):
        return judge_generate(model, again, text)
    if plain_number(call.get("temperature", 0)) != 0:
        other = "eagenerate" if "naive" in method else "naivegenerate"
        same = torch.equal(text, text_of(run(model, other, again)))
        return ("right" if same else "wrong"), f"as {other}, sampled"
    return judge_greedy(model, again, text)


def judge_generate(model: EaModel, call: dict[str, Any], text: torch.Tensor) -> tuple[str, str]:
    """Greedy calls against stock `generate` of the same arguments; sampled ones against themselves."""
    config = call.get("generation_config")
    if call.get("do_sample") or getattr(config, "do_sample", False):
        same = call.get("seed") is None or torch.equal(text, text_of(run(model, "generate", call)))
        return ("right" if same else "wrong"), "sampled again"
    mask = call.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not mask[:, -1].all():
        return "right", "padded behind, where stock generate goes on behind the padding"
    options = {name: value for name, value in call.items() if name not in NOT_OF_STOCK}
    try:
        expected = text_of(model.base_model.generate(call["input_ids"], config, **options))
    except Exception as error:
        return "right", f"stock generate cannot: {type(error).__name__}: {error}"
    return ("right" if torch.equal(text, expected) else "wrong"), f"{text.tolist()}, stock {expected.tolist()}"


def judge_greedy(model: EaModel, call: dict[str, Any], text: torch.Tensor) -> tuple[str, str]:
    """Each sequence against what stock `generate` makes of it alone."""
    ids = call["input_ids"].long()
    mask = call.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    stops = call.get("eos_token_id")
    stops = [stops] if plain_number(stops) is not None else [] if stops is None else stops
    stops = [int(each) for each in stops if each < 131]
    for row in range(len(ids)):
        alone = ids[row, mask[row].bool()][None]
        room = int(min(plain_number(call["max_new_tokens"]), plain_number(call["max_length"]) - alone.shape[1]))
        hooks = {name: list(call.get(name) or []) for name in ("logits_processor", "stopping_criteria")}
        options = {name: type_of_list(name)(value) for name, value in hooks.items()}
        options |= {"attention_mask": torch.ones_like(alone), "eos_token_id": stops or None, "pad_token_id": 0}
        try:
            expected = stock(model, alone, max_new_tokens=room, **options)
        except (TypeError, RuntimeError) as error:  # it takes no bool of NumPy from a criterion
            return "right", f"stock generate cannot: {type(error).__name__}: {error}"
        new = text[row, ids.shape[1] :].tolist()
        wanted = expected[0, alone.shape[1] :].tolist()
        if (
            new[: len(wanted)] != wanted
            or any(new[len(wanted) :])
            or text[row, : ids.shape[1]].tolist() != ids[row].tolist()
        ):
            return "wrong", f"sequence {row}: {new}, stock {wanted}"
    return "right", "as stock generate"


def type_of_list(name: str) -> type:
    return transformers.LogitsProcessorList if name == "logits_processor" else transformers.StoppingCriteriaList


def text_of(result) -> torch.Tensor:
    result = getattr(result, "sequences", result)
    return result[0] if isinstance(result, tuple) else result


EXPECTED: list[torch.Tensor] = []


def is_sound(model: EaModel) -> bool:
    """Whether a fixed call gives the text that it gave first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = model.eagenerate(prompt(11, CPU), max_new_tokens=4)
    if not EXPECTED:
        EXPECTED.append(model.base_model.generate(prompt(11, CPU), max_new_tokens=4, do_sample=False))
    return torch.equal(text, EXPECTED[0])


# -- many --------------------------------------------------------------------------------------------------------------


def prepare() -> None:
    quiet()
    decoder("llama", CPU)


def quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def describe(seed: int, number: int) -> tuple[str, str]:
    method, call, changed = make_call(seed, number)
    return method, f"{method}({', '.join(f'{name}={shown(call[name], 80)}' for name in changed)})"


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor do the workers see a GPU
    sys.exit(main("api_calls", __doc__))
