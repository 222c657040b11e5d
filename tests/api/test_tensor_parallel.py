"""tensor_parallel as an argument: what it loads, what base_model is then, and what is refused by name. All on a CPU."""

import gc
import weakref

import pytest
import torch
from decoders import TREE
from ranked import both, folders, prompts
from zoo import make

import eagle_fast.target.devices
import eagle_fast.target.rank_files
from eagle_fast import EaModel, run_multi_gpu_inference, setup_multi_gpu_inference
from eagle_fast.target.anatomy import UnsupportedModel
from eagle_fast.target.rank_files import Checkpoint, cut_of

CPUS = ["cpu", "cpu"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return folders(make("qwen3"), tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def single(paths):
    return EaModel.from_pretrained(**paths, **TREE)


@pytest.fixture(scope="module")
def model(paths):
    return EaModel.from_pretrained(**paths, tensor_parallel=CPUS, **TREE)


def load(paths, **options):
    return EaModel.from_pretrained(**{**paths, **TREE, "tensor_parallel": CPUS, **options})


def test_what_is_loaded(model, single):
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert list(model.device_map) == list(single.device_map) or len(single.device_map) == 1
    assert next(iter(model.device_map)) == "model.embed_tokens"
    assert set(map(tuple, model.device_map.values())) == {(torch.device("cpu"),) * 2}
    assert all(each.is_meta for each in model.base_model.parameters())
    assert len(cut_of(model.base_model).ranks) == 2
    assert cut_of(single.base_model) is None
    assert model.name_or_path == single.name_or_path
    assert model.exactness.reason
    assert model.base_model.generation_config.to_dict() == single.base_model.generation_config.to_dict()


def test_the_scripts_of_the_multi_gpu_page(paths, single):
    model = setup_multi_gpu_inference(
        paths["base_model_path"], ea_model_path=paths["ea_model_path"], tensor_parallel=CPUS, total_token=16
    )
    ids = prompts(1)["input_ids"]
    first_device = next(iter(model.device_map.values()))
    if isinstance(first_device, list):
        first_device = first_device[0]
    out = model.eagenerate(ids.to(first_device), temperature=0.0, top_p=0.0, max_new_tokens=20, use_distributed=True)
    assert torch.equal(out, single.naivegenerate(ids, max_new_tokens=20))
    with pytest.raises(ValueError, match="tensor_parallel=1"):
        run_multi_gpu_inference(paths["base_model_path"], paths["ea_model_path"], "text", tensor_parallel=1)


def test_generate_of_the_model_and_of_its_skeleton(model, single):
    ids = prompts(1)["input_ids"]
    options = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.3}
    expected = single.base_model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.base_model.generate(ids, **options), expected)


def test_records_of_rounds(model, single):
    options = {**prompts(3), "max_new_tokens": 15, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    options |= dict.fromkeys(["return_dict_in_generate", "output_scores", "output_logits", "output_logprobs"], True)
    out, expected = model.eagenerate(**options), single.eagenerate(**options)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.allclose(out.logprobs, expected.logprobs, atol=1e-4)
    for mine, theirs in zip(out.logits, expected.logits, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3)


def test_conversations(model, single, monkeypatch):
    """Rows are reused where they lie, and copied to a longer state, on every rank."""
    monkeypatch.setattr("eagle_fast.decoding.states.LENGTH_STEP", 32)
    ids, held = prompts(1)["input_ids"], 0
    model.states.clear()
    for _ in range(3):
        out = model.eagenerate(ids, max_new_tokens=8, reuse_cache=True, return_dict_in_generate=True)
        assert torch.equal(out.sequences, single.naivegenerate(ids, max_new_tokens=8))
        assert out.statistics.reused_tokens == [held]
        held = out.sequences.shape[1] - 2
        ids = torch.cat([out.sequences, prompts(1)["input_ids"]], 1)


def test_trees_may_change(paths, single):
    model = EaModel.from_pretrained(**paths, tensor_parallel=CPUS, total_token=16, adaptive=True)
    options = {**prompts(3), "max_new_tokens": 60}
    assert torch.equal(model.eagenerate(**options), single.naivegenerate(**options))


def test_tied_embeddings_and_an_eagle1_head_share_what_rank_0_has(tmp_path):
    from often_right import write_often_right_head

    def write(model, folder):
        write_often_right_head(model, folder, "eagle")

    pair = both(make("llama"), writer=write)
    options = {**prompts(1), "max_new_tokens": 20}
    assert torch.equal(pair.ranked.eagenerate(**options), pair.single.naivegenerate(**options))


# -- how it is loaded --------------------------------------------------------------------------------------------------


def test_no_moment_holds_more_than_one_whole_layer(paths, monkeypatch):
    alive, most = weakref.WeakSet(), []
    fill = Checkpoint.fill

    def watched(self, module, prefix):
        made = fill(self, module, prefix)
        gc.collect()
        alive.add(made)
        most.append(len(alive))
        return made

    monkeypatch.setattr(Checkpoint, "fill", watched)
    load(paths)
    assert len(most) == 6 + 3  # layers, and the ends with the norm
    assert max(most[:6]) <= 2  # the one before may be about to go
    assert not alive


def test_a_checkpoint_of_several_files_in_another_dtype(tmp_path):
    model = make("llama")
    given = folders(model, tmp_path)
    model.save_pretrained(tmp_path / "target", max_shard_size="100KB")
    (tmp_path / "target" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((tmp_path / "target").glob("*.safetensors"))) > 2
    two = load(given, dtype=torch.bfloat16)
    weights = [cut_of(two.base_model).ranks[rank].layers[5].o.weight for rank in range(2)]
    assert torch.equal(torch.cat(weights, 1), model.model.layers[5].self_attn.o_proj.weight.bfloat16())


def test_a_checkpoint_that_lacks_a_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    given = folders(make("llama"), tmp_path)
    file = tmp_path / "target" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.layers\.3\.mlp\.up_proj\.weight"):
        load(given)
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(96, 63)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"as \[96, 63\], its config.json says \[96, 64\]"):
        load(given)


def test_a_checkpoint_without_safetensors(tmp_path):
    given = folders(make("llama"), tmp_path)
    (tmp_path / "target" / "model.safetensors").rename(tmp_path / "target" / "other.bin")
    with pytest.raises(ValueError, match="tensor_parallel reads safetensors files"):
        load(given)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device_map": "balanced"}, "does not go with device_map"),
        ({"max_memory": {"cpu": "1GiB"}}, "does not go with max_memory"),
        ({"draft_device": "cpu"}, "does not go with draft_device"),
        ({"target_bits": 3}, "target_bits=3: use 8 or 4"),
        ({"gguf_file": "x.gguf"}, "does not go with gguf_file"),
        ({"load_in_4bit": True}, "does not go with quantization_config"),
        ({"num_hidden_layers": 3}, "does not go with num_hidden_layers"),
        ({"tensor_parallel": 0}, "tensor_parallel=0: give the number"),
        ({"tensor_parallel": ["cpu"]}, r"a list of two devices"),
        ({"tensor_parallel": "cuda"}, "use True, a number of GPUs, or a list"),
        ({"tensor_parallel": ["cpu", "meta"]}, "runs on CUDA GPUs and on the CPU"),
    ],
)
def test_arguments_that_do_not_go_together(paths, options, match):
    with pytest.raises(ValueError, match=match):
        load(paths, **options)


def test_a_model_that_is_loaded_already(paths):
    with pytest.raises(ValueError, match="is a loaded model, and tensor_parallel cuts weights while they are loaded"):
        load({**paths, "base_model_path": make("qwen3")})


@pytest.mark.parametrize("name", ["mixtral", "gemma3_text"])
def test_other_families(name, tmp_path):
    with pytest.raises(UnsupportedModel, match="device_map='balanced' spreads layers"):
        load(folders(make(name), tmp_path))


@pytest.mark.parametrize(
    ("value", "gpus", "match"),
    [
        (True, 8, "all 8 GPUs, and more than 2 have not yet run"),
        (True, 1, "it takes two GPUs, and torch sees 1"),
        (2, 1, r"torch sees 1 GPU\(s\)"),
        ([0, 0], 2, "names a GPU twice"),
        (["cuda:1", 1], 2, "names a GPU twice"),
        ([0, "cpu"], 2, "give GPUs alone"),
    ],
)
def test_gpus_that_are_not_there_or_twice(monkeypatch, paths, value, gpus, match):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=match):
        load(paths, tensor_parallel=value)


def test_more_gpus_than_have_run_are_taken_by_number_with_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    resolve = eagle_fast.target.devices.resolve_ranks
    with pytest.warns(UserWarning, match="have not yet run"):
        assert resolve(4) == [torch.device("cuda", index) for index in range(4)]
    assert resolve(True if torch.cuda.device_count() == 2 else 2) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert resolve(None) is resolve(False) is None


def test_gpus_that_cannot_reach_each_other(monkeypatch):
    from eagle_fast.layers.peer_links import check_peers

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: False)
    with pytest.raises(ValueError, match=r"cuda:0 cannot reach the memory of cuda:1 .*device_map='balanced'"):
        check_peers([torch.device("cuda", 0), torch.device("cuda", 1)], "tensor_parallel=2")


def test_a_forward_of_its_own(model):
    with pytest.raises(ValueError, match="decodes, and has no forward"):
        model(prompts(1)["input_ids"])


def test_changes_that_ranks_cannot_follow(paths):
    model = load(paths)
    ids = prompts(1)["input_ids"]
    before = model.eagenerate(ids, max_new_tokens=5)
    layer = model.base_model.model.layers[2]

    def refused(match):
        with pytest.raises(ValueError, match=match):
            model.eagenerate(ids, max_new_tokens=5)

    handle = layer.mlp.register_forward_hook(lambda *_: None)
    refused(r"a hook on model\.layers\.2\.mlp\), and its weights are cut over 2 ranks \(tensor_parallel\)")
    handle.remove()
    layer.mlp.forward = lambda x: x
    refused(r"a forward put on model\.layers\.2\.mlp")
    del layer.mlp.forward
    own, layer.mlp.up_proj = layer.mlp.up_proj, torch.nn.Linear(64, 96, bias=False)
    refused("its modules, tensors or code")
    layer.mlp.up_proj = own
    layer.self_attn.scaling *= 2
    refused("scaling of a module or config")
    layer.self_attn.scaling /= 2
    model.config.rms_norm_eps = 0.1
    refused("rms_norm_eps of a module or config")
    model.config.rms_norm_eps = 1e-6
    assert torch.equal(model.eagenerate(ids, max_new_tokens=5), before)


def test_tokens_that_end_a_text_may_change(paths):
    model = load(paths)
    ids = prompts(1)["input_ids"]
    text = model.eagenerate(ids, max_new_tokens=10)[0, 19:].tolist()
    model.config.eos_token_id = model.base_model.generation_config.eos_token_id = text[3]
    assert model.eagenerate(ids, max_new_tokens=10)[0, 19:].tolist() == text[: text.index(text[3]) + 1]
