"""
The field's metrics, by the field's libraries: {name: number} of predictions and references.

    classification   accuracy, F1 of one class, macro F1, Matthews correlation   scikit-learn
    regression       Pearson's and Spearman's correlation                        scipy
    multi_label      micro and macro F1                                          scikit-learn
    tagging          precision, recall and F1 of whole entities                  seqeval
    generation       BLEU, chrF, ROUGE-L, NIST, METEOR               sacrebleu, rouge-score, nltk
    glue             those that a GLUE task is judged by

A score is a float, or None if it is undefined. Libraries are imported when a score needs them. All
functions raise ValueError for empty lists or unequal lengths, and for a missing library.
"""

import contextlib
import importlib
import math
import warnings
from itertools import zip_longest
from statistics import fmean

PACKAGES = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}  # where pip's name differs
GLUE = {  # the scores of each task (arXiv 1804.07461, Table 1)
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


def library(name):
    """An imported module. Raises ValueError, with the pip command, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        package = PACKAGES.get(package, package)
        raise ValueError(f"this score needs {package} ({error}): pip install {package}") from None


def check_lengths(predictions, references):
    if not references or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: give one "
            f"prediction for each reference, and at least one"
        )


def glue(task, predictions, references):
    """The scores of a GLUE task, from labels (strings) or, for stsb, from numbers."""
    if task not in GLUE:
        raise ValueError(f"unknown GLUE task {task!r}: choose {', '.join(GLUE)}")
    if task == "stsb":
        return regression(predictions, references)
    scores = classification(predictions, references, positive="1")
    return {name: scores[name] for name in GLUE[task]}


def classification(predictions, references, positive=None):
    """
    accuracy, f1_macro (over all labels that occur), matthews and, for the label `positive`, f1. The
    f1 of a label that does not occur is 0; so is matthews if all predictions or references agree.
    """
    check_lengths(predictions, references)
    metrics = library("sklearn.metrics")
    scores = {
        "accuracy": metrics.accuracy_score(references, predictions),
        "f1_macro": metrics.f1_score(references, predictions, average="macro", zero_division=0.0),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")
        scores["matthews"] = metrics.matthews_corrcoef(references, predictions)
    if positive is not None:
        both = ([label == positive for label in labels] for labels in (references, predictions))
        scores["f1"] = metrics.f1_score(*both, zero_division=0.0)
    return {name: float(score) for name, score in scores.items()}


def regression(predictions, references):
    """
    pearson and spearman of numbers. None for fewer than two examples, for predictions or references
    that are all the same (pearson: up to rounding), and for numbers that are not finite.
    """
    check_lengths(predictions, references)
    stats = library("scipy.stats")
    scores = {"pearson": None, "spearman": None}
    if len(references) < 2 or not all(map(math.isfinite, (*predictions, *references))):
        return scores

    for name, correlation in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        # scipy warns of (nearly) constant numbers, and of numbers whose squares overflow.
        with warnings.catch_warnings(), contextlib.suppress(Warning):
            warnings.simplefilter("error")
            scores[name] = float(correlation(predictions, references).statistic)
    return scores


def multi_label(predictions, references):
    """f1_micro and f1_macro of collections of labels, one an example; None if no label occurs."""
    check_lengths(predictions, references)
    metrics, preprocessing = library("sklearn.metrics"), library("sklearn.preprocessing")
    columns = preprocessing.MultiLabelBinarizer().fit([*predictions, *references])
    if not len(columns.classes_):
        return {"f1_micro": None, "f1_macro": None}

    both = columns.transform(references), columns.transform(predictions)
    options = {"zero_division": 0.0}
    if len(columns.classes_) == 1:  # scikit-learn would count 0 and 1 as two labels
        options["labels"] = [1]
    return {
        f"f1_{average}": float(metrics.f1_score(*both, average=average, **options))
        for average in ("micro", "macro")
    }


def tagging(predictions, references):
    """
    precision, recall and f1 (micro) of entities, from a list of BIO tags for each sentence. An
    entity counts if its first word, last word and type are right. I-X after no entity of type X
    begins one (conlleval). A ratio over no entity is 0; all are None if no entity occurs.
    """
    check_lengths(predictions, references)
    for number, (tags, right) in enumerate(zip(predictions, references), start=1):
        if len(tags) != len(right):
            raise ValueError(f"sentence {number}: {len(tags)} tags for {len(right)} words")
        if strange := [t for t in (*tags, *right) if t != "O" and t[:2] not in ("B-", "I-")]:
            raise ValueError(f"sentence {number}: the tag {strange[0]!r} is not O, B-… or I-…")

    names = ("precision", "recall", "f1")
    if all(tag == "O" for tags in (*predictions, *references) for tag in tags):
        return dict.fromkeys(names)
    score = library("seqeval.metrics.sequence_labeling").precision_recall_fscore_support
    values = score(references, predictions, average="micro", zero_division=0)
    return {name: float(value) for name, value in zip(names, values)}


def generation(predictions, references):
    """
    bleu, chrf, rougeL, nist and meteor of texts, each with a list of one or more references.

    bleu and chrf are from 0 to 100. rougeL (F-measure, unstemmed) and meteor are from 0 to 1, means
    over the examples, each with its best reference. nist is 0 or more. NIST and METEOR count BLEU's
    tokens (mteval-v13a), rouge-score only a-z and 0-9. An empty prediction gets 0. nist is None if
    no prediction has five tokens or no reference has any; meteor if NLTK's WordNet is missing.
    """
    check_lengths(predictions, references)
    for number, texts in enumerate(references, start=1):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"example {number}: give a list of one or more references")

    sacrebleu, rouge = library("sacrebleu.metrics"), library("rouge_score.rouge_scorer")
    streams = list(zip_longest(*references))  # all first references, all second ones, …
    bleu = sacrebleu.BLEU(force=True)  # no warning about texts that look tokenized
    rouge_l = rouge.RougeScorer(["rougeL"])
    best = [rouge_l.score_multi(texts, text) for text, texts in zip(predictions, references)]

    tokens = library("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    words = [tokens(text).split() for text in predictions]
    right = [[tokens(text).split() for text in texts] for texts in references]
    return {
        "bleu": bleu.corpus_score(predictions, streams).score,
        "chrf": sacrebleu.CHRF().corpus_score(predictions, streams).score,
        "rougeL": fmean(score["rougeL"].fmeasure for score in best),
        "nist": nist(words, right),
        "meteor": meteor(words, right),
    }


def nist(predictions, references):
    """NIST-5 of lists of tokens, or None."""
    try:
        return float(library("nltk.translate.nist_score").corpus_nist(references, predictions, n=5))
    except ZeroDivisionError:
        return None


def meteor(predictions, references):
    """The mean METEOR of lists of tokens, or None without NLTK's WordNet."""
    score = library("nltk.translate.meteor_score").meteor_score
    wordnet = library("nltk.corpus").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    pairs = zip(references, predictions)
    return fmean(score(texts, words, wordnet=wordnet) for texts, words in pairs)
