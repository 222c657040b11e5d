"""Heads that cannot help: an error at load that says why, in place of a text that is right and slow for ever."""

import json

import pytest
import torch
from decoders import TREE
from often_right import write_often_right_head
from safetensors.torch import load_file, save_file
from zoo import make

from eagle_fast import EaModel


def load(tmp_path, change=lambda tensors: None, **settings):
    model = make("llama")
    folder = write_often_right_head(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return EaModel.from_pretrained(base_model_path=model, ea_model_path=str(folder), **TREE)


def put(name, value):
    def change(tensors):
        tensors[name] = torch.full_like(tensors[name], value)

    return change


def one_nan(tensors):
    tensors["midlayer.mlp.down_proj.weight"][3, 5] = float("nan")


def all_zeros(tensors):
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = torch.zeros_like(tensor)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_nan, r"layers\.0\.mlp\.down_proj\.weight: NaN or infinite"),
        (put("lm_head.weight", float("nan")), r"lm_head\.weight: NaN or infinite"),
        (put("norm.weight", float("inf")), r"norm\.weight: NaN or infinite"),
        (put("lm_head.weight", 0.0), "hold one number throughout"),
        (put("lm_head.weight", 0.5), "hold one number throughout"),
        (all_zeros, "hold one number throughout"),
    ],
)
def test_dead_weights_are_refused(change, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        load(tmp_path, change)


@pytest.mark.parametrize("theta", [-1.0, float("nan"), float("inf")])
def test_impossible_rotations_are_named(theta, tmp_path):
    with pytest.raises(ValueError, match=r"rope_theta is .*positive number"):
        load(tmp_path, rope_theta=theta, rope_scaling=None, rope_parameters=None)


def test_the_head_itself_loads(tmp_path):
    assert load(tmp_path).tree.total_token == TREE["total_token"]
