"""Odd values in every field of a head's config.json, of `HeadConfig` and in arguments: a ValueError that names the
field, or a head that decodes the target's text."""

import dataclasses
import functools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import TREE, prompt
from often_right import write_often_right_head
from zoo import make

from eagle_fast import EaModel, TreeConfig
from eagle_fast.head import DraftHead, HeadConfig, read_head
from eagle_fast.head.checks import _FIELDS

pytestmark = pytest.mark.filterwarnings("ignore:config.json", "ignore:the head is for a vocabulary")

ODD = [
    -1, 0, 1, 3, 10**30, 10**400, 1.5, -0.5, 1e-300, 1e300, math.nan, True, False, "", "x", [], {}, [1], [-1, 2, 3],
    [1, 2, 3], ["x"], [True, False, True], [1.5, 2.5, 3.5], [99, 100, 101], {"a": {}}, {"factor": "x"},
]  # fmt: skip
COMPARED = ["hidden_size", "intermediate_size", "target_hidden_size", "draft_vocab_size", "num_hidden_layers"]
OTHERS = ["hidden_act", "hidden_activation", "sliding_window", "rope_theta", "rope_scaling", "rope_parameters"]
OTHERS += ["partial_rotary_factor", "transformer_layer_config", "model", "eagle_config", "architectures"]
OTHERS += ["parallel_drafting", "ptd_token_id", "dflash_config", "early_stop_method", "medusa_num_heads", "torch_dtype"]
ROPES = {
    "linear": dict(factor=2.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=2.0, attention_factor=1.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "longrope": dict(short_factor=[1.0] * 16, long_factor=[2.0] * 16),
}
MEMBERS = [(kind, name) for kind, members in ROPES.items() for name in ("rope_theta", *members)]
MEMBERS += [(kind, "original_max_position_embeddings") for kind in ("yarn", "llama3", "longrope")]


@functools.cache
def pair():
    """(target, head's folder, its config.json, the head, the target's own text)."""
    kept = tempfile.TemporaryDirectory()
    model = make("llama")
    folder = write_often_right_head(model, Path(kept.name) / "head")
    text = model.generate(prompt(11, torch.device("cpu")), max_new_tokens=12, do_sample=False)
    return model, kept, folder, json.loads((folder / "config.json").read_text()), read(folder), text


def read(folder, **arguments):
    return read_head(folder, target_hidden_size=64, target_vocab_size=131, num_target_layers=6, **arguments)


# what an error may name instead, where a field is right by itself
ALSO = {
    "norm_before_fc": "input_norm",
    "use_aux_hidden_state": "fc.weight is",
    "eagle_aux_hidden_state_layer_ids": "feature layers",
    "rope_scaling": "factor",
    "rope_parameters": "factor",
    "num_target_layers": "feature layers",
    "activation": "hidden_act",
    "has_fc": "without fc",
}
decoded: list[HeadConfig] = []


def assert_decodes(checkpoint):
    """The target's text with this head; once for each of the configs."""
    model, *_, text = pair()
    if checkpoint.config in decoded:
        return
    embedding, lm_head = model.get_input_embeddings().weight, model.lm_head.weight
    head = DraftHead(checkpoint, embedding=embedding, lm_head_weight=lm_head)
    ea_model = EaModel(model, head, tree=TreeConfig(16, 3, 4), adaptive=False)
    assert torch.equal(ea_model.eagenerate(prompt(11, torch.device("cpu")), max_new_tokens=12), text)
    decoded.append(checkpoint.config)


def result_or_refusal(name, call):
    """What the call gives, or None if it raises a ValueError, which must name the field."""
    try:
        return call()
    except ValueError as error:
        message = str(error)
    assert name in message or ALSO[name] in message, message
    return None


def try_config(changes, name, folder):
    _, _, source, config, *_ = pair()
    if not (folder / "model.safetensors").exists():
        (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | changes))
    checkpoint = result_or_refusal(name, lambda: read(folder))
    if checkpoint is not None:
        assert_decodes(checkpoint)


@pytest.mark.parametrize("name", [*_FIELDS, *COMPARED, *OTHERS])
def test_fields_of_config_json(name, tmp_path):
    for value in ODD:
        extra = {"layer_types": ["sliding_attention"]} if name == "sliding_window" else {}
        try_config(extra | {name: value}, name, tmp_path)
    try_config({"eagle_config": {name: ODD[-2]}}, name, tmp_path)


@pytest.mark.parametrize(("kind", "member"), MEMBERS)
def test_members_of_rope_scaling(kind, member, tmp_path):
    for value in ODD:
        rope = {"rope_type": kind, "original_max_position_embeddings": 32, **ROPES[kind], member: value}
        try_config({"rope_scaling": rope}, member, tmp_path)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HeadConfig)])
def test_fields_of_the_record(field):
    checkpoint = pair()[4]
    for value in [*ODD, None, (), b"x"]:
        config = result_or_refusal(field, lambda: dataclasses.replace(checkpoint.config, **{field: value}))  # noqa: B023
        if config is None:
            continue
        try:
            DraftHead(checkpoint._replace(config=config), embedding=torch.randn(131, 64))
        except ValueError:  # tensors that do not fit it, by name
            continue
        assert_decodes(checkpoint._replace(config=config))


ARGUMENTS = ("feature_layers", "norm_before_residual", "norm_output", "rope_theta", "rope_interleaved", "use_eagle3")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    *_, folder, _, _, _ = pair()
    for value in [*ODD, b"x", range(3), np.int64(3), np.array([1, 2, 3]), torch.tensor([1, 2, 3]), np.bool_(True)]:
        checkpoint = result_or_refusal(name, lambda: read(folder, **{name: value}))  # noqa: B023
        if checkpoint is not None:
            assert_decodes(checkpoint)


@pytest.mark.parametrize("name", [*ARGUMENTS, "threshold"])
def test_arguments_are_checked_before_the_target_is_loaded(name):
    wrong = {"base_model_path": "no-owner/no-target", "ea_model_path": pair()[2], name: {"x": 1}}
    with pytest.raises(ValueError, match=rf"^{name}=\{{'x': 1\}}: use "):
        EaModel.from_pretrained(**wrong, **TREE)
