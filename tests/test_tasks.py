"""Each task, from examples to a trained and reloaded model, against transformers and peft."""

import json
import random
import shutil
import sys
from pathlib import Path

import numpy
import peft
import pytest
import sklearn.metrics
import torch
import transformers
from safetensors.torch import load_file
from test_any_model import checkpoint
from test_heads import tokenizers as write_tokenizer
from test_train import TINY, metrics, write

import data
import sample
import tasks
import train
from config import Config
from support.run.files import read_json
from support.tasks import predict
from support.tasks.head_task import HeadTask, encode_words, load_tokenizer
from support.text.jsonl import FORMATS
from support.weights.pretrained import find_model
from tools import merge

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(train.__file__).parent
WORDS = ["ab", "cd", "abc", "de", "e", "a", "cab", "bed"]
STEPS = dict(search_steps=3, retrain_steps=2, dtype="float32", batch_size=4, out_dir="run")


def make(family, count=24, seed=0):
    """Examples of a family of tasks, with something to learn."""
    rng, examples = random.Random(seed), []
    for i in range(count):
        words = rng.choices(WORDS, k=rng.randint(2, 7))
        text = {"text": " ".join(words), "text_b": rng.choice(WORDS)}
        tags = [{"ab": "B-X", "cd": "I-X"}.get(word, "O") for word in words]
        tags[0] = ("B-X", "I-X", "O")[i % 3]
        forms = {
            "classification": text | {"label": "pqr"[i % 3]},
            "multi_label": text | {"labels": [x for x in "pqr" if x == "pqr"[i % 3] or i % 4]},
            "regression": text | {"score": len(words) / 2},
            "tagging": {"words": words, "tags": tags},
            "generation": {"prompt": words[0], "references": [" ".join(words), words[-1]]},
        }
        examples.append(forms[family])
    return examples


def trained(family="", **settings):
    """The results of a short run, on examples of the family."""
    return train.train(Config(**STEPS | (files(family) if family else {}) | settings))


def refused(capsys, message, *arguments):
    """Train.py gives the message in one line, before any work."""
    capsys.readouterr()
    assert train.main([*arguments, "--out_dir=run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("run").exists()


def head(family, names, examples, length=64):
    """A task on an encoder, its model, the examples as rows, and how many were cut."""
    folder = Path(encoder())
    task = HeadTask(family, names, *load_tokenizer(folder))
    rows, cut = task.encode(examples, length)
    torch.manual_seed(0)
    return task, tasks.load_model(task, folder, torch.float32, "cpu", rows), rows, cut


LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
ESM_TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, *"abcde", "<null_1>", "<mask>"]


def encoder(name="bert"):
    """A folder with a small random encoder and a tokenizer of its family."""
    folder = Path(name)
    checkpoint(folder, name, vocab_size=400)
    if name == "esm":
        (folder / "vocab.txt").write_text("\n".join(ESM_TOKENS))
    else:
        write_tokenizer(folder, "bert" if "bert" in name.replace("roberta", "") else "roberta")
    return str(folder)


def files(family):
    train_file = write("train.jsonl", make(family))
    return dict(train_file=train_file, test_file=write("test.jsonl", make(family, 12, seed=1)))


HEADS = ["classification", "multi_label", "regression", "tagging"]
CLASSES = {"tagging": "AutoModelForTokenClassification"}
MODELS = ["bert", "roberta", "esm", "deberta-v3", "gpt2", "tiny-random"]


def model_of(name):
    return name if name == "tiny-random" else encoder(name)


LABELLED = {"text": "a", "label": "b"}
CHOICE = {"prompt": "ab", "choices": ["cd", "e f", "e"], "answer": 1}
CHOICES = [  # format of the example, encoder?, chosen
    (LABELLED, False, "label_words"),
    (LABELLED, True, "classification"),
    ({"text": "a", "labels": ["b"]}, False, "multi_label"),
    ({"text": "a", "score": 1.0}, True, "regression"),
    ({"words": ["a"], "tags": ["O"]}, True, "tagging"),
    ({"prompt": "a", "completion": "b"}, False, "language_model"),
    ({"instruction": "a", "output": "b"}, False, "language_model"),
    ({"prompt": "a", "references": ["b"]}, False, "generation"),
    (CHOICE, False, "multiple_choice"),
    ({"text": "a"}, False, "language_model"),
]


@pytest.mark.parametrize("example, is_encoder, expected", CHOICES)
def test_the_task_follows_from_the_data_and_the_model(example, is_encoder, expected):
    folder = find_model("tiny-random")
    if is_encoder:
        checkpoint(folder := Path("bert"), "bert")
    assert tasks.choose("auto", example, tasks.read_shape(folder)) == expected


@pytest.mark.parametrize(
    "task, example, message",
    [
        ("auto", {"prompt": "a", "completion": "b"}, "'prompt' need a model that writes, which an"),
        ("label_words", LABELLED, "task=label_words needs a model that writes, which"),
        ("auto", CHOICE, "'multiple_choice' need a model that writes"),
        ("tagging", LABELLED, "task=tagging does not take examples of .*; use task=classification"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(task, example, message):
    checkpoint(Path("bert"), "bert")
    with pytest.raises(ValueError, match=message):
        tasks.choose(task, example, tasks.read_shape(Path("bert")))


def auto_model(family):
    return getattr(transformers, CLASSES.get(family, "AutoModelForSequenceClassification"))


def peer_of(family, model, labels):
    """Transformers' model with the run's adapter in it, loaded by peft."""
    options = dict(num_labels=labels, dtype=torch.float32)
    base = auto_model(family).from_pretrained(find_model(model), **options)
    if model == "tiny-random":
        base.config.pad_token_id = 0
    return peft.PeftModel.from_pretrained(base, "run").eval()


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_trained_head_gives_the_same_logits_in_transformers_and_peft(name, family):
    """From examples to the saved adapter. Within 1e-4 of logits of about 1: fp32, another norm."""
    model = model_of(name)
    with torch.enable_grad():
        trained(family, model=model, task=family, method="dora", lower_lr=1e-2)
    ours, task, _ = sample.load("run")
    peer = peer_of(family, model, len(task.names) or 1)
    rows, _ = task.encode(make(family, 12, seed=1), 64)
    *inputs, _ = task.collate(rows)
    together = ours(*inputs)
    for place, row in enumerate(rows):
        ids, mask, types, _ = task.collate([row])
        more = {"token_type_ids": types} if name == "bert" else {}
        if name == "gpt2":
            peer.base_model.model.config.pad_token_id = 399  # none of the rows' tokens
        expected = peer(input_ids=ids, attention_mask=mask, **more).logits
        torch.testing.assert_close(ours(ids, mask, types), expected, rtol=0, atol=1e-4)
        padded = together[place] if family != "tagging" else together[place, : ids.size(1)]
        torch.testing.assert_close(padded, expected[0], rtol=0, atol=1e-4)


def by_sklearn(family, targets, logits):
    """The metrics of a run, from each row's target and logits."""
    if family == "regression":
        scores = torch.cat(logits).tolist()
        loss = pytest.approx(sklearn.metrics.mean_squared_error(targets, scores), rel=1e-5)
        pearson = pytest.approx(numpy.corrcoef(targets, scores)[0, 1], abs=1e-6)
        return {"loss": loss, "pearson": pearson}
    if family == "multi_label":
        labels = torch.stack(logits) > 0
        score = sklearn.metrics.f1_score(numpy.array(targets), labels, average="micro")
        return {"f1_micro": pytest.approx(score)}
    if family == "tagging":
        pairs = [pair for row in zip(targets, logits) for pair in zip(*row) if pair[0] != -100]
        targets, logits = zip(*pairs)
    p = torch.stack(logits).softmax(-1)
    loss = pytest.approx(sklearn.metrics.log_loss(targets, p, labels=[0, 1, 2]), abs=1e-5)
    if family == "tagging":
        return {"loss": loss}
    return {"loss": loss, "accuracy": sklearn.metrics.accuracy_score(targets, p.argmax(-1))}


@pytest.mark.parametrize("family", HEADS)
def test_the_losses_and_scores_of_a_run_are_those_of_its_reloaded_model(family):
    """
    By scikit-learn, from the logits row by row. On the test split, which no seed shuffles. After 40
    steps, numbers lie far enough apart: Pearson's correlation magnifies rounding by their spread.
    """
    settings = dict(method="lora", lower_lr=1e-2, retrain_steps=40)
    after = trained(family, model=encoder(), **settings)["after"]["test"]
    model, task, _ = sample.load("run")
    rows, _ = task.encode(make(family, 12, seed=1), 64)
    with torch.no_grad():
        logits = [model(*task.collate([row])[:-1])[0] for row in rows]
    expected = by_sklearn(family, [row.target for row in rows], logits)
    assert {name: after[name] for name in expected} == expected


@pytest.mark.parametrize("family", HEADS)
def test_micro_batches_add_up_to_the_batch(family):
    """Their losses times shares, within fp32's rounding: rows differ in tags, and one is alone."""
    names = {"tagging": ["B-X", "I-X", "O"], "regression": []}.get(family, ["p", "q", "r"])
    task, model, rows, _ = head(family, names, make(family, 7))
    parts = data.micro_batches(rows, 2, count=task.supervised)
    losses = [model(*task.collate(part)).item() * share for part, share in parts]
    assert sum(losses) == pytest.approx(model(*task.collate(rows)).item(), rel=1e-5)


def test_dropouts_are_off_and_it_is_said(capsys):
    trained("classification", model=encoder("roberta"), method="lora")
    said = "dropouts are off (attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1)"
    assert said in capsys.readouterr().out


def test_a_regression_begins_at_the_mean_score_of_train():
    _, model, _, _ = head("regression", [], make("regression"))
    expected = numpy.mean([example["score"] for example in make("regression")])
    assert model.output.bias.item() == pytest.approx(expected)


def test_words_that_do_not_fit_are_predicted_as_outside():
    example = {"words": ["ab"] * 9, "tags": ["B-X"] * 9}
    task, _, [row], cut = head("tagging", ["B-X", "O"], [example], 6)  # [CLS], four words, [SEP]
    assert cut == 1 and len(row.input_ids) == 6
    assert task.in_words(row, [0] * 6) == ["B-X"] * 4 + ["O"] * 5
    blank = {"words": ["ab", "ab", " "], "tags": ["B-X"] * 3}  # it has no token, so none is cut
    assert head("tagging", ["B-X", "O"], [blank], 6)[3] == 0


@pytest.mark.parametrize("family", HEADS)
def test_full_fine_tuning_of_an_encoder_loads_in_transformers_with_the_labels_names(family):
    trained(family, model=encoder(), method="ft", lower_lr=1e-3)
    peer = auto_model(family).from_pretrained("run").eval()
    ours, task, _ = sample.load("run")
    ids = torch.tensor([task.tokenizer.encode("abc cab").ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), peer(ids).logits, rtol=0, atol=1e-5)
    if family != "regression":
        assert [peer.config.id2label[i] for i in range(len(task.names))] == task.names


def test_letters_of_proteins_become_the_tokens_of_transformers():
    """Also letters that it does not know, spaces, special tokens, and pairs."""
    folder = Path(encoder("esm"))
    peer = transformers.EsmTokenizer(str(folder / "vocab.txt"))
    ours, pad_id = load_tokenizer(folder)
    assert pad_id == peer.pad_token_id
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("LAGVSERTIDPKQNFYMHWCXBUZO JJ", k=rng.randint(1, 20)))
        text = text.replace("JJ", "<mask>")
        assert ours.encode(text).ids == peer(text)["input_ids"], text
    assert ours.encode("LAG", "VS").ids == peer("LAG", "VS")["input_ids"]


def test_generated_texts_are_scored_on_the_last_split_and_train_takes_each_reference():
    results = trained("generation", model="tiny-random", max_new_tokens=8)
    assert results["metric"] == "bleu" and results["examples"]["test"] == 12
    assert results["examples"]["train"] + results["examples"]["val"] == 48
    assert results["after"]["test"].keys() >= {"loss", "bleu", "chrf", "rougeL"}
    assert results["after"]["val"].keys() == {"loss"}


def test_a_greedy_text_is_what_generate_writes():
    """On a model that has learnt to copy a word; beams are tested in test_any_model.py."""
    trained("generation", model="tiny-random", max_new_tokens=8, lower_lr=1e-2)
    model, tokenizer, _ = sample.load("run")
    search = dict(max_new_tokens=8, num_beams=1, length_penalty=1.0, no_repeat_ngram_size=0)
    task = tasks.LanguageTask(tokenizer, "", {}, False, search, None)
    rows, _ = task.encode(make("generation", 5), 64)
    _, _, pairs = task.evaluate(model, rows)
    for row, (text, references) in zip(rows, pairs):
        ids = torch.tensor([row.prompt_ids])
        out = model.generate(ids, 8, temperature=0, stop_ids=tokenizer.stop_ids)[0, ids.size(1) :]
        assert tokenizer.decode(out.tolist()).strip() == text
        assert references == row.references


def writer(name):
    """A folder with a small random language model of transformers and a tokenizer."""
    checkpoint(name, name, "ForCausalLM", vocab_size=400)
    write_tokenizer(Path(name), "roberta")
    if name == "gpt2":  # as on the hub: config.json alone names the end token
        Path(name, "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return name


WRITTEN = {  # task: (its settings, an example of its file but for the prompt)
    "label_words": (dict(data="toy-sentiment", test_size=20), None),
    "language_model": ({}, {"completion": "cd de"}),
    "generation": (dict(max_new_tokens=4, num_beams=2), {"references": ["e"]}),
    "multiple_choice": ({}, CHOICE),
}


@pytest.mark.parametrize("task", WRITTEN)
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "phi3"])
def test_a_run_resumes_bit_for_bit_is_sampled_merged_and_read_by_peft(name, task, monkeypatch):
    settings, example = WRITTEN[task]
    settings = STEPS | dict(model=writer(name), task=task, checkpoint_every=1) | settings
    if example:
        rows = [example | {"prompt": f"ab {i}"} for i in range(24)]
        settings["train_file"] = write("train.jsonl", rows)
    train.train(Config(**settings | dict(out_dir="whole")))

    with monkeypatch.context() as patched:
        scale = train.learning_rate_scale

        def stops(step, steps, floor):
            if step == steps == STEPS["retrain_steps"]:
                raise KeyboardInterrupt
            return scale(step, steps, floor)

        patched.setattr(train, "learning_rate_scale", stops)
        with pytest.raises(KeyboardInterrupt):
            train.train(Config(**settings))
    train.train(Config(**settings, resume=True))
    adapters = [load_file(f"{run}/adapter_model.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])

    labels = ["--labels=a,b"] * (task == "multiple_choice")
    assert sample.main(["--adapter=run", "--prompt=ab", "--max_new_tokens=4", *labels]) == 0
    assert merge.main(["--adapter=run", "--out_dir=merged"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(name)
    peer = peft.PeftModel.from_pretrained(base, "run").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    ours, ids = sample.load("run")[0], torch.arange(3, 20)[None]
    with torch.no_grad():
        for logits in (ours(ids), merged(ids).logits):
            torch.testing.assert_close(logits, peer(ids).logits, rtol=0, atol=1e-5)


def test_dora_in_two_phases_fixes_the_magnitude_of_its_first_phase():
    ends = []
    for steps in (0, 5):
        settings = dict(method="dora", two_phases=True, overwrite=True, retrain_steps=steps)
        train.train(Config(**TINY | settings, out_dir="run"))
        ends.append(load_file("run/adapter_model.safetensors"))
    magnitudes = [name for name in ends[0] if "magnitude" in name]
    assert magnitudes and all(torch.equal(ends[0][name], ends[1][name]) for name in magnitudes)
    assert [line["phase"] for line in metrics()] == ["search"] * 4 + ["retrain"] * 5
    assert not any("val_loss" in line for line in metrics())


def test_the_upper_level_can_learn_from_train_as_a_control(monkeypatch):
    seen, batches = [], data.Batches

    def spy(rows, *arguments):
        seen.append(rows)
        return batches(rows, *arguments)

    monkeypatch.setattr(data, "Batches", spy)
    train.train(Config(**TINY, upper_data="train", out_dir="run"))
    lower, upper, retrain, _ = seen
    assert upper is lower and len(retrain) > len(lower)


def test_rates_of_their_own_for_the_final_phase_and_its_end():
    train.train(Config(**TINY, retrain_lr=5e-4, lr_floor=0.0, out_dir="run"))
    rates = {"search": [], "retrain": []}
    for line in metrics():
        rates[line["phase"]].append(line["lower_lr"])
    assert max(rates["search"]) == 1e-3 and max(rates["retrain"]) == 5e-4
    assert rates["search"][-1] == rates["retrain"][-1] == 0


def test_a_tokenizer_beside_a_heads_adapter_is_used_and_said(capsys, refuses):
    """The base's own says the same; one with more tokens than the model is refused."""
    trained("regression", model=encoder(), method="lora")
    ask = ["--adapter=run", "--prompt=ab cd", "--prompt_b=de"]
    capsys.readouterr()
    assert sample.main(ask) == 0
    expected = capsys.readouterr()
    shutil.copy("bert/tokenizer.json", "run")
    Path("bert/tokenizer.json").write_text("{}")
    assert sample.main(ask) == 0
    printed = capsys.readouterr()
    assert printed.out == expected.out and "the tokenizer is the adapter's own" in printed.err
    config = read_json(Path("bert/config.json"))
    Path("bert/config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    refuses(sample, ask, "tokens, the model only 9: remove it")


def test_a_vocabulary_alone_is_converted_by_transformers():
    folder = Path(encoder())
    expected, _ = load_tokenizer(folder)
    vocab = sorted(expected.get_vocab().items(), key=lambda item: item[1])
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(token for token, _ in vocab))
    ours, _ = load_tokenizer(folder)
    assert ours.encode("ab cab, de").ids == expected.encode("ab cab, de").ids


@pytest.mark.parametrize(
    "family, lines", [("classification", 3), ("multi_label", 3), ("regression", 1), ("tagging", 2)]
)
def test_sample_says_what_a_head_finds(family, lines, capsys, refuses):
    trained(family, model=encoder(), method="lora")
    capsys.readouterr()
    pair = [] if family == "tagging" else ["--prompt_b=de"]  # as some of the examples are
    assert sample.main(["--adapter=run", "--prompt=ab cd", *pair]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    if family == "classification":
        assert sum(float(line.split("%")[0]) for line in printed) == pytest.approx(100, abs=0.2)
    if family == "tagging":
        assert [line.split("\t")[0] for line in printed] == ["ab", "cd"]
    said = f"the run's task is {family}: give --prompt alone"
    refuses(sample, ["--adapter=run", "--prompt=ab", "--labels=x,y"], said)


@pytest.mark.parametrize("model", ["bert", "tiny-random"])
def test_a_run_on_pairs_asks_for_both_texts_and_one_on_single_texts_for_one(model, capsys, refuses):
    """The last line of the run is a command with both, and sample.py refuses one alone."""
    one, both = ["--adapter=run", "--prompt=ab"], ["--adapter=run", "--prompt=ab", "--prompt_b=de"]
    trained(model="tiny-random", data="toy-sentiment")
    refuses(sample, both, "single texts: omit --prompt_b")

    pairs = [example | {"text_b": "de"} for example in make("classification")]
    settings = STEPS | {"model": model_of(model), "train_file": write("train.jsonl", pairs)}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    assert train.main([*arguments, "--overwrite=True"]) == 0
    assert '--prompt="..." --prompt_b="..."' in capsys.readouterr().out
    refuses(sample, one, "error: the run is on pairs of texts: give both --prompt and --prompt_b\n")
    assert sample.main(both) == 0


def test_sample_writes_what_a_run_on_data_to_text_has_learnt(capsys):
    """One answer, learnt by heart, by the run's own search."""
    examples = [{"prompt": f"{word} {i}", "references": ["yes"]} for word in WORDS for i in "123"]
    settings = dict(train_file=write("train.jsonl", examples), search_steps=20, retrain_steps=40)
    trained(model="tiny-random", lower_lr=2e-2, **settings)
    capsys.readouterr()
    assert sample.main(["--adapter=run", "--prompt=ab 2"]) == 0
    assert capsys.readouterr().out.strip() == "yes"


GOOD = {
    "c": {"text": "ab", "label": "p"},
    "d": {"text": "cd", "label": "q"},
    "t": {"words": ["ab"], "tags": ["B-X"]},
    "r": {"text": "ab", "score": 1},
}
BAD = [  # lines of train, lines of test, the message
    ([*"cd"] * 5, ["c", {"text": "ab", "label": "z"}], "test.jsonl:2: test has the label 'z'"),
    (["t"] * 9, [{"words": ["ab"], "tags": ["B-Y"]}], "test.jsonl:1: test has the label 'B-Y'"),
    (["t", {"words": ["ab", "cd"], "tags": ["O"]}], [], "train.jsonl:2: 2 words and 1 tags: give"),
    (["t", {"words": ["ab"], "tags": ["X"]}], [], "train.jsonl:2: the tag 'X' is not O, B-"),
    (["t", {"words": "ab", "tags": ["O"]}], [], "train.jsonl:2: 'words' is str, not a list"),
    (["r", {"text": "ab", "score": "high"}], [], "train.jsonl:2: 'score' is 'high', not a"),
    (["r", {"text": "ab", "score": True}], [], "train.jsonl:2: 'score' is True, not a number"),
    (["r", {"text": "ab"}], [], "train.jsonl:2: the line has text, but the lines before have"),
    (["c", {"text": "ab", "text_b": "cd", "label": "q"}], [], "train.jsonl:1: text_b is missing"),
    (["c", {"text": "ab", "text_b": 3, "label": "q"}], [], "train.jsonl:2: 'text_b' is int, not a"),
    ([{"text": "ab", "labels": ["p", "p"]}], [], "train.jsonl:1: a label occurs twice"),
    ([{"text": "ab", "labels": "p"}], [], "train.jsonl:1: 'labels' is str, not a list"),
    ([{"prompt": "ab", "references": []}], [], "train.jsonl:1: the answer is empty"),
    ([CHOICE, CHOICE | {"choices": ["a"]}], [], "train.jsonl:2: the choices are ['a']: give two"),
    ([CHOICE | {"choices": "ab"}], [], "train.jsonl:1: 'choices' is str, not a list"),
    ([CHOICE | {"answer": True}], [], "train.jsonl:1: 'answer' is True: give the right choice's"),
    ([CHOICE | {"answer": "B"}], [], "train.jsonl:1: 'answer' is 'B': give the right choice's"),
]  # fmt: skip


@pytest.mark.parametrize("lines, test, message", BAD)
def test_a_wrong_example_is_refused_by_file_and_line_before_any_work(lines, test, message, capsys):
    arguments = [f"--model={encoder()}"]
    for name, rows in (("train", lines), ("test", test)):
        if rows:
            rows = [GOOD[row] if isinstance(row, str) else row for row in rows]
            arguments.append(f"--{name}_file={write(f'{name}.jsonl', rows)}")
    refused(capsys, message, *arguments)


BORROWED = [
    (["--quantize=nf4"], "quantize=nf4 packs model.py's models only (LLaMA"),
    (["--auto_hardware=True"], "auto_hardware=True knows the memory of model.py's"),
    (["--compile=True", "--hypergradient=first_order"], "compile=True does not work with a model"),
]
CANNOT = [
    *((model, *case) for model in ("gpt2", "bert") for case in BORROWED),
    ("gpt2", ["--block_size=65"], "block_size=65 is more than the 64 positions of gpt2"),
    ("gpt2", ["--target_modules=q_proj"], "'q_proj' matches no linear layer; there are: c_attn, c"),
    ("bert", ["--task=tagging"], "task=tagging does not take examples of the format 'classificati"),
    ("bert", ["--task=label_words"], "task=label_words needs a model that writes, which"),
    ("bert", ["--block_size=900"], "block_size=900 is more than the 64 positions of bert"),
    ("bert", ["--block_size=2"], "block_size=2 leaves no room beside 3 special tokens"),
    ("bert", ["--target_modules=q_proj"], "target module 'q_proj' matches no linear layer"),
    ("bert", ["--label_prompt=Is {text} good?"], "label_prompt is a question"),
    ("bert", ["--num_beams=2"], "are for"),
]


@pytest.mark.parametrize("model, arguments, message", CANNOT)
def test_what_a_borrowed_model_or_its_head_cant_have_is_refused(model, arguments, message, capsys):
    folder = writer(model) if model == "gpt2" else encoder(model)
    file = write("train.jsonl", make("classification"))
    data = "--data=toy-sentiment" if model == "gpt2" else f"--train_file={file}"
    refused(capsys, message, f"--model={folder}", data, *arguments)


def test_a_folder_without_a_dev_set_can_not_serve_the_upper_level(capsys):
    Path("folder").mkdir()
    write("folder/train.jsonl", make("classification"))
    said = "folder has no dev set for the upper level"
    refused(capsys, said, f"--model={encoder()}", "--data=folder", "--val_fraction=0")


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_tag_that_occurs_once_is_learnt_wherever_the_split_puts_it(place):
    examples = make("tagging", 9)
    examples.insert(place, {"words": ["de"], "tags": ["B-RARE"]})
    splits = data.load_splits(Config(train_file=write("train.jsonl", examples)))
    assert splits.labels == ["B-RARE", "B-X", "I-X", "O"]


def test_a_text_without_a_token_is_named(capsys):
    """The tiny model's tokenizer adds no special tokens."""
    file = write("train.jsonl", [*make("regression", 9), {"text": "", "text_b": "", "score": 1}])
    said = "train.jsonl:10: the text is empty, and this tokenizer has no token for that: fill it in"
    refused(capsys, said, "--model=tiny-random", f"--train_file={file}")


def test_a_library_that_the_scores_need_is_missed_before_training(monkeypatch, capsys):
    """Also where nothing is scored before training."""
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    file = write("train.jsonl", make("classification"))
    arguments = [f"--model={encoder()}", f"--train_file={file}", "--eval_before=False"]
    refused(capsys, "pip install scikit-learn", *arguments)


LORA, DORA = (dict(data="toy-sentiment", method=method) for method in ("lora", "dora"))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(train_file="train.jsonl", train_size=9), "train_size=9: train_file is taken whole"),
        (dict(data="folder", tune_size=9), "tune_size is for a built-in set"),
        (LORA | dict(upper_data="train"), "lora has no upper level"),
        (LORA | dict(two_phases=True), "two_phases=True is for met"),
        (DORA | dict(two_phases=True, search_steps=0), "two_phases=True needs search_steps"),
        (dict(data="toy-sentiment", length_penalty=1e9), "length_penalty=1000000000.0 must be at"),
        (dict(data="toys"), "unknown data 'toys'"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings, message):
    Path("folder").mkdir()
    with pytest.raises(ValueError, match=message):
        train.check(Config(**settings))


def test_tags_and_labels_of_other_formats_are_notes():
    """Instruction data often has fields of these names."""
    row = {"instruction": "a", "output": "b"}
    rows = [row | {"tags": tags} for tags in (["x"], 3, ["y"], ["z"])]
    test_file = write("test.jsonl", [row | {"labels": ["other"]}])
    config = Config(train_file=write("train.jsonl", rows), test_file=test_file)
    assert data.load_splits(config).labels == []


@pytest.mark.parametrize("name", ["bert", "tiny-random"])
def test_words_are_the_tokens_that_they_are_within_a_text(name):
    """By the tokenizers library itself, on a text that begins with a space."""
    tokenizer, _ = load_tokenizer(Path(find_model(model_of(name))))
    ids, places = encode_words(tokenizer, ["ab", "cab", "de"], 64)
    assert ids == tokenizer.encode(" ab cab de").ids
    assert [place for place in places if place >= 0] == [0, 1, 2]


@pytest.mark.parametrize("sizes", [(300, 5), (5, 300), (200, 150)])
def test_of_a_long_pair_the_left_of_the_longer_text_is_cut_first(sizes):
    """One token a byte: what is kept is counted in characters."""
    tokenizer = data.Tokenizer.from_pretrained(find_model("tiny-random"))
    label_ids = data.tokenize_labels(["no", "yes"], tokenizer)
    text, text_b = "a" * sizes[0], "b" * sizes[1]
    ids, cut = data.Question(tokenizer, "{text}|{text_b}", label_ids, 150).tokenize(text, text_b)
    before, after = tokenizer.decode(ids).split("|")
    kept = before.count("a"), after.count("b")
    assert cut and len(ids) == 150 - 3  # room for "yes"
    if min(sizes) == 5:
        assert min(kept) == 5 and max(kept) < 300
    else:
        assert abs(kept[0] - kept[1]) <= 1


def test_an_encoder_with_a_head_is_merged_for_transformers_and_for_sample(capsys):
    trained("classification", model=encoder(), method="bidora")
    assert merge.main(["--adapter=run", "--out_dir=merged"]) == 0
    ours, task, _ = sample.load("run")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    again, _, _ = sample.load("", "merged")
    ids = torch.tensor([task.tokenizer.encode("abc cab").ids])
    with torch.no_grad():
        for logits in (peer(ids).logits, again(ids)):
            torch.testing.assert_close(logits, ours(ids), rtol=0, atol=1e-5)
    assert peer.config.id2label == {0: "p", 1: "q", 2: "r"}


def test_a_language_model_with_a_head_is_not_merged(refuses):
    trained("regression", model="tiny-random")
    refuses(merge, ["--adapter=run", "--out_dir=merged"], "keep the adapter, which holds the head")


CONFIGS = sorted(path.stem for path in (ROOT / "configs" / "paper").glob("*.py"))
GLUE = {  # the columns of GLUE's files; a row of each
    "cola": (None, ["x", "{i}", "", "ab cd"]),
    "sst2": (["sentence", "label"], ["ab cd", "{i}"]),
    "mrpc": (["Quality", "#1 ID", "#1 String", "#2 String"], ["{i}", "1", "ab", "cd"]),
    "stsb": (["index", "sentence1", "sentence2", "score"], ["1", "ab", "cd", "{i}.5"]),
    "qqp": (["id", "question1", "question2", "is_duplicate"], ["1", "ab", "cd", "{i}"]),
    "mnli": (["sentence1", "sentence2", "gold_label"], ["ab", "cd", "{i}"]),
    "qnli": (["index", "question", "sentence", "label"], ["1", "ab", "cd", "{i}"]),
    "rte": (["index", "sentence1", "sentence2", "label"], ["1", "ab", "cd", "{i}"]),
}  # fmt: skip


def write_official(name):
    """A folder in the official layout of a config's data; returns its path."""
    folder = Path({"sst2": "SST-2", "stsb": "STS-B"}.get(name, name.upper()))
    folder.mkdir()
    if name == "conll2003":
        for part in ("eng.train", "eng.testa", "eng.testb"):
            lines = ["ab NN B-NP I-LOC", "cd NN I-NP O", ""] * 10
            (folder / part).write_text("\n".join(["-DOCSTART- -X- O O", "", *lines]))
    elif name == "commonsense":
        for part in ("train", "test"):
            write(folder / f"{part}.jsonl", [CHOICE | {"prompt": f"ab {i}"} for i in range(20)])
    elif name == "e2e":
        for part in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
            rows = [f'"name[ab{i}], food[cd]",a restaurant' for i in range(10)]
            (folder / part).write_text("\n".join(["mr,ref", *rows]))
    else:
        header, row = GLUE[name]
        rows = [[cell.replace("{i}", str(i % 2)) for cell in row] for i in range(20)]
        lines = ["\t".join(cells) for cells in ([header] if header else []) + rows]
        for part in ("train.tsv", "dev_matched.tsv" if name == "mnli" else "dev.tsv"):
            (folder / part).write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "glue"])
def test_each_of_the_papers_runs_works_on_a_small_stand_in(name, capsys):
    """Its own settings, but for the model, the data's place, the steps and the row lengths."""
    stand_ins = {"e2e": "gpt2", "esm": "esm", "deberta": "deberta-v3"}
    model = stand_ins.get(name.partition("_")[0], "roberta")
    folder = writer(model) if name == "e2e" else encoder(model)
    folder = "tiny-random" if name == "commonsense" else folder
    task = "cola" if name.startswith("as_") else name.removeprefix("deberta_")
    arguments = [] if task == "esm_peptides" else [f"--data={write_official(task)}"]
    config = train.read_config(
        [f"--config=paper/{name}.py", f"--model={folder}", *arguments, "--block_size=48"]
        + ["--search_steps=2", "--batch_size=4", "--max_new_tokens=4", "--eval_size=20"]
    )
    config.retrain_steps = min(config.retrain_steps, 1)
    results = train.train(config)
    expected = dict(cola="matthews", stsb="pearson", conll2003="f1", e2e="bleu", commonsense="acc")
    assert results["metric"] == expected.get(task, "accuracy")
    assert results["after"]["test"][results["metric"]] is not None or name == "stsb"
    run = read_json(Path(results["out_dir"]) / "run.json")
    row = name in ("as_published", "esm_peptides", "commonsense")
    assert run["magnitude_axis"] == ("row" if row else "column")
    assert run["rank"] == (32 if name == "commonsense" else 4)


@pytest.mark.parametrize("family", [*HEADS, "label_words", "generation", "language_model"])
def test_a_file_is_predicted_as_the_run_evaluated_it(family, monkeypatch, capsys):
    """The scores of the run's own table, also after an interruption, and without the answers."""
    forms = {"label_words": "classification", "language_model": "generation"}
    examples = make(forms.get(family, family), 40, seed=1)
    if family == "language_model":
        examples = [{"prompt": x["prompt"], "completion": "x"} for x in examples]
    settings = dict(model="tiny-random", test_file=write("new.jsonl", examples))
    if family in HEADS:
        trained(family, **settings | dict(model=encoder(), method="lora"))
    elif family == "label_words":
        trained("classification", **settings)
    else:
        settings |= dict(train_file=write("train.jsonl", examples), max_new_tokens=4)
        trained(**settings, task=family)
    command = ["--adapter=run", "--file=new.jsonl", "--out=found.jsonl"]
    calls = []
    monkeypatch.setattr(predict, "ROWS", 16)

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    kind = HeadTask if family in HEADS else tasks.LanguageTask
    original = kind.evaluate
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(kind, "evaluate", stops)
        sample.use(sample.Sample(adapter="run", file="new.jsonl", out="found.jsonl"))
    capsys.readouterr()
    assert sample.main(command) == 0
    printed = capsys.readouterr().out
    after = read_json(Path("run/summary.json"))["after"]["test"]
    scores = {name: x for name, x in after.items() if name != "loss" and x is not None}
    if family != "language_model":
        assert all(f"{name}  {score:.4f}" in printed for name, score in scores.items())
    assert sample.main(command[:2]) == 0
    printed = capsys.readouterr().out
    assert all(f"{n}  {x:.4f}" in printed for n, x in after.items() if x is not None)
    lines = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and not list(Path().glob("*.part"))

    answer = FORMATS[predict.form_of({"task": family, "raw": True})][-1]
    write("new.jsonl", [{k: x for k, x in example.items() if k != answer} for example in examples])
    assert sample.main([*command[:2], "--out=again.jsonl"]) == 0
    again = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    assert again == [{"prediction": line["prediction"]} for line in lines]


def test_a_csv_file_is_predicted_into_csv(capsys, refuses):
    """Its columns and blanks are read as in training; an unknown label is said."""
    trained("classification", model=encoder(), method="lora")
    Path("new.csv").write_text('sentence1,sentence2,label\n"ab cd",e, p\n"de, e",ab,z \n')
    ask = ["--adapter=run", "--file=new.csv"]
    assert sample.main([*ask, "--out=found.csv"]) == 0
    header, *rows = Path("found.csv").read_text().splitlines()
    assert header == "prediction,answer" and [row.split(",")[1] for row in rows] == ["p", "z"]
    assert all(row.partition(",")[0] in "pqr" for row in rows)
    assert "note: the run did not learn z" in capsys.readouterr().err
    Path("new.csv").write_text('text,text_b\n,"ab"\n"' + "ab " * 99 + '",cd\n')
    assert sample.main([*ask, "--out=empty.csv"]) == 0  # an empty text is one, as in training
    assert "note: 1 examples were longer than block_size=64" in capsys.readouterr().err
    Path("new.csv").write_text("words\nab\n")
    for out, said in (
        ("more.csv", "new.csv:2: 'text' is missing, which the run's examples have"),
        ("found.csv", "found.csv exists: choose another --out"),
        ("nowhere/more.csv", "nowhere is no folder: make it, or choose another --out"),
    ):
        refuses(sample, [*ask, f"--out={out}"], said)


def test_a_head_s_adapter_goes_on_with_its_own_labels_alone(refuses):
    trained("classification", model=encoder(), method="lora")
    rows = [row | {"label": row["label"] + "!"} for row in make("classification")]
    more = ["--adapter=run", "--method=lora", f"--train_file={write('more.jsonl', rows)}"]
    said = "run has a head for p, q, r, not for p!, q!, r!: name them alike"
    refuses(train, [*more, "--out_dir=new"], said)


def test_instructions_of_a_file_are_answered(capsys):
    rows = [{"instruction": f"say {i}", "output": "yes"} for i in range(24)]
    settings = dict(train_file=write("train.jsonl", rows), search_steps=20, retrain_steps=40)
    trained(model="tiny-random", lower_lr=2e-2, **settings)
    assert sample.main(["--adapter=run", "--file=train.jsonl", "--out=found.jsonl"]) == 0
    lines = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    assert lines == [{"prediction": "yes", "answer": "yes"}] * 24
