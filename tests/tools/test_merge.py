"""What tools.merge and method=ft write, as transformers' generate and AutoTokenizer take it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from test_train import trained, write

import sample
from support.weights.pretrained import find_model
from tools import merge

pytestmark = pytest.mark.usefixtures("elsewhere")


def change(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def base(name="base", **tokenizer):
    """A folder whose texts end with <|endoftext|>, while its template's answers have <|im_end|>."""
    shutil.copytree(find_model("tiny-random"), name)
    change(Path(name, "tokenizer_config.json"), eos_token="<|endoftext|>", **tokenizer)
    change(Path(name, "config.json"), eos_token_id=0)
    change(Path(name, "generation_config.json"), eos_token_id=0, temperature=0.5)
    return name


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]


def trained_on_talks(method):
    """Run until one talk is known by heart."""
    file, steps = write("talks.jsonl", [{"messages": TALK}] * 20), dict(search_steps=20)
    steps |= dict(retrain_steps=40, lower_lr=2e-2)
    trained("run", model=base(), data="", train_file=file, method=method, **steps)


@pytest.mark.parametrize("rank", [3, 64])
def test_the_nearest_lora_of_a_rank_is_peft_s_to_load_and_its_error_is_printed(rank, capsys):
    """Rank 64 is the whole matrix. The error is the singular values' that are left out."""
    trained("run", method="dora", lower_lr=1e-2)
    arguments = ["--adapter=run", "--out_dir=lora", "--to=peft-lora", f"--lora_rank={rank}"]
    assert merge.main(arguments) == 0
    shown = capsys.readouterr().out
    weights = {}
    for folder in (None, "run", "lora"):
        model = transformers.AutoModelForCausalLM.from_pretrained(find_model("tiny-random"))
        model = PeftModel.from_pretrained(model, folder).merge_and_unload() if folder else model
        weights[folder] = {n: p.double() for n, p in model.named_parameters() if "_proj" in n}
    base, dora, lora = weights.values()
    off, moved, best = (
        sum(term(n).square().sum() for n in base).sqrt().item()
        for term in (
            lambda n: lora[n] - dora[n],
            lambda n: dora[n] - base[n],
            lambda n: torch.linalg.svdvals(dora[n] - base[n])[rank:],
        )
    )
    assert off == pytest.approx(best, abs=1e-4 * moved)
    missed = float(re.search(r"misses ([\d.]+)%", shown)[1])
    assert missed == pytest.approx(100 * off / moved, abs=0.02)
    assert (off < 1e-4 * moved) == (rank == 64)
    assert not json.loads(Path("lora/adapter_config.json").read_text())["use_dora"]
    command = shlex.split(shown.splitlines()[-1])[2:-1]
    assert sample.main([*command, "--prompt=a", "--temperature=0", "--max_new_tokens=2"]) == 0


def generated(folder, asked=TALK[:1], tools=None):
    """What transformers answers to messages, from a folder alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = tokenizer.apply_chat_template(asked, tools=tools, **options)
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].size(1) :])


@pytest.mark.parametrize("method", ["dora", "ft"])
def test_transformers_stops_where_the_answers_that_were_learnt_end(method):
    trained_on_talks(method)
    if method == "dora":
        assert merge.main(["--adapter=run", "--out_dir=merged"]) == 0
    folder = Path("merged" if method == "dora" else "run")
    assert generated(folder) == "yes<|im_end|>"
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [0, 2], "temperature": 0.5}


def test_an_adapter_s_own_tokenizer_is_used_carried_and_named(capsys):
    """The base's template is another: the trainer put its own tokenizer beside the adapter."""
    trained_on_talks("lora")
    plain = base("plain", chat_template="{{ messages[0]['content'] }}")
    transformers.AutoTokenizer.from_pretrained("base").save_pretrained("run")
    Path("run/run.json").unlink()
    arguments = ["--adapter=run", f"--model={plain}"]
    capsys.readouterr()
    assert sample.main([*arguments, "--prompt=Hi", "--temperature=0", "--max_new_tokens=20"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "yes\n"
    assert "tokenizer and chat template are the adapter's own, of run" in shown.err
    assert merge.main([*arguments, "--out_dir=merged"]) == 0
    assert generated("merged") == "yes<|im_end|>"


@pytest.mark.parametrize(
    "swap, said",
    [
        (("a", "b"), "gives 'a' the id 68, and the model has 67 for it"),
        (("a", None), "the id 259, and the model has only 259 tokens"),
    ],
)
def test_a_tokenizer_beside_an_adapter_that_is_not_the_model_s_is_refused(swap, said, capsys):
    trained("run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("tiny-random") / name, "run")
    path = Path("run/tokenizer.json")
    spec = json.loads(path.read_text())
    vocab, (one, other) = spec["model"]["vocab"], swap
    vocab[one], vocab[other or "more"] = (vocab[other], vocab[one]) if other else (vocab[one], 259)
    path.write_text(json.dumps(spec))
    assert sample.main(["--adapter=run", "--prompt=a"]) == 2
    assert re.search(said, capsys.readouterr().err)


ROWS = {
    "free": [{"prompt": "ab" * i, "completion": " cd"} for i in range(1, 21)],
    "pairs": [{"text": "ab", "text_b": "cd" * i, "label": "yn"[i % 2]} for i in range(20)],
}


@pytest.mark.parametrize("form", ROWS)
def test_a_merged_model_is_asked_as_it_was_trained_by_the_command_that_is_printed(form, capsys):
    """A run on free text asks without a template by itself, too."""
    trained("run", data="", train_file=write("rows.jsonl", ROWS[form]))
    capsys.readouterr()
    assert merge.main(["--adapter=run", "--out_dir=a folder"]) == 0
    python, program, model, *rest = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert rest[1:] == {"free": ["--raw"], "pairs": ["--prompt_b=..."]}[form]
    answers, less = set(), [argument for argument in rest if argument != "--raw"]
    for arguments in ([model, *rest], [model, *less], ["--adapter=run", *less]):
        assert sample.main([*arguments, "--temperature=0", "--max_new_tokens=5"]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1
