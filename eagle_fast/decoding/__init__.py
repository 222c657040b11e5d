"""Decoding: the round, and the host's side of it.

round        the algorithm: draft, verify, accept, compact, absorb
tree, draft  the tree as tensors; how the head grows it and absorbs what was accepted
sampling     the next token as a deterministic function of logits and seed
processors   logits processors on a tree
request, validate   what a call asks for, checked
generation, reports the host launches a round before it has read the last; stop conditions, statistics
graph, states       one CUDA graph per round; buffers kept between calls
tune         the number of tree nodes that pays best here
"""
