"""Scores against closed forms, hand counts and other entry points; a warning is an error here."""

import collections
import functools
import math
import random
import re
from types import SimpleNamespace

import nltk
import pytest
from nltk.corpus.util import LazyCorpusLoader

from support.tasks import scores

pytestmark = pytest.mark.filterwarnings("error")


def drawn(values, count=300, seed=0):
    return random.Random(seed).choices(values, k=count)


def counts(predictions, references, label):
    """(true positives, false positives, false negatives)"""
    pairs = collections.Counter((p == label, r == label) for p, r in zip(predictions, references))
    return pairs[True, True], pairs[True, False], pairs[False, True]


def f1(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn)


@pytest.mark.parametrize("labels", ["01", "abc"])
def test_accuracy_and_f1_are_their_formulas(labels):
    found, right = drawn(labels), drawn(labels, seed=1)
    got = scores.classification(found, right, positive=labels[1])
    each = {label: f1(*counts(found, right, label)) for label in labels}
    assert got["accuracy"] == pytest.approx(sum(map(str.__eq__, found, right)) / 300)
    assert got["f1_macro"] == pytest.approx(sum(each.values()) / len(labels))
    assert got["f1"] == pytest.approx(each[labels[1]])


def test_matthews_correlation_of_two_labels_is_its_formula():
    found, right = drawn("01"), drawn("01", seed=1)
    tp, fp, fn = counts(found, right, "1")
    tn = 300 - tp - fp - fn
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores.classification(found, right)["matthews"] == pytest.approx(expected)


def test_matthews_correlation_of_a_constant_and_the_f1_of_an_absent_label_are_0():
    for found, right in (("1111", "0011"), ("0011", "1111"), ("1111", "1111")):
        got = scores.classification(list(found), list(right), positive="c")
        assert got["matthews"] == got["f1"] == 0


def test_pearson_is_its_formula_and_spearman_is_pearson_of_ranks():
    rng = random.Random(0)
    found, right = ([rng.gauss(0, 1) for _ in range(300)] for _ in range(2))
    found = [a + b for a, b in zip(found, right)]

    def pearson(x, y):
        x, y = ([v - sum(z) / len(z) for v in z] for z in (x, y))
        return sum(a * b for a, b in zip(x, y)) / (math.hypot(*x) * math.hypot(*y))

    def ranks(x):
        return [sorted(x).index(v) for v in x]

    got = scores.regression(found, right)
    assert got["pearson"] == pytest.approx(pearson(found, right))
    assert got["spearman"] == pytest.approx(pearson(ranks(found), ranks(right)))


def test_undefined_correlations_are_none():
    numbers = [1.0, 2.0, 3.0]
    unequal = ([1.0] * 3, [1.0, math.nan, 3.0], [1.0, math.inf, 3.0])
    for found, right in [*((x, numbers) for x in unequal), (numbers, [2.0] * 3), ([1.0], [2.0])]:
        assert scores.regression(found, right) == {"pearson": None, "spearman": None}


def test_numbers_that_differ_by_rounding_alone_have_ranks_but_no_pearson():
    got = scores.regression([1.0, 1.0 + 1e-15, 1.0], [1.0, 2.0, 3.0])
    assert got == {"pearson": None, "spearman": pytest.approx(0, abs=1e-15)}


def test_multi_label_f1_counts_labels_over_all_examples():
    rng = random.Random(0)
    found, right = ([rng.sample("abc", rng.randrange(4)) for _ in range(100)] for _ in range(2))
    each = [
        counts([x in labels and x for labels in found], [x in labels and x for labels in right], x)
        for x in "abc"
    ]
    got = scores.multi_label(found, right)
    assert got["f1_micro"] == pytest.approx(f1(*map(sum, zip(*each))))
    assert got["f1_macro"] == pytest.approx(sum(f1(*c) for c in each) / 3)


def test_multi_label_f1_of_one_label_does_not_count_its_absence_and_without_any_is_none():
    """Two of the four labels are found: F1 = 2 · 2 / (2 · 2 + 2)."""
    got = scores.multi_label([["a"], ["a"], [], []], [["a"]] * 4)
    assert got == {"f1_micro": pytest.approx(2 / 3), "f1_macro": pytest.approx(2 / 3)}
    assert scores.multi_label([[], []], [[], []]) == {"f1_micro": None, "f1_macro": None}


@pytest.mark.parametrize("task", scores.GLUE)
def test_each_glue_task_has_its_own_scores(task):
    """Two in three are right; of the label 1: one is found, one missed, none wrong."""
    found, right = (["0", "1", "0"], ["0", "1", "1"])
    expected = {"accuracy": 2 / 3}
    if task in ("mrpc", "qqp"):
        expected = {"accuracy": 2 / 3, "f1": 2 / 3}
    if task == "cola":  # (1 · 1 - 0 · 1) / √(1 · 2 · 1 · 2)
        expected = {"matthews": 0.5}
    if task == "stsb":
        found, right, expected = [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], {"pearson": 1, "spearman": 1}
    got = scores.glue(task, found, right)
    assert got == pytest.approx(expected) and tuple(got) == scores.GLUE[task]


def test_entities_count_as_wholes():
    """Right: one of three found, one of two present; a wrong end and a wrong type don't count."""
    right = [["B-PER", "I-PER", "O", "B-LOC"], ["O"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-ORG"]]
    expected = {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / (3 + 2)}
    assert scores.tagging(found, right) == pytest.approx(expected)


def test_an_entity_ends_with_its_sentence_and_where_the_next_begins():
    assert scores.tagging([["B-A"], ["I-A"]], [["B-A"], ["I-A"]])["f1"] == 1
    assert scores.tagging([["B-A", "B-A"]], [["B-A", "I-A"]])["f1"] == 0
    assert scores.tagging([["I-A", "O"]], [["B-A", "O"]])["f1"] == 1  # I begins one, in conlleval


def test_without_any_entity_there_is_no_score():
    assert set(scores.tagging([["O"]], [["O"]]).values()) == {None}
    assert set(scores.tagging([["O"]], [["B-A"]]).values()) == {0}
    assert set(scores.tagging([["B-A"]], [["O"]]).values()) == {0}


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch):
    """NLTK as it is on a machine without its data."""
    monkeypatch.setattr(nltk.data, "path", [])
    absent = LazyCorpusLoader("wordnet", nltk.corpus.reader.WordNetCorpusReader, None)
    monkeypatch.setattr(nltk.corpus, "wordnet", absent)


WORDS = "the cat sat on a mat and there was one dog that ran to its friend .".split()


def sentences(count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(6, 15))) for _ in range(count)]


def test_a_prediction_that_is_a_reference_is_perfect():
    """NIST is then the mean information of n-grams: five words, each once, hold log2(5) bits."""
    got = scores.generation(["one two three four five"], [["zero", "one two three four five"]])
    assert got["bleu"] == pytest.approx(100) and got["chrf"] == pytest.approx(100)
    assert got["rougeL"] == 1 and got["meteor"] is None
    got = scores.generation(["one two three four five"], [["one two three four five"]])
    assert got["nist"] == pytest.approx(math.log2(5))


def test_rouge_l_and_bleu_are_their_formulas():
    """Of 4 and 5 words, 3 are common. 7 words of 8, one wrong: 6/7, 4/6, 2/5, 1/4, exp(1 - 8/7)."""
    got = scores.generation(["a b x c"], [["a b c d e"]])
    assert got["rougeL"] == pytest.approx(2 * 3 / (4 + 5))
    got = scores.generation(["a b c d x f g"], [["a b c d e f g h"]])
    precision = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert got["bleu"] == pytest.approx(100 * precision * math.exp(1 - 8 / 7))


def test_references_of_unequal_number_count_as_if_the_last_ones_were_repeated():
    found, pool = sentences(30, 0), sentences(90, 1)
    right = [pool[3 * i : 3 * i + 1 + i % 3] for i in range(30)]
    full = [texts + texts[-1:] * (3 - len(texts)) for texts in right]
    ours, padded = (scores.generation(found, references) for references in (right, full))
    for name in ("bleu", "chrf", "rougeL"):
        assert ours[name] == pytest.approx(padded[name]), name
    assert 0 < ours["bleu"] < 100 and 0 < ours["nist"]


def test_more_references_never_lower_a_score():
    found, pool = sentences(30, 0), sentences(60, 1)
    one = scores.generation(found, [[text] for text in pool[:30]])
    two = scores.generation(found, [list(pair) for pair in zip(pool[:30], pool[30:])])
    for name in ("chrf", "rougeL"):
        assert two[name] >= one[name], name


def test_empty_predictions_are_worth_0_and_nist_needs_five_words():
    got = scores.generation(["", ""], [["a b"], ["c"]])
    assert got == {"bleu": 0, "chrf": 0, "rougeL": 0, "nist": None, "meteor": None}
    assert scores.generation(["one two three four five"], [[""]])["nist"] is None


def test_meteor_is_its_formula_where_wordnet_is_there(monkeypatch):
    """Of m words in one run, all right: 1 - 0.5 / m³. This WordNet knows no synonyms."""
    empty = SimpleNamespace(ensure_loaded=lambda: None, synsets=lambda word: [])
    monkeypatch.setattr(nltk.corpus, "wordnet", empty)
    got = scores.generation(["one two three"], [["four", "one two three"]])
    assert got["meteor"] == pytest.approx(1 - 0.5 / 3**3)


@pytest.mark.parametrize("score", ["classification", "regression", "multi_label", "tagging"])
@pytest.mark.parametrize("found, right", [([], []), ([["O"]], []), ([["O"]], [["O"], ["O"]])])
def test_lists_of_unequal_or_no_length_are_refused(score, found, right):
    with pytest.raises(ValueError, match=f"{len(found)} predictions for {len(right)} references"):
        getattr(scores, score)(found, right)


@pytest.mark.parametrize(
    "score, found, right, said",
    [
        (functools.partial(scores.glue, "sst-2"), "1", "1", "GLUE task 'sst-2': choose cola, sst2"),
        (scores.tagging, [["O"], ["O"]], [["O"], ["O", "O"]], "sentence 2: 1 tags for 2 words"),
        (scores.tagging, [["S-A"]], [["B-A"]], "sentence 1: the tag 'S-A' is not O, B-"),
        (scores.generation, ["a", "b"], [["a"], []], "example 2: give a list of one or more"),
        (scores.generation, ["a"], ["a"], "example 1: give a list of one or more"),
    ],
)
def test_malformed_input_is_refused(score, found, right, said):
    with pytest.raises(ValueError, match=said):
        score(found, right)


@pytest.mark.parametrize(
    "score, found, right, module, package",
    [
        (scores.classification, ["a"], ["a"], "sklearn", "scikit-learn"),
        (scores.multi_label, [["a"]], [["a"]], "sklearn", "scikit-learn"),
        (scores.regression, [1, 2], [1, 2], "scipy", "scipy"),
        (scores.tagging, [["B-A"]], [["B-A"]], "seqeval", "seqeval"),
        (scores.generation, ["a"], [["a"]], "sacrebleu", "sacrebleu"),
        (scores.generation, ["a"], [["a"]], "rouge_score", "rouge-score"),
        (scores.generation, ["a"], [["a"]], "nltk", "nltk"),
    ],
)
def test_a_missing_library_gets_its_pip_command(score, found, right, module, package, monkeypatch):
    real = scores.importlib.import_module

    def without(name, *more):
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real(name, *more)

    monkeypatch.setattr(scores.importlib, "import_module", without)
    with pytest.raises(ValueError, match=f"pip install {re.escape(package)}$") as error:
        score(found, right)
    assert "\n" not in str(error.value)
