"""The shell: `eagle-fast chat`, `eagle-fast generate` and `eagle-fast bench`, for any pair.

The rule: answers go to stdout, everything else to stderr; colours and spinners are for terminals alone.

In reading order:

settings        how answers are decoded, as options and as names that a conversation can set
answer          one prompt decoded, round by round
screen          what a terminal, or a pipe, is shown
conversation    turns of user and model, kept and taken back
slash           what a line that begins with "/" does in a conversation
chat            the subcommand
generate        the subcommand: prompts to texts or JSON lines, and beside plain decoding
bench           the subcommand: the speed-up on this machine
own_prompts     what is measured where no file of prompts is named
figures         what `bench` found, as a table and as a plot
"""
