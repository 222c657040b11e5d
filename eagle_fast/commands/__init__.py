"""What each command of `eagle-fast` is told: its options, and a help that teaches with examples.

The rule: nothing here imports torch or transformers, so that help is there at once. What a command does is elsewhere
(`cli` says where).

loading     the options of everything that loads a pair or a part of one, under the names of `EaModel.from_pretrained`
decoding    the options of decoding
"""
