"""Targets, heads, trees and devices that cannot be: errors of `EaModel.from_pretrained` that say what to do."""

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from decoders import TREE
from often_right import write_random_head
from zoo import make

from eagle_fast import EaModel


@functools.cache
def folders():
    """Folders: a target, a head for it, heads for others, and incomplete ones. Kept until the tests end."""
    kept = tempfile.TemporaryDirectory()
    root = Path(kept.name)
    model = make("llama")
    model.save_pretrained(root / "target")
    write_random_head(model, root / "head")
    write_random_head(make("llama", hidden_size=32), root / "narrow")
    write_random_head(make("llama", vocab_size=160), root / "vocabulary")
    write_random_head(make("llama", num_hidden_layers=8), root / "deep", eagle_aux_hidden_state_layer_ids=[2, 5, 8])
    (root / "empty").mkdir()
    (root / "file").write_text("{}")
    for source, name in (("target", "target without config"), ("head", "head without config")):
        (root / name).mkdir()
        (root / name / "model.safetensors").write_bytes((root / source / "model.safetensors").read_bytes())
    return SimpleNamespace(kept=kept, root=root, model=model)


LOADS = {
    "no target": ({"base_model_path": None}, ValueError, r"base_model_path=None: pass a hub name"),
    "no head": ({"ea_model_path": None}, ValueError, r"ea_model_path=None: pass a hub name"),
    "number": ({"base_model_path": 3}, ValueError, r"base_model_path=3"),
    "missing target": ({"base_model_path": "/no/such/folder"}, ValueError, r"'/no/such/folder': there is no such fold"),
    "missing head": ({"ea_model_path": "./nowhere"}, ValueError, r"'./nowhere': there is no such folder"),
    "file as head": ({"ea_model_path": "file"}, ValueError, r"there is no such folder"),
    "empty target": ({"base_model_path": "empty"}, ValueError, r"model_type"),
    "empty head": ({"ea_model_path": "empty"}, ValueError, r"no config.json in .* needs config.json beside"),
    "target without config": ({"base_model_path": "target without config"}, ValueError, r"config.json"),
    "head without config": ({"ea_model_path": "head without config"}, ValueError, r"no config.json in"),
    "head of another width": ({"ea_model_path": "narrow"}, ValueError, r"32 wide .* hidden size is 64"),
    "head of another vocabulary": ({"ea_model_path": "vocabulary"}, ValueError, r"of 131 tokens, lacks 29 of the 160"),
    "head of a deeper target": ({"ea_model_path": "deep"}, ValueError, r"\[8\] outside 0..6"),
    "feature layers": ({"feature_layers": [1, 2]}, ValueError, r"3 times the target's hidden size 64.*\[1, 2\]"),
    "unknown name": ({"quantization": 4}, TypeError, r"'quantization'"),
    "total_token 1": ({"total_token": 1}, ValueError, r"total_token=1: use 2 to 256, or -1"),
    "total_token 257": ({"total_token": 257}, ValueError, r"total_token=257: use 2 to 256"),
    "total_token 60.0": ({"total_token": 60.0}, ValueError, r"total_token=60.0"),
    "more than can be drafted": ({"total_token": 60, "depth": 1, "top_k": 2}, ValueError, r"more than the 7 nodes"),
    "depth -1": ({"depth": -1}, ValueError, r"depth=-1: use an integer from 0 to 16"),
    "depth 17": ({"depth": 17}, ValueError, r"depth=17"),
    "top_k 0": ({"top_k": 0}, ValueError, r"top_k=0: use an integer from 1 to 16"),
    "top_k 17": ({"top_k": 17}, ValueError, r"top_k=17"),
    "top_k True": ({"top_k": True}, ValueError, r"top_k=True"),
    "cuda": ({"device_map": "cuda"}, ValueError, r"'cuda', but torch sees no GPU"),
    "cuda:7": ({"device_map": "cuda:7"}, ValueError, r"'cuda:7', but torch sees no GPU"),
    "7": ({"device_map": 7}, ValueError, r"'cuda:7', but torch sees no GPU"),
    "meta": ({"device_map": "meta"}, ValueError, r"device_map='meta': eagle_fast runs on CUDA GPUs and on the CPU"),
    "mps": ({"device_map": "mps"}, ValueError, r"device_map='mps'"),
    "unknown device": ({"device_map": "gpu"}, ValueError, r"device_map='gpu': use 'auto', 'cpu', 'cuda' or 'cuda:N'"),
    "float device": ({"device_map": 1.5}, ValueError, r"device_map=1.5: use"),
    "several devices": (
        {"device_map": {"model": 0, "lm_head": 1}},
        ValueError,
        r"device_map\['model'\]=0: 'cuda:0', but torch sees no",
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_bad_loads(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    options, error, message = LOADS[name]
    options = {"base_model_path": "target", "ea_model_path": "head", **TREE, **options}
    for key in ("base_model_path", "ea_model_path"):
        if (folders().root / str(options[key])).exists():
            options[key] = str(folders().root / options[key])
    with pytest.raises(error, match=message):
        EaModel.from_pretrained(**options)


def test_a_missing_gpu_is_named_among_those_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device_map in ("cuda:2", 2, {"": "cuda:2"}):
        with pytest.raises(ValueError, match=r"'cuda:2', but torch sees 2 GPU\(s\), cuda:0 to cuda:1"):
            EaModel.from_pretrained(base_model_path="owner/a", ea_model_path="owner/b", device_map=device_map)


def test_a_loaded_model_cannot_be_loaded_otherwise():
    with pytest.raises(ValueError, match=r"\['device_map', 'dtype'\] cannot change a model that is loaded already"):
        EaModel.from_pretrained(
            base_model_path=folders().model,
            ea_model_path=str(folders().root / "head"),
            dtype="float16",
            device_map="cpu",
        )
