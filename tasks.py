"""
From examples to rows, a loss, predictions and scores: one class for each family of tasks.

    LanguageTask    a language model writes the answer: a label's name (label_words), any text
                    (language_model), or a text that is compared with references (generation)
    MultipleChoice  a language model scores the choices of each example: support/tasks/likelihood.py
    HeadTask        a head on an encoder or a decoder chooses classes (classification,
                    multi_label), a number (regression) or a tag a word (tagging):
                    support/tasks/head_task.py

All have the same methods, in the order in which train.py calls them.
"""

from dataclasses import dataclass

import torch

import data
from model import ModelConfig, Transformer
from support.run.files import read_json
from support.tasks import any_model, likelihood, scores
from support.tasks.head_task import HeadTask, load_tokenizer
from support.tasks.heads import DecoderWithHead
from support.text.jsonl import format_of
from support.text.tokenizer import Tokenizer
from support.weights.hf_format import is_own

# The formats of examples (support/text/jsonl.py) that each task takes. By default, the first task
# that takes an example's format is chosen; on an encoder, the first one with a head.
LANGUAGE = {
    "label_words": ("classification",),
    "language_model": ("text", "code", "prompt", "instruction", "messages"),
    "generation": ("generation", "prompt"),
    "multiple_choice": ("multiple_choice",),
}
HEADS = {name: (name,) for name in ("classification", "multi_label", "regression", "tagging")}
TASKS = LANGUAGE | HEADS


def read_shape(folder):
    """The sizes of a folder's model: a ModelConfig, or of any other an AnyShape. Raises as they."""
    if not is_own(folder):
        return any_model.read_shape(folder)
    return ModelConfig.from_hf(read_json(folder / "config.json"))


def choose(name, example, shape):
    """
    The name of a task, a key of TASKS, for examples like this one. name: one of them, or "auto";
    shape: from read_shape. Raises ValueError where nothing fits.
    """
    form, encoder = format_of(example), not getattr(shape, "writes", True)
    fitting = [task for task, formats in TASKS.items() if form in formats]
    possible = [task for task in fitting if task in HEADS or not encoder]
    if name == "auto" and possible:
        return possible[0]
    if name in possible:
        return name
    if encoder and (name in LANGUAGE or not possible):
        use = f"task={' or '.join(possible)}" if possible else f"examples for {', '.join(HEADS)}"
        what = f"task={name} needs" if possible else f"examples of the format {form!r} need"
        writes = "a model that writes, which an encoder does not"
        raise ValueError(f"{what} {writes}: use {use}, or a language model")
    raise ValueError(
        f"task={name} does not take examples of the format {form!r}; use task="
        f"{' or '.join(possible)}"
    )


def build(name, config, folder, question, labels, glue, began=None):
    """
    The task `name`, from choose. folder: the model's; question, labels, glue: from
    data.load_splits; began: the time that chat templates are told, ChatTemplate's now. Raises
    FileNotFoundError or ValueError for a tokenizer that can't be used.
    """
    if name in HEADS:
        return HeadTask(name, labels, *load_tokenizer(folder), glue)

    tokenizer = Tokenizer.from_pretrained(folder, began)
    label_ids = data.tokenize_labels(labels, tokenizer) if name == "label_words" else {}
    search = search_options(vars(config)) if name == "generation" else {}
    make = MultipleChoice if name == "multiple_choice" else LanguageTask
    return make(tokenizer, question, label_ids, config.train_on_prompt, search, glue)


def search_options(settings):
    """beam_search's options, of a run's settings as a dict."""
    names = "max_new_tokens num_beams length_penalty no_repeat_ngram_size"
    return {name: settings[name] for name in names.split()}


def load_model(family, folder, dtype, device, rows=(), own_head=False, **options):
    """
    A folder's model for a task, all but its head frozen. family: from `build`; rows: those that it
    will train on; own_head: the folder holds a head for the task, else a fresh one is drawn;
    options: quantize and mapped, for model.py's. Raises as Transformer.from_pretrained.
    """
    form = family.form if isinstance(family, HeadTask) else None
    if is_own(folder):
        model = Transformer.from_pretrained(folder, dtype, device, **options).requires_grad_(False)
        model = DecoderWithHead(model, *form) if form else model
    elif options.get("quantize"):
        raise ValueError(f"{folder}: quantize is for the models of model.py; leave it out")
    elif form:
        load = any_model.AnyWithHead.from_pretrained
        model = load(folder, *form, dtype, device, anew=not own_head)
    else:
        model = any_model.AnyLanguageModel.from_pretrained(folder, dtype, device)
    if form:
        family.start(model, rows)
    return model


@dataclass
class LanguageTask:
    """
    question, label_ids: of label_words, else "" and {}. search: of generation, the options of
    beam_search, else {}. glue: the key of scores.GLUE that says which scores are shown, or None.
    """

    tokenizer: Tokenizer
    question: str  # the prompt, with {text} for the example's text
    label_ids: dict  # {label: its token ids}, sorted by label
    train_on_prompt: bool
    search: dict
    glue: str | None

    @property
    def unknown_id(self):
        return self.tokenizer.unknown_id

    @property
    def metric(self):
        """The score that a run is judged by."""
        if self.glue:
            return scores.GLUE[self.glue][0]
        return "bleu" if self.search else "accuracy"

    def notes(self, cut, block_size):
        """Lines about the data and the tokenizer. cut: how many examples were too long."""
        if cut:
            what = "their texts were" if self.label_ids else "they were"
            yield (
                f"{cut} examples were longer than block_size={block_size} tokens: {what} cut on "
                f"the left, their last answers kept"
            )
        if not self.tokenizer.has_chat_template:
            yield "the tokenizer has no chat template: a plain one (User: … Assistant: …) is used"

    def encode(self, examples, block_size):
        """As data.encode."""
        options = (self.question, self.label_ids, self.train_on_prompt)
        return data.encode(examples, self.tokenizer, block_size, *options)

    def loss(self, model, rows):
        """The mean loss of a list of rows, a scalar tensor."""
        return model([row.input_ids for row in rows], [row.labels for row in rows])

    supervised = staticmethod(data.supervised)

    def rehearse(self, rows):
        """Raise ValueError now if a library is missing that the scores will need."""
        if self.search:
            self.scores([(row.references[0], row.references) for row in rows[:1]])
        elif self.glue:
            self.scores([(row.label, row.label) for row in rows[:1]])

    def save_pretrained(self, model, base, folder):
        """Write a trained model and its tokenizer. base: the folder that it was loaded from."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def evaluate(self, model, rows, scored=True):
        """
        (summed loss in nats, number of tokens, a list of what `scores` takes) of a few rows.

        label_words: the loss of the right label's tokens, and (likeliest label, right label).
        generation: that of the answers, and, if scored, (generated text, references). Otherwise the
        loss at the supervised positions, and (how often the likeliest token is right, how many).
        """
        if self.label_ids:
            labels = list(self.label_ids)
            found = model.score([row.prompt_ids for row in rows], list(self.label_ids.values()))
            answers = torch.tensor([labels.index(row.label) for row in rows], device=found.device)
            loss = -found.gather(1, answers[:, None]).sum().item()
            pairs = [(labels[i], row.label) for i, row in zip(found.argmax(1).tolist(), rows)]
            return loss, sum(len(self.label_ids[row.label]) for row in rows), pairs

        ids, labels = [row.input_ids for row in rows], [row.labels for row in rows]
        loss, right, count = model.totals(ids, labels)
        if not self.search:
            return loss, count, [(right, count)]
        if not scored:
            return loss, count, []
        texts = self.write(model, [row.prompt_ids for row in rows])
        return loss, count, list(zip(texts, (row.references for row in rows)))

    def write(self, model, prompts):
        """The texts that follow prompts, lists of token ids, by the search of a generation task."""
        model = any_model.as_any(model) if isinstance(model, Transformer) else model
        found = model.beam_search(prompts, stop_ids=self.tokenizer.stop_ids, **self.search)
        return [self.tokenizer.decode(ids).strip() for ids in found]

    def scores(self, found):
        """The task's metrics, {name: number}, of the lists that `evaluate` returns, joined."""
        if self.search:
            return scores.generation(*zip(*found)) if found else {}
        if self.glue:
            return scores.glue(self.glue, *zip(*found))
        if self.label_ids:
            return {"accuracy": sum(label == right for label, right in found) / len(found)}
        return {"accuracy": sum(n for n, _ in found) / sum(n for _, n in found)}


class MultipleChoice(LanguageTask):
    """Choices of each example's own, scored by their likelihood; the right one is trained."""

    metric = "acc"
    evaluate = staticmethod(likelihood.evaluate)
    scores = staticmethod(likelihood.scores)
