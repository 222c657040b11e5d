"""Norms of the twin: of a known kind ours, of any other the stock ones; and a model computes what it did."""

import pytest
import torch
from torch import nn
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from zoo import FAMILIES, make

from eagle_fast.target import Target
from eagle_fast.target.anatomy import row_norm_parts
from eagle_fast.target.check import check_target
from eagle_fast.target.fused import FusedNorm
from eagle_fast.target.norms import Kind, RowNorm, kind_of

OF_PYTORCH = {"phi", "starcoder2", "stablelm", "gpt2", "gpt_neox", "opt", "gptj"} & set(FAMILIES)  # nn.LayerNorm
LLAMAS, OLMOS = Kind(), Kind(round_once=True)
GEMMAS, COHERES = Kind(round_once=True, plus_one=True), Kind(centered=True, round_once=True)
KINDS = {"gemma": GEMMAS, "cohere": COHERES, "olmo2": OLMOS, "olmo3": OLMOS, "gpt_oss": OLMOS}  # others: Llama's


def norms(model):
    return {name: module for name, module in model.named_modules() if "Norm" in type(module).__name__}


def tokens(device, rows=2, count=19):
    return torch.randint(3, 130, (rows, count), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - OF_PYTORCH))
def test_every_norm_of_a_family_is_ours_and_computes_what_the_stock_one_does(name, fuse, device):
    model = make(name).to(device)
    stock = norms(model)
    with torch.no_grad():
        expected = model(tokens(device)).logits
    target = Target(model, (2,), fuse=fuse)
    ours = norms(target.model)
    assert set(map(type, ours.values())) <= {RowNorm, FusedNorm}
    kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), LLAMAS)
    assert {norm.kind for norm in ours.values() if isinstance(norm, RowNorm)} <= {kind}
    if not fuse:
        assert set(ours) == set(stock)
        for key, norm in ours.items():
            assert norm.weight is getattr(stock[key], "weight", None), "weights are shared"
    logits = target.read(tokens(device)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert norms(model) == stock, "the user's model keeps its own"


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - OF_PYTORCH))
def test_half_precision_passes_the_check(name, device):
    """Which holds every layer against the stock layer, and both against a wider precision."""
    target = Target(make(name, dtype=torch.bfloat16).to(device), (2,), fuse=False)
    assert set(map(type, norms(target.model).values())) == {RowNorm}
    target.model.eval()
    check_target(target)


@pytest.mark.parametrize("name", sorted(OF_PYTORCH))
def test_those_of_pytorch_stay(name, device):
    target = Target(make(name).to(device), (2,))
    assert set(map(type, norms(target.model).values())) == {nn.LayerNorm}


def test_heads_with_a_weight_each(device):
    """Of Cohere: over the dimensions of a head, times a weight for each head."""
    model = make("cohere", use_qk_norm=True).to(device)
    with torch.no_grad():
        expected = model(tokens(device)).logits
    target = Target(model, (2,))
    ours = norms(target.model)
    assert set(map(type, ours.values())) == {RowNorm}
    assert {norm.weight.dim() for norm in ours.values()} == {1, 2}
    logits = target.read(tokens(device)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_norm_with_a_hook_or_a_forward_of_its_own_stays_stock(device):
    model = make("smollm3").to(device)
    first, second, third = (model.model.layers[index].input_layernorm for index in range(3))
    seen = []
    first.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    second.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    third.forward = lambda x: 2 * type(third).forward(third, x)
    with torch.no_grad():
        expected = model(tokens(device)).logits
    target = Target(model, (2,))
    left = [name for name, norm in norms(target.model).items() if not isinstance(norm, RowNorm)]
    assert left == [f"model.layers.{index}.input_layernorm" for index in range(3)]
    seen.clear()
    logits = target.read(tokens(device)).logits
    assert seen == [(2, 19, 64)]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_norm_whose_parts_were_replaced_stays_stock_and_those_like_it_do_not(device):
    model = make("gemma2").to(device)
    model.model.layers[3].input_layernorm._norm = lambda x: x
    model.model.layers[4].input_layernorm.eps = 0.1
    with torch.no_grad():
        expected = model(tokens(device)).logits
    target = Target(model, (2,))
    left = [name for name, norm in norms(target.model).items() if not isinstance(norm, RowNorm)]
    assert left == ["model.layers.3.input_layernorm"]
    logits = target.read(tokens(device)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_norm_that_several_modules_hold_stays_one(device):
    model = make("granite").to(device)
    first, second = model.model.layers[:2]
    second.input_layernorm = first.input_layernorm
    layers = Target(model, (2,)).decoder_layers
    assert isinstance(layers[0].input_layernorm, RowNorm)
    assert layers[0].input_layernorm is layers[1].input_layernorm


def written(forward, module="transformers_modules.acme"):
    """A norm of 48 numbers with this forward, in a file of this name."""
    kind = type("AcmeRMSNorm", (GraniteRMSNorm,), {"forward": forward, "__module__": module})
    return kind(48, eps=1e-5)


def found(norm):
    parts = row_norm_parts(norm)
    return None if parts is None else kind_of(norm, parts)


def test_a_kind_is_told_by_what_is_computed_not_by_a_name():
    def olmos(self, x):
        wide = x.float()
        return (self.weight * wide * (wide * wide).mean(-1, keepdim=True).add(self.variance_epsilon).rsqrt()).to(x)

    def rounded_sooner(self, x):  # the factor too
        return self.weight * (x * x.float().pow(2).mean(-1, keepdim=True).add(self.variance_epsilon).rsqrt().to(x))

    def louder(self, x):
        return 1.01 * GraniteRMSNorm.forward(self, x)

    def clipped(self, x):
        return GraniteRMSNorm.forward(self, x.clamp(-50, 50))

    def without_epsilon(self, x):
        wide = x.float()
        return self.weight * (wide * wide.pow(2).mean(-1, keepdim=True).rsqrt()).to(x)

    def of_the_whole(self, x):
        wide = x.float()
        return self.weight * (wide * wide.pow(2).mean().add(self.variance_epsilon).rsqrt()).to(x)

    def gated(self, x, gate=None):
        return GraniteRMSNorm.forward(self, x)

    assert found(GraniteRMSNorm(48)) == LLAMAS
    assert found(written(olmos)) == OLMOS
    assert found(written(olmos, module="my_file")) is None, "the user's own code runs as it is"
    for forward in (rounded_sooner, louder, clipped, without_epsilon, of_the_whole, gated):
        assert found(written(forward)) is None, forward.__name__
    assert found(nn.RMSNorm(48)) is None


def test_rows_in_a_narrower_precision_than_the_weight():
    """The result has the dtype that stock code gives, of either kind."""
    for norm, name in ((GraniteRMSNorm(48), "granite"), (make("olmo2").model.norm, "olmo2")):
        nn.init.normal_(norm.weight)
        parts = row_norm_parts(norm)
        ours = RowNorm(parts, kind_of(norm, parts))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(3, len(norm.weight)).to(dtype)
            assert torch.equal(ours(x), norm(x)), name


@pytest.mark.parametrize("name", ["gemma3_text", "olmo2", "cohere2", "exaone4", "llama4_text"])
@pytest.mark.usefixtures("triton_kernels")
@torch.no_grad()
def test_a_row_alone_and_among_others(name, device):
    """Of views as attention layers make them."""
    target = Target(make(name, sharp=False, dtype=torch.bfloat16).to(device), (2,))
    for norm in {norm.kind: norm for norm in norms(target.model).values()}.values():
        width = 16 if norm.weight is None else len(norm.weight)
        x = torch.randn(2, 3, 30, width, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        among = norm(x.transpose(1, 2))
        for count in (1, 2, 5):
            assert torch.equal(norm(x[:, :, :count].transpose(1, 2)), among[:, :count])
            assert torch.equal(norm(x[1:, :, -count:].transpose(1, 2)), among[1:, -count:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - OF_PYTORCH))
@torch.no_grad()
def test_a_row_of_each_family_alone_and_among_others(name, dtype):
    target = Target(make(name, dtype=dtype).cuda(), (2,), fuse=False)
    for norm in norms(target.model).values():
        width = 16 if norm.weight is None else len(norm.weight)
        x = torch.randn(600, width, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
        among = norm(x)
        for count in (1, 2, 5, 60):
            assert torch.equal(norm(x[-count:]), among[-count:])
