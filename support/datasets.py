"""
The built-in data sets, one entry of BUILT_IN each; downloads are PyPI archives pinned by hash.

vaderSentiment's archive holds human ratings of film and product reviews (Hutto & Gilbert, "VADER",
ICWSM 2014; MIT). toy-sentiment is generated here and needs no download.
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
    """An entry of BUILT_IN."""

    load: Callable  # returns a list of examples, dicts in one of the formats of support/jsonl.py
    question: str  # the prompt of a classification example; {text} stands for the example's text
    sample_prompt: str  # a text to try with sample.py
    licence: str


def rated_snippets(name):
    """
    Snippets labelled 'positive' or 'negative' by the sign of their mean human rating (-4 to 4; less
    than ±0.5 is left out): 10,070 from movie reviews, or 2,977 sentences from product reviews.

    The product reviews' ids say which sentences belong together: 12_3 is the third of review 12,
    so its group is "12". The film snippets' ids are plain numbers.
    """
    with tarfile.open(fetch(**SNIPPETS)) as outer:
        path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=outer.extractfile(path)) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            lines = file.read().decode("utf-8").splitlines()

    examples = {}  # by text, so that no snippet occurs twice
    for line in lines:
        name, rating, text = line.split("\t")
        if abs(float(rating)) < 0.5:
            continue
        example = {"text": text.strip(), "label": "positive" if float(rating) > 0 else "negative"}
        if "_" in name:
            example["group"] = name.partition("_")[0]
        examples.setdefault(example["text"], example)
    return list(examples.values())


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
