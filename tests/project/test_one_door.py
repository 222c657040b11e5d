"""One door to transformers: which files read a target's config, or private names of transformers, accelerate and torch.

Both tables are complete. A name that is new in a file fails, and so does one that is no longer used: what a target's
config or modules are asked for belongs into target/anatomy.py, what transformers calls into target/interface.py.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "eagle_fast"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
# here `config` is a draft head's, or train's own
OF_HEADS = {"decoding/draft.py", "train/rollout.py", "train/card.py", "train/fresh.py", "train/trainer.py"}

BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}

CONFIG_FIELDS = {
    "doctor/plan.py": {"dtype"},  # of the weights to come
    "doctor/trees.py": {"acceptance"},  # of a head
    "hf_generate.py": {  # of a generation config
        "?", "_pad_token_tensor", "do_sample", "get_generation_mode", "return_dict_in_generate",
        "stop_strings",
    },
    "hf_model.py": {"setter"},  # of a property
    "pairs.py": {"eos_token_id", "pad_token_id", "quantization_config"},  # written, of the demo's model
    "target/experts.py": {"_experts_implementation"},
    "target/formats/quantizer.py": {"format", "lm_head_bits", "quantization_config"},  # who is to load it
    "target/interface.py": {"_attn_implementation"},
    "target/kind.py": {  # what is to be loaded, if anything can be
        "architectures", "auto_map", "is_decoder", "is_encoder_decoder", "model_type",
    },
    "target/placement.py": {"dtype"},
    "target/quantized.py": {"dtype"},
}  # fmt: skip
PRIVATE_NAMES = {
    # transformers
    "decoding/processors.py": {"_num_beams", "_prefix_allowed_tokens_fn"},
    "hf_generate.py": {"_pad_token_tensor", "_getframe"},
    "target/experts.py": {"_experts_implementation"},
    "target/formats/quantizer.py": {"_keys_to_ignore_on_load_unexpected"},
    "target/interface.py": {"_attn_implementation", "_getframe"},
    "target/placement.py": {"_no_split_modules"},
    # accelerate, and torch's modules
    "target/twin.py": {
        "_hf_hook", "_old_forward", "_modules", "_buffers", "_forward_hooks", "_forward_hooks_with_kwargs",
        "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_global_forward_hooks", "_global_forward_pre_hooks",
        "_compiled_call_impl", "_orig_mod", "_original_forward", "_torchdynamo_orig_callable",
    },
    # torch
    "decoding/graph.py": {"_cuda_endAllocateToPool", "_cuda_releasePool"},
    "doctor/environment.py": {"_nccl_version"},
    "doctor/measure.py": {"_sleep"},
    "head/module.py": {"_modules"},
    "layers/linear.py": {"_modules"},
    "target/anatomy.py": {"_buffers", "_modules", "_parameters"},
    "target/fused.py": {"_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"},
    "target/longrope.py": {"_modules"},
    "target/norms.py": {"_modules", "_parameters"},
    "target/reference.py": {"_buffers", "_parameters"},
    "target/shards.py": {"_modules", "_pytree"},
    "head/cut.py": {"_version"},
    "target/watch.py": {"_parameters", "_buffers", "_version"},
    # Python, and our own
    "attached.py": {"_eagle_fast"},
    "head/shared.py": {"_replace"},
    "messages.py": {"_getframe"},
    "model.py": {"_tokenizer_options"},
    "target/formats/scheme.py": {"_replace"},
    "target/rank_parts.py": {"_replace"},
    "train/trainer.py": {"_replace"},
}  # fmt: skip


def config_fields(tree):
    """Attributes of anything called config, or ending in _config or .config, but those of heads; "?" is computed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base, name = node.value, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            base, name = node.args[0], getattr(node.args[1], "value", "?")
        else:
            continue
        source = ast.unparse(base)
        if re.search(r"(^|[._])config$", source) and not re.search(r"(head|ea_layer|found)\.config$", source):
            yield name


def private_names(tree):
    """Names that begin with one underscore and are not of the object or module itself; also as texts and in imports."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            found = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            parts = getattr(node, "module", "") or ""
            found = [*parts.split("."), *(part for each in node.names for part in each.name.split("."))]
        else:
            continue
        yield from (name for name in found if re.fullmatch(r"_[a-z]\w*", name) and name not in own)


def table(function, leave_out=()):
    found = {name: set(function(ast.parse(path.read_text(encoding="utf-8")))) for name, path in FILES.items()}
    return {name: names for name, names in found.items() if names and name not in leave_out}


def test_fields_of_target_configs():
    leave_out = {"target/anatomy.py", *OF_HEADS, *(name for name in FILES if name.startswith("head/"))}
    assert table(config_fields, leave_out) == CONFIG_FIELDS


def test_private_names():
    assert table(private_names) == PRIVATE_NAMES


def test_the_door_is_one():
    """Only two files take a config apart and name the attention implementation."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
    assert [name for name, text in texts.items() if "get_text_config" in text] == ["target/anatomy.py"]
    assert [name for name, text in texts.items() if re.search(r"\b_attn_implementation\b", text)] == [
        "target/interface.py"
    ]
    assert [name for name, text in texts.items() if "AttentionInterface.register" in text] == ["target/interface.py"]


@pytest.mark.parametrize(
    "line", ["model.config.new_field", 'getattr(self.config, "new_field")', "generation_config.new_field"]
)
def test_a_new_field_would_be_seen(line):
    assert set(config_fields(ast.parse(line))) >= {"new_field"}


@pytest.mark.parametrize(
    "line", ["model._new_name", 'vars(model)["_new_name"]', "from transformers.utils import _new_name"]
)
def test_a_new_private_name_would_be_seen(line):
    assert set(private_names(ast.parse(line))) == {"_new_name"}
