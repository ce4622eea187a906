"""
Numbers that README.md, docs/ and the lessons quote from results/ are the numbers of results/.

They are computed here from the lines of runs.jsonl and compared at the precision that the text has;
only what is not computed here is compared with what tools/study.py reports.
"""

import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest
from scipy.stats import wilcoxon

from tools.arms import GROUPS
from tools.differences import of_group, tables

ROOT = Path(__file__).parents[1]
RUNS = [json.loads(line) for line in (ROOT / "results" / "runs.jsonl").read_text().splitlines()]
README, RESULTS = (
    " ".join((ROOT / name).read_text(encoding="utf-8").split())
    for name in ("README.md", "docs/results.md")
)


def text_of(lesson):
    """A notebook's Markdown, and what its code printed."""
    [path] = (ROOT / "notebooks").glob(f"{lesson}_*.ipynb")
    cells = nbformat.read(path, 4).cells
    printed = "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
    return " ".join(" ".join(c.source for c in cells if c.cell_type == "markdown").split()), printed


def accuracy(run):
    return 100 * run["after"]["test"]["accuracy"]


def loss(run):
    return run["after"]["test"]["loss"]


def gap(run):
    return 100 * run["after"]["train"]["accuracy"] - accuracy(run)


def runs(domain, size, method, which="main"):
    kind = {"domain": domain, "size": int(size), "method": method, "set": which}
    return [run for run in RUNS if kind.items() <= run.items()]


def pairs(measure, method, size, which="main"):
    """BiDoRA minus another method, paired by domain and seed, rounded so that ties are ties."""
    ours = {(r["domain"], r["seed"]): r for d in DOMAINS for r in runs(d, size, "bidora")}
    other = {(r["domain"], r["seed"]): r for d in DOMAINS for r in runs(d, size, method, which)}
    return [round(measure(ours[k]) - measure(other[k]), 9) for k in ours.keys() & other.keys()]


DOMAINS = sorted({run["domain"] for run in RUNS})


def assert_quoted(quote, value):
    """A number in a text is this value, rounded to the digits that the text has."""
    decimals = len(quote.partition(".")[2])
    assert abs(float(quote) - value) <= 0.5 * 10**-decimals + 1e-9, f"{quote} for {value}"


def assert_pairs(found, mean, p):
    assert_quoted(mean, statistics.mean(found))
    assert_quoted(p, wilcoxon(found).pvalue)


ROWS = re.findall(
    r"\| ([a-z-]+), (\d+) \| `(\w+)` \| (\d+) " + 3 * r"\| (\S+) ± (\S+) " + r"\|", RESULTS
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[:3]))
def test_a_row_of_the_comparison_is_what_its_runs_measured(row):
    domain, size, method, seeds, *numbers = row
    found = runs(domain, size, method)
    assert len(found) == int(seeds)
    for measure, mean, deviation in zip((accuracy, loss, gap), numbers[::2], numbers[1::2]):
        values = list(map(measure, found))
        assert_quoted(mean, statistics.mean(values))
        assert_quoted(deviation, statistics.stdev(values))


def test_the_comparison_s_table_has_a_row_for_all_main_runs():
    groups = {(r["domain"], str(r["size"]), r["method"]) for r in RUNS if r["set"] == "main"}
    assert {row[:3] for row in ROWS} == groups and len(ROWS) == len(groups)


PAIRS = re.findall(
    r"\| `(\w+)`, (\d+) \| (\d+) \| (\S+) \(p = (\S+)\) \| (\S+) \(p = (\S+)\) \| "
    r"(\S+) \(p = (\S+)\) \| (\d+) \|",
    RESULTS,
)


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: "-".join(row[:2]))
def test_a_row_of_pairs_is_what_its_runs_measured(row):
    method, size, count, *numbers, smaller = row
    for measure, mean, p in zip((accuracy, loss, gap), numbers[::2], numbers[1::2]):
        found = pairs(measure, method, size)
        assert len(found) == int(count)
        assert_pairs(found, mean, p)
    assert sum(difference < 0 for difference in found) == int(smaller)


def test_the_readme_quotes_the_smaller_gap():
    [(wins, at_100, p_100, at_400, p_400)] = re.findall(
        r"smaller in (\d+) of 10 pairs, by (\S+) points at 100 examples \(p = (\S+)\) "
        r"and by (\S+) at 400 \(p = (\S+)\)",
        README,
    )
    for size, mean, p in ((100, at_100, p_100), (400, at_400, p_400)):
        found = pairs(gap, "dora", size)
        assert_pairs(found, f"-{mean}", p)
        assert sum(difference < 0 for difference in found) == int(wins)


def test_the_readme_quotes_the_gap_at_equal_rates():
    [(mean, p)] = re.findall(r"DoRA at BiDoRA's rate, (\S+) points remain \(p = (\S+)\)", README)
    assert_pairs(pairs(gap, "dora", 100, "dora-at-1e-3"), f"-{mean}", p)


LINES = (ROOT / "results" / "study" / "runs.jsonl").read_text().splitlines()
STUDY = [r for r in map(json.loads, LINES) if r["set"] == "main"]


def score(run, split="test"):
    """In points of 100; what was undefined counts as 0."""
    return 100 * (run["after"][split][run["metric"]] or 0)


def train_minus_test(run):
    return score(run, "train") - score(run)


def measured(arm, domains, measure=score, seeds=20, size=100):
    """{seed: the mean of a measure over the domains}, of the seeds that all of them have."""
    parts = []
    for domain in domains:
        kind = {"method": arm, "domain": domain, "size": size}
        found = [r for r in STUDY if kind.items() <= r.items()]
        parts.append({r["seed"]: measure(r) for r in found if r["seed"] < seeds})
    return {s: statistics.mean(p[s] for p in parts) for s in set.intersection(*map(set, parts))}


def paired(ours, other):
    """The differences of two {seed: value}, rounded so that ties are ties."""
    return [round(ours[s] - other[s], 9) for s in ours.keys() & other.keys()]


def test_the_readme_quotes_the_study_s_mean_scores():
    domains = {r["domain"] for r in STUDY}
    [(seeds, below, p_below, above, p_above)] = re.findall(
        r"five tasks and (\w+) seeds, its mean score is (\S+) points below DoRA's \(p = (\S+)\), "
        r"and (\S+) above DoRA in BiDoRA's phases \(p = (\S+)\)",
        README,
    )
    for arm, mean, p in (("dora", f"-{below}", p_below), ("dora-two-phases", above, p_above)):
        found = paired(measured("bidora", domains), measured(arm, domains))
        assert seeds == "twenty" and len(found) == 20 and len(domains) == 5
        assert_pairs(found, mean, p)


def test_the_readme_quotes_the_study_s_gap_at_400_examples():
    domains = {r["domain"] for r in STUDY if r["size"] == 400}
    kind = (domains, train_minus_test, 20, 400)
    [(smaller, p)] = re.findall(
        r"At 400 examples its gap is (\S+) points smaller than DoRA's \(p = (\S+)\)", README
    )
    assert_pairs(paired(measured("bidora", *kind), measured("dora", *kind)), f"-{smaller}", p)
    phases = paired(measured("dora-two-phases", *kind), measured("dora", *kind))
    assert len(phases) == 20 and statistics.mean(phases) < -2 and wilcoxon(phases).pvalue < 0.001


def section_of(heading):
    """The text below a heading of docs/results.md, up to the next one."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    return re.split(r"(?m)^#+ ", text.partition(f"# {heading}\n")[2])[0]


def cells_of(table):
    """A table's rows, lists of cells."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def tables_of(heading):
    """The tables below a heading of docs/results.md, by cells_of."""
    return list(map(cells_of, re.findall(r"(?m)(?:^\|.*\|\n)+", section_of(heading))))


@pytest.mark.parametrize(
    "heading, seeds, count",
    [("An encoder, five tasks, twenty seeds", 20, 12), ("Which difference matters", 10, 6)],
)
def test_the_study_s_tables_are_what_its_runs_measured(heading, seeds, count):
    titled = r"(?m)^\*\*(.*) score, points of 100, (\d+) examples\*\*.*\n\n((?:\|.*\|\n)+)"
    found = re.findall(titled, section_of(heading))
    assert len(found) == count
    measures = {"test": score, "train - test": train_minus_test}
    for title, size, table in found:
        (first, *names), _, *rows = cells_of(table)
        names = [name.strip("`") for name in names if name.startswith("`")]
        columns = [*([name] for name in names), names]  # the domains of each
        against = first.replace("minus", "").strip(" `")
        for arm, *cells in rows:
            for domains, cell in zip(columns, cells):
                kind = (domains, measures[title], seeds, int(size))
                values = measured(arm.strip("`"), *kind)
                if first == "arm":
                    assert_spread(cell, list(values.values()))
                elif first.startswith("minus"):
                    assert_difference(cell, paired(values, measured(against, *kind)))
                else:
                    assert_difference(cell, paired(measured(against, *kind), values))


def assert_spread(cell, values):
    if cell == "–":
        assert len(values) < 6
        return
    mean, _, deviation, count = cell.split()
    assert count == f"({len(values)})"
    assert_quoted(mean, statistics.mean(values))
    assert_quoted(deviation, statistics.stdev(values))


def assert_difference(cell, found):
    if cell == "–":
        assert len(found) < 6
        return
    mean, p = re.fullmatch(r"(\S+) \[.*\], p = (\S+) \(.*\)", cell).groups()
    assert_pairs(found, mean, p)


@pytest.mark.parametrize("name", GROUPS)
def test_the_rows_of_the_study_s_tables_are_the_report_s(name):
    """All cells, also those that are not computed here: intervals, Holm's p, traces."""
    group, text = GROUPS[name], (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    results = of_group(STUDY, group)
    rows = [line for line in tables(results, group.arms, group.sign) if line.startswith("| `")]
    scores = len(rows) // 2 if name in ("paper", "hypergradients") else len(rows)
    assert len(rows) > 10 and not [line for line in rows[:scores] if line not in text]


DECODER = ROOT / "results" / "smollm2" / "runs.jsonl"
LOSSES = [(split, "loss") for split in ("test", "train")]


@pytest.mark.parametrize(
    "domain, columns",
    [
        ("e2e", [("test", name) for name in ("bleu", "chrf", "rougeL", "nist")] + LOSSES),
        ("movie-sentiment", [("test", "accuracy"), ("train", "accuracy"), LOSSES[0]]),
    ],
)
def test_the_tables_of_the_decoder_are_what_its_runs_measured(domain, columns):
    found = [json.loads(line) for line in DECODER.read_text().splitlines()]
    found = [r for r in found if (r["domain"], r["set"]) == (domain, "main")]
    found.sort(key=lambda r: r["seed"])
    headings = ("Text from data, three seeds", "Which difference matters")
    tables = [t for heading in headings for t in tables_of(heading) if "seeds 0" in t[0][1]]
    _, _, *rows = tables[domain != "e2e"]
    assert len(tables) == 2 and len(rows) == 3
    for arm, seeds, *cells in rows:
        ours = [r["after"] for r in found if r["method"] == arm.strip("`")]
        values = [
            [(100 if name == "accuracy" else 1) * after[split][name] for after in ours]
            for split, name in columns
        ]
        for quote, value in zip(seeds.split(" / "), values[0], strict=True):
            assert_quoted(quote, value)
        for cell, column in zip(cells, values):
            mean, _, deviation = cell.split()
            assert_quoted(mean, statistics.mean(column))
            assert_quoted(deviation, statistics.stdev(column))


def test_the_readme_quotes_the_test_accuracy():
    [(at_100, p_100, at_400, p_400)] = re.findall(
        r"accuracy is (\S+) points higher at 100 examples \(p = (\S+)\) "
        r"and (\S+) at 400 \(p = (\S+)\)",
        README,
    )
    assert_pairs(pairs(accuracy, "dora", 100), at_100, p_100)
    assert_pairs(pairs(accuracy, "dora", 400), at_400, p_400)


def test_lesson_02_quotes_the_mean_gaps():
    text, _ = text_of("02")
    found = re.findall(r"(\d+\.\d) (?:points )?against (\d+\.\d) at (\d+)", text)
    assert [size for *_, size in found] == ["50", "100", "200", "400", "800"]
    for ours, other, size in found:
        for quote, method in ((ours, "bidora"), (other, "dora")):
            assert_quoted(quote, statistics.mean(map(gap, runs("movie-sentiment", size, method))))


def test_lesson_04_prints_the_seeds_and_accuracies_that_results_hold():
    _, printed = text_of("04")
    found = re.findall(r"(?m)^(\D+?) +(\d+) seeds, .* accuracy (\S+) %$", printed)
    assert len(found) == 5
    names = {"full fine-tuning": "ft"}
    for title, seeds, percent in found:
        kind = runs("movie-sentiment", 100, names.get(title, title.lower()))
        assert len(kind) == int(seeds), title
        assert_quoted(percent, statistics.mean(map(accuracy, kind)))


def test_the_claims_quote_the_draws_that_lesson_02_counted():
    _, printed = text_of("02")
    wins = dict.fromkeys(("DoRA", "joint"), ())
    for name, count in re.findall(
        r"(?m)^(DoRA|joint)(?:, then m fixed)? .* (\d+) of 100 ", printed
    ):
        wins[name] += (count,)
    [quoted] = re.findall(
        r"a hundred draws\), its test error is lower than DoRA's in (\d+) at rank 6 and in (\d+) "
        r"at rank 2. .*? BiDoRA's error is lower in (\d+) and in (\d+)",
        RESULTS,
    )
    assert quoted == (wins["DoRA"][0], wins["DoRA"][-1], *wins["joint"])
