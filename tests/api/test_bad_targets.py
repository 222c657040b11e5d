"""Targets that cannot be: each is a ValueError that names the argument or the file, and says what to do."""

import copy
import functools
import io
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from decoders import TREE
from huggingface_hub import errors
from often_right import write_random_head
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from zoo import make

from eagle_fast import EaModel, TreeConfig
from eagle_fast.layers.slab import LayerShape
from eagle_fast.target import UnsupportedModel
from eagle_fast.target.sound import check_shapes


@functools.cache
def pair():
    """A target in a folder, one in shards, a head for both, and the pair in memory. Kept until the tests end."""
    kept = tempfile.TemporaryDirectory()
    root = Path(kept.name)
    model = make("llama", num_hidden_layers=2)
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "shards", max_shard_size="100KB")
    write_random_head(model, root / "head")
    loaded = EaModel.from_pretrained(base_model_path=model, ea_model_path=root / "head", **TREE)
    return SimpleNamespace(kept=kept, root=root, model=model, loaded=loaded)


def load(base_model_path=None, **options):
    whole = pair().root / "whole" if base_model_path is None else base_model_path
    return EaModel.from_pretrained(base_model_path=whole, ea_model_path=pair().root / "head", **{**TREE, **options})


OPTIONS = [
    (dict(device_map={1: "cpu"}), r"device_map has the key 1: keys are names of modules"),
    (dict(device_map={"model": "cpu", None: "cpu"}), r"device_map has the key None"),
    (dict(device_map={}), r"device_map=\{\}: it names no module"),
    (dict(device_map={"": {}}), r"device_map=\{\}: use 'auto'"),
    (dict(device_map=["cpu"]), r"device_map=\['cpu'\]: use 'auto'"),
    (dict(device_map=True), r"device_map=True: use 'auto'"),
    (dict(device_map={"nope": "cpu"}), r"device_map names nope, which LlamaForCausalLM does not have"),
    (dict(device_map={"model": "cpu"}), r"device_map gives no device to lm_head"),
    (dict(max_memory="1GiB"), r"max_memory='1GiB': use a dict of GPU indices"),
    (dict(max_memory={"gpu": 1}, device_map="auto"), r"max_memory has the key 'gpu'"),
    (dict(max_memory={"cpu": "lots"}), r"max_memory\['cpu'\]='lots': use bytes"),
    (dict(max_memory={"cpu": -1}), r"max_memory\['cpu'\]=-1"),
    (dict(max_memory={"cpu": 1.5}), r"max_memory\['cpu'\]=1.5"),
    (dict(dtype="bogus"), r"dtype='bogus': use torch.bfloat16"),
    (dict(torch_dtype="bogus"), r"dtype='bogus'"),
    (dict(dtype=16), r"dtype=16"),
    (dict(dtype=torch.int8), r"dtype=torch.int8"),
    (dict(dtype="float8_e4m3fn"), r"dtype='float8_e4m3fn'.*quantization_config"),
    (dict(dtype=torch.complex64), r"dtype=torch.complex64"),
    (dict(dtype={"": "bogus"}), r"dtype='bogus'"),
    (dict(config="x"), r"config='x': pass a config"),
    (
        dict(config=LlamaConfig()),
        r"config= is of a model of width 4096 .* is \d+: pass the checkpoint's own",
    ),
    (dict(quantization_config="x"), r"cannot be loaded"),
    (dict(subfolder=3), r"base_model_path='.*' "),
    (dict(subfolder="nope"), r"base_model_path='.*' cannot be loaded|no config.json"),
    (dict(attn_implementation="bogus"), r"base_model_path='.*' cannot be loaded: .*bogus"),
    (dict(base_model_path="a b/c"), r"base_model_path='a b/c' is neither a folder nor a name"),
    (
        dict(base_model_path="no/such", local_files_only=True),
        r"'no/such' is not a folder, .*check the name",
    ),
    (dict(base_model_path=""), r"base_model_path='': pass a hub name"),
    (dict(base_model_path=b"x"), r"base_model_path=b'x': pass a hub name"),
    (dict(base_model_path=__file__), r"is a file, there is no such folder: pass the folder .*gguf_file="),
]


@pytest.mark.parametrize("at", range(len(OPTIONS)))
def test_odd_options(at):
    options, message = OPTIONS[at]
    with pytest.raises(ValueError, match=message) as caught:
        load(**options)
    assert len(str(caught.value)) < 600


def test_unknown_options_are_type_errors():
    with pytest.raises(TypeError, match=r"^EaModel.from_pretrained\(\) takes no 'quantization'"):
        load(quantization=4)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def without_weights():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(pair().model.config)


OBJECTS = {
    "None": (lambda: None, ValueError, r"=None"),
    "number": (lambda: 3, ValueError, r"=3"),
    "class": (lambda: type(pair().model), ValueError, r"LlamaForCausalLM"),
    "config": (lambda: pair().model.config, ValueError, r"<LlamaConfig>"),
    "tensors": (lambda: pair().model.state_dict(), ValueError, r"<OrderedDict>"),
    "linear": (lambda: nn.Linear(2, 2), UnsupportedModel, r" is a Linear: give a causal language model"),
    "wrapper": (lambda: Wrapper(pair().model), UnsupportedModel, r"around a LlamaForCausalLM: give its \.module"),
    "parallel": (lambda: nn.DataParallel(pair().model), UnsupportedModel, r"DataParallel around .* give its \.module"),
    "EaModel": (lambda: pair().loaded, UnsupportedModel, r"EaModel around .* give its \.base_model"),
    "head": (lambda: pair().loaded.ea_layer, UnsupportedModel, r" is a DraftHead: give a causal"),
    "no lm_head": (lambda: pair().model.model, UnsupportedModel, r" is a LlamaModel, which has no lm_head"),
    "classifier": (
        lambda: LlamaForSequenceClassification(pair().model.config),
        UnsupportedModel,
        r"LlamaForSequenceClassification, which has no lm_head",
    ),
    "meta": (without_weights, UnsupportedModel, r"without weights \(model.embed_tokens.weight is on the meta device"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_that_are_no_target(name):
    made, error, message = OBJECTS[name]
    value = made()
    with pytest.raises(error, match=f"base_model.*{message}"):
        EaModel(value, pair().loaded.ea_layer)
    with pytest.raises(error, match=f"base_model_path.*{message}"):
        EaModel.from_pretrained(base_model_path=value, ea_model_path=pair().root / "head", **TREE)


def test_what_is_no_head_and_no_tree():
    for head, message in ((None, "NoneType"), ("folder", "str"), (nn.Linear(1, 1), "Linear")):
        with pytest.raises(ValueError, match=f"ea_layer is a {message}: give a DraftHead"):
            EaModel(pair().model, head)
    with pytest.raises(ValueError, match=r"tree='x': give a TreeConfig"):
        EaModel(pair().model, pair().loaded.ea_layer, tree="x")
    assert EaModel(pair().model, pair().loaded.ea_layer, tree=TreeConfig(16, 3, 4)).tree.total_token == 16


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps, lambda it: torch.save(it, io.BytesIO())])
def test_copies_are_refused(way):
    with pytest.raises(TypeError, match=r"neither copied nor pickled.*make another EaModel"):
        way(pair().loaded)


SHARD = "model-00002-of-"
DAMAGE = {
    "config.json gone": ("whole", "config.json", None, r"has no config.json, .*model_type"),
    "config.json cut": ("whole", "config.json", 7, r"damaged: config.json is not JSON"),
    "config.json a list": ("whole", "config.json", b"[]", r"damaged: config.json holds no JSON object"),
    "config.json empty": ("whole", "config.json", b"{}", r"model_type"),
    "unknown type": ("whole", "config.json", b'{"model_type": "nosuch"}', r"model type `nosuch`"),
    "other sizes": ("whole", "config.json", {"hidden_size": 32}, r"tensors of other shapes than its config.json says"),
    "no heads": ("whole", "config.json", {"num_attention_heads": 0}, r"is its config.json right"),
    "weights gone": ("whole", "model.safetensors", None, r"has no weights \(model.safetensors, .*holds config.json"),
    "weights cut": ("whole", "model.safetensors", 1000, r"damaged: model.safetensors cannot be read"),
    "weights empty": ("whole", "model.safetensors", 0, r"damaged: model.safetensors cannot be read"),
    "a pointer": ("whole", "model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer"),
    "index cut": ("shards", "model.safetensors.index.json", 9, r"damaged: model.safetensors.index.json is not JSON"),
    "index empty": ("shards", "model.safetensors.index.json", b"{}", r"model.safetensors.index.json has no weight_map"),
    "shard gone": ("shards", SHARD, None, rf"index.json names {SHARD}\d+.safetensors, which is not there"),
    "shard cut": ("shards", SHARD, 500, rf"damaged: {SHARD}\d+.safetensors cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_name_the_file(name, tmp_path):
    source, start, what, message = DAMAGE[name]
    folder = tmp_path / "base"
    shutil.copytree(pair().root / source, folder)
    file = next(each for each in sorted(folder.iterdir()) if each.name.startswith(start))
    content = file.read_bytes()
    if what is None:
        file.unlink()
    elif isinstance(what, dict):
        file.write_text(json.dumps(json.loads(content) | what))
    else:
        file.write_bytes(content[:what] if isinstance(what, int) else what)
    with pytest.raises(ValueError, match=rf"base_model_path='.*' .*{message}") as caught:
        load(folder)
    assert len(str(caught.value)) < 600


def test_a_damaged_pickle(tmp_path):
    shutil.copy(pair().root / "whole" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK" + bytes(5000))
    with pytest.raises(ValueError, match=r"damaged: pytorch_model.bin cannot be read"):
        load(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="may read every file")
def test_no_permission(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(pair().root / "whole", folder)
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(ValueError, match=r"model.safetensors"):
        load(folder)


def test_a_pair_without_a_tokenizer(monkeypatch):
    def answer(*args, **options):
        raise OSError("no tokenizer.json")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", answer)
    with pytest.raises(ValueError, match=r"the tokenizer of base_model_path='.*' cannot be loaded .no tokenizer.json"):
        load().get_tokenizer()


HUB = {
    "gated": (errors.GatedRepoError, r"is gated: ask for access .*token="),
    "private": (errors.RepositoryNotFoundError, r"is not on the hub: check the name, and pass token="),
    "revision": (errors.RevisionNotFoundError, r"has no such revision"),
    "offline": (errors.LocalEntryNotFoundError, r"is neither in the hub's cache nor could it be fetched|not a folder"),
    "network": (ConnectionError, r"check the name and the network"),
    "permission": (PermissionError, r"no permission"),
}


@pytest.mark.parametrize("name", HUB)
def test_answers_of_the_hub(name, monkeypatch):
    """transformers' OSError around the hub's own error."""
    kind, message = HUB[name]

    def answer(*args, **options):
        cause = kind.__new__(kind)
        OSError.__init__(cause, "pages\n\nand pages")
        raise OSError("pages\n\nand pages") from cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", answer)
    monkeypatch.setattr("eagle_fast.loading_target.find_adapter_config_file", lambda *args, **options: None)
    with pytest.raises(ValueError, match=f"base_model_path='owner/name' .*{message}"):
        load("owner/name")


def test_an_adapter_alone_loads_with_its_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(pair().root / "whole")
    adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path)
    decoder = load(tmp_path)
    ids = torch.randint(3, 131, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = decoder.base_model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=8), expected)


def test_shapes_that_the_kernels_do_not_take(monkeypatch, device):
    def shapes(size, dtype):
        return [LayerShape(2, 64, torch.float32, device), LayerShape(2, size, dtype, device)]

    wide, double = shapes(512, torch.bfloat16), shapes(64, torch.float64)
    monkeypatch.setenv("EAGLE_FAST_KERNELS", "triton")
    check_shapes(shapes(256, torch.bfloat16))
    with pytest.raises(UnsupportedModel, match=r"layer 1 has heads of size 512 .* up to 256"):
        check_shapes(wide)
    with pytest.raises(UnsupportedModel, match=r"float64"):
        check_shapes(double)
    monkeypatch.setenv("EAGLE_FAST_KERNELS", "ref")
    check_shapes(wide + double)


def test_a_window_that_the_model_does_not_know():
    """transformers' cache forgets keys by it, Llama's attention does not: stock text depends on how it is made."""
    model = make("llama", num_hidden_layers=2, sliding_window=7)
    with pytest.raises(UnsupportedModel, match=r"config has sliding_window, which a LlamaConfig does not know"):
        EaModel(model, pair().loaded.ea_layer)
