"""Damaged head folders: every error is a ValueError that names the file or the tensor, and says what to do."""

import json

import huggingface_hub.errors
import pytest
import torch
from draft_formats import sample
from draft_weights import TARGET, H, V, plain_eagle3

import eagle_fast.head.files
from eagle_fast import EaModel
from eagle_fast.head import DraftHead, read_head

NOISE = bytes((37 * i * i + 11 * i) % 256 for i in range(300))


def folder_with(tmp_path, **files):
    """A whole head, and then these files in place of its own: bytes, an object for JSON, or None for a folder."""
    plain_eagle3().write(tmp_path)
    for name, content in files.items():
        name = name.replace("__", ".")
        if name != "config.json" and (tmp_path / "model.safetensors").is_file():
            (tmp_path / "model.safetensors").unlink()
        file = tmp_path / name
        if content is None:
            file.unlink(missing_ok=True)
            file.mkdir()
        else:
            file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return tmp_path


DAMAGED = r"cannot be read as plain tensors; .* Download the head again"
INDEX = "model__safetensors__index__json"
FILES = {
    "no JSON": (dict(config__json=b"{"), r"config\.json is not JSON .* download the head again"),
    "no text": (dict(config__json=NOISE), r"config\.json is not JSON"),
    "nothing": (dict(config__json=b""), r"config\.json is not JSON"),
    "too deep": (dict(config__json=b"[" * 100_000), r"config\.json is not JSON"),
    "too long a number": (dict(config__json=b'{"a": ' + b"9" * 5000 + b"}"), r"config\.json is not JSON"),
    "a list": (dict(config__json=[1]), r"config\.json holds a list, not a JSON object"),
    "a number": (dict(config__json=3), r"config\.json holds a int, not a JSON object"),
    "config is a folder": (dict(config__json=None), r"config\.json cannot be read: IsADirectoryError"),
    "index is no JSON": ({INDEX: NOISE}, r"index\.json is not JSON"),
    "index is a list": ({INDEX: [1]}, r"index\.json holds a list"),
    "index is empty": ({INDEX: {}}, r"index\.json has no weight_map .* download the head again"),
    "map is a list": ({INDEX: {"weight_map": ["a"]}}, r"index\.json has no weight_map"),
    "map of numbers": ({INDEX: {"weight_map": {"a": 1}}}, r"index\.json has no weight_map"),
    "map of nothing": ({INDEX: {"weight_map": {}}}, r"missing layers\.0\.mlp\.gate_proj\.weight"),
    "missing shard": ({INDEX: {"weight_map": {"a": "b.safetensors"}}}, r"names the file 'b\.safetensors', which"),
    "weights are a folder": (dict(model__safetensors=None), r"model\.safetensors cannot be read: .*may read\?"),
    **{
        f"{len(content)} bytes as {file}": ({file: content}, DAMAGED)
        for file in ("model__safetensors", "pytorch_model__bin")
        for content in (b"", b"x", b"\0" * 64, NOISE, b"PK\x03\x04" + NOISE, b"\x80\x02}q\x00.")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    files, message = FILES[name]
    with pytest.raises(ValueError, match=message) as error:
        read_head(folder_with(tmp_path, **files), **TARGET)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
def test_truncated_weights(storage, tmp_path):
    made = plain_eagle3()
    made.storage = storage
    file = made.write(tmp_path) / ("model.safetensors" if storage == "safetensors" else "pytorch_model.bin")
    whole = file.read_bytes()
    for kept in (4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"{file.name} cannot be read as plain tensors"):
            read_head(tmp_path, **TARGET)


def test_links_to_nothing_and_files_that_may_not_be_read(tmp_path, monkeypatch):
    folder = folder_with(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: FileNotFoundError"):
        read_head(folder, **TARGET)

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(eagle_fast.head.files, "load_file", refuse)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: PermissionError.*may read\?"):
        read_head(folder, **TARGET)


# -- tensors

SPARSE = torch.eye(80, H).to_sparse()
TENSORS = {
    "0-d fc": ({"fc.weight": torch.tensor(1.0)}, r"fc\.weight has shape \[\], expected a matrix"),
    "1-d fc": ({"fc.weight": torch.ones(7)}, r"fc\.weight has shape \[7\], expected a matrix"),
    "3-d fc": ({"fc.weight": torch.ones(2, 2, 2)}, r"fc\.weight has shape \[2, 2, 2\], expected a matrix"),
    "empty fc": ({"fc.weight": torch.ones(0, 144)}, r"fc\.weight has shape \[0, 144\], expected a matrix"),
    "narrow fc": ({"fc.weight": torch.ones(H, 3)}, r"fc\.weight has 3 columns"),
    "0-d lm_head": ({"lm_head.weight": torch.tensor(1.0)}, r"lm_head\.weight has shape \[\], expected a matrix"),
    "1-d lm_head": ({"lm_head.weight": torch.ones(23)}, r"lm_head\.weight has shape \[23\], expected a matrix"),
    "wide lm_head": ({"lm_head.weight": torch.randn(23, 7)}, r"lm_head\.weight is \[23, 7\], expected \[23, 48\]"),
    "0-d norm": ({"norm.weight": torch.tensor(1.0)}, r"norm\.weight has shape \[\], expected at least"),
    "0-d q_norm": ({"midlayer.self_attn.q_norm.weight": torch.tensor(1.0)}, r"q_norm\.weight"),
    "1-d q_proj": ({"midlayer.self_attn.q_proj.weight": torch.ones(9)}, r"q_proj\.weight has shape \[9\]"),
    "narrow q_proj": ({"midlayer.self_attn.q_proj.weight": torch.ones(64, 49)}, r"embeddings 1 wide"),
    "embedding": ({"embed_tokens.weight": torch.ones(V)}, r"embed_tokens\.weight has shape \[61\], expected a matrix"),
    "no embedding": ({"embed_tokens.weight": torch.ones(0, H)}, r"embed_tokens\.weight has shape \[0, 48\]"),
    "int": ({"norm.weight": torch.ones(H, dtype=torch.int64)}, r"norm\.weight is torch\.int64: weights are"),
    "bool": ({"norm.weight": torch.ones(H, dtype=torch.bool)}, r"norm\.weight is torch\.bool: weights are floats"),
    "complex": ({"norm.weight": torch.ones(H, dtype=torch.complex64)}, r"norm\.weight is torch\.complex64: weights"),
    "uint8": ({"norm.weight": torch.ones(H, dtype=torch.uint8)}, r"quantized weights: norm\.weight is torch\.uint8"),
    "NaN": ({"norm.weight": torch.full((H,), torch.nan)}, r"norm\.weight: NaN or infinite"),
    "float d2t": ({"d2t": torch.ones(23)}, r"d2t is torch\.float32: token ids are integers, save it as int64"),
    "bool d2t": ({"d2t": torch.ones(23, dtype=torch.bool)}, r"d2t is torch\.bool: token ids are integers"),
    "0-d d2t": ({"d2t": torch.tensor(1)}, r"d2t has shape \[\], expected at least one number"),
    "no d2t": ({"d2t": torch.ones(0, dtype=torch.int64)}, r"d2t has shape \[0\], expected at least one number"),
    "huge d2t": ({"d2t": torch.full((23,), 2**63 - 1), "t2d": None}, r"d2t leads to token ids"),
    "float t2d": ({"t2d": torch.ones(V)}, r"t2d is torch\.float32"),
    "numbers as t2d": ({"t2d": torch.arange(V)}, r"t2d holds more than 0 and 1"),
    "0-d t2d": ({"t2d": torch.tensor(True)}, r"t2d has shape \[\]"),
    "sparse": ({"midlayer.mlp.up_proj.weight": SPARSE}, r"up_proj\.weight is a torch\.sparse_coo tensor: save"),
    "meta": ({"norm.weight": torch.ones(H, device="meta")}, r"norm\.weight is a meta tensor"),
    "far layer": ({"layers.99999999.mlp.up_proj.weight": torch.ones(2, 2)}, r"missing layers\.1, while there is"),
    "no tensor": ({"norm.weight": "x"}, r"norm\.weight is a str, not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, tmp_path):
    changes, message = TENSORS[name]
    made = plain_eagle3()
    made.tensors = {key: tensor for key, tensor in (made.tensors | changes).items() if tensor is not None}
    made.storage = "bin"
    with pytest.raises(ValueError, match=message) as error:
        read_head(made.write(tmp_path), **TARGET)
    assert str(tmp_path) in str(error.value)


def test_tensors_that_another_config_names(tmp_path):
    checkpoint = read_head(sample("safeailab_eagle3").write(tmp_path), **TARGET)
    wrong = checkpoint._replace(tensors=checkpoint.tensors | {"norm.weight": torch.ones(5)})
    with pytest.raises(ValueError, match=r"norm\.weight is \[5\], expected \[48\]"):
        DraftHead(wrong, embedding=torch.randn(V, H))


# -- names and the hub


@pytest.mark.parametrize("name", ["", None, 3, b"a/b"])
def test_what_is_no_name(name):
    with pytest.raises(ValueError, match=r"give a local folder or a hub name like 'owner/name'"):
        read_head(name, **TARGET)
    with pytest.raises(ValueError, match=r"ea_model_path=.*: pass a hub name like 'owner/name' or a folder"):
        EaModel.from_pretrained(base_model_path="owner/target", ea_model_path=name)


@pytest.mark.parametrize("name", ["x" * 5000, "a b", "owner/na\0me", "~nobody/x", "owner/.."])
def test_names_that_cannot_be(name):
    with pytest.raises(ValueError, match=r"(there is no folder|Check the name \(ea_model_path\))"):
        read_head(name, **TARGET, local_files_only=True)


class Answer:
    """What the hub's errors read of a response."""

    headers, request, status_code = {}, None, 404


@pytest.mark.parametrize("name", ["RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "OSError"])
def test_errors_of_the_hub(name, monkeypatch):
    kind = getattr(huggingface_hub.errors, name, OSError)

    def fail(*args, **options):
        raise OSError("no route") if kind is OSError else kind("no such thing", response=Answer())

    monkeypatch.setattr(eagle_fast.head.files, "snapshot_download", fail)
    message = rf"draft head owner/name: .*{name}: .*\. Check the name \(ea_model_path\); .* token=, .*ea_revision"
    with pytest.raises(ValueError, match=message):
        read_head("owner/name", **TARGET)


def test_a_local_head_is_looked_at_before_the_target_is_loaded(tmp_path):
    wrong = {"base_model_path": "no-owner/no-target", "ea_model_path": str(tmp_path)}
    with pytest.raises(ValueError, match=rf"draft head {tmp_path}: no config\.json in"):
        EaModel.from_pretrained(**wrong)
    (tmp_path / "config.json").write_text('{"head_dim": {}}')
    with pytest.raises(ValueError, match=r"config\.json: head_dim is \{\}: use a whole number"):
        EaModel.from_pretrained(**wrong)
