"""
Evaluation of rows; and of a whole file: its loss and scores, or a prediction for each example.

    python sample.py --adapter=out/mine --file=test.csv --out=predictions.csv

The file is JSONL or CSV, and its columns have the names of the run's. With --out, the same call
resumes. Answers may be missing; if every example has one, the scores are returned.
"""

import csv
import hashlib
import io
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from support.run import distributed, progress
from support.text.jsonl import FORMATS, OPTIONAL, clean, columns_of, format_of, objects_of, renamed
from support.text.splits import Examples, labels_of, left_out, load_examples
from support.text.tables import csv_rows, fields_of, places_of

ROWS = 32  # in a forward pass
TASKS = {  # the format of a task's examples
    "label_words": "classification",
    "language_model": "instruction",  # or "prompt"
    **{name: name for name in ("generation", "classification", "multi_label", "regression")},
    "tagging": "tagging",
}
ANY_ANSWER = {"labels": [], "score": 0.0, "references": ["?"], "completion": "?", "output": "?"}


def evaluate_rows(task, rows, bar=None, scored=True):
    """{"loss": the mean, and the scores} of rows, None without rows. task: a train.Task's parts."""
    if not rows:
        return None
    model, family, config = task.model, task.family, task.config
    training, _ = model.training, model.eval()
    total = count = 0
    pairs = []  # (prediction, answer) of each row

    # Each process takes its share of the rows. With sharded weights, all processes must call the
    # same blocks in step, so each takes all rows.
    mine = sorted(rows, key=lambda row: len(row.input_ids))  # similar lengths need little padding
    share = 1 if config.fsdp else distributed.WORLD_SIZE
    mine = mine[distributed.RANK % share :: share]
    size = max(1, min(32, 8192 // max(len(row.input_ids) for row in rows)))  # rows per forward pass

    # Each batch here has a shape of its own, and torch.compile would compile for each.
    with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            loss, targets, answered = family.evaluate(model, batch, scored)
            total, count, pairs = total + loss, count + targets, pairs + answered
            if bar is not None:
                bar.update(min(share * len(batch), bar.total - bar.n))

    if share > 1:
        sums = torch.tensor([total, count], dtype=torch.float64)
        (total, count), pairs = distributed.add_up([sums])[0].tolist(), distributed.gather(pairs)
    model.train(training)
    return {"loss": total / count} | family.scores(pairs)


def evaluate(family, model, run, path, tasks):
    """The loss and the scores of a file of examples with answers. tasks: {task: its formats}."""
    examples, name = load_examples(str(path), columns_of(run)), run.get("task", "unknown")
    if (form := format_of(examples[0])) not in tasks.get(name, ()):
        raise ValueError(f"{path} has the format {form!r}, and the run's task is {name}")
    if new := {label for example in examples for label in labels_of(example)} - {*run["labels"]}:
        raise ValueError(f"{path} has the label {min(new)!r}, which the run did not learn")
    rows, cut = family.encode(examples, run["block_size"])
    for line in left_out(Examples.of({"train": examples}), {"train": rows}, []):
        print(f"note: {line}", file=sys.stderr)
    say_cut(family, cut, run["block_size"])
    plain = SimpleNamespace(fsdp=False, compile=False)
    with progress.bar("evaluate", len(rows), "row") as bar:
        return evaluate_rows(SimpleNamespace(model=model, family=family, config=plain), rows, bar)


def form_of(run):
    """The key of FORMATS for a run's examples. run: its run.json. Raises ValueError for others."""
    if (task := run.get("task")) not in TASKS:
        known = f"--file needs a run of a task among {', '.join(TASKS)}"
        raise ValueError(f"{known}; this one is {task or 'no run'}")
    return "prompt" if run.get("raw") and task == "language_model" else TASKS[task]


def read_questions(path, form, columns=None):
    """(examples without answers, their answers or None) of a file. form: a key of FORMATS."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a JSONL or CSV file")
    if path.suffix.lower() in (".parquet", ".xlsx", ".xls"):
        raise ValueError(f"{path}: predictions need a JSONL or CSV file: save it as CSV, in UTF-8")
    *needed, answer = FORMATS[form]
    keys, examples, answers = (*needed, *OPTIONAL.get(form, ())), [], []
    read = csv_fields if path.suffix.lower() in (".csv", ".tsv") else json_fields
    for where, fields in read(path, columns or {}):
        empty = {"text"}.intersection(needed, fields)  # keys that may be empty, as in training
        if missing := [key for key in needed if not fields.get(key) and key not in empty]:
            name = (columns or {}).get(missing[0], missing[0])
            talks = "; talks can't be predicted" * ("messages" in fields)
            raise ValueError(f"{where}: {name!r} is missing, which the run's examples have{talks}")
        examples.append({key: fields[key] or "" for key in keys if key in empty or fields.get(key)})
        given = fields.get(answer)
        if answer in ("label", "labels"):  # as in training
            given = clean(given)
        answers.append(None if given == "" else given)
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples, answers


def json_fields(path, columns):
    """Yield (file and line, {key: value}) of each object of a JSONL file."""
    for where, fields in objects_of(path):
        present = {key: name for key, name in columns.items() if name in fields}
        yield where, renamed(fields, present, where)


def csv_fields(path, columns):
    """Yield (file and line, {key: value}) of each row of a CSV file."""
    rows = csv_rows(path)
    where, header = next(rows, (path, []))
    names = [name.strip().lower() for name in header]
    present = {key: name for key, name in columns.items() if name.lower() in names}
    places = places_of(header, where, present)
    for where, values, _ in fields_of(rows, places, len(header), tidy=True):
        yield where, values


def encode(family, examples, form, block_size):
    """The rows of examples, which get any answer, since encoding needs one."""
    *_, key = FORMATS[form]
    names = list(getattr(family, "label_ids", None) or getattr(family, "names", ()))
    answers = ANY_ANSWER | {"label": names and names[0]}
    of = (lambda x: names[:1] * len(x["words"])) if key == "tags" else lambda x: answers[key]
    rows, cut = family.encode([x | {key: of(x)} for x in examples], block_size)
    say_cut(family, cut, block_size)
    return rows


def say_cut(family, cut, block_size):
    """If examples were cut, print the family's first note, which is about that."""
    if cut:
        print(f"note: {next(iter(family.notes(cut, block_size)))}", file=sys.stderr)


def line_of(prediction, answer, separator):
    """A line of JSON, or of CSV if there is a separator for lists."""
    if not separator:
        given = {} if answer is None else {"answer": answer}
        return json.dumps({"prediction": prediction} | given, ensure_ascii=False) + "\n"
    line = io.StringIO()
    cells = [separator.join(x) if isinstance(x, list) else x for x in (prediction, answer)]
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def predict(family, model, run, path, out):
    """Write the predictions of a file to `out`; return their scores, {} if an answer is missing."""
    form = form_of(run)
    examples, answers = read_questions(path, form, columns_of(run))
    rows = encode(family, examples, form, run["block_size"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    part = out.with_name(f"{out.name}.{digest}.part")  # JSON, whatever out is
    done = [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []
    with (
        progress.bar("predict", len(rows), "row", begin=len(done)) as bar,
        open(part, "a", encoding="utf-8") as file,
    ):
        for start in range(len(done), len(rows), ROWS):
            _, _, pairs = family.evaluate(model, rows[start : start + ROWS])
            predictions = [prediction for prediction, _ in pairs]
            file.write("".join(json.dumps(prediction) + "\n" for prediction in predictions))
            file.flush()
            done += predictions
            bar.update(len(predictions))

    separator = ("|" if form == "multi_label" else " ") * (out.suffix.lower() == ".csv")
    lines = [line_of(*pair, separator) for pair in zip(done, answers)]
    part.write_text("prediction,answer\n" * bool(separator) + "".join(lines), encoding="utf-8")
    part.replace(out)
    if None in answers or form in ("prompt", "instruction"):
        return {}
    names = {*getattr(family, "label_ids", ())} | {*getattr(family, "names", ())}
    if form == "classification" and (unknown := {*map(str, answers)} - names):
        print(f"note: the run did not learn {', '.join(sorted(unknown))}", file=sys.stderr)
    convert = float if form == "regression" else lambda answer: answer  # CSV has texts
    scores = family.scores([(x, convert(answer)) for x, answer in zip(done, answers)])
    return {name: score for name, score in scores.items() if score is not None}
