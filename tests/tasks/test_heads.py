"""The heads against transformers' own, on small random checkpoints that transformers made."""

import functools
import json
import random

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from test_architectures import Problem
from test_encoder import BASIC, adapted, batch, checkpoint, refused, rewrite, without
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import bidora
from bilevel import BilevelOptimizer
from support.tasks.encoder import Encoder
from support.tasks.head_task import encode_pair, encode_words
from support.tasks.heads import IGNORED, EncoderWithHead

SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
CLASSES = {"classification": SEQUENCE, "tagging": TOKEN}
FAMILIES = [*BASIC, "camembert", "xlm-roberta"]
LABELS = 3


def assert_alike(model, peer, inputs):
    """Logits of about 1 at real tokens, within 1e-5: fp32 in another order."""
    with torch.no_grad():
        logits, expected = model(**inputs), peer(**inputs).logits
    assert logits.shape == expected.shape
    if logits.dim() == 3:
        real = inputs["attention_mask"].bool()
        logits, expected = logits[real], expected[real]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def load(folder, kind, **options):
    labels = 1 if kind == "regression" else LABELS
    return EncoderWithHead.from_pretrained(folder, kind, labels, **options)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, kind, tmp_path):
    """With the head that the file holds, on padded rows."""
    peer = checkpoint(tmp_path, name, CLASSES[kind], num_labels=LABELS)
    assert_alike(load(tmp_path, kind), peer, batch(peer))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_have_transformers_names_and_shapes(name, kind, tmp_path):
    """On a file with a pooler and without. ESM's contact head, which no task uses, is left out."""
    peer = checkpoint(None, name, CLASSES[kind], num_labels=LABELS)
    for head in ("Model", "ForMaskedLM"):
        checkpoint(tmp_path / head, name, head)
        theirs = {n: p.shape for n, p in peer.named_parameters() if "contact_head" not in n}
        model = load(tmp_path / head, kind)
        assert {n: p.shape for n, p in model.named_parameters()} == theirs


def targets_for(kind, mask):
    """Random targets for a batch with this attention mask."""
    generator = torch.Generator().manual_seed(7)
    rows = len(mask)
    if kind == "classification":
        return torch.randint(LABELS, (rows,), generator=generator)
    if kind == "multi_label":
        return torch.randint(2, (rows, LABELS), generator=generator)
    if kind == "regression":
        return torch.randn(rows, generator=generator)
    tags = torch.randint(LABELS, mask.shape, generator=generator)
    tags[:, ::3] = IGNORED
    return tags.masked_fill(mask == 0, IGNORED)


PROBLEMS = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
    "tagging": None,
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("name", BASIC)
def test_losses_equal_transformers(name, kind, tmp_path):
    """Within 1e-5 of losses of about 1, as the logits."""
    options = dict(num_labels=1 if kind == "regression" else LABELS, problem_type=PROBLEMS[kind])
    peer = checkpoint(tmp_path, name, CLASSES.get(kind, SEQUENCE), **options)
    model, inputs = load(tmp_path, kind), batch(peer)
    targets = targets_for(kind, inputs["attention_mask"])
    theirs = targets.float() if kind == "multi_label" else targets
    with torch.no_grad():
        loss, expected = model(**inputs, targets=targets), peer(**inputs, labels=theirs).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("name", BASIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_head_and_loss_are_in_float32_or_finer(dtype, name, kind, tmp_path):
    inputs = batch(checkpoint(tmp_path, name))
    model = load(tmp_path, kind, dtype=dtype)
    fine = torch.promote_types(dtype, torch.float32)
    assert model.encoder.embeddings.word_embeddings.weight.dtype == dtype
    assert {p.dtype for p in model.classifier.parameters()} == {fine}
    loss = model(**inputs, targets=targets_for(kind, inputs["attention_mask"]))
    assert loss.dtype == fine and loss.shape == ()


def test_predictions_are_what_a_kind_says(tmp_path):
    checkpoint(tmp_path, "bert")
    logits = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.4, -0.1]])
    for kind, given, expected in (
        ("classification", logits, [2, 0]),
        ("multi_label", logits, [[1, 0, 1], [1, 1, 0]]),
        ("tagging", logits[None], [[2, 0]]),
        ("regression", logits[:, :1], [1.0, 0.5]),
    ):
        assert load(tmp_path, kind).predict(given).tolist() == expected


# ------------------------------------------------------------------------------- a fresh head


@pytest.mark.parametrize("name", BASIC)
def test_a_fresh_head_is_drawn_by_torch_generator_as_transformers_draws_it(name, tmp_path):
    """Weights from N(0, 0.02): of 1024 numbers, the deviation is within 0.002, 4 of its errors."""
    checkpoint(tmp_path, name, hidden_size=64)

    def head(seed):
        torch.manual_seed(seed)
        model = EncoderWithHead.from_pretrained(tmp_path, "classification", 16)
        return dict(model.classifier.named_parameters())

    first, again, other = head(0), head(0), head(1)
    for key, parameter in first.items():
        assert torch.equal(parameter, again[key])
        if key.endswith("bias"):
            assert not parameter.any()
        else:
            assert not torch.equal(parameter, other[key])
            assert abs(parameter.std() - 0.02) < 0.002 and abs(parameter.mean()) < 0.003


def test_a_file_with_a_head_of_another_size_is_refused_and_can_be_loaded_without_it(tmp_path):
    checkpoint(tmp_path, "roberta", SEQUENCE, num_labels=LABELS)
    with pytest.raises(ValueError, match=r"out_proj.weight is \(3, 32\), .* has \(2, 32\): give"):
        EncoderWithHead.from_pretrained(tmp_path, "classification", 2)
    EncoderWithHead(Encoder.from_pretrained(tmp_path), "classification", 2)

    rewrite(tmp_path, without("classifier.dense.bias"))
    with pytest.raises(ValueError, match="classifier.dense.bias is missing, but the head has"):
        EncoderWithHead.from_pretrained(tmp_path, "classification", LABELS)


# ------------------------------------------------------------------------------- what trains


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


ONE = {"classifier.weight", "classifier.bias"}
TWO = {f"classifier.{name}.{end}" for name in ("dense", "out_proj") for end in ("weight", "bias")}
TRAINED = {
    ("bert", "classification"): ONE,
    ("bert", "tagging"): ONE,
    ("esm", "tagging"): ONE,
    ("roberta", "classification"): TWO,
    ("esm", "classification"): TWO,
}


@pytest.mark.parametrize("name, kind", TRAINED)
def test_beside_adapters_the_classifier_alone_trains(name, kind, tmp_path):
    """At the lower level, whether adapters come before the head or after it."""
    checkpoint(tmp_path, name)
    model = EncoderWithHead.from_pretrained(tmp_path, kind, 2)
    bidora.replace_linear_with_bidora(model, 2, target_modules=["query", "value"])
    before = EncoderWithHead(adapted(Encoder.from_pretrained(tmp_path)), kind, 2)
    for each in (model, before):
        assert trained(each) == TRAINED[name, kind]
        lower = {id(p) for p in bidora.lower_parameters(each)}
        assert all(id(p) in lower for n, p in each.named_parameters() if n in trained(each))
        assert len(bidora.upper_parameters(each)) == 6


def test_a_pooler_that_the_checkpoint_lacks_trains_too(tmp_path):
    checkpoint(tmp_path, "bert", "ForMaskedLM")
    model = EncoderWithHead.from_pretrained(tmp_path, "classification", 2)
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trained(model) == TRAINED["bert", "classification"] | pooler


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("name", BASIC)
def test_a_bilevel_step_moves_the_head_with_the_directions(name, kind, tmp_path):
    """And the magnitudes on val data; nothing else."""
    peer = checkpoint(tmp_path, name)
    model = load(tmp_path, kind)
    bidora.replace_linear_with_bidora(model, 2, target_modules=["query", "value"])
    batches = [batch(peer, seed) for seed in (0, 1)]
    batches = [x | {"targets": targets_for(kind, x["attention_mask"])} for x in batches]

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = BilevelOptimizer(model)
    # In the first step B = 0, so that no gradient reaches A.
    for _ in range(2):
        optimizer.bilevel_step(lambda model, inputs: model(**inputs), *batches)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


class HeadProblem(Problem):
    """Problem's derivatives, of a head's own loss."""

    def loss(self, inputs):
        targets = targets_for(self.model.kind, inputs["attention_mask"])
        return lambda: self.model(**inputs, targets=targets)


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("name", BASIC)
def test_unrolled_equals_finite_differences_with_a_head(name, kind, tmp_path):
    peer = checkpoint(tmp_path, name)
    model = load(tmp_path, kind, dtype=torch.float64)
    problem = HeadProblem(model, functools.partial(batch, peer), ["query", "value"])
    h = problem.hypergradient("unrolled", dict(lr=0.1, steps=2))
    problem.check(h, problem.slope(lambda: problem.after_steps(2, 0.1)))


# ------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", BASIC)
def test_peft_reads_the_adapter_with_its_head(name, kind, tmp_path):
    """Over transformers' model with a head of its own, which the file's replaces."""
    checkpoint(tmp_path, name)
    model = adapted_head(tmp_path, kind)
    bidora.save_adapter(model, tmp_path / "adapter")
    auto = getattr(transformers, f"AutoModel{CLASSES[kind]}")
    peer = auto.from_pretrained(tmp_path, num_labels=LABELS)
    peer = PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    assert_alike(model, peer, batch(peer))

    loaded = bidora.load_adapter(load(tmp_path, kind), tmp_path / "adapter")
    assert_alike(loaded, peer, batch(peer))
    assert trained(loaded) == trained(model)


def adapted_head(folder, kind):
    """A model with adapters that have moved, and a head far from a fresh one."""
    model = load(folder, kind)
    adapted(model.encoder)
    for parameter in model.classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", BASIC)
def test_what_peft_trained_is_loaded_with_its_head(name, kind, tmp_path):
    base = checkpoint(tmp_path, name, CLASSES[kind], num_labels=LABELS)
    task = "TOKEN_CLS" if kind == "tagging" else "SEQ_CLS"
    config = LoraConfig(task_type=task, target_modules=["query", "value"], use_dora=True, r=2)
    peer = get_peft_model(base, config).eval()
    for parameter in peer.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "adapter")
    model = bidora.load_adapter(load(tmp_path, kind), tmp_path / "adapter")
    assert_alike(model, peer, batch(peer))


# -------------------------------------------------------------------------------- from text

LETTERS = "abcdeéß ,.'-"


def texts(count, longest, seed=0):
    """Random texts of words and punctuation."""
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randint(0, longest))) for _ in range(count)]


def tokenizers(folder, family, **options):
    """Transformers' tokenizer of a family, and the tokenizers library's of the file it writes."""
    if family == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = [*"abcde,.'-", *(f"##{c}" for c in "abcde"), "ab", "##cd", "abc", "##ee"]
        vocab = {piece: i for i, piece in enumerate([*special, *pieces])}
        peer = transformers.BertTokenizerFast(vocab=vocab)
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts(200, 60, seed=9), 300, 2, False, special)
        content = json.loads(bpe.to_str())["model"]
        merges = [tuple(pair) for pair in content["merges"]]
        peer = transformers.RobertaTokenizerFast(vocab=content["vocab"], merges=merges)
    peer.save_pretrained(folder)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if family == "roberta" and options:
        peer = transformers.RobertaTokenizerFast(vocab=content["vocab"], merges=merges, **options)
    return ours, peer


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pairs_are_encoded_and_truncated_as_by_transformers(family, tmp_path):
    """Single texts and pairs of any lengths, in rows of 5 to 30 tokens."""
    ours, peer = tokenizers(tmp_path, family)
    ours.enable_padding(length=64)  # which a file may ask for
    rng = random.Random(1)
    for text, other in zip(texts(300, 40), texts(300, 40, seed=1)):
        # For transformers, an empty second text is none.
        other, size = rng.choice([None, f"{other}a"]), rng.randint(5, 30)
        row = peer(text, other, truncation=True, max_length=size, return_token_type_ids=True)
        whole = len(peer(text, other)["input_ids"])
        expected = row["input_ids"], row["token_type_ids"], whole > size
        assert encode_pair(ours, text, other, size) == expected
        assert len(row["input_ids"]) <= size


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_tags_stand_on_first_tokens_of_words_by_transformers_word_ids(family, tmp_path):
    """RoBERTa's file has no space before the first word; transformers demands the option."""
    ours, peer = tokenizers(tmp_path, family, add_prefix_space=True)
    rng = random.Random(2)
    for text in texts(300, 60):
        words, size = text.split(), rng.randint(4, 30)
        tags = [rng.randrange(5) for _ in words]
        row = peer(words, is_split_into_words=True, truncation=True, max_length=size)
        places = row.word_ids()
        expected = [
            IGNORED if place is None or place in places[:i] else tags[place]
            for i, place in enumerate(places)
        ]
        assert encode_words(ours, words, tags, size) == (row["input_ids"], expected)


# --------------------------------------------------------------------------------- refusals

UNFIT = {
    "unknown kind": ("sorting", 2, "unknown kind 'sorting': choose classification, multi_label"),
    "one class": ("classification", 1, "labels=1 must be an integer from 2 to 100000 for class"),
    "one tag": ("tagging", 1, "labels=1 must be an integer from 2"),
    "two numbers": ("regression", 2, "labels=2 must be 1 for regression"),
    "no labels": ("multi_label", 0, "labels=0 must be an integer from 1"),
    "a fraction": ("classification", 2.0, "labels=2.0 must be an integer"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_head_that_does_not_exist_is_refused_in_one_line(case, tmp_path):
    kind, labels, message = UNFIT[case]
    checkpoint(tmp_path, "bert")
    with refused(message):
        EncoderWithHead.from_pretrained(tmp_path, kind, labels)


NONE = [[IGNORED] * 4] * 2
WRONG = {
    "too large": ("classification", [0, 3], "target 3: classification needs integers from 0 to 2"),
    "negative": ("classification", [0, -100], "target -100: classification needs integers"),
    "a float": ("classification", [0.0, 1.0], "target 0.0: classification needs integers"),
    "wrong shape": ("classification", [[0], [1]], r"targets are \(2, 1\): .* needs \(2,\) here"),
    "too few": ("multi_label", [[0, 1], [1, 0]], r"\(2, 2\): multi_label needs \(2, 3\) here"),
    "two": ("multi_label", [[0, 1, 2]] * 2, "target 2: multi_label needs from 0 to 1"),
    "not a number": ("regression", [0.5, float("nan")], "target nan: regression needs finite"),
    "no row": ("regression", [0.5], r"targets are \(1,\): regression needs \(2,\) here"),
    "a tag too large": ("tagging", [[0, 1, 2, 3]] * 2, "target 3: .* from 0 to 2, or -100"),
    "no tags": ("tagging", NONE, "all targets are -100: a batch needs at least one tag"),
    "tags a row": ("tagging", [0, 1], r"targets are \(2,\): tagging needs \(2, 4\) here"),
}


@pytest.mark.parametrize("case", WRONG)
def test_targets_that_do_not_fit_are_refused_in_one_line(case, tmp_path):
    kind, targets, message = WRONG[case]
    checkpoint(tmp_path, "bert")
    with refused(message):
        load(tmp_path, kind)(torch.full((2, 4), 5), targets=torch.tensor(targets))


def test_rows_that_begin_with_padding_are_refused_where_the_first_token_is_read(tmp_path):
    checkpoint(tmp_path, "bert")
    ids, mask = torch.full((2, 4), 5), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    load(tmp_path, "tagging")(ids, mask)
    with pytest.raises(ValueError, match="a row begins with padding: pad the end"):
        load(tmp_path, "classification")(ids, mask)


def test_text_that_can_not_be_encoded_as_asked_is_refused(tmp_path):
    ours, _ = tokenizers(tmp_path, "bert")
    with pytest.raises(ValueError, match="block_size=3 leaves no room beside 3 special tokens"):
        encode_pair(ours, "ab", "cd", 3)
    with pytest.raises(ValueError, match="1 targets for 2 words"):
        encode_words(ours, ["ab", "cd"], [0])
