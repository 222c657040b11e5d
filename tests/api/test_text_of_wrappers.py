"""Models of several modalities with text alone: every method gives the text of the model's own `generate`."""

import pytest
import torch
from decoders import TREE, prompt
from often_right import write_random_head
from transformers import AutoModelForImageTextToText, Gemma3Config
from zoo import VOCAB, make

from eagle_fast import EaModel

NEW = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny Gemma 3 with a vision tower, and a head for it."""
    text = make("gemma3_text").config
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14, model_type="siglip_vision_model")  # fmt: skip
    config = Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    folder = write_random_head(make("gemma3_text"), tmp_path_factory.mktemp("head"))
    return EaModel.from_pretrained(base_model_path=model, ea_model_path=str(folder), **TREE), model


@pytest.mark.parametrize("extra", [{}, {"token_type_ids": 0}, {"attention_mask": 1}])
def test_text_alone(pair, extra):
    decoder, model = pair
    ids = prompt(11, torch.device("cpu"))
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    options = {name: torch.full_like(ids, value) for name, value in extra.items()}
    assert torch.equal(decoder.generate(ids, max_new_tokens=NEW, do_sample=False, **options), expected)
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)
    custom = model.generate(
        ids, max_new_tokens=NEW, do_sample=False, custom_generate=decoder.custom_generate, **options
    )
    assert torch.equal(custom, expected)


def test_images_are_refused_by_name(pair):
    decoder, _ = pair
    ids = prompt(11, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"pixel_values: images are not taken.*base_model.generate alone takes them, as pixel_values"
    ):
        decoder.generate(ids, max_new_tokens=NEW, do_sample=False, pixel_values=torch.ones(1, 3, 28, 28))


INPUTS = {
    "pixel_values": "images are not taken: .*base_model.generate alone takes them, as pixel_values$",
    "images": "images are not taken: .*base_model.generate alone takes them, as pixel_values$",
    "image_grid_thw": "images are not taken",
    "pixel_values_videos": "videos are not taken: .*reads none$",
    "input_features": "sounds are not taken: .*reads none$",
    "inputs_embeds": "prompts are token ids",
    "decoder_input_ids": "models with an encoder, and Gemma3ForConditionalGeneration has none",
    "past_key_values": "caches are kept within",
    "num_beams": "decoding is greedy or by sampling; base_model.generate takes other ways",
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_are_no_text_are_refused_by_name(pair, name):
    """With the reason, and never with a method that refuses them too."""
    decoder, _ = pair
    ids = prompt(11, torch.device("cpu"))
    for method in ("eagenerate", "naivegenerate", "ea_generate", "naive_generate"):
        with pytest.raises(TypeError, match=rf"^{method}\(\) takes no '{name}': .*{INPUTS[name]}"):
            getattr(decoder, method)(ids, **{name: torch.ones(1)})
    if name != "num_beams":
        with pytest.raises(ValueError, match=f"^{name}: .*{INPUTS[name]}"):
            decoder.generate(ids, **{name: torch.ones(1)})
