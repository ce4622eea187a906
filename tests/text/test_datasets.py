"""The built-in data sets against their archives; a small one stands in for BIG-bench's 358 MB."""

import collections
import csv
import hashlib
import io
import itertools
import json
import os
import statistics
import tarfile
import zipfile

import pytest
from seqeval.metrics.sequence_labeling import get_entities

import data
from support.text import datasets
from support.text.datasets import BUILT_IN

SMALL = ("movie-ratings", "bbc-topics", "similarity", "tweet-entities", "peptides")
PAIRS = ("fact-verification", "nli", "epistemic-nli", "paraphrase")  # of BIG-bench


def text_in(pinned, name):
    """The text of the only file in a zip archive whose path ends so."""
    with zipfile.ZipFile(datasets.fetch(pinned)) as archive:
        [path] = [path for path in archive.namelist() if path.endswith(name)]
        return archive.read(path).decode()


def texts_of(example):
    return example.get("words") or [example[key] for key in ("text", "text_b") if key in example]


@pytest.mark.parametrize("name", SMALL)
def test_no_text_is_empty_and_no_example_occurs_twice(model_cache, name):
    examples = BUILT_IN[name].load()
    assert all(text == text.strip() and text for e in examples for text in texts_of(e))
    assert len({tuple(texts_of(example)) for example in examples}) == len(examples)


def test_a_movie_s_score_is_the_mean_of_its_raters(model_cache):
    """The archive also lists every single rating, by the snippet's number. It rounds to 1e-9."""
    with tarfile.open(datasets.fetch(datasets.SNIPPETS)) as outer:
        path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=outer.extractfile(path)) as inner:
            folder = "hutto_ICWSM_2014/movieReviewSnippets_"
            texts = inner.extractfile(f"{folder}GroundTruth.txt").read().decode().splitlines()
            ratings = inner.extractfile(f"{folder}anonDataRatings.txt").read().decode().splitlines()
    means = {}
    for line in ratings:
        number, _, _, listed = line.split("\t")
        means[number] = statistics.fmean(json.loads(listed))
    expected = collections.defaultdict(list)
    for line in texts:
        number, _, text = line.split("\t")
        expected[text.strip()].append(means[number])

    found = {example["text"]: example["score"] for example in BUILT_IN["movie-ratings"].load()}
    assert found.keys() == expected.keys() and len(texts) == 10605
    for text, score in found.items():
        assert score == pytest.approx(expected[text][0], abs=1e-8)  # two texts occur twice


def test_every_bbc_article_has_its_folder_as_topic(model_cache):
    with zipfile.ZipFile(datasets.fetch(datasets.BBC)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt") and "/data/" in name]
        texts = [archive.read(name).decode("utf-8", errors="replace").strip() for name in names]
    expected = {(name.split("/")[-2], text) for name, text in zip(names, texts)}
    found = {(example["label"], example["text"]) for example in BUILT_IN["bbc-topics"].load()}
    assert found == expected and len(names) == 2225


def test_tweets_are_tagged_as_in_their_file(model_cache):
    """By seqeval, as a library: the file's entities, less those of tweets that occur before."""
    lines = text_in(datasets.TWEETS, "/ner.txt").split("\n")
    blocks = [
        [line.split("\t") for line in block]
        for filled, block in itertools.groupby(lines, key=lambda line: bool(line.strip()))
        if filled
    ]
    assert len(blocks) == 2394 and sum(map(len, blocks)) == 46469
    first = {}
    for block in blocks:
        first.setdefault(" ".join(word for word, _ in block), [tag for _, tag in block])

    found = [example["tags"] for example in BUILT_IN["tweet-entities"].load()]
    assert get_entities(found) == get_entities(list(first.values()))
    types = {name for name, _, _ in get_entities(found)}
    assert len(types) == 10 and {"person", "geo-loc", "tvshow"} < types


def test_a_tag_inside_an_entity_follows_one_of_its_type(model_cache):
    for example in BUILT_IN["tweet-entities"].load():
        assert len(example["words"]) == len(example["tags"])
        for before, tag in zip(["O", *example["tags"]], example["tags"]):
            assert not tag.startswith("I-") or before[2:] == tag[2:]


def test_words_have_the_scores_of_their_file_from_1_to_5(model_cache):
    rows = list(csv.reader(io.StringIO(text_in(datasets.WORD_PAIRS, "mturk-771.csv"))))[1:]
    found = [(e["text"], e["text_b"], e["score"]) for e in BUILT_IN["similarity"].load()]
    assert found == [(a, b, float(score)) for _, a, b, score in rows] and len(found) == 771
    assert all(1 <= score <= 5 for *_, score in found)


def test_peptides_are_residues_with_the_label_of_their_file(model_cache):
    rows = text_in(datasets.PEPTIDES, "/AMPvsUniProt.csv").split("\n")[1:]
    listed = {tuple(part.strip() for part in row.split(",")) for row in rows if row}
    both = {sequence for sequence, label in listed if (sequence, str(1 - int(label))) in listed}
    expected = {pair for pair in listed if pair[0] not in both}
    assert sum(bool(row) for row in rows) == 5200 and len(both) == 22

    examples = BUILT_IN["peptides"].load()
    names = {"antimicrobial": "1", "other": "0"}
    assert {("".join(e["text"].split()), names[e["label"]]) for e in examples} == expected
    letters = {letter for example in examples for letter in example["text"].split(" ")}
    assert letters == set("ACDEFGHIKLMNPQRSTVWY")


def headlines(examples):
    return {example["text"].split("\n")[0].strip() for example in examples}


def words(examples):
    return {word for example in examples for word in texts_of(example)}


def runs_of_eight(examples):
    sequences = ["".join(example["text"].split()) for example in examples]
    return {sequence[i : i + 8] for sequence in sequences for i in range(len(sequence) - 7)}


@pytest.mark.parametrize(
    "name, parts", [("bbc-topics", headlines), ("similarity", words), ("peptides", runs_of_eight)]
)
def test_no_two_splits_share_a_headline_a_word_or_eight_residues(model_cache, name, parts):
    examples = BUILT_IN[name].load()
    for seed in range(3):
        train, val = data.split(examples, 0.2, seed)
        assert not parts(train) & parts(val)
        assert len(val) == pytest.approx(0.2 * len(examples), rel=0.03)


def test_a_question_names_every_label_and_has_a_place_for_every_text(model_cache):
    for name in ("bbc-topics", "peptides", "movie-sentiment", "product-sentiment"):
        examples, question = BUILT_IN[name].load(), BUILT_IN[name].question
        assert all(example["label"] in question for example in examples), name
        assert "{text}" in question and "{text_b}" not in question


def source(text, label, names, **more):
    """An example as BIG-bench writes it: its right label has the score 1."""
    return {"input": text, "target_scores": {name: int(name == label) for name in names}, **more}


FACTS = [
    source(
        f"Town {page}: It has {size} houses :\nmany .\nClaim: It has more than {claim} .",
        str(size > claim),
        ("True", "False", "Neither"),
    )
    for page in range(10)
    for size, claim in [(5, 3), (5, 7), (9, 3), (9, 10)]
]
INFERENCES = [
    source(
        f"Sentence 1: Ann{verb} see {i} cats. \nSentence 2: There {there} {i} cats.\n\n"
        "The answer is: ",
        label,
        ("entailment", "neutral", "contradiction"),
        comment={"example_id": str(i)},
    )
    for i in range(10)
    for verb, there, label in [("did", "were", "entailment"), ("didn't", "weren't", "neutral")]
]
BELIEFS = [
    source(f"Premise: Ann {verb} that it rains. Hypothesis: It rains.", label, names)
    for names in [("entailment", "non-entailment")]
    for verb, label in zip(("knows", "thinks"), names)
]
METAPHORS = [
    source(f"He is a {animal}. <-->  He is {like}.", label, ("True", "False"))
    for animal in ("fox", "lion", "mouse", "snail", "bee")
    for like, label in [(f"like a {animal}", "True"), (f"the owner of a {animal}", "False")]
]
PROVERBS = [f"Proverb {k}" for k in range(5)]
CONTENT = {
    "vitaminc_fact_verification": [*FACTS, FACTS[0]],
    "presuppositions_as_nli": [*INFERENCES, INFERENCES[3]],
    "epistemic_reasoning": BELIEFS,
    "metaphor_boolean": [*METAPHORS, METAPHORS[1]],
    "gem/e2e_nlg": [
        {"input": "name: Blue, area: city", "target": "Blue is in the city."},
        {"input": "name: Red, area: riverside", "target": "Red is by the river."},
        {"input": "name: Blue, area: city", "target": "In the city you find Blue."},
        {"input": "name: Blue, area: city", "target": "Blue is in the city."},
    ],
    "social_iqa": [  # How? has two answers
        source(question, label, ("joy", "pay", "heat"))
        for question, label in [("Why? ", "pay"), ("How? ", "joy"), ("How? ", "pay")] * 2
    ],
    "abstract_narrative_understanding/4_distractors": [
        source(f"Story {i}{j}.", PROVERBS[i], PROVERBS) for i in range(5) for j in range(4)
    ],
}


@pytest.fixture
def archive(monkeypatch, tmp_path):
    """BIG-bench's layout with CONTENT and two other files, and an empty cache."""
    path, pins = tmp_path / "bigbench-1.0.0.tar.gz", {}
    with tarfile.open(path, "w:gz") as file:

        def add(name, content):
            member = tarfile.TarInfo(f"bigbench-1.0.0/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))

        add("setup.py", b"raise SystemExit('never run')")
        add("bigbench/benchmark_tasks/gem/xsum/task.json", b"{}")
        for task, examples in CONTENT.items():
            content = json.dumps({"canary": "GUID", "examples": examples}).encode()
            pins[task] = hashlib.sha256(content).hexdigest()
            add(f"bigbench/benchmark_tasks/{task}/task.json", content)

    assert pins.keys() == datasets.TASKS.keys()
    monkeypatch.setattr(datasets, "TASKS", pins)
    monkeypatch.setattr(datasets, "fetch", lambda pinned: path)
    monkeypatch.setenv("BIDORA_CACHE", str(tmp_path / "cache"))
    return path


FIRST = ("Town 0: It has 5 houses :\nmany .", "It has more than 7 .", "False", "Town 0")


@pytest.mark.parametrize(
    "name, count, at, values",
    [
        ("fact-verification", 40, 1, FIRST),
        ("nli", 20, 3, ("Anndidn't see 1 cats.", "There weren't 1 cats.", "neutral", "1")),
        ("paraphrase", 10, 0, ("He is a fox.", "He is like a fox.", "True", "He is a fox.")),
        ("epistemic-nli", 2, 0, ("Ann knows that it rains.", "It rains.", "entailment")),
        ("epistemic-nli", 2, 1, ("Ann thinks that it rains.", "It rains.", "non-entailment")),
    ],
)
def test_pairs_have_both_texts_the_source_s_label_and_no_repeats(archive, name, count, at, values):
    examples, question = BUILT_IN[name].load(), BUILT_IN[name].question
    expected = dict(zip(("text", "text_b", "label", "group"), values))
    assert len(examples) == count and examples[at] == expected
    assert all(example["label"] in question for example in examples)
    assert "{text}" in question and "{text_b}" in question


def test_a_meaning_has_each_of_its_descriptions_once(archive):
    blue = ["Blue is in the city.", "In the city you find Blue."]
    assert BUILT_IN["e2e"].load() == [
        {"prompt": "name: Blue, area: city", "references": blue},
        {"prompt": "name: Red, area: riverside", "references": ["Red is by the river."]},
    ]


def test_choices_are_the_source_s_without_questions_that_have_two_answers(archive):
    [example] = BUILT_IN["social-iqa"].load()
    assert example.pop("group") == "pay"
    assert example == {"prompt": "Q: Why?\nA:", "choices": ["joy", "pay", "heat"], "answer": 1}
    example = BUILT_IN["proverbs"].load()[9]
    assert example.pop("prompt").startswith("Story 21. This narrative is a good illustration of")
    assert example == {"choices": PROVERBS, "answer": 2, "group": "Proverb 2"}


@pytest.mark.parametrize(
    "name, source",
    [
        ("fact-verification", lambda example: example["text"].split(":")[0]),
        ("proverbs", lambda example: example["prompt"][:7]),
        ("nli", lambda example: "".join(filter(str.isdigit, example["text"]))),
        ("paraphrase", lambda example: example["text"]),
    ],
)
def test_no_page_premise_or_metaphor_is_in_two_splits(archive, name, source):
    """A premise's variants have the same number here."""
    examples = BUILT_IN[name].load()
    train, val = data.split(examples, 0.4)
    assert not set(map(source, train)) & set(map(source, val))
    assert len(val) == 0.4 * len(examples)


def test_the_archive_is_read_once(archive):
    expected = BUILT_IN["e2e"].load()
    archive.unlink()
    assert BUILT_IN["e2e"].load() == expected
    assert all(BUILT_IN[name].load() for name in PAIRS)
    assert len(os.listdir(archive.parent / "cache" / "big-bench")) == 7  # nothing else is left


def test_a_damaged_file_is_named_and_taken_out_again_once_deleted(archive):
    expected = BUILT_IN["e2e"].load()
    path = archive.parent / "cache" / "big-bench" / "gem-e2e_nlg.json"
    path.write_bytes(path.read_bytes().replace(b"river.", b"rover."))
    with pytest.raises(ValueError, match="gem-e2e_nlg.json is damaged .* delete it and run again"):
        BUILT_IN["e2e"].load()
    path.unlink()
    assert BUILT_IN["e2e"].load() == expected
