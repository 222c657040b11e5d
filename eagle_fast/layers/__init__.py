"""What the draft head and the target are both built of: rows that attend, their cache, weights, copies.

The rule: nothing here knows a head, a target, a model family or transformers.

In reading order:

attention    what the rows of a forward are (a prompt chunk, a tree), where they are written and what they see
slab         keys and values of some layers: written in place, compacted in place
linear       weights as objects: a product of few rows, its parts, its gated form; in 16 bits or int8
transfers    copies between devices that wait for nothing on the host
cuts         how heads, widths and vocabularies are dealt to ranks
links, peer_links   what ranks exchange in a forward: the reference, and between GPUs
lockstep     work of several ranks, from one exchange to the next
"""
