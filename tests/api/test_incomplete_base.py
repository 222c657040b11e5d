"""A base that lacks tensors is an error that names them; targets whose rows depend on each other are refused."""

from types import SimpleNamespace

import pytest
import torch
from often_right import write_often_right_head
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import make

from eagle_fast import EaModel
from eagle_fast.target import Target, UnsupportedModel


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.2.self_attn.q_proj.weight"])
def test_lost_tensors_are_named(lost, tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "base")
    head = write_often_right_head(model, tmp_path / "head")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != lost}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks tensors of LlamaForCausalLM.*{lost}"):
        EaModel.from_pretrained(base_model_path=str(tmp_path / "base"), ea_model_path=str(head))


def test_a_head_is_no_base(tmp_path):
    head = write_often_right_head(make("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"lacks tensors .*no draft head"):
        EaModel.from_pretrained(base_model_path=str(head), ea_model_path=str(head))


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_int8_whose_rows_depend_on_each_other(threshold):
    """bitsandbytes' layer by the marks that it is known by; its arithmetic does not matter here."""

    class Linear8bitLt(nn.Linear):
        pass

    model = make("llama")
    layer = model.model.layers[1].mlp.down_proj
    layer.__class__, layer.state = Linear8bitLt, SimpleNamespace(threshold=threshold)
    if threshold:
        with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.down_proj .*llm_int8_threshold=0\.0"):
            Target(model)
    else:
        tokens = torch.ones(1, 3, dtype=torch.long)
        assert Target(model).read(tokens).logits.isfinite().all()
