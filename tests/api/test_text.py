"""Text in, text out: `EaModel.chat`, text as its tokens arrive, and files of prompts."""

import json

import pytest
import torch
from chatty import END, make_tokenizer
from often_right import write_often_right_head
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import make

from eagle_fast import EaModel
from eagle_fast.prompts import read_prompts
from eagle_fast.text import TextStream

NEW = 20


@pytest.fixture
def model(tmp_path):
    base = make("llama")
    base.generation_config.eos_token_id = END
    write_often_right_head(base, tmp_path)
    found = EaModel.from_pretrained(base_model_path=base, ea_model_path=tmp_path, total_token=16, depth=3, top_k=4)
    found.tokenizer = make_tokenizer()
    return found


def stock(model, chat, new=NEW):
    """The text of transformers alone."""
    ids = model.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    out = model.base_model.generate(ids, do_sample=False, max_new_tokens=new, attention_mask=torch.ones_like(ids))
    return model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_conversation_is_answered_with_the_targets_text_and_goes_on_from_its_cache(model, monkeypatch):
    chat = [{"role": "user", "content": "w5 w17 w40"}]
    assert model.chat("w5 w17 w40", max_new_tokens=NEW) == stock(model, chat)
    reused, inner = [], model.eagenerate

    def watched(ids, **options):
        out = inner(ids, return_dict_in_generate=True, **options)
        reused.append(out.statistics.reused_tokens[0])
        return out.sequences

    monkeypatch.setattr(model, "eagenerate", watched)
    for turn in range(3):
        answer = model.chat(chat, max_new_tokens=NEW)
        assert answer == stock(model, chat)
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"w{turn + 7}"}]
    assert reused[2] > reused[1] > NEW
    model.chat(chat, max_new_tokens=NEW, reuse_cache=False)
    assert reused[-1] == 0


def test_a_conversation_is_sampled_by_a_seed(model):
    options = {"temperature": 1.0, "top_k": 5, "max_new_tokens": NEW}
    texts = [model.chat("w5 w17", seed=seed, **options) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_long_conversation_is_not_cut_at_a_length_that_nobody_asked_for(model):
    chat = [{"role": "user", "content": " ".join(["w5 w17"] * 1100)}]
    assert len(model.chat(chat, max_new_tokens=3, eos_token_id=[]).split()) == 3


def test_options_of_the_chat_template_arrive(model):
    model.tokenizer.chat_template = "{{ 'w9 w9' if loud else 'w7' }}"
    loud, quiet = (model.chat("w5", chat_template_kwargs={"loud": loud}, max_new_tokens=NEW) for loud in (True, False))
    assert loud != quiet


@pytest.mark.parametrize("messages", [[], ["w5"], [{"role": "user"}], {"role": "user", "content": "w5"}, None, 7])
def test_what_is_no_conversation_is_refused(model, messages):
    with pytest.raises(ValueError, match="messages="):
        model.chat(messages)


@pytest.mark.parametrize("content", [5, None, ["w5"], [{"type": "text", "text": "w5"}], "w5 \udcff"])
def test_contents_that_are_no_text_are_refused(model, content):
    model.tokenizer.chat_template = "{{ 'w1 ' + messages[0].content }}"
    with pytest.raises(ValueError, match=r"the chat template cannot use messages=|the text is no UTF-8"):
        model.chat([{"role": "user", "content": content}])


def test_what_a_template_refuses_is_said(model):
    """As some do with system messages."""
    model.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"messages=.*a=1.*System role not supported"):
        model.chat("w5", chat_template_kwargs={"a": 1})


@pytest.mark.parametrize("name", ["messages", "tokenize", "add_generation_prompt"])
def test_names_that_a_template_has_already(model, name):
    with pytest.raises(ValueError, match=f"the chat template cannot use messages=.*{name}="):
        model.chat("w5", chat_template_kwargs={name: []})


def test_what_gives_no_text_is_refused(model):
    with pytest.raises(ValueError, match="chat_template_kwargs=5: pass a dict"):
        model.chat("w5", chat_template_kwargs=5)
    with pytest.raises(TypeError, match=r"chat\(\) takes no 'log'"):
        model.chat("w5", log=True)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        model.chat("w5", max_new_tokens=0)
    model.tokenizer = make_tokenizer(chat=False)
    with pytest.raises(ValueError, match="no chat template"):
        model.chat("w5")


# -- text as its tokens arrive ---------------------------------------------------------------------------------------


def byte_tokenizer():
    """A token for every byte, so that most characters beyond ASCII are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [(byte_tokenizer(), "Zwölf\n\n  Boxkämpfer\t– 速い 🦊!<end>"), (make_tokenizer(), "w5 w17 <end> w40 w41")],
    ids=["bytes", "words"],
)
def test_pieces_are_the_whole_text_and_whole_characters(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stream = TextStream(tokenizer)
    pieces = [stream.take(token) for token in ids]
    assert "".join([*pieces, stream.rest()]) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not [piece for piece in pieces if "\ufffd" in piece]
    assert sum(map(bool, pieces)) > len(pieces) / 2, "text should come as it grows"


def test_half_a_character_at_the_end_comes_last():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a🦊", add_special_tokens=False).input_ids[:-1]
    stream = TextStream(tokenizer)
    assert [stream.take(token) for token in ids] == ["a", "", "", ""]
    assert stream.rest() == tokenizer.decode(ids)[1:]
    assert stream.rest() == ""


# -- files -----------------------------------------------------------------------------------------------------------


def test_files_of_prompts(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lines = [{"prompt": "p"}, {"text": "t"}, {"turns": ["first", "second"]}, {"messages": chat}, "bare"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts(file) == ["p", "t", "first", chat, "bare"]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as editors on Windows begin a file
    assert read_prompts(file)[0] == "p"
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "lines.txt") == ["one", "two"]


def test_only_a_newline_ends_a_line(tmp_path):
    """U+2028 and others stand in texts, and in JSON as they are."""
    text = "a\u2028b\x85c\u2029d"
    file = tmp_path / "prompts.JSONL"
    file.write_bytes(json.dumps({"prompt": text}, ensure_ascii=False).encode() + b"\r\n")
    assert read_prompts(file) == [text]
    (tmp_path / "lines.txt").write_bytes(f"{text}\x0ce\r\nf".encode())
    assert read_prompts(tmp_path / "lines.txt") == [f"{text}\x0ce", "f"]


def test_json_that_has_no_lines_is_refused(tmp_path):
    (tmp_path / "prompts.json").write_text('[{"prompt": "a"}]')
    with pytest.raises(ValueError, match=r"prompts\.json is one JSON text.*\.jsonl"):
        read_prompts(tmp_path / "prompts.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "holds no prompts"), (b"\xff\xfe", "cannot be read"), (b"{", "line 1: not JSON"), (b"{}", "needs a field"),
     (b'{"messages": ["x"]}', "line 1: messages"), (b'"a"\n{"prompt": 5}', "line 2: prompt=5"),
     (b'{"text": ["a", "b"]}', "line 1: text="), (b'{"turns": [5]}', "line 1: turns=5"),
     (b'{"turns": {"a": 1}}', "line 1: turns=")],
)  # fmt: skip
def test_a_file_that_holds_no_prompts_is_named(content, reason, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts.jsonl.*{reason}"):
        read_prompts(file)
