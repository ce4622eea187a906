"""Multiple choice against transformers and its tokenizer alone, choice by choice, uncached."""

import random

import peft
import pytest
import torch
import transformers
from test_tasks import STEPS, WORDS, elsewhere, writer  # noqa: F401  (elsewhere: a fixture)
from test_train import write

import sample
import tasks
import train
from config import Config
from support.weights.pretrained import find_model

RNG = random.Random(0)
EXAMPLES = [
    {"prompt": "", "choices": ["ab ab cd", "cd"], "answer": 1},
    {"prompt": "cab cab bed ab ab cd e? ", "choices": ["ab ab", "é", "cd"], "answer": 2},
] + [
    {
        "prompt": " ".join(RNG.choices(WORDS, k=9)),
        "choices": [" ".join(RNG.choices([*WORDS, "éé"], k=k)) for k in (1, 2, 4)],
        "answer": i % 3,
    }
    for i in range(30)
]
NAMES = ("acc", "acc_norm", "acc_token")


def loaded(name, **settings):
    """The task, its model, and transformers' tokenizer and model, of a small random checkpoint."""
    folder = find_model(name if name == "tiny-random" else writer(name))
    task = tasks.build("multiple_choice", Config(**settings), folder, "", [], None)
    model = tasks.load_model(task, folder, torch.float32, "cpu")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return task, model, transformers.AutoTokenizer.from_pretrained(folder), peer


def tokens_of(tokenizer, example, choice):
    """(prompt, continuation) as token ids; the blanks between them count with the choice."""
    begin, whole, a = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (example["prompt"].rstrip(), example["prompt"] + " " + choice, "a")
    )
    assert whole[: len(begin)] == begin
    special = tokenizer("a").input_ids
    prompt = special[: special.index(a[0])] + begin
    return prompt or [tokenizer.eos_token_id], whole[len(begin) :]


@torch.no_grad()
def log_p(peer, prompt, answer):
    logits = peer(torch.tensor([prompt + answer])).logits[0]
    return logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt + answer) - 1), answer].sum()


@pytest.mark.parametrize("name", ["tiny-random", "gpt2", "gemma3"])
def test_scores_and_losses_are_those_of_transformers(name):
    """acc_norm divides by characters: by bytes, other choices would be the best."""
    task, model, tokenizer, peer = loaded(name)
    rows, cut = task.encode(EXAMPLES, 64)
    loss, count, found = task.evaluate(model, rows)
    expected, by_bytes, losses, lengths = [], [], [], []
    for row, example in zip(rows, EXAMPLES):
        pairs = [tokens_of(tokenizer, example, choice) for choice in example["choices"]]
        exact = torch.stack([log_p(peer, *pair) for pair in pairs])
        ours = model.score([row.prompt_ids], [ids for ids, _ in row.choices])
        torch.testing.assert_close(ours, exact[None], rtol=0, atol=1e-4)

        sizes = [len(x) for x in example["choices"]], [len(answer) for _, answer in pairs]
        best = [(exact / torch.tensor(size)).argmax().item() for size in (1, *sizes)]
        expected.append([place == example["answer"] for place in best])
        size = torch.tensor([len(x.encode()) for x in example["choices"]])
        by_bytes.append((exact / size).argmax().item() == example["answer"])
        losses.append(-exact[example["answer"]].item())
        lengths.append(len(pairs[example["answer"]][1]))
    assert (found, count, cut) == (expected, sum(lengths), 0)
    assert loss == pytest.approx(sum(losses), rel=1e-5)
    assert task.loss(model, rows).item() == pytest.approx(sum(losses) / sum(lengths), rel=1e-5)
    columns = [*zip(*expected)]
    assert task.scores(found) == {n: sum(x) / len(rows) for n, x in zip(NAMES, columns)}
    assert len({*columns, tuple(by_bytes)}) == 4  # so that the test can tell them apart


@pytest.mark.parametrize(
    "name, expected", [("tiny-random", 20 + 3 * 2), ("gpt2", 19 + 3 * 3), ("gemma3", 19 + 3 * 3)]
)
def test_a_prompt_passes_once_for_all_of_its_choices(name, expected):
    """The embedding counts: 20 tokens, 2 of each choice. transformers repeats the prompt's last."""
    _, model, _, _ = loaded(name)
    prompt, choices, seen = list(range(4, 24)), [[5, 6, 7], [8, 9, 5], [9, 6, 8]], []
    embedding = next(x for x in model.modules() if isinstance(x, torch.nn.Embedding))
    embedding.register_forward_hook(lambda _, ids, out: seen.append(ids[0].numel()) and None)
    model.score([prompt], choices)
    assert sum(seen) == expected


def test_the_prompt_is_learnt_if_wanted_and_nothing_follows_the_choice():
    task, model, tokenizer, peer = loaded("tiny-random", train_on_prompt=True)
    prompt, answer = tokens_of(tokenizer, EXAMPLES[1], "cd")
    ids = torch.tensor([prompt + answer])
    rows, _ = task.encode(EXAMPLES[1:2], 64)
    assert task.loss(model, rows).item() == pytest.approx(peer(ids, labels=ids).loss.item())


def test_a_long_prompt_is_cut_on_the_left_for_the_longest_choice():
    """A token a byte: of 20 tokens, 15 are the choice's and its blank's."""
    task, *_ = loaded("tiny-random")
    example = {"prompt": "0123456789", "choices": ["a", "b" * 14], "answer": 0}
    [row], cut = task.encode([example], 20)
    assert cut == 1 and task.tokenizer.decode(row.prompt_ids) == "56789"
    assert task.tokenizer.decode(row.input_ids) == "56789 a"
    with pytest.raises(ValueError, match="begins with ' bbb.* has 15 tokens, and block_size=15"):
        task.encode([example], 15)


def test_a_run_learns_the_right_choice_and_sample_ranks_choices(capsys):
    choices = ["ab", "cd cd", "e bed"]
    rows = [{"prompt": f"{i}:", "choices": choices, "answer": 1} for i in range(40)]
    file = write("train.jsonl", rows)
    budget = dict(search_steps=20, retrain_steps=30, lower_lr=1e-2)
    after = train.train(Config(**STEPS | budget, model="tiny-random", train_file=file))["after"]
    assert after["val"].keys() == {"loss", *NAMES} and after["val"]["acc"] == 1
    capsys.readouterr()

    arguments = ["--adapter=run", "--prompt=7:"]
    assert sample.main([*arguments, "--labels=e bed,cd cd"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    _, _, tokenizer, base = loaded("tiny-random")
    peer = peft.PeftModel.from_pretrained(base, "run").eval()
    pairs = [tokens_of(tokenizer, {"prompt": "7:"}, choice) for choice in ("cd cd", "e bed")]
    right, wrong = torch.stack([log_p(peer, *pair) for pair in pairs]).softmax(0).tolist()
    assert (first, second) == (f"{right:6.1%}  cd cd", f"{wrong:6.1%}  e bed")
    assert sample.main(arguments) == 2
    assert "task is multiple_choice: give --labels=" in capsys.readouterr().err
