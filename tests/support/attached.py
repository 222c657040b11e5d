"""A target's folder with a head attached, that notes every call of its `generate`."""

from often_right import write_often_right_head

from eagle_fast.attach import attach

# a line for every call: rounds that left a state behind
COUNTED = """
inner = generate
def generate(*args, model, **options):
    try:
        return inner(*args, model=model, **options)
    finally:
        with open({log!r}, "a") as log:
            log.write(f"{{len(model._eagle_fast.model.states.idle)}}\\n")
"""


def write_attached(model, tokenizer, root):
    """root/target, root/head, root/both; root/calls gets a line for each call."""
    model.save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    write_often_right_head(model, root / "head")
    attach(str(root / "target"), str(root / "head"), root / "both")
    hook = root / "both" / "custom_generate" / "generate.py"
    hook.write_text(hook.read_text() + COUNTED.format(log=str(root / "calls")))
