"""Finding and reading the files of a draft head: folders, the hub, shards, and what is not safe to load."""

import json
import os

import pytest
import torch
from draft_formats import sample
from draft_weights import TARGET

import eagle_fast.head.files
from eagle_fast.head.checkpoint import note_acceptance, read_head, write_head


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        read_head(tmp_path / "nowhere", **TARGET)
    with pytest.raises(ValueError, match=r"no config\.json in"):
        read_head(tmp_path, **TARGET)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"looked for model\.safetensors, .* found config\.json"):
        read_head(tmp_path, **TARGET)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_head(tmp_path, **TARGET)
    with pytest.raises(ValueError, match="is a file"):
        read_head(tmp_path / "config.json", **TARGET)


def test_missing_shard_and_escaping_shard(tmp_path):
    made = sample("angelslim")
    made.write(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the file 'model-00002-of-00002\.safetensors', which is not there"):
        read_head(tmp_path, **TARGET)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="which is not there"):
        read_head(tmp_path, **TARGET)


class Rogue:
    def __reduce__(self):
        return os.system, ("true",)


def test_pickles_with_code_and_pointers_are_not_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"fc.weight": Rogue()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        read_head(tmp_path, **TARGET)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        read_head(tmp_path, **TARGET)


def test_hub_names_are_downloaded_and_folders_are_not(tmp_path, monkeypatch):
    asked = []

    def download(name, *, allow_patterns, **arguments):
        asked.append((name, allow_patterns, arguments))
        return str(tmp_path / "cache")

    monkeypatch.setattr(eagle_fast.head.files, "snapshot_download", download)
    made = sample("safeailab_eagle1")
    read_head(made.write(tmp_path / "cache"), **TARGET)
    assert asked == []
    read_head("owner/name", **TARGET, revision="r", token="t", cache_dir="c", local_files_only=True)
    assert [name for name, _, _ in asked] == ["owner/name"] * 2  # pickles are asked for only if nothing else is there
    assert not any("bin" in pattern for pattern in asked[0][1])
    assert any("bin" in pattern for pattern in asked[1][1])
    assert asked[0][2] == dict(revision="r", token="t", cache_dir="c", local_files_only=True)


def test_how_drafts_did_is_noted_and_read(tmp_path):
    made = sample("angelslim")
    made.write(tmp_path)
    assert read_head(tmp_path, **TARGET).config.acceptance == {}
    before = json.loads((tmp_path / "config.json").read_text())
    tables = {0.0: [[0.7, 0.3], [0.6]], 0.5: [[0.5]]}
    note_acceptance(tmp_path, tables)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: value for name, value in config.items() if name != "acceptance"} == before
    found = read_head(tmp_path, **TARGET)
    assert found.config.acceptance == tables
    write_head(tmp_path / "again", found)
    assert read_head(tmp_path / "again", **TARGET).config.acceptance == tables


@pytest.mark.parametrize(
    "tables", [[], 3, {"0": []}, {"0": [[]]}, {"0": [0.5]}, {"0": [[1.5]]}, {"warm": [[0.5]]}, {"nan": [[0.5]]}]
)
def test_tables_that_cannot_be_are_refused(tables, tmp_path):
    sample("angelslim").write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"acceptance": tables}))
    with pytest.raises(ValueError, match=r"acceptance is .*: use tables of chances by temperature"):
        read_head(tmp_path, **TARGET)
