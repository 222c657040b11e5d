"""`eagle-fast doctor`: what this machine has, what was measured on it, and where a model would go.

environment   versions and GPUs, as reported
measure       bandwidth, copies and a kernel, as measured
plan          placements of a model, its memory, and a round's time from the measured figures
report        the same as text
command       the subcommand
"""
