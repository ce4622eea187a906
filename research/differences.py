"""
Arms side by side, from the runs of research/sweep.py: scores, paired differences with intervals and
tests, and the seconds that a run takes, as tables in Markdown.
"""

import itertools

import numpy
from scipy.stats import t, wilcoxon


def points(result, split):
    """A run's score on a split, in points of 100; what was undefined counts as 0."""
    return 100 * (result["after"][split][result.get("metric", "accuracy")] or 0)


MEASURES = {
    "test score": lambda result: points(result, "test"),
    "train - test score": lambda result: points(result, "train") - points(result, "test"),
}


def of_group(results, group):
    """The results of the runs of a group, or of a Sweep, in the order of its domains."""
    chosen = [r for r in results if str(r["size"]) in group.sizes and r["seed"] < group.seeds]
    chosen = [r for r in chosen if r["method"] in group.arms and r["domain"] in group.domains]
    return sorted(chosen, key=lambda r: group.domains.index(r["domain"]))


def collect(results, size, measure):
    """{(domain, arm): {seed: value}} of one size, and as domain "all" the means over domains."""
    values = {}
    for r in results:
        if r["size"] == size and "diverged" not in r:
            values.setdefault((r["domain"], r["method"]), {})[r["seed"]] = MEASURES[measure](r)
    domains = list(dict.fromkeys(domain for domain, _ in values))
    for arm in dict.fromkeys(arm for _, arm in values):
        parts = [values.get((domain, arm), {}) for domain in domains]
        seeds = set.intersection(*map(set, parts))
        values["all", arm] = {s: numpy.mean([part[s] for part in parts]) for s in sorted(seeds)}
    return values


def interval(values):
    """The mean of values, and its 95 % interval's half-width (Student's t), NaN for one value."""
    n = len(values)
    half = t.ppf(0.975, n - 1) * numpy.std(values, ddof=1) / n**0.5 if n > 1 else numpy.nan
    return float(numpy.mean(values)), float(half)


def compare(ours, other):
    """
    (the number of pairs, the mean difference, the half-width of its 95 % interval, p by Wilcoxon's
    signed-rank test) of two {seed: value}. None for fewer than six pairs.
    """
    # Rounding makes equal differences tie, whatever their last digits are.
    differences = [round(ours[seed] - other[seed], 9) for seed in sorted(ours.keys() & other)]
    if len(differences) < 6:  # no p below 0.05 is possible
        return None
    p = wilcoxon(differences).pvalue if any(differences) else 1.0
    return len(differences), *interval(differences), float(p)


def holm(p_values):
    """p after Holm's correction for their number (Scandinavian Journal of Statistics 6, 1979)."""
    p = numpy.array(p_values)
    order = p.argsort()
    raised = numpy.maximum.accumulate(p[order] * numpy.arange(len(p), 0, -1)).clip(max=1)
    return raised[order.argsort()].tolist()


def compare_all(pairs):
    """
    `compare` pairs, {(domain, name): two {seed: value}}, and add p after Holm's correction for the
    number of names and domains, apart from that for the domain "all".
    """
    compared = {key: one for key, pair in pairs.items() if (one := compare(*pair))}
    for together in (False, True):
        keys = [key for key in compared if (key[0] == "all") == together]
        for key, p in zip(keys, holm([compared[key][3] for key in keys])):
            compared[key] += (p,)
    return compared


def differences(results, size, measure, first, sign):
    """
    `compare_all` of the first arm minus each other (sign 1), or of each other minus the first (-1):
    {(domain, arm): (pairs, mean, half-width, p, Holm's p)}.
    """
    values = collect(results, size, measure)
    return compare_all(
        {
            (domain, arm): (values.get((domain, first), {}), other)[::sign]
            for (domain, arm), other in values.items()
            if arm != first
        }
    )


def table(titles, rows, heading=""):
    """Lines of a Markdown table, and an empty one. rows: lists of cells, of any type."""
    yield from [heading, ""] if heading else []
    for cells in (titles, ["---"] * len(titles), *rows):
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""


def spread(values, digits=1):
    """Mean ± standard deviation, as text; of a single value, the mean alone."""
    deviation = f" ± {numpy.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{numpy.mean(values):.{digits}f}{deviation}"


def difference_cell(difference):
    """One of `differences` as text."""
    if not difference:
        return "–"
    _, mean, half, p, corrected = difference
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}], p = {p:.2g} ({corrected:.2g})"


TRACED = ("indirect / direct", "cosine", "m moves by")


def traced(results):
    """The cells of TRACED: medians over the traced runs' upper-level steps, and how far m moved."""
    traces = [r["trace"] for r in results if r.get("trace")]
    if not traces:
        return "–", "–", "–"
    ratio, cosine = (
        numpy.median([x for trace in traces for x in trace[key]]) for key in ("indirect", "cosine")
    )
    moved = numpy.mean([trace["moved"][-1] for trace in traces])
    return f"{ratio:.2g}", f"{cosine:+.2f}" if ratio else "–", f"{100 * moved:.1f} %"


def tables(results, arms, sign):
    """Lines of Markdown: for each size, the arms' scores, gaps and differences. sign: a Group's."""
    corner = f"`{arms[0]}` minus" if sign == 1 else f"minus `{arms[0]}`"
    pairs = {f"`{arm}`": (arms[0], arm)[::sign] for arm in arms[1:]}
    return tables_of(results, arms, corner, pairs)


def tables_of(results, arms, corner, pairs):
    """`tables` with the differences of pairs, {row: (an arm, the arm that is subtracted)}."""
    for size in sorted({r["size"] for r in results}):
        of_size = [r for r in results if r["size"] == size]
        for measure in MEASURES:
            yield from measure_tables(of_size, size, measure, arms, corner, pairs)
        yield from dtype_note(of_size)


def dtype_note(results):
    """Lines of Markdown that say which arms ran in which dtype, if there are several."""
    arms = {}
    for r in results:
        if "dtype" in r:
            arms.setdefault(r["dtype"], {})[f"`{r['method']}`"] = None
    if len(arms) > 1:
        parts = (f"{dtype}: {', '.join(sorted(names))}" for dtype, names in sorted(arms.items()))
        yield from (f"Not all in one dtype; {'; '.join(parts)}", "")


def measure_tables(results, size, measure, arms, corner, pairs):
    """Two tables: the arms' values of a measure (and traces), and differences of the pairs."""
    values = collect(results, size, measure)
    columns = {r["domain"]: f"`{r['domain']}`" for r in results} | {"all": "mean of all"}
    heading = f"**{measure}, points of 100, {size} examples**"
    shown = measure == "test score" and any("trace" in r for r in results)
    rows = []
    for arm in arms:
        if runs := [r for r in results if r["method"] == arm]:
            each = [values.get((domain, arm)) for domain in columns]
            cells = [f"{spread([*v.values()])} ({len(v)})" if v else "–" for v in each]
            rows.append([f"`{arm}`", *cells, *(traced(runs) if shown else ())])
    titles = ["arm", *columns.values(), *(TRACED if shown else ())]
    yield from table(titles, rows, f"{heading}: mean ± standard deviation (seeds)")

    compared = compare_all(
        {
            (domain, row): [values.get((domain, arm), {}) for arm in pair]
            for domain, (row, pair) in itertools.product(columns, pairs.items())
        }
    )
    rows = [
        [row, *(difference_cell(compared.get((domain, row))) for domain in columns)]
        for row in pairs
        if any((domain, row) in compared for domain in columns)
    ]
    if rows:
        heading += ": mean [95 % interval], p by Wilcoxon's test (by Holm)"
        yield from table([corner, *columns.values()], rows, heading)


def seconds_table(results, arms):
    """Lines of Markdown: the arms' median seconds; none if no run recorded its threads."""
    seconds = {}
    for r in results:
        if "seconds" in r:  # it did not diverge
            where = r["size"], r.get("processor", "unrecorded"), r.get("dtype"), r.get("threads")
            times = seconds.setdefault(where, {}).setdefault(r["method"], [])
            times.append(r["seconds"]["total"])
    arms = [arm for arm in arms if any(arm in times for times in seconds.values())]
    rows = []
    for (size, *where), times in sorted(seconds.items(), key=lambda item: item[0][0]):
        cells = [f"{numpy.median(times[arm]):.0f}" if arm in times else "–" for arm in arms]
        rows.append([size, ", ".join(map(str, where)), *cells])
    titles = ["examples", "processor, dtype, threads", *(f"`{arm}`" for arm in arms)]
    heading = "**median seconds of a run**, to be compared within a row"
    return table(titles, rows, heading) if any("threads" in r for r in results) else ()
