"""lm-eval on tiny tasks: an `EaModel`, and an attached folder by its command line, have the figures of the target."""

import json
import os
import subprocess
import sys

import pytest
import torch
from attached import write_attached
from chatty import END, make_tokenizer
from transformers import AutoModelForCausalLM
from zoo import make

from eagle_fast import EaModel

pytest.importorskip("lm_eval")

NEW = 12
TASKS = {
    "tiny_answers": """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["w128"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_choices": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A target with tokenizer, its head, both attached, and a folder of tasks. Some answers are the target's."""
    root = tmp_path_factory.mktemp("lm_eval")
    model, tokenizer = make("llama").float(), make_tokenizer()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, 0
    write_attached(model, tokenizer, root)
    lines = []
    for number in range(8):
        question = " ".join(f"w{9 + number + 7 * place}" for place in range(3 + number % 3))
        ids = tokenizer(question, return_tensors="pt").input_ids
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :])
        right = answer.split("w128")[0] if number % 2 else "w5"
        choices = [f"w{11 + 3 * number}", answer.split()[0], "w40 w41"]
        lines.append({"question": question, "answer": right, "choices": choices, "label": number % 3})
    (root / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "tasks").mkdir()
    for name, text in TASKS.items():
        (root / "tasks" / f"{name}.yaml").write_text(COMMON.format(name=name, file=root / "lines.jsonl") + text)
    return root


@pytest.fixture(scope="module")
def evaluated(root):
    """Figures and every response of a model in this process."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def figures(model):
        lm = HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=3)
        manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
        found = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0)
        return found["results"], {name: [each["resps"] for each in found["samples"][name]] for name in TASKS}

    return figures


@pytest.fixture(scope="module")
def plain(root, evaluated):
    """Those of the plain target."""
    figures, responses = evaluated(AutoModelForCausalLM.from_pretrained(root / "target").eval())
    assert 0 < figures["tiny_answers"]["exact_match,none"] < 1
    assert 0 < figures["tiny_choices"]["acc,none"] < 1
    return figures, responses


def same_figures(found, expected):
    for name in TASKS:
        figures = {key: value for key, value in expected[name].items() if "," in key and "_stderr" not in key}
        assert figures
        assert {key: found[name][key] for key in figures} == figures


def test_an_ea_model(root, evaluated, plain):
    model = EaModel.from_pretrained(
        base_model_path=str(root / "target"), ea_model_path=str(root / "head"), device_map="cpu", dtype=torch.float32
    )
    figures, responses = evaluated(model)
    assert model.states.idle, "decoded without the head"
    same_figures(figures, plain[0])
    assert responses == plain[1]


def test_the_command_line_with_an_attached_folder(root, plain):
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "3"]
    command += ["--model_args", f"pretrained={root / 'both'},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(root / "tasks")]
    command += ["--output_path", str(root / "out"), "--log_samples"]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=600)
    assert done.returncode == 0, done.stderr
    (file,) = (root / "out").rglob("results_*.json")
    same_figures(json.loads(file.read_text())["results"], plain[0])
    for name in TASKS:
        (file,) = (root / "out").rglob(f"samples_{name}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda each: each["doc_id"])
        responses = [each["resps"] for each in samples]
        if name == "tiny_answers":
            assert responses == plain[1][name]
        else:  # written with fewer digits
            for found, expected in zip(responses, plain[1][name], strict=True):
                assert [float(value) for ((value, _),) in found] == pytest.approx(
                    [v for ((v, _),) in expected], rel=1e-4
                )
    calls = (root / "calls").read_text().split()
    assert calls
    assert all(int(each) > 0 for each in calls), "decoded without the head"
