"""`eagle-fast doctor`: what this machine has, what was measured on it, and where a model would go.

The rule: every figure is reported by the software or measured on the spot; what cannot be is None, with the reason.

In reading order:

command       the subcommand
findings      all that the doctor says, before it is put in words
environment   versions and GPUs, as reported
measure       bandwidth, copies and a kernel, as measured
plan, plan_ranks   placements of a model, its memory, and a round's time from the measured figures
trees         what trees of a head's drafts are worth, and what rounds under them take
report        the findings as text
"""
