"""Whole training runs on a tiny model: it learns, what it writes is a head that works, and it resumes exactly."""

import json
from dataclasses import replace

import pytest
import torch
from chatty import END, make_tokenizer
from quantized_files import LAYOUTS, write_quantized
from safetensors.torch import load_file
from zoo import VOCAB, make

from eagle_fast import EaModel
from eagle_fast.cli import main
from eagle_fast.head import DraftHead
from eagle_fast.loading import load_head
from eagle_fast.train import TrainOptions, train
from eagle_fast.train.evaluate import measure_decoding
from eagle_fast.train.fresh import head_config
from eagle_fast.train.progress import Budget, amount, duration
from eagle_fast.train.setting import Setting
from eagle_fast.train.trainer import Trainer

OPTIONS = TrainOptions(
    updates=40, draft_vocab=120, steps=3, batch_tokens=512, pool_tokens=1600, rows=32, passes=4, max_question=20,
    max_answer=30, held_out=12, learning_rate=4e-3, log_seconds=0.001,
)  # fmt: skip
PROMPTS = [f"w{first} w{first + 1}" for first in range(3, 120)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(model, result) of a short run; its device is the one of the tests."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make("llama", eos_token_id=END).to(device)
    return model, train(model, make_tokenizer(), tmp_path_factory.mktemp("run") / "head", OPTIONS, prompts=PROMPTS)


def records(folder, kind):
    lines = (folder / "training" / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_it_learns(run):
    """The loss falls, every step agrees more often than at first, and the trained head drafts what is accepted."""
    _, result = run
    updates, held_out = records(result.folder, "update"), records(result.folder, "held out")
    assert updates[-1]["losses"][0] < 0.6 * updates[0]["losses"][0]
    assert held_out[-1]["losses"][0] < 0.6 * updates[0]["losses"][0]
    assert all(last > first + 0.05 for first, last in zip(updates[0]["agreement"], result.agreement, strict=True))
    assert result.agreement[0] > 0.4
    assert result.taus[0.0] > 1.8
    assert result.finished
    assert updates[-1]["updates"] == OPTIONS.updates
    assert updates[-1]["learning_rate"] < 0.1 * OPTIONS.learning_rate
    assert len(records(result.folder, "written")) == 2


def test_the_written_head_loads_and_leaves_the_text_alone(run):
    model, result = run
    decoder = EaModel.from_pretrained(base_model_path=model, ea_model_path=str(result.folder), adaptive=False)
    ids = torch.tensor([[130, 17, 18, END, 129]], device=model.device)
    out = decoder.eagenerate(ids, max_new_tokens=80, eos_token_id=[], return_dict_in_generate=True)
    assert torch.equal(out.sequences, decoder.naivegenerate(ids, max_new_tokens=80, eos_token_id=[]))
    assert out.statistics.tau > 1.5
    sampled = dict(temperature=1.0, seed=3, max_new_tokens=40)
    assert torch.equal(decoder.eagenerate(ids, **sampled), decoder.naivegenerate(ids, **sampled))


def test_what_is_written(run):
    _, result = run
    tensors = load_file(result.folder / "model.safetensors")
    ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    assert len(ids) == 120
    assert {0, 1, END} <= set(ids.tolist()), "special tokens are always in"
    assert torch.equal(tensors["t2d"].nonzero().flatten(), ids)
    assert tensors["midlayer.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert tensors["lm_head.weight"].shape == (120, 64)
    config = json.loads((result.folder / "config.json").read_text())
    assert (config["draft_vocab_size"], config["vocab_size"]) == (120, VOCAB)
    card = (result.folder / "README.md").read_text()
    assert f"{result.taus[0.0]:.2f} at temperature 0" in card
    tables = config["acceptance"]
    assert set(tables) == {"0", "1"}
    for table in tables.values():
        assert [len(row) for row in table] == [10] * 8
        assert all(0 < chance < 1 for row in table for chance in row)
    assert tables["0"][0][0] > tables["0"][0][3]
    decoder = EaModel.from_pretrained(base_model_path=run[0], ea_model_path=str(result.folder))
    usual = decoder.experience.worth(0.0, True).usual
    assert usual[:8, :10].tolist() == [[max(chance, 0.005) for chance in row] for row in tables["0"]]
    assert "40 updates" in card


def test_names_and_shapes_are_those_that_vllm_and_sglang_read(run):
    """`llama_eagle3.py` of both: SGLang has these parameters, vLLM renames midlayer to layers.0; d2t holds offsets, t2d
    is passed over, the embedding is the target's, and fc reads three features."""
    _, result = run
    hidden, heads, kv, inner, draft = 64, 4 * 16, 2 * 16, 96, 120
    layer = {
        "self_attn.q_proj": (heads, 2 * hidden), "self_attn.k_proj": (kv, 2 * hidden),
        "self_attn.v_proj": (kv, 2 * hidden), "self_attn.o_proj": (hidden, heads), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner), "hidden_norm": (hidden,),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    expected = {f"midlayer.{name}.weight": shape for name, shape in layer.items()}
    expected |= {"fc.weight": (hidden, 3 * hidden), "norm.weight": (hidden,), "lm_head.weight": (draft, hidden)}
    expected |= {"d2t": (draft,), "t2d": (VOCAB,)}
    tensors = load_file(result.folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    config = json.loads((result.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    wanted = {"model_type": "llama", "draft_vocab_size": draft, "vocab_size": VOCAB, "num_hidden_layers": 1,
              "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu"}  # fmt: skip
    assert wanted.items() <= config.items()
    ids = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert len(ids) == 3
    assert ids[0] != 1, "by a first id of 1 SGLang takes them for layers' outputs"


def test_training_goes_on_from_a_written_head(run, tmp_path):
    """Nothing is lost on the way through the file: the first agreement is that at the end of the first run."""
    model, result = run
    setting = Setting(model, make_tokenizer(), replace(OPTIONS, updates=1, learning_rate=1e-6), PROMPTS)
    trainer = Trainer(setting, tmp_path, load_head(str(result.folder), model))
    trainer.run()
    _, agreement = trainer.measure_held_out()
    assert agreement[0] == pytest.approx(result.agreement[0], abs=0.08)
    trainer.export()
    before, after = (load_file(folder / "model.safetensors") for folder in (result.folder, tmp_path))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-3, rtol=2**-7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sliding_windows": (7,)}, "sliding windows"),
        ({"lm_head_bias": True}, "an lm_head with a bias"),
        ({"has_fc": False, "feature_layers": (), "uses_final_hidden": True}, "no fc"),
    ],
)
def test_heads_that_cannot_be_trained_are_refused(change, reason, tmp_path):
    model = make("llama", eos_token_id=END)
    config = replace(head_config(model, VOCAB), **change)
    DraftHead.random(config, embedding=model.get_input_embeddings().weight.detach()).export(tmp_path / "head")
    with pytest.raises(ValueError, match=rf"--initial .*{reason} cannot be trained"):
        train(model, make_tokenizer(), tmp_path / "out", OPTIONS, initial=tmp_path / "head")


def test_a_head_that_shares_the_targets_lm_head(tmp_path):
    model = make("llama", eos_token_id=END)
    options = replace(OPTIONS, updates=12, pool_tokens=300, held_out=4, share_lm_head=True)
    result = train(model, make_tokenizer(), tmp_path, options, prompts=PROMPTS)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    decoder = EaModel.from_pretrained(base_model_path=model, ea_model_path=str(tmp_path))
    assert torch.equal(decoder.ea_layer.lm_head_weight, model.lm_head.weight[decoder.ea_layer.token_ids])
    ids = torch.tensor([[130, 17, 18, END, 129]])
    expected = decoder.naivegenerate(ids, max_new_tokens=30)
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=30), expected)
    losses = [record["losses"][0] for record in records(tmp_path, "held out")]
    assert losses[-1] < losses[0]
    assert load_head(str(result.folder), model).config.own_lm_head is False


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    """Interrupted after 5 of 9 updates, in the middle of a pass: the same weights, bit for bit."""
    model, tokenizer = make("llama", eos_token_id=END), make_tokenizer()
    options = replace(OPTIONS, updates=9, pool_tokens=600, batch_tokens=128, held_out=4)

    def trainer(name):
        return Trainer(Setting(model, tokenizer, options, PROMPTS), tmp_path / name)

    whole = trainer("whole")
    whole.run()
    first = trainer("parts")
    update = first._update

    def interrupted(indices):
        if first.budget.updates == 5:
            raise KeyboardInterrupt
        return update(indices)

    first._update = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = trainer("parts")
    assert second.resumable
    second.resume()
    assert second.budget.updates == 5
    assert second.place.batch > 0
    second.run()
    assert second.budget.updates == whole.budget.updates == 9
    assert second.num_tokens == whole.num_tokens
    for mine, theirs in zip(second.optimizer.masters, whole.optimizer.masters, strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="holds a run"):
        train(model, tokenizer, tmp_path / "parts", options, prompts=PROMPTS)
    options = replace(options, steps=2)
    with pytest.raises(ValueError, match="resume with the same"):
        trainer("parts").resume()


def test_a_run_of_minutes_pauses_and_ends():
    times = iter([0.0, 30.0, 60.0, 61.0, 119.0, 120.0])
    budget = Budget(TrainOptions(minutes=2), lambda: next(times))
    assert [budget.spent for _ in range(5)] == [False, False, False, False, True]
    now = 0.0
    budget = Budget(TrainOptions(minutes=10, pause_after=1), lambda: now)
    budget.earlier = 120.0
    now = 59.0
    assert not budget.spent
    now = 60.0
    assert budget.spent
    assert budget.fraction == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(minutes=0), "minutes is 0"),
        (dict(rows=-1), "rows is -1"),
        (dict(greedy_share=1.5), "share from 0 to 1"),
        (dict(batch_tokens=500), "at least max_question"),
    ],
)
def test_options_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**settings)


def test_options_for_a_cpu_leave_what_was_set():
    small = TrainOptions(pool_tokens=7).for_device(torch.device("cpu"))
    assert (small.pool_tokens, small.batch_tokens) == (7, 1024)
    assert TrainOptions().for_device(torch.device("cuda")) == TrainOptions()


def test_the_command(tmp_path, capsys):
    """From folders and files, end to end, by the names of the command line."""
    model, target = make("llama", eos_token_id=END, num_hidden_layers=3), tmp_path / "target"
    model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    sizes = (
        "--updates 3 --draft-vocab 60 --steps 2 --batch-tokens 128 --pool-tokens 300 --max-question 8 --max-answer 12"
    )
    out = tmp_path / "head"
    arguments = ["train", "--model", str(target), "--out", str(out), "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--device", "cpu", "--held-out", "4", *sizes.split()]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "held out" in said
    assert "few of its drafts are right: --resume" in said, "after three updates"
    assert EaModel.from_pretrained(base_model_path=str(target), ea_model_path=str(out)).ea_layer.token_ids.numel() == 60
    assert main(arguments) == 2
    assert "resume it" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--updates", "4"]) == 0
    assert "resumed after 3 updates" in capsys.readouterr().out


@pytest.mark.parametrize("with_lm_head", [(), ("lm_head.weight",)], ids=["layers", "lm_head"])
def test_a_packed_target(with_lm_head, tmp_path, capsys):
    """The command reads it natively, and the head drafts for it."""
    model, target = make("llama", eos_token_id=END, num_hidden_layers=3, vocab_size=136), tmp_path / "target"
    ends = ("_proj.weight", *with_lm_head)
    write_quantized(model, target, LAYOUTS["gptq"], ends=ends, lm_head=bool(with_lm_head))
    make_tokenizer().save_pretrained(target)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    sizes = "--updates 2 --draft-vocab 60 --steps 2 --batch-tokens 128 --pool-tokens 300 --max-question 8"
    sizes += " --share-lm-head" * len(with_lm_head)
    arguments = ["train", "--model", str(target), "--out", str(tmp_path / "head"), "--device", "cpu"]
    arguments += ["--prompts", str(tmp_path / "prompts.txt")]
    with pytest.warns(UserWarning, match=r"--model='.*' \(GPTQ, 4 bits in groups of 32\) runs from its packed weights"):
        assert main([*arguments, "--held-out", "4", "--max-answer", "12", *sizes.split()]) == 0
    with pytest.warns(UserWarning, match="runs from its packed weights"):
        decoder = EaModel.from_pretrained(base_model_path=target, ea_model_path=tmp_path / "head")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=12), decoder.naivegenerate(ids, max_new_tokens=12))


def test_options_of_loading(tmp_path, capsys):
    """A target whose weights are rounded while it is loaded, and what training cannot take."""
    model, target = make("llama", eos_token_id=END, num_hidden_layers=3, vocab_size=136), tmp_path / "target"
    model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["train", "--model", str(target), "--out", str(tmp_path / "head"), "--device-map", "cpu"]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--updates", "2", "--draft-vocab", "60", "--steps", "2"]
    arguments += ["--batch-tokens", "128", "--pool-tokens", "300", "--max-question", "8", "--max-answer", "12"]
    with pytest.warns(UserWarning, match="runs from its packed weights|rounded"):
        assert main([*arguments, "--held-out", "4", "--target-bits", "8", "--local-files-only"]) == 0
    assert "held out" in capsys.readouterr().out
    for wrong, message in (
        (["--device-map", "balanced"], "--device-map balanced: training takes one device"),
        (["--dtype", "float16"], "too small for float16"),
        (["--load", "nonsense=1"], "--load: "),
    ):
        assert main([*arguments, *wrong, "--resume"]) == 2
        assert message in capsys.readouterr().err


def test_the_commands_usage(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    assert "--draft-vocab" in capsys.readouterr().out


def test_time_is_kept_for_the_end_and_told():
    now = 0.0
    budget = Budget(TrainOptions(minutes=10), lambda: now)
    budget.reserve = 60.0
    now = 270.0
    assert (budget.fraction, budget.left) == (0.5, 270.0)
    now = 541.0
    assert budget.spent
    assert (budget.left, budget.left_for_the_end) == (0, 59.0)
    by_updates = Budget(TrainOptions(updates=10), lambda: now)
    assert by_updates.left is None, "nobody can tell before the first update"
    now, by_updates.updates = 551.0, 4
    assert by_updates.left == pytest.approx(15.0)
    assert [duration(seconds) for seconds in (3, 100, 7200)] == ["3s", "2m", "2.0h"]
    assert [amount(number) for number in (0, 31.4, 9300, 98_200, 1_234_567)] == ["0", "31", "9.3k", "98.2k", "1.23M"]


def test_measuring_keeps_to_its_seconds(run):
    """A round for each temperature where there is no time at all, and all prompts where there is enough."""
    model, result = run
    asked = [[130, 17, 18, END, 129], [130, 33, 34, END, 129]]
    short = measure_decoding(model, result.folder, asked, max_new_tokens=20, seconds=0.0)
    assert {temperature: done.rounds for temperature, done in short.items()} == {0.0: 1, 1.0: 1}
    whole = measure_decoding(model, result.folder, asked, max_new_tokens=20)
    assert all(done.rounds > 1 for done in whole.values())


def test_a_run_without_an_update_is_no_success(tmp_path, monkeypatch):
    """Its minutes are over when the texts are written: an error that says so, and no head."""
    monkeypatch.setattr(Budget, "spent", True)
    options = replace(OPTIONS, updates=0, pool_tokens=300, held_out=4)
    with pytest.raises(ValueError, match=r"no update was made in .* give it more minutes"):
        train(make("llama", eos_token_id=END), make_tokenizer(), tmp_path / "head", options, prompts=PROMPTS)
    assert not (tmp_path / "head" / "model.safetensors").exists()


def test_minutes_that_no_answer_fits_into(tmp_path):
    options = replace(OPTIONS, updates=0, minutes=1e-6, max_answer=300, batch_tokens=1024)
    with pytest.raises(ValueError, match=r"answers were finished in .* too few to learn from"):
        train(make("llama"), make_tokenizer(), tmp_path / "head", options, prompts=PROMPTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prompts", "/nowhere/questions.jsonl"], "file of prompts /nowhere/questions.jsonl cannot be read"),
        (["--out", "/dev/null/head"], "no folder /dev/null/head"),
        (["--model", "/nowhere/model"], "there is no such folder"),
        (["--initial", "/nowhere/head"], "no folder /nowhere/head"),
        (["--kv-heads", "3"], "kv_heads=3: use a number that divides the target's 4 heads"),
    ],
)
def test_wrong_names_end_in_one_line(change, message, tmp_path, capsys):
    make("llama", num_hidden_layers=3).save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    arguments = ["train", "--model", str(tmp_path / "target"), "--out", str(tmp_path / "head"), "--device", "cpu"]
    assert main([*arguments, *change]) == 2
    shown = capsys.readouterr()
    said = [line for line in shown.err.splitlines() if line.startswith("eagle-fast train:")]
    assert len(said) == 1
    assert message in said[0]
    assert "wrote" not in shown.out, "before minutes are spent on texts"
