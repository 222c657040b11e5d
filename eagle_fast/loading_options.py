"""Which options loading takes: ours, a draft head's, and what transformers' from_pretrained makes something of.

transformers takes options of its own, then fields of the config (unless config= is given), then arguments of the
model's class; classes that take any argument make nothing of it. Other names are a TypeError, before weights are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from eagle_fast.messages import listed
from eagle_fast.options import option_names, perhaps
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.target.kind import model_class

HEAD_OPTIONS = ("feature_layers", "norm_before_residual", "norm_output", "rope_theta", "rope_interleaved")
HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
CONFIG_OPTIONS = (*HUB_OPTIONS, "revision", "subfolder", "trust_remote_code")
BITSANDBYTES_OPTIONS = ("load_in_4bit", "load_in_8bit")
OURS = ("output_loading_info", "return_unused_kwargs")  # that loading says to transformers itself
_BY_KEYWORD = (
    "adapter_kwargs", "adapter_name", "allow_all_kernels", "attn_implementation", "code_revision", "device_map",
    "device_mesh", "distributed_config", "dtype", "experts_implementation", "generation_config", "gguf_file",
    "kernel_config", "key_mapping", "max_memory", "offload_buffers", "offload_folder", "proxies",
    "quantization_config", "state_dict", "subfolder", "torch_dtype", "tp_plan", "tp_size", "tqdm_class",
    "trust_remote_code", "use_kernels", "variant",
    "from_flax", "from_tf", "low_cpu_mem_usage", "mirror", "offload_state_dict",  # of old, and ignored
)  # fmt: skip


class UnknownOption(TypeError):
    """An option that nobody takes.

    candidates: what may have been meant, besides the arguments of the method. rest: who takes what the method does not.
    """

    def __init__(
        self,
        name: str,
        candidates: Collection[str] = (),
        rest: str = "",
        of: str = "from_pretrained",
        taken: Collection[str] = (),
    ):
        unlike = name in candidates  # which others take
        hint = "" if unlike else perhaps(name, [*taken, *candidates])
        own = f"It takes {listed(taken, len(taken))}; {rest}" if taken else rest
        super().__init__(f"{of}() takes no {name!r}{hint}. {own}")
        self.name, self.candidates, self.rest, self.taken = name, candidates, rest, taken


def names_options(function: Callable) -> Callable:
    """Decorator for what hands **options on to `load_target`: an unknown one is said of this function."""

    @functools.wraps(function)
    def named(*args, **options):
        try:
            return function(*args, **options)
        except UnknownOption as error:
            own = [name for name in option_names(function) if name != "cls"]
            taken = list(dict.fromkeys([*own, *error.taken, *HEAD_OPTIONS]))
            raise UnknownOption(error.name, error.candidates, error.rest, function.__qualname__, taken) from None

    return named


def transformers_options() -> set[str]:
    """Options that from_pretrained of transformers takes of any model."""
    own = {*option_names(PreTrainedModel.from_pretrained), *_BY_KEYWORD, *BITSANDBYTES_OPTIONS}
    return own - {"cls", "pretrained_model_name_or_path", *OURS}


def check_names(auto: Any, config: PreTrainedConfig | None, options: dict[str, Any]) -> None:
    """UnknownOption for options of from_pretrained that neither transformers nor the model would make something of.

    config: the checkpoint's; None where a file of weights holds it, whose fields are not known then. The classes that a
    checkpoint brings are not looked at either.
    """
    taken, fields = transformers_options(), None if options.get("config") is not None else config
    rest = _rest(auto, config, options)
    model = None if config is None else model_class(auto, config, options)
    if model is None:
        unknown = [name for name in options if name in OURS or name.startswith("_")]
    else:
        taken |= {*option_names(vars(model).get("__init__", len))} - {"config"}
        unknown = [name for name in options if name not in taken and not _is_field(fields, name)]
    _refuse(unknown, taken, config, rest)


def check_names_of_loaded(model: Any, options: Collection[str]) -> None:
    """UnknownOption for names that loading would not take of this model either."""
    taken, config = transformers_options(), Anatomy(model).config
    unknown = [name for name in options if name not in taken and not _is_field(config, name)]
    _refuse(unknown, taken, config, "nothing else can be said of a model that is loaded already")


def _is_field(config: PreTrainedConfig | None, name: str) -> bool:
    return config is not None and Anatomy(config).has_field(name)


def _refuse(unknown: list[str], taken: set[str], config: PreTrainedConfig | None, rest: str) -> None:
    if unknown:
        raise UnknownOption(unknown[0], sorted(taken | (Anatomy(config).fields if config else set())), rest)


def _rest(auto: Any, config: PreTrainedConfig | None, options: dict[str, Any]) -> str:
    name = f"{auto.__name__}.from_pretrained of transformers"
    if config is None:
        return f"the rest goes to {name}"
    of_config = f"fields of {type(config).__name__}"
    if options.get("config") is not None:
        return f"the rest goes to {name}, which takes no {of_config} beside config=: set them in it"
    return f"the rest goes to {name}, which takes options of its own and {of_config}"
