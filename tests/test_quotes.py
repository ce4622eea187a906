"""
Numbers that README.md, docs/ and the lessons quote from results/ are the numbers of results/.

They are computed here from the lines of runs.jsonl, without tools/, and compared at the precision
that the text has.
"""

import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest
from scipy.stats import wilcoxon

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
STUDY = [r for r in map(json.loads, LINES) if r["set"] == "main" and r["size"] == 100]


def scores(arm, domain):
    """{seed: the test score}, in points of 100."""
    found = [r for r in STUDY if (r["method"], r["domain"]) == (arm, domain)]
    return {r["seed"]: 100 * (r["after"]["test"][r["metric"]] or 0) for r in found}


def mean_differences(arm, other, domains):
    """One arm minus another, means over the domains, by seed; rounded so that ties are ties."""
    means = []
    for name in (arm, other):
        parts = [scores(name, domain) for domain in domains]
        seeds = set.intersection(*map(set, parts))
        means.append({s: statistics.mean(part[s] for part in parts) for s in seeds})
    return [round(means[0][s] - means[1][s], 9) for s in means[0].keys() & means[1].keys()]


def test_the_readme_quotes_the_study_s_mean_scores():
    domains = {r["domain"] for r in STUDY}
    [(seeds, below, p_below, above, p_above)] = re.findall(
        r"five tasks and (\w+) seeds, its mean score is (\S+) points below DoRA's \(p = (\S+)\), "
        r"and (\S+) above DoRA in BiDoRA's phases \(p = (\S+)\)",
        README,
    )
    for arm, mean, p in (("dora", f"-{below}", p_below), ("dora-two-phases", above, p_above)):
        found = mean_differences("bidora", arm, domains)
        assert len(found) == {"sixteen": 16, "twenty": 20}[seeds] and len(domains) == 5
        assert_pairs(found, mean, p)


def tables_of(heading):
    """The tables below a heading of docs/results.md: lists of rows, lists of cells."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = re.split(r"(?m)^#+ ", text.partition(f"# {heading}\n")[2])[0]
    tables = re.findall(r"(?m)(?:^\|.*\|\n)+", section)
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
        for table in tables
    ]


@pytest.mark.parametrize("which, base", [(0, "as-written"), (1, "bidora")])
def test_the_ablation_s_tables_are_what_its_runs_measured(which, base):
    head, _, *rows = tables_of("Which difference matters")[which]
    domains = [cell.strip("`") for cell in head[1:4]]
    assert len(rows) > 10 and f"`{base}`" in head[4]
    for arm, *cells in rows:
        arm = arm.strip("`")
        for domain, cell in zip(domains, cells):
            if cell == "–":  # one run at most
                assert len(scores(arm, domain)) < 2
                continue
            mean, deviation, seeds = re.fullmatch(r"(\S+) ± (\S+) \((\d+)\)", cell).groups()
            values = scores(arm, domain).values()
            assert len(values) == int(seeds)
            assert_quoted(mean, statistics.mean(values))
            assert_quoted(deviation, statistics.stdev(values))
        if cells[3] != "–":
            assert_pairs(
                mean_differences(arm, base, domains), cells[3].split()[0], cells[4].split()[0]
            )


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
