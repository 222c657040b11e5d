"""What the calls of `load_calls.py` are made of: odd arguments of loading, odd fields of config.json, damaged files."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from often_right import write_random_head
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from zoo import make

from eagle_fast import TreeConfig

FAMILIES = ("llama", "mixtral")
TREE = {"total_token": 8, "depth": 2, "top_k": 3}
NAN, INF = float("nan"), float("inf")
VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 2**31, 2**63, 10**30, 0.0, 0.5, -0.5, 2.0, 1e30, NAN, INF, "", "x", "1",
    "silu", "float16", [], [1], ["x"], {}, {"a": 1}, {"rope_type": "linear"}, [[1, 2]],
)  # fmt: skip
OBJECTS = (b"x", 1j, object, len, (), (1, 2), {1}, np.int64(2), np.float32(0.5), np.array([1, 2]), torch.tensor(2),
           torch.tensor([1, 2]), torch.float16, torch.device("cpu"), Path("x"), ...)  # fmt: skip
ODD = VALUES + OBJECTS
FITTING: dict[str, tuple] = {
    "device_map": ("cpu", "auto", "balanced", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, {"": "disk"}, "disk",
                   {"model.embed_tokens": "cpu"}, "cuda", "meta", {"": None}),
    "max_memory": ({"cpu": "1GiB"}, {0: "1GiB"}, {"cpu": 10}, {"cpu": -1}, {"cpu": "x"}),
    "draft_device": ("cpu", "cuda", "meta", "auto"),
    "dtype": ("auto", "float32", torch.float32, "bfloat16", torch.float64, "float8_e4m3fn", {"": "float32"}, "int8"),
    "torch_dtype": ("auto", "float32", torch.float16),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "paged|eager"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
    "quantization_config": ({"load_in_8bit": True}, BitsAndBytesConfig(load_in_4bit=True), {"quant_method": "gptq"}),
    "config": (LlamaConfig(), LlamaConfig(vocab_size=131, hidden_size=64, num_attention_heads=4)),
    "revision": ("main", "no"), "ea_revision": ("main", "no"), "subfolder": ("", ".", "no"),
    "gguf_file": ("model.gguf", "config.json"), "feature_layers": ([0, 1, 2], (0, 1, 1), [1, 2, 9]),
    "acceptance": ({"0": [[0.7, 0.2], [0.6]]}, {"0": [[]]}, {"x": [[0.5]]}, {"1": [[2.0]]}, {"0": 0.5}),
    "tree": (TreeConfig(**TREE), TreeConfig), "total_token": (-1, 2, 256), "offload_folder": ("/nonexistent/x",),
}  # fmt: skip
OF_LOADING = (
    "use_eagle3", "base_model_path", "ea_model_path", "total_token", "depth", "top_k", "threshold", "adaptive",
    "device_map", "max_memory", "draft_device", "ea_revision", "draft_int8", "feature_layers", "norm_before_residual",
    "norm_output", "rope_theta", "rope_interleaved", "dtype", "torch_dtype", "attn_implementation",
    "experts_implementation", "quantization_config", "config", "revision", "subfolder", "gguf_file", "token",
    "cache_dir", "local_files_only", "trust_remote_code", "load_in_4bit", "load_in_8bit", "use_safetensors", "variant",
    "key_mapping", "state_dict", "adapter_kwargs", "generation_config", "weights_only", "offload_folder",
    "low_cpu_mem_usage", "pad_token_id", "eos_token_id", "max_position_embeddings", "rope_parameters",
    "num_hidden_layers", "vocab_size", "hidden_act", "ignore_mismatched_sizes", "proxies", "foo", "quantize",
    "attn_implementaton", "tree", "output_loading_info",
)  # fmt: skip
OF_CONFIGS = {
    "base": ("sliding_window", "layer_types", "head_dim", "is_encoder_decoder", "is_decoder", "auto_map", "torch_dtype",
             "quantization_config", "text_config", "partial_rotary_factor", "rope_scaling", "attention_chunk_size",
             "mlp_bias", "use_cache", "cross_attention_hidden_size", "num_experts_per_tok"),
    "head": ("eagle_aux_hidden_state_layer_ids", "feature_layers", "layer_types", "sliding_window", "rope_scaling",
             "rope_parameters", "norm_output", "fc_norm", "norm_before_fc", "norm_before_residual", "eagle_config",
             "use_aux_hidden_state", "speculators_model_type", "transformer_layer_config", "target_hidden_size",
             "tie_word_embeddings", "use_last_layernorm", "head_dim", "rope_theta", "hidden_act", "model_type",
             "draft_vocab_size", "quantization_config", "acceptance"),
}  # fmt: skip
METHODS = {
    "from_pretrained": 6, "setup_multi_gpu": 2, "EaModel": 1, "base config": 5, "head config": 4, "base weights": 3,
    "head weights": 3, "base index": 2, "head index": 2, "base generation": 1,
}  # fmt: skip


class Call(NamedTuple):
    method: str
    note: str
    options: dict[str, Any]
    words: tuple[str, ...]  # one of which a refusal names


@functools.cache
def originals(family: str) -> Path:
    """A folder with `base`, `head`, and both of them in shards. Kept until the process ends."""
    kept = tempfile.TemporaryDirectory()
    KEPT.append(kept)
    root, model = Path(kept.name), make(family, num_hidden_layers=2, sharp=False)
    model.save_pretrained(root / "base")
    model.save_pretrained(root / "base shards", max_shard_size="100KB")
    write_random_head(model, root / "head")
    shutil.copytree(root / "head", root / "head shards")
    (root / "head shards" / "model.safetensors").unlink()
    tensors = load_file(root / "head" / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, root / "head shards" / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (root / "head shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


KEPT: list[Any] = []


@functools.cache
def loaded(family: str):
    return AutoModelForCausalLM.from_pretrained(originals(family) / "base")


# -- files -------------------------------------------------------------------------------------------------------------


def edit_bytes(file: Path, dice: random.Random) -> str:
    content = bytearray(file.read_bytes())
    kind = dice.choice(("cut", "empty", "garbage", "flipped", "long", "pointer", "missing", "folder", "link", "zeros"))
    if kind == "cut":
        content = content[: dice.choice((1, 7, 8, 9, 50, len(content) // 2, len(content) - 1))]
    elif kind == "garbage":
        content = bytearray(dice.randbytes(len(content)))
    elif kind == "flipped":
        content[dice.randrange(min(len(content), 600))] ^= 1 << dice.randrange(8)
    elif kind == "long":
        content[:8] = (2 ** dice.choice((20, 40, 63))).to_bytes(8, "little")
    elif kind == "pointer":
        content = bytearray(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "zeros":
        content = bytearray(len(content))
    if kind in ("missing", "folder", "link"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "link":
            file.symlink_to("nowhere")
        return kind
    file.write_bytes(b"" if kind == "empty" else content)
    return kind


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "gone": lambda x: None, "flat": lambda x: x.flatten(), "more rows": lambda x: torch.cat([x, x[:1]]),
    "fewer rows": lambda x: x[1:], "no rows": lambda x: x[:0], "scalar": lambda x: x.flatten()[0].clone(),
    "turned": lambda x: x.T.contiguous(), "a dimension more": lambda x: x[None], "int8": lambda x: x.to(torch.int8),
    "int64": lambda x: x.long(), "bool": lambda x: x > 0, "double": lambda x: x.double(), "half": lambda x: x.half(),
    "fp8": lambda x: x.to(torch.float8_e4m3fn), "nan": lambda x: x.float() * NAN, "inf": lambda x: x.float() * INF,
    "zero": torch.zeros_like, "huge": lambda x: x.float() * 1e30, "complex": lambda x: x.float() + 0j,
}  # fmt: skip


def edit_tensor(file: Path, dice: random.Random) -> str:
    tensors = load_file(file)
    name, kind = dice.choice(sorted(tensors)), dice.choice([*TENSORS, "other name", "extra"])
    if kind == "other name":
        tensors[f"{name}.x"] = tensors.pop(name)
    elif kind == "extra":
        tensors["more.weight"] = tensors[name].clone()
    else:
        changed = TENSORS[kind](tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()
    save_file(tensors, file, metadata=dice.choice(({"format": "pt"}, {"format": "pt"}, None)))
    return f"{name}: {kind}"


def edit_index(file: Path, dice: random.Random) -> str:
    content = json.loads(file.read_text())
    names = content["weight_map"]
    name, kind = (
        dice.choice(sorted(names)),
        dice.choice(("value", "map", "gone", "extra", "swap", "bytes", "top", "nomap")),
    )
    value = dice.choice(VALUES)
    if kind == "value":
        names[name] = dice.choice((value, "no.safetensors", "/etc/passwd", "../base/model.safetensors", "config.json"))
    elif kind == "map":
        content["weight_map"] = value
    elif kind == "gone":
        names.pop(name)
    elif kind == "extra":
        names["more.weight"] = names[name]
    elif kind == "swap":
        names[name] = dice.choice(sorted(set(names.values())))
    elif kind == "nomap":
        del content["weight_map"]
    file.write_text(json.dumps(value if kind == "top" else content))
    return f"{name}: {kind} " + (edit_bytes(file, dice) if kind == "bytes" else str(value))


def edit_field(file: Path, part: str, dice: random.Random) -> tuple[str, str]:
    """(field, what became of it)."""
    content = json.loads(file.read_text())
    if dice.random() < 0.08:
        return "config.json", edit_bytes(file, dice)
    field = dice.choice(sorted({*content, *OF_CONFIGS.get(part, ())}))
    value, at = dice.choice(VALUES), content
    if isinstance(content.get(field), dict) and dice.random() < 0.7:
        at = content[field]
        field = dice.choice(sorted(at))
    if dice.random() < 0.1:
        at.pop(field, None)
        value = "gone"
    else:
        at[field] = value
    file.write_text(json.dumps(content))
    return field, repr(value)


# -- calls -------------------------------------------------------------------------------------------------------------


def make_call(seed: int, number: int, folder: Path) -> Call:
    """The call of this number, with its files in an empty folder."""
    dice = random.Random(f"{seed}/{number}")
    method = dice.choices(list(METHODS), list(METHODS.values()))[0]
    family = dice.choice(FAMILIES)
    root = originals(family)
    options: dict[str, Any] = {"base_model_path": root / "base", "ea_model_path": root / "head", **TREE}
    part, _, what = method.partition(" ")
    if not what:
        words: tuple[str, ...]
        names = dice.sample(OF_LOADING, dice.choice((1, 1, 1, 2, 3)))
        if method == "EaModel":
            names = [dice.choice(("base_model", "ea_layer", "tree", "name", "device_map", "foo"))]
        for name in names:
            options[name] = dice.choice(dice.choice((ODD, FITTING.get(name, ODD))))
        note = ", ".join(f"{name}={str(options[name])[:60]!r}" for name in names)
        meant = [name.removeprefix("torch_") for name in names]
        meant += ["bitsandbytes" for name in names if name.startswith("load_in") or "quant" in name]
        words = (*names, *meant)
        return Call(method, f"{family}: {note}", options, words)
    part = f"{part} shards" if what == "index" else part
    changed = folder / part
    shutil.copytree(root / part, changed)
    options["base_model_path" if part.startswith("base") else "ea_model_path"] = changed
    file = changed / {"config": "config.json", "weights": "model.safetensors", "generation": "generation_config.json",
                      "index": "model.safetensors.index.json"}[what]  # fmt: skip
    if what in ("config", "generation"):
        field, note = edit_field(file, part if what == "config" else "", dice)
        words = (
            field,
            "config.json",
            file.name,
            "fc.weight",
            "norm.weight",
            *(("encoder",) if "encoder" in field else ()),
        )
        note = f"{field}: {note}"
    elif what == "weights":
        note = (edit_tensor if dice.random() < 0.6 else edit_bytes)(file, dice)
        # the head's first layer has its sizes from some of its tensors, and others are off then
        also = ("more.weight", "layers.0.", "fc.weight", "embeddings", "q_proj", "overflow")
        words = (file.name, note.partition(":")[0], "no weights", "weights", "tensors", *also)
    else:
        note = edit_index(file, dice)
        words = (file.name, note.partition(":")[0], "no weights", "tensors", "missing")
    return Call(method, f"{family}: {note}", options, words)
