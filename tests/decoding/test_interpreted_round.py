"""Whole rounds through the Triton kernels: interpreted where there is no GPU, so everything here is tiny."""

import pytest
import torch
from often_right import write_often_right_head
from zoo import make

from eagle_fast import EaModel

TREE = {"total_token": 5, "depth": 1, "top_k": 2}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 5}])
def test_rounds_of_kernels_give_the_text_of_their_twins(sampling, device, tmp_path, monkeypatch):
    model = make("mistral", num_hidden_layers=2)  # a window, grouped heads
    write_often_right_head(model, tmp_path)
    decoder = EaModel.from_pretrained(base_model_path=model.to(device), ea_model_path=str(tmp_path), **TREE)
    ids = torch.randint(3, 130, (2, 9), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    out = {}
    for kernels in ("ref", "triton"):
        monkeypatch.setenv("EAGLE_FAST_KERNELS", kernels)
        out[kernels] = decoder.eagenerate(
            ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True, **sampling
        )
    assert torch.equal(out["triton"].sequences, out["ref"].sequences)
    assert out["triton"].statistics.accepted == out["ref"].statistics.accepted
    assert out["triton"].statistics.tau > 1.2
