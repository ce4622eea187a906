"""
Numbers that README.md, docs/ and the lessons quote from results/ are the numbers of results/.

They are computed here from the lines of runs.jsonl and compared at the precision that the text has.
The tables of docs/tables/ are also what research.tables writes.
"""

import collections
import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest
from scipy.stats import wilcoxon

from research import tables

ROOT = Path(__file__).parents[2]
README, RESULTS = (
    " ".join((ROOT / name).read_text(encoding="utf-8").split())
    for name in ("README.md", "docs/results.md")
)


def lines_of(folder, which="main"):
    """The results of a set in a folder, a list of dicts, but for the runs that diverged."""
    lines = (ROOT / folder / "runs.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["set"] == which and "diverged" not in r]


COMPARISON, EARLIER, STUDY = map(lines_of, ("results", "results/earlier", "results/study"))
ONE_RATE = lines_of("results", "rate-0.001")
SOLVED, ERRORS = lines_of("results/resolved"), lines_of("results/resolved", "errors")


def text_of(lesson):
    """A notebook's Markdown, and what its code printed."""
    [path] = (ROOT / "notebooks").glob(f"{lesson}_*.ipynb")
    cells = nbformat.read(path, 4).cells
    printed = "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
    return " ".join(" ".join(c.source for c in cells if c.cell_type == "markdown").split()), printed


def score(run, split="test"):
    """In points of 100; what was undefined counts as 0."""
    return 100 * (run["after"][split][run.get("metric", "accuracy")] or 0)


def gap(run):
    return score(run, "train") - score(run)


def measured(runs, arm, domains, measure=score, seeds=20, size=100):
    """{seed: the mean of a measure over the domains}, of the seeds that all of them have."""
    parts = []
    for domain in domains:
        same = {"method": arm, "domain": domain, "size": size}
        own = [r for r in runs if same.items() <= r.items() and r["seed"] < seeds]
        parts.append({r["seed"]: measure(r) for r in own})
    return {s: statistics.mean(p[s] for p in parts) for s in set.intersection(*map(set, parts))}


def paired(ours, other):
    """The differences of two {key: value}, rounded so that ties are ties."""
    return [round(ours[key] - other[key], 9) for key in ours.keys() & other.keys()]


def domains_of(runs):
    return sorted({run["domain"] for run in runs})


def assert_quoted(quote, value):
    """A number in a text is this value, rounded to the digits that the text has."""
    decimals = len(quote.partition(".")[2])
    assert abs(float(quote) - value) <= 0.5 * 10**-decimals + 1e-9, f"{quote} for {value}"


def assert_pairs(found, mean, p):
    assert_quoted(mean, statistics.mean(found))
    assert_quoted(p, wilcoxon(found).pvalue)


def gaps(runs, *arm_and_size):
    """{(domain, seed): gap}"""
    own = [r for r in runs if (r["method"], r["size"]) == arm_and_size]
    return {(r["domain"], r["seed"]): gap(r) for r in own}


def test_the_earlier_comparison_s_smaller_gaps():
    """In pairs of equal domain and seed, as that page had them."""
    [quoted] = re.findall(
        r"gap was (\S+) points smaller than DoRA's at 100 examples \(ten pairs, p = (\S+)\) "
        r"and (\S+) at 400 \(p = (\S+)\)",
        RESULTS,
    )
    at_1e_3 = re.findall(r"BiDoRA's gap had been (\S+) points smaller \(p = (\S+)\)", RESULTS)
    same_rate = lines_of("results/earlier", "dora-at-1e-3")
    for size, others, (mean, p) in (
        (100, EARLIER, quoted[:2]),
        (400, EARLIER, quoted[2:]),
        (100, same_rate, *at_1e_3),
    ):
        found = paired(gaps(EARLIER, "bidora", size), gaps(others, "dora", size))
        assert len(found) == 10
        assert_pairs(found, f"-{mean}", p)


def tuning_losses(folder):
    """{(method, lower_lr, upper_lr or None): losses by seed} of the runs that chose the rates."""
    found = {}
    for r in lines_of(folder, "tune"):
        key = r["method"], r["lower_lr"], r.get("upper_lr")
        found.setdefault(key, []).append(r["after"]["test"]["loss"])
    return found


def test_the_losses_that_chose_the_rates():
    loss = tuning_losses("results")
    [(_, *rates), _, *rows] = tables_of("compare")[-1]
    assert len(rows) * len(rates) == len(loss)
    for name, *cells in rows:
        method, upper = re.fullmatch(r"`([\w-]+)`(?:, `upper_lr` (\S+))?", name).groups()
        for rate, cell in zip(rates, cells):
            losses = loss[method, float(rate), upper and float(upper)]
            assert len(losses) == 3
            assert_quoted(cell, statistics.mean(losses))


@pytest.mark.parametrize("text", [RESULTS, text_of("02")[0]], ids=["results", "lesson"])
def test_the_losses_that_had_chosen_dora_s_rate_and_the_same_runs_made_again(text):
    number = r"(\d\.\d+)"
    [quoted] = re.findall(f"losses of {number}, {number} and {number} [^.]*at 3e-4, 1e-3", text)
    [again] = re.findall(f"give {number}, {number} and {number}", text)
    for folder, quotes in (("results/earlier", quoted), ("results", again)):
        for rate, quote in zip((3e-4, 1e-3, 3e-3), quotes):
            assert_quoted(quote, tuning_losses(folder)["dora", rate, None][0])


COMPARED = (  # gap and score; at the chosen rates, then at one rate
    r"accuracy is (\S+) points larger \(p = (\S+)\) [^.]*?, (\S+) smaller \(p = (\S+)\)",
    r"its test accuracy is (\S+) points higher \(p = (\S+)\), and (\S+) lower \(p = (\S+)\)",
)


def test_the_readme_quotes_the_comparison():
    for measure, pattern in zip((gap, score), COMPARED):
        [(above, p_chosen, below, p_same)] = re.findall(pattern, README)
        for runs, mean, p in ((COMPARISON, above, p_chosen), (ONE_RATE, f"-{below}", p_same)):
            kind = (domains_of(runs), measure, 10)
            found = paired(*(measured(runs, arm, *kind) for arm in ("bidora", "dora")))
            assert len(found) == 10
            assert_pairs(found, mean, p)


def test_the_comparison_quotes_what_the_phases_cost():
    [(chosen, p_chosen, same, p_same)] = re.findall(
        r"is (\S+) points below DoRA at the chosen rates \(p = (\S+)\) "
        r"and (\S+) below it at one rate \(p = ([^;]+);",
        RESULTS,
    )
    for runs, mean, p in ((COMPARISON, chosen, p_chosen), (ONE_RATE, same, p_same)):
        scores = (measured(runs, m, domains_of(runs)) for m in ("dora-two-phases", "dora"))
        assert_pairs(paired(*scores), f"-{mean}", p)


def test_lesson_02_quotes_the_comparison_s_gaps():
    [quoted] = re.findall(
        r"gap is \*larger\*, by (\S+) points \(p = (\S+)\); with both at 1e-3 it is (\S+) points "
        r"smaller \(p = (\S+)\)",
        text_of("02")[0],
    )
    assert [quoted] == re.findall(COMPARED[0], README)


def test_the_readme_quotes_the_study_s_mean_scores():
    domains = domains_of(STUDY)
    [(seeds, below, p_below, above, p_above)] = re.findall(
        r"five tasks and (\w+) seeds, its mean score is (\S+) points below DoRA's \(p = (\S+)\), "
        r"and (\S+) above DoRA in BiDoRA's phases \(p = (\S+)\)",
        README,
    )
    for arm, mean, p in (("dora", f"-{below}", p_below), ("dora-two-phases", above, p_above)):
        found = paired(measured(STUDY, "bidora", domains), measured(STUDY, arm, domains))
        assert seeds == "twenty" and len(found) == 20 and len(domains) == 5
        assert_pairs(found, mean, p)


def test_the_readme_quotes_the_study_s_gap_at_400_examples():
    domains = domains_of(r for r in STUDY if r["size"] == 400)
    bidora, dora, phases = (
        measured(STUDY, arm, domains, gap, 20, 400) for arm in ("bidora", "dora", "dora-two-phases")
    )
    [(smaller, below, p)] = re.findall(
        r"At 400 examples its gap is (\S+) points smaller than DoRA's \(p < 0.001\), but so is "
        r"DoRA's in these phases; its score is (\S+) lower \(p = (\S+)\)",
        README,
    )
    assert_quoted(f"-{smaller}", statistics.mean(paired(bidora, dora)))
    for found in (paired(bidora, dora), paired(phases, dora)):
        assert len(found) == 20 and statistics.mean(found) < -2 and wilcoxon(found).pvalue < 0.001
    scores = (measured(STUDY, arm, domains, score, 20, 400) for arm in ("bidora", "dora"))
    assert_pairs(paired(*scores), f"-{below}", p)


def test_the_readme_quotes_the_ablation():
    domains = ["similarity", "movie-sentiment", "peptides"]
    [cost] = re.findall(r"transposed layers, which cost (\d+) points on MiniLM", README)
    [(fixed, p, seeds)] = re.findall(
        r"a magnitude that stays fixed costs (\S+) points on one of three tasks \(p = (\S+), "
        r"(\w+) seeds\)",
        README,
    )

    def minus(arm, other, *domains):
        return paired(measured(STUDY, arm, domains), measured(STUDY, other, domains))

    transposed = minus("written+transposed", "as-written", *domains)
    assert seeds == "twenty" and len(transposed) == 20
    assert_quoted(f"-{cost}", statistics.mean(transposed))
    assert wilcoxon(minus("first-order", "bidora", *domains)).pvalue > 0.5

    of_one, *of_others = (minus("m-fixed", "bidora", domain) for domain in domains)
    assert_pairs(of_one, f"-{fixed}", p)
    assert all(wilcoxon(pairs).pvalue > 0.4 for pairs in of_others)


def cells_of(table):
    """A table's rows, lists of cells."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def text_of_file(name):
    return (ROOT / "docs" / "tables" / f"{name}.md").read_text(encoding="utf-8")


def tables_of(name):
    """The tables of a file in docs/tables/, by cells_of."""
    return list(map(cells_of, re.findall(r"(?m)(?:^\|.*\|\n)+", text_of_file(name))))


@pytest.mark.parametrize("name", tables.FILES)
def test_the_files_of_tables_are_what_the_program_writes(name):
    assert text_of_file(name) == "\n".join(tables.FILES[name]()).rstrip() + "\n"


STUDIED = ("study", "controls", "paper", "published", "network", "hypergradients")
STUDIED += ("rank", "tiny", "sensitivity")


@pytest.mark.parametrize(
    "name, runs, seeds",
    [
        ("compare", COMPARISON, 10),
        ("compare-one-rate", ONE_RATE, 10),
        *((name, STUDY, 20) for name in STUDIED),
    ],
)
def test_the_tables_are_what_their_runs_measured(name, runs, seeds):
    titled = r"(?m)^\*\*(.*) score, points of 100, (\d+) examples\*\*.*\n\n((?:\|.*\|\n)+)"
    found = re.findall(titled, text_of_file(name))
    assert len(found) == text_of_file(name).count(" examples**") >= 4
    measures = {"test": score, "train - test": gap}
    for title, size, table in found:
        (first, *names), _, *rows = cells_of(table)
        names = [name.strip("`") for name in names if name.startswith("`")]
        columns = [*([name] for name in names), names]  # the domains of each
        for row, *cells in rows:
            arms = re.findall("`(.+?)`", f"{row} {first}" if first != "arm" else row)
            if first.endswith("minus"):
                arms.reverse()
            for domains, cell in zip(columns, cells):
                kind = (domains, measures[title], seeds, int(size))
                values = [measured(runs, arm, *kind) for arm in arms]
                if first == "arm":
                    assert_spread(cell, list(values[0].values()))
                else:
                    assert_difference(cell, paired(*values))


def test_the_tables_of_the_solved_layer_are_what_its_runs_measured():
    errors, losses, scores, differences, *_ = tables_of("resolved")
    (_, *steps), _, *rows = errors
    for arm, *cells in rows:
        for column, cell in zip(steps, cells):
            domain, after = re.fullmatch(r"(?:`(.*)`, )?(\w+)", column).groups()
            lines = [r for r in ERRORS if "errors" in r and domain in (None, r["domain"])]
            found = [r["errors"][after][arm.strip("`")] for r in lines]
            for quote, values in zip(cell.split(", "), zip(*found)):
                assert quote in (f"{(x := statistics.median(values)):.2g}", f"{x:+.2f}")

    (_, *columns), _, *rows = losses
    for place, column in enumerate(columns, 1):
        domain, count = re.fullmatch(r"`(.*)` \((\d+)\)", column).groups()
        of_domain = [r for r in SOLVED if r["domain"] == domain and "val" in r]
        arms = collections.Counter(r["seed"] for r in of_domain)
        shared = [seed for seed, number in arms.items() if number == len(rows)]
        assert count == str(len(shared))
        for row in rows:
            found = [r for r in of_domain if r["method"] == row[0].strip("`")]
            found = [r for r in found if r["seed"] in shared]
            val, test, moved = row[place].split(", ")
            assert_quoted(val, statistics.mean(r["val"] for r in found))
            assert_quoted(test, statistics.mean(r["after"]["test"]["loss"] for r in found))
            assert moved == f"{statistics.mean(r['moved'] for r in found):.0%}"

    done, domains = [r for r in SOLVED if "after" in r], domains_of(SOLVED)
    against = measured(done, "first-order", domains)
    for arm, *_, cell in differences[2:]:
        assert_difference(cell, paired(measured(done, arm.strip("`"), domains), against))
    assert len(scores) == len(differences) + 1 == len(losses)


def test_the_rates_of_the_study_are_those_of_its_runs():
    by_size = tables_of("study-rates")
    assert len(by_size) == 2
    for (size, *domains), _, *rows in by_size:
        for arm, *cells in rows:
            for domain, cell in zip(domains, cells):
                kind = {"method": arm.strip("`"), "domain": domain.strip("`")}
                kind["size"] = int(size.removesuffix(" examples"))
                found = [r for r in STUDY if kind.items() <= r.items()]
                rates = {tuple(r[k] for k in ("lower_lr", "upper_lr") if k in r) for r in found}
                assert rates == {tuple(map(float, cell.split(" and ")))}, kind


def assert_each(cell, values):
    for quote, value in zip(cell.split(" / "), values, strict=True):
        assert_quoted(quote, value)


def assert_spread(cell, values):
    if cell == "–":
        assert not values
        return
    mean, *deviation, count = cell.split()
    assert count == f"({len(values)})" and len(deviation) == (2 if len(values) > 1 else 0)
    assert_quoted(mean, statistics.mean(values))
    if deviation:
        assert_quoted(deviation[1], statistics.stdev(values))


def assert_difference(cell, found):
    if cell == "–":
        assert len(found) < 6
        return
    mean, p = re.fullmatch(r"(\S+) \[.*\], p = (\S+) \(.*\)", cell).groups()
    assert_pairs(found, mean, p)


LOSSES = [(split, "loss") for split in ("test", "train")]


@pytest.mark.parametrize(
    "domain, columns",
    [
        ("e2e", [("test", name) for name in ("bleu", "chrf", "rougeL", "nist")] + LOSSES),
        ("movie-sentiment", [("test", "accuracy"), ("train", "accuracy"), LOSSES[0]]),
    ],
)
def test_the_tables_of_the_decoder_are_what_its_runs_measured(domain, columns):
    found = [r for r in lines_of("results/smollm2") if r["domain"] == domain]
    found.sort(key=lambda r: r["seed"])
    [(_, _, *rows)] = tables_of("e2e" if domain == "e2e" else "decoder")
    assert {row[0].strip("`") for row in rows} == {r["method"] for r in found}
    for arm, seeds, *cells in rows:
        ours = [r["after"] for r in found if r["method"] == arm.strip("`")]
        values = [
            [(100 if name == "accuracy" else 1) * after[split][name] for after in ours]
            for split, name in columns
        ]
        assert_each(seeds, values[0])
        for cell, column in zip(cells, values):
            assert_spread(f"{cell} ({len(column)})", column)


def test_the_table_of_the_default_run_is_what_its_runs_measured():
    [(_, _, *rows)] = tables_of("default")
    assert len(rows) == 4
    for arm, seeds, spread, loss, train, seconds in rows:
        found = [r for r in lines_of("results/default") if r["method"] == arm.strip("`")]
        found.sort(key=lambda r: r["seed"])
        accuracies = [100 * r["after"]["test"]["accuracy"] for r in found]
        assert_each(seeds, accuracies)
        assert_spread(f"{spread} (3)", accuracies)
        assert_quoted(loss, statistics.mean(r["after"]["test"]["loss"] for r in found))
        assert_quoted(train, statistics.mean(100 * r["after"]["train"]["accuracy"] for r in found))
        totals = [r["seconds"]["total"] for r in found]
        assert seconds == f"{min(totals):.0f} to {max(totals):.0f}"


def test_lesson_02_quotes_the_mean_gaps():
    text, _ = text_of("02")
    found = re.findall(r"(\d+\.\d) (?:points )?against (\d+\.\d) at (\d+)", text)
    assert [size for *_, size in found] == ["50", "100", "200", "400", "800"]
    for ours, other, size in found:
        for quote, method in ((ours, "bidora"), (other, "dora")):
            kind = (EARLIER, method, ["movie-sentiment"], gap, 20, int(size))
            assert_quoted(quote, statistics.mean(measured(*kind).values()))


def test_lesson_04_prints_the_seeds_and_accuracies_that_results_hold():
    _, printed = text_of("04")
    found = re.findall(r"(?m)^(\D+?) +(\d+) seeds, .* accuracy (\S+) %$", printed)
    assert len(found) == 5
    names = {"full fine-tuning": "ft"}
    for title, seeds, percent in found:
        values = measured(EARLIER, names.get(title, title.lower()), ["movie-sentiment"]).values()
        assert len(values) == int(seeds), title
        assert_quoted(percent, statistics.mean(values))


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
