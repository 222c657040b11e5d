"""Packed checkpoints, read without the libraries that wrote them.

The rule: a format is one file that says which tensors a layer has in the file and what they mean; all else is the same
for all of them.

In reading order:

scheme      what every format is read into
gptq, awq, compressed, fp8   the formats
choose      the format of a checkpoint, or the reason why it is none of these
rounding    weights of 16 bits made packed ones while they are loaded (target_bits)
arriving    a layer whose tensors come one by one, and which is packed when the last is there
quantizer   what transformers calls
"""
