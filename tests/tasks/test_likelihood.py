"""Multiple choice against transformers and its tokenizer alone, choice by choice, uncached."""

import random

import peft
import pytest
import torch
import transformers
from test_tasks import WORDS, trained, writer
from test_train import write

import sample
import tasks
from config import Config
from support.weights.pretrained import find_model

pytestmark = pytest.mark.usefixtures("elsewhere")
RNG = random.Random(0)
EXAMPLES = [{"prompt": "", "choices": ["ab ab cd", "cd"], "answer": 1}]
for i in range(30):
    prompt = " ".join(RNG.choices(WORDS, k=9)) + " " * (i % 2)
    choices = [" ".join(RNG.choices([*WORDS, "éé"], k=k)) for k in (1, 2, 4)]
    EXAMPLES.append({"prompt": prompt, "choices": choices, "answer": i % 3})


def loaded(name, **settings):
    """The task, its model, and transformers' tokenizer and model, of a small random checkpoint."""
    folder = find_model(name if name == "tiny-random" else writer(name))
    task = tasks.build("multiple_choice", Config(**settings), folder, "", [], None)
    model = tasks.load_model(task, folder, torch.float32, "cpu")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return task, model, transformers.AutoTokenizer.from_pretrained(folder), peer


@torch.no_grad()
def exact(tokenizer, peer, prompt, choice):
    """(log p, tokens) of a choice; the blanks between prompt and choice count with the choice."""
    plain = dict(add_special_tokens=False)
    begin = tokenizer(prompt.rstrip(), **plain).input_ids
    answer = tokenizer(f"{prompt} {choice}", **plain).input_ids[len(begin) :]
    special, [a] = tokenizer("a").input_ids, tokenizer("a", **plain).input_ids
    begin = special[: special.index(a)] + begin or [tokenizer.eos_token_id]
    log_p = peer(torch.tensor([begin + answer])).logits[0, len(begin) - 1 : -1].log_softmax(-1)
    return log_p[range(len(answer)), answer].sum().item(), len(answer)


@pytest.mark.parametrize("name", ["tiny-random", "gpt2", "gemma3"])
def test_scores_and_losses_are_those_of_transformers(name):
    """acc_norm divides by characters: by bytes, other choices would be the best."""
    task, model, *peer = loaded(name)
    rows, cut = task.encode(EXAMPLES, 64)
    loss, count, found = task.evaluate(model, rows)
    right, losses, tokens = [], 0, 0
    for row, example in zip(rows, EXAMPLES):
        texts, answer = example["choices"], example["answer"]
        log_p, lengths = zip(*(exact(*peer, example["prompt"], text) for text in texts))
        ours = model.score([row.prompt_ids], [ids for ids, _ in row.choices])[0]
        assert ours.tolist() == pytest.approx(log_p, abs=1e-4)
        sizes = [(1, len(text), n, len(text.encode())) for text, n in zip(texts, lengths)]
        best = (torch.tensor(log_p)[:, None] / torch.tensor(sizes)).argmax(0)
        right.append((best == answer).tolist())
        losses, tokens = losses - log_p[answer], tokens + lengths[answer]
    assert (found, count, cut) == ([places[:3] for places in right], tokens, 0)
    assert loss == pytest.approx(losses, rel=1e-5)
    assert task.loss(model, rows).item() == pytest.approx(losses / tokens, rel=1e-5)
    acc, norm, token, by_bytes = (sum(column) / len(rows) for column in zip(*right))
    assert task.scores(found) == {"acc": acc, "acc_norm": norm, "acc_token": token}
    assert len({*zip(*right)}) == 4  # so that the rows can tell them apart


@pytest.mark.parametrize("name, expected", [("tiny-random", 26), ("gpt2", 28), ("gemma3", 28)])
def test_a_prompt_passes_once_for_all_of_its_choices(name, expected):
    """The embedding counts: 20 tokens, 2 a choice; transformers repeats the prompt's last one."""
    _, model, *_ = loaded(name)
    embedding, seen = next(x for x in model.modules() if isinstance(x, torch.nn.Embedding)), []
    embedding.register_forward_hook(lambda _, ids, out: seen.append(ids[0].numel()) and None)
    model.score([list(range(4, 24))], [[5, 6, 7], [8, 9, 5], [9, 6, 8]])
    assert sum(seen) == expected


@pytest.mark.parametrize("whole", [True, False])
def test_a_long_prompt_is_cut_on_the_left_for_the_longest_choice(whole):
    """A token a byte: of 20, 15 are the choice's. The prompt is learnt if wanted."""
    task, *_ = loaded("tiny-random", train_on_prompt=whole)
    example = {"prompt": "0123456789", "choices": ["a", "b" * 14], "answer": 0}
    [row], cut = task.encode([example], 20)
    assert cut == 1 and task.tokenizer.decode(row.prompt_ids) == "56789"
    assert task.tokenizer.decode(row.input_ids) == "56789 a"
    assert row.labels == (row.input_ids if whole else [-100] * 5 + row.input_ids[5:])
    with pytest.raises(ValueError, match="begins with ' bbb.* has 15 tokens, and block_size=15"):
        task.encode([example], 15)


def test_a_run_learns_the_right_choice_and_sample_ranks_choices(capsys, refuses):
    """The ranks' probabilities are those of PEFT's model."""
    rows = [{"prompt": f"{i}:", "choices": ["ab", "cd d", "e be"], "answer": 1} for i in range(40)]
    settings = dict(train_file=write("train.jsonl", rows), search_steps=20, retrain_steps=30)
    assert trained(model="tiny-random", lower_lr=1e-2, **settings)["after"]["val"]["acc"] == 1
    capsys.readouterr()
    assert sample.main(["--adapter=run", "--prompt=7:", "--labels=e be,cd d"]) == 0
    printed = capsys.readouterr().out
    _, _, tokenizer, base = loaded("tiny-random")
    peer = peft.PeftModel.from_pretrained(base, "run").eval()
    log_p = [exact(tokenizer, peer, "7:", choice)[0] for choice in ("cd d", "e be")]
    right, wrong = torch.tensor(log_p).softmax(0).tolist()
    assert printed == f"{right:6.1%}  cd d\n{wrong:6.1%}  e be\n"
    refuses(sample, ["--adapter=run", "--prompt=7:"], "task is multiple_choice: give --labels=")
