"""Decoding: the round, and the host's side of it.

The rule: within a round nothing reads a value on the host. What the host decides, it decides between rounds.

In reading order:

round        the algorithm: draft, verify, accept, compact, absorb; and the state that it carries
ranked_round, ranked_draft   the same where the head is cut over ranks as the target is
ranked_prompts   prompts of a target over ranks, by graphs
tree, draft  the tree as tensors; how the head grows it and absorbs what was accepted
sampling     the next token as a deterministic function of logits, seed and position; the draft's scores
processors   logits processors on a tree, on the host: each node sees its own prefix
request, validate, memory   what a call asks for, checked
hooks        what processors and criteria give back, checked
generation, reports the host launches a round before it has read the last; stop conditions
statistics   what a call did, with which trees
records      logits, scores and log-probabilities of the emitted tokens, for calls that ask for them
choice, worth, cost   which tree pays: candidates, the tokens that each would bring, the time that each takes
adapt        the same while a call decodes: what was learned, when to rest from drafting
graph, steps one CUDA graph per round and tree
states, held what is kept between calls: buffers, graphs, rows of the caches
"""
