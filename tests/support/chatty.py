"""A tokenizer with a chat template for the tiny models of `zoo.py`: words w3, w4, ... are the tokens 3, 4, ..."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import VOCAB

END, USER, ASSISTANT = 2, 130, 129
TEMPLATE = (
    "{% for message in messages %}{{ '<user> ' if message['role'] == 'user' else '<assistant> ' }}"
    "{{ message['content'] }} <end> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(
    chat: bool = True, end_of_turn: int | None = None, stop_strings: bool = False
) -> PreTrainedTokenizerFast:
    """end_of_turn: the token that is Llama 3's <|eot_id|> instead of a word. stop_strings: w3 is "abcdef", by which
    transformers' stop strings see how tokens are joined."""
    words = {f"w{i}": i for i in range(3, VOCAB)} | {"<pad>": 0, "<begin>": 1, "<end>": END}
    words |= {"<user>": USER, "<assistant>": ASSISTANT}
    words = {word: token for word, token in words.items() if word not in (f"w{USER}", f"w{ASSISTANT}")}
    words = {"<|eot_id|>" if token == end_of_turn else word: token for word, token in words.items()}
    if stop_strings:
        words = {"abcdef" if token == 3 else word: token for word, token in words.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<begin>", eos_token="<end>",
        chat_template=TEMPLATE if chat else None,
    )  # fmt: skip
