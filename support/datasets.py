"""
The built-in data sets: {name: DataSet}, an entry each, out of PyPI archives pinned by hash.

vaderSentiment's archive holds human ratings of film and product reviews (Hutto & Gilbert, "VADER",
ICWSM 2014; MIT). toy-sentiment is made up here, and needs no download.
"""

import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from support.files import fetch

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
    """
    An entry of BUILT_IN. load: a function that returns a list of examples, as data.load_examples
    does. question: how its classification question is put, with {text}. sample_prompt: a text to
    try.
    """

    load: Callable
    question: str
    sample_prompt: str
    licence: str


def rated_snippets(name):
    """
    Snippets, 'positive' or 'negative' by the sign of their mean human rating (-4 … 4, |rating| ≥
    0.5): 10,070 out of movie reviews, or 2,977 sentences of product reviews.
    """
    with tarfile.open(fetch(**SNIPPETS)) as outer:
        path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=outer.extractfile(path)) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            lines = file.read().decode("utf-8").splitlines()
    ratings = {}  # by text, so that no snippet stands twice
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= 0.5:
            ratings.setdefault(text.strip(), float(rating))
    return [
        {"text": text, "label": "positive" if rating > 0 else "negative"}
        for text, rating in ratings.items()
    ]


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
}
