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
from scipy.stats import ttest_1samp, wilcoxon

from research import tables
from research.arms import AT_RANK
from research.results import load_results

ROOT = Path(__file__).parents[2]
README, RESULTS, VARIATIONS, CLAIMS = (
    " ".join((ROOT / f"{name}.md").read_text(encoding="utf-8").split())
    for name in ("README", "docs/results", "docs/variations", "docs/claims")
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


def quoted(text, sentence):
    """The numbers at each {} of a sentence, in which … stands for other words."""
    pattern = re.escape(sentence).replace(r"\{\}", r"([-+.\de]*\d)").replace("…", "[^.]*?")
    [match] = re.finditer(pattern, text)
    return match.groups()


(LESSON_02, PRINTED_02), (_, PRINTED_04) = text_of("02"), text_of("04")


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


def tuning_results(folder):
    """{(method, lower_lr, upper_lr or None): (loss, accuracy) pairs} of the tuning runs."""
    found = {}
    for r in lines_of(folder, "tune"):
        key = r["method"], r["lower_lr"], r.get("upper_lr")
        found.setdefault(key, []).append((r["after"]["test"]["loss"], score(r)))
    return found


def test_the_losses_that_chose_the_rates_and_the_accuracies_beside_them():
    found = tuning_results("results")
    for method in ("dora", "lora", "bidora"):  # by accuracy, 1e-3 is the best, as results.md says
        own = {key: pairs for key, pairs in found.items() if key[0] == method}
        assert max(own, key=lambda key: statistics.mean(a for _, a in own[key]))[1] == 1e-3

    [(_, *rates), _, *rows] = tables_of("compare")[-1]
    assert len(rows) * len(rates) == len(found)
    for name, *cells in rows:
        method, upper = re.fullmatch(r"`([\w-]+)`(?:, `upper_lr` (\S+))?", name).groups()
        for rate, cell in zip(rates, cells):
            pairs = found[method, float(rate), upper and float(upper)]
            assert len(pairs) == 3
            for quote, values in zip(cell.split(", "), zip(*pairs), strict=True):
                assert_quoted(quote, statistics.mean(values))


@pytest.mark.parametrize("text", [RESULTS, LESSON_02], ids=["results", "lesson"])
def test_the_losses_that_had_chosen_dora_s_rate_and_the_same_runs_made_again(text):
    before = quoted(text, "losses of {}, {} and {}…at 3e-4, 1e-3")
    again = quoted(text, "give {}, {} and {}")
    for folder, quotes in (("results/earlier", before), ("results", again)):
        for rate, quote in zip((3e-4, 1e-3, 3e-3), quotes):
            assert_quoted(quote, tuning_results(folder)["dora", rate, None][0][0])


def differences(runs, ours, other, measure=score, size=100, domains=(), apart=False):
    """Of two arms, seed by seed: of the means over domains, by default all, or of each apart."""
    seeds = 20 if runs is STUDY else 10
    domains, found = domains or domains_of(r for r in runs if r["size"] == size), []
    for part in [[domain] for domain in domains] if apart else [domains]:
        both = (measured(runs, arm, part, measure, seeds, size) for arm in (ours, other))
        found += paired(*both)
    assert len(found) in (6, seeds)
    return found


GAPS = [("", COMPARISON, "bidora", "dora", gap), ("-", ONE_RATE, "bidora", "dora", gap)]
SCORES = [("", COMPARISON, "bidora", "dora"), ("-", ONE_RATE, "bidora", "dora")]
PHASES = [(s, r, "dora-two-phases", "dora") for s, r in (("", COMPARISON), ("-", ONE_RATE))]
OF_STUDY = [("-", STUDY, "bidora", "dora"), ("", STUDY, "bidora", "dora-two-phases")]
EARLIER_GAPS = [("-", EARLIER, "bidora", "dora", gap, size, (), True) for size in (100, 400)]
AT_1E_3 = [r for r in EARLIER if r["method"] == "bidora"]
AT_1E_3 += lines_of("results/earlier", "dora-at-1e-3")
SAME_RATE = [("-", AT_1E_3, "bidora", "dora", gap, 100, (), True)]
THREE = ["similarity", "movie-sentiment", "peptides"]  # the tasks of most groups of arms
PARTS = [(100, THREE), (100, THREE[:1]), (400, THREE), (400, THREE[2:])]
BIDORA = [(runs, "bidora", "dora") for runs in (COMPARISON, ONE_RATE, STUDY)]
HALVES = [(AT_RANK["dora"][r // 2], AT_RANK["lora"][r]) for r in (2, 8, 32)]
HALVES += [("lora-r16", "lora-r32")]
CLAIMED = {  # {words of a claim: the arguments of differences, of each interval in its row}
    "mitigates overfitting": [(*pair, gap) for pair in BIDORA]
    + [(STUDY, arm, "dora", gap, 400) for arm in ("bidora", "dora-two-phases")],
    "distinct": [(STUDY, "bidora", "bidora-on-train", m, 100, THREE) for m in (gap, score)],
    "the risk of": [(STUDY, "dora", "lora", gap, size, THREE) for size in (100, 400)],
    "outperforms DoRA": [*BIDORA, (STUDY, "bidora", "dora", score, 400)],
    "extremely small": [(STUDY, "bidora", "dora", score, n, THREE[2:]) for n in (100, 400, 16, 64)],
    "3.92 times": [(STUDY, "bidora", "lora-same-time", score, 100, THREE)],
    "unrolled step": [(STUDY, "first-order", "bidora", score, 100, THREE)],
    "m alone": [(STUDY, "dora-granular", "dora", score, 100, THREE)],
    "half of": [(STUDY, *pair, score, 100, THREE) for pair in HALVES],
    "ranks 4": [(STUDY, f"dora-r{r}", f"lora-r{r}", score, 100, THREE) for r in (8, 16, 32)],
    "consistently outperforms LoRA": [(STUDY, "dora", "lora", score, *part) for part in PARTS],
}


@pytest.mark.parametrize(
    "text, pairs, sentence",
    [
        (README, GAPS, "gap is {} points larger (p = {}) …, {} smaller (p = {})"),
        (README, SCORES, "test accuracy is {} points higher (p = {}), and {} lower (p = {})"),
        (LESSON_02, GAPS, "is *larger*, by {} points (p = {}); … it is {} points smaller (p = {})"),
        (RESULTS, PHASES, "is {} points above DoRA at … (p = {}) and {} below it … (p = {};"),
        (README, OF_STUDY, "twenty seeds, its mean score is {} points below DoRA's (p = {}), and "
         "{} above DoRA in BiDoRA's phases (p = {})"),
        (RESULTS, EARLIER_GAPS, "gap was {} points smaller than DoRA's at 100 examples (ten pairs, "
         "p = {}) and {} at 400 (p = {})"),
        (RESULTS, SAME_RATE, "BiDoRA's gap had been {} points smaller (p = {})"),
    ],
    ids=["gap", "score", "lesson's gap", "phases", "study", "earlier", "at 1e-3"],
)  # fmt: skip
def test_a_quoted_mean_and_its_p_are_those_of_paired_runs(text, pairs, sentence):
    numbers = quoted(text, sentence)
    for (sign, *arms), mean, p in zip(pairs, numbers[::2], numbers[1::2], strict=True):
        assert_pairs(differences(*arms), sign + mean, p)
    assert len(domains_of(STUDY)) == 5


def test_the_results_quote_dora_at_each_rate_and_the_earlier_difference():
    earlier, domains = lines_of("results", "rate-0.0003"), domains_of(COMPARISON)
    sentence = (
        "accuracy rises from {} to {} and {}, and its test loss from {} to {} and {}; BiDoRA has"
    )
    *quotes, accuracy, loss = quoted(RESULTS, sentence + " {} and {}.")
    of_dora = [(runs, "dora") for runs in (COMPARISON, earlier, ONE_RATE)]
    measures = score, lambda run: run["after"]["test"]["loss"]
    for pairs, measure in zip((quotes[:3] + [accuracy], quotes[3:] + [loss]), measures):
        for quote, (runs, arm) in zip(pairs, [*of_dora, (COMPARISON, "bidora")], strict=True):
            found = measured(runs, arm, domains, measure, 10)
            assert_quoted(quote, statistics.mean(found.values()))
    both = measured(COMPARISON, "bidora", domains), measured(earlier, "dora", domains)
    [above] = quoted(RESULTS, "BiDoRA was {} points above DoRA there")
    assert_quoted(above, statistics.mean(paired(*both)))


def test_the_results_quote_how_many_choices_of_rates_had_a_rival():
    losses = collections.defaultdict(lambda: collections.defaultdict(list))
    for r in lines_of("results/study", "tune"):
        rates = r["lower_lr"], r.get("upper_lr")
        losses[r["domain"], r["method"], r["size"]][rates].append(r["after"]["test"]["loss"])
    means = [[statistics.mean(x) for x in c.values() if len(x) == 3] for c in losses.values()]
    rivals = [n for c in means if (n := sum(mean <= 1.03 * min(c) for mean in c)) > 1]
    found = quoted(RESULTS, "{} of {} choices had a rival within 3 %, which ten seeds, {} runs")
    assert [*map(int, found)] == [len(rivals), len(means), 7 * sum(rivals)]


def test_the_readme_quotes_the_study_s_gap_at_400_examples():
    sentence = "At 400 examples its gap is {} points smaller than DoRA's (p < 0.001); DoRA in "
    sentence += "these phases narrows it as much. Its score is {} lower (p = {})"
    smaller, below, p = quoted(README, sentence)
    own, phases = (differences(STUDY, a, "dora", gap, 400) for a in ("bidora", "dora-two-phases"))
    assert_quoted(f"-{smaller}", statistics.mean(own))
    for found in (own, phases):
        assert statistics.mean(found) < -2 and wilcoxon(found).pvalue < 0.001
    assert_pairs(differences(STUDY, "bidora", "dora", score, 400), f"-{below}", p)


def test_the_readme_quotes_the_ablation():
    [cost] = quoted(README, "transposed layers, which cost {} points on MiniLM")
    sentence = "a magnitude that stays fixed costs {} points on one of three tasks (p = {})"
    fixed, p = quoted(README, sentence)
    transposed = differences(STUDY, "written+transposed", "as-written", domains=THREE)
    assert_quoted(f"-{cost}", statistics.mean(transposed))
    assert wilcoxon(differences(STUDY, "first-order", "bidora", domains=THREE)).pvalue > 0.5

    one, *others = (differences(STUDY, "m-fixed", "bidora", domains=[task]) for task in THREE)
    assert_pairs(one, f"-{fixed}", p)
    assert all(wilcoxon(pairs).pvalue > 0.4 for pairs in others)


def test_the_variations_quote_intervals_of_the_tables_that_their_sections_link():
    interval = r"(-?\d+\.\d)(?:(?!\d\.\d)[^()])*\((-?[\d.]+) to (-?[\d.]+)\)"
    for section in VARIATIONS.split(" ## ")[1:]:
        linked = "".join(map(text_of_file, re.findall(r"tables/([\w-]+)\.md", section)))
        known = re.findall(r"([-+][\d.]+) \[([-+][\d.]+), ([-+][\d.]+)\]", linked)
        known = {tuple(map(float, cell)) for cell in known}
        known |= {(-mean, -high, -low) for mean, low, high in known}  # the other way round
        quotes = [tuple(map(float, quote)) for quote in re.findall(interval, section)]
        assert len(quotes) == len(re.findall(r"\(\S+ to \S+\)", section)) > 0
        assert set(quotes) <= known


def test_the_granular_arms_moved_as_their_trajectories_say():
    """At the end, ΔM in % of the norms at the start, and ΔD: means over runs and layers."""
    [(_, *targets), _, *rows] = tables_of("relatives")[-1]
    runs = [r for r in load_results(ROOT / "results/study") if "trajectory" in r]
    for arm, *cells in rows:
        of_arm = [r["trajectory"] for r in runs if r["method"] == arm.strip("`")]
        assert len(of_arm) == 6 * len(THREE)
        for target, cell in zip(targets, cells):
            found = [
                (100 * t["delta_m"][-1][i] / t["magnitude"][i], t["delta_d"][-1][i])
                for t in of_arm
                for i, name in enumerate(t["layers"])
                if f".{name}".endswith(f".{target.strip('`')}")
            ]
            for quote, values in zip(cell.split(" %, "), zip(*found), strict=True):
                assert_quoted(quote, statistics.mean(values))


def test_the_claims_quote_what_paired_runs_linked_tables_and_lesson_04_hold():
    for row in CLAIMS.split("| |"):
        intervals = re.findall(r"([-+][\d.]+) \[([-+][\d.]+), ([-+][\d.]+)\]", row)
        [pairs] = [pairs for words, pairs in CLAIMED.items() if words in row] or [[]]
        for quotes, pair in zip(intervals, pairs, strict=True):
            ends = ttest_1samp(differences(*pair), 0).confidence_interval()
            for quote, value in zip(quotes, (statistics.mean(differences(*pair)), *ends)):
                assert_quoted(quote, value)

        linked = "".join(map(text_of_file, re.findall(r"tables/([\w-]+)\.md", row)))
        for quote in re.findall(r"[\d.]+±[\d.]+|[-+.\d]+ \([-+.\d]+ … [-+.\d]+\)", row):
            assert quote.replace("±", " ± ") in linked + PRINTED_04, row
    assert all(CLAIMS.count(words) == 1 for words in CLAIMED)


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


STUDIED = "study controls paper published network hypergradients rank tiny alpha sensitivity cost"
TABLES = [("compare", COMPARISON, 10), ("compare-one-rate", ONE_RATE, 10)]
TABLES += [(name, STUDY, 20) for name in (*STUDIED.split(), "relatives")]


@pytest.mark.parametrize("name, runs, seeds", TABLES)
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
    mean, *ends, p = re.fullmatch(r"(\S+) \[(\S+), (\S+)\], p = (\S+) \(.*\)", cell).groups()
    assert_pairs(found, mean, p)
    for quote, value in zip(ends, ttest_1samp(found, 0).confidence_interval(), strict=True):
        assert_quoted(quote, value)


LOSSES = [(split, "loss") for split in ("test", "train")]
ACCURACIES = [("test", "accuracy"), ("train", "accuracy")]
TEXTS = [("test", name) for name in ("bleu", "chrf", "rougeL", "nist")] + LOSSES
BY_METHOD = [("default", "default", "movie-sentiment", [ACCURACIES[0], LOSSES[0], ACCURACIES[1]])]
BY_METHOD += [("decoder", "smollm2", "movie-sentiment", [*ACCURACIES, LOSSES[0]])]
BY_METHOD += [("e2e", "smollm2", "e2e", TEXTS)]


@pytest.mark.parametrize("name, folder, domain, columns", BY_METHOD)
def test_the_tables_by_method_are_what_their_runs_measured(name, folder, domain, columns):
    """A cell without a deviation is a mean alone; the default run's last one, its seconds."""
    found = [r for r in lines_of(f"results/{folder}") if r["domain"] == domain]
    found.sort(key=lambda r: r["seed"])
    [(_, _, *rows)] = tables_of(name)
    assert {row[0].strip("`") for row in rows} == {r["method"] for r in found}
    unit = {"accuracy": 100}  # points of 100; other scores as they are
    for arm, seeds, *cells in rows:
        ours = [r for r in found if r["method"] == arm.strip("`")]
        values = [[unit.get(x, 1) * r["after"][split][x] for r in ours] for split, x in columns]
        for quote, value in zip(seeds.split(" / "), values[0], strict=True):
            assert_quoted(quote, value)
        for cell, column in zip(cells, values):
            if "±" in cell:
                assert_spread(f"{cell} ({len(column)})", column)
            else:
                assert_quoted(cell, statistics.mean(column))
        if name == "default":
            totals = [r["seconds"]["total"] for r in ours]
            assert cells[-1] == f"{min(totals):.0f} to {max(totals):.0f}"


def test_lesson_02_quotes_the_mean_gaps():
    found = re.findall(r"(\d+\.\d) (?:points )?against (\d+\.\d) at (\d+)", LESSON_02)
    assert [size for *_, size in found] == ["50", "100", "200", "400", "800"]
    for ours, other, size in found:
        for quote, method in ((ours, "bidora"), (other, "dora")):
            kind = (EARLIER, method, ["movie-sentiment"], gap, 20, int(size))
            assert_quoted(quote, statistics.mean(measured(*kind).values()))


def test_lesson_04_prints_the_seeds_and_accuracies_that_results_hold():
    found = re.findall(r"(?m)^(\D+?) +(\d+) seeds, .* accuracy (\S+) %$", PRINTED_04)
    assert len(found) == 5
    names = {"full fine-tuning": "ft"}
    for title, seeds, percent in found:
        values = measured(EARLIER, names.get(title, title.lower()), ["movie-sentiment"]).values()
        assert len(values) == int(seeds), title
        assert_quoted(percent, statistics.mean(values))


def test_the_claims_quote_the_draws_that_lesson_02_counted():
    names = ("DoRA", "joint, then m fixed")
    dora, joint = (re.findall(rf"(?m)^{n} .* (\d+) of 100 ", PRINTED_02) for n in names)
    sentence = "its test error is lower than DoRA's in {} at rank 6 and in {} at rank 2"
    assert quoted(CLAIMS, sentence) == (dora[0], dora[-1])
    assert quoted(CLAIMS, "BiDoRA's error is lower in {} and in {}") == tuple(joint)
