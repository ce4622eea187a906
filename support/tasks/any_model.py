"""
Any model that model.py does not compute, by transformers: encoders (BERT, RoBERTa, DeBERTa, ESM-2,
ModernBERT, T5's) and language models (GPT-2, Gemma 3, Phi-3, OLMo, SmolLM3).

    shape = read_shape(folder)                              what config.json says of it
    model = AnyLanguageModel.from_pretrained(folder)        has the methods of model.Transformer
    model = AnyWithHead.from_pretrained(folder, "classification", labels=2)

transformers is imported when such a model is asked for, since that takes seconds. Parameter names,
heads and files are its own, so adapters are PEFT's. Dropouts are 0: a hypergradient needs the same
loss at each call. Attention is torch's or plain: fused kernels have no second derivative.
"""

import contextlib
import functools
import inspect
import itertools
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from support.fast.rows import Rows
from support.run.files import make_folder, read_json
from support.tasks import likelihood
from support.tasks.heads import Head, fresh
from support.weights import hf_format

LOGITS = 2**27  # at a time, in evaluation
UNLIMITED = 10**6  # tokens a row, of a model without a table of positions
UNUSED = re.compile(r"contact_head|pooler")  # what a file may lack: no task reads it, or it trains
LOADERS = {None: "AutoModelForCausalLM", "tagging": "AutoModelForTokenClassification"}
SUPPORTED = "AutoModelForCausalLM, …SequenceClassification and …TokenClassification"
PROBLEMS = {  # transformers' names
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


@functools.cache
def library():
    """transformers, which prints errors alone."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def in_one_line(folder):
    """Turn the many kinds of errors that transformers raises into ValueErrors of one line."""
    try:
        yield
    except Exception as error:
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        if "ecognize" in line:  # a type that it does not know, or that is not of texts
            line = f"{line:.250}; supported is what {SUPPORTED} load"
        version, error_name = library().__version__, type(error).__name__
        raise ValueError(
            f"{folder}: transformers {version} can't load this model: {error_name}: {line:.400}"
        ) from None


@dataclass
class AnyShape:
    family: str  # config.json's model_type
    vocab_size: int
    max_position_embeddings: int  # the most tokens a row
    writes: bool  # whether it is a language model, not an encoder
    targets: tuple  # of adapters: the ends of the names of all linear layers in its blocks


def read_config(folder):
    """transformers' configuration of a folder's model. Raises ValueError."""
    if read_json(Path(folder) / "config.json").get("quantization_config"):
        raise ValueError(f"{folder}: the checkpoint is quantised already, which is not supported")
    with in_one_line(folder):
        config = library().AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config.get_text_config()


def loader(head):
    """The class of transformers' that loads a model; head: a key of heads.KINDS, or None."""
    return getattr(library(), LOADERS.get(head, "AutoModelForSequenceClassification"))


def writes(config):
    """Whether a configuration is of a language model; masked ones, such as BERT, are encoders."""
    names = library().models.auto.modeling_auto
    causal = config.model_type in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return causal and not masked and not config.is_encoder_decoder


def read_shape(folder):
    """The AnyShape of a folder's model. Raises ValueError if transformers does not know it."""
    config = read_config(folder)
    with in_one_line(folder), torch.device("meta"):
        empty = loader(None if writes(config) else "classification").from_config(config)
    modules = dict(empty.named_modules())

    positions = getattr(config, "max_position_embeddings", None) or UNLIMITED
    for name, table in modules.items():
        if "position" in name and getattr(table, "padding_idx", None) is not None:
            positions = len(table.weight) - table.padding_idx - 1  # RoBERTa counts from the next on
    return AnyShape(config.model_type, config.vocab_size, positions, writes(config), ends(modules))


def ends(modules):
    """The shortest ends of names that match all linear layers in blocks, and no others."""
    linears = [n for n, x in modules.items() if type(x).__name__ in ("Linear", "Conv1D")]
    in_blocks = [name for name in linears if re.search(r"\.\d+\.", name)]
    others, chosen = set(linears) - set(in_blocks), {}
    for name in in_blocks:
        parts = name.split(".")
        tails = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        chosen[next(t for t in tails if not any(f".{n}".endswith(f".{t}") for n in others))] = True
    return tuple(chosen)


def load(folder, head, dtype, device, **settings):
    """
    (transformers' model; what its file says of dropouts and padding; the names that the file lacks
    of the head and the pooler; (name, its shape, ours) for others in the head). settings: changes
    of the configuration. Raises FileNotFoundError or ValueError.
    """
    hf_format.find_tensors(Path(folder))  # safetensors, and all of the shards
    config = read_config(folder)
    if head is None and not writes(config):
        raise ValueError(f"{folder} is an encoder, which does not write: choose a language model")
    dropouts = {n: x for n, x in vars(config).items() if "drop" in n and type(x) is float}
    for name, value in (settings | dict.fromkeys(dropouts, 0.0)).items():
        setattr(config, name, value)

    options = dict(config=config, dtype=dtype, local_files_only=True, trust_remote_code=False)
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    with in_one_line(folder), torch.random.fork_rng():  # `fresh` draws instead
        try:
            hf, said = loader(head).from_pretrained(folder, attn_implementation="sdpa", **options)
        except ValueError:  # DeBERTa's attention is its own
            hf, said = loader(head).from_pretrained(folder, attn_implementation="eager", **options)

    base, parts = hf.base_model_prefix + ".", [name for name, _ in hf.base_model.named_children()]
    misshapen = sorted(said["mismatched_keys"])
    lost = {*said["missing_keys"], *(name for name, *_ in misshapen)}
    for name in sorted(lost):
        if name.startswith(base) and not UNUSED.search(name):
            raise ValueError(f"{folder}: tensor {name} is missing, or of another shape")
    for name in sorted(said["unexpected_keys"]):
        if name.removeprefix(base).split(".")[0] in parts and re.search(r"\.\d+\.", name):
            raise ValueError(f"{folder}: unexpected tensor {name}; config.json says fewer layers")
    for part in hf.modules():  # some heads have a dropout that no setting names
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    if head is None and config.tie_word_embeddings:
        if hf.get_input_embeddings().weight is not hf.get_output_embeddings().weight:
            print(hf_format.UNTIED.format(folder=folder))
    own = dropouts | {"pad_token_id": config.pad_token_id}
    return hf.requires_grad_(False).to(device), own, lost, misshapen


class Borrowed(nn.Module):
    """What both models share: transformers' model `hf`, whose modules and names are their own."""

    def borrow(self, hf, own):
        self.__dict__["hf"], self.own = hf, own  # no module, which would prefix the names
        self._modules, self._parameters, self._buffers = hf._modules, hf._parameters, hf._buffers
        self.accepts = inspect.signature(hf.forward).parameters
        self.eval()

    @property
    def config(self):
        return self.hf.config

    @property
    def notes(self):
        """A line about what is not as the model's file says."""
        dropouts = {name: x for name, x in sorted(self.own.items()) if "drop" in name and x}
        off = ", ".join(f"{name}={x}" for name, x in dropouts.items())
        yield f"transformers computes the model{f'; its dropouts are off ({off})' * bool(off)}"

    @property
    def gradient_checkpointing(self):
        return self.hf.is_gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted):
        with warnings.catch_warnings(action="ignore"):  # its name changes between versions
            if wanted:
                self.hf.gradient_checkpointing_enable({"use_reentrant": False})
            elif self.gradient_checkpointing:
                self.hf.gradient_checkpointing_disable()

    def train(self, mode=True):
        self.hf.train(mode)
        return super().train(mode)

    def save_pretrained(self, folder):
        """
        Write config.json, with its file's dropouts, and model.safetensors, as transformers does.
        Raises ValueError for an adapted model: call `bidora.merge(model)` first.
        """
        if any("lora_" in name for name, _ in self.named_parameters()):
            raise ValueError("the model holds adapters: call merge(model) first")
        now = {name: vars(self.config)[name] for name in self.own}
        vars(self.config).update(self.own)
        with tempfile.TemporaryDirectory(dir=make_folder(folder)) as temporary:
            self.hf.save_pretrained(temporary)
            for path in Path(temporary).iterdir():
                path.replace(Path(folder) / path.name)
        vars(self.config).update(now)


class AnyWithHead(Borrowed, Head):
    """
    A model with transformers' head, frozen but for the head and adapters. kind, labels: as in Head.
    What the files lack of the head, or of BERT's pooler before it, starts afresh.
    """

    def __init__(self, hf, kind, labels, own=(), lost=(), anew=False):
        Head.__init__(self, kind, labels)
        self.borrow(hf, own)
        self.dtype = torch.promote_types(hf.dtype, torch.float32)
        self.typed = "token_type_ids" in self.accepts and getattr(self.config, "type_vocab_size", 0)
        for name, layer in hf.named_modules():
            in_base = name.startswith(hf.base_model_prefix + ".")
            if (in_base and "pooler" not in name) or not list(layer.parameters(recurse=False)):
                continue
            layer.to(self.dtype).register_forward_pre_hook(to_its_dtype)
            absent = any(f"{name}.{end}" in lost for end in ("weight", "bias"))
            layer.requires_grad_(absent or not in_base)
            if isinstance(layer, nn.Linear):
                self.__dict__["output"] = layer  # the last one gives the logits
                if absent or (anew and not in_base):
                    fresh(layer)

    def logits(self, input_ids, real, token_type_ids=None):
        """As in forward."""
        inputs = {"attention_mask": real.long()}
        if self.typed and token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if hasattr(self.hf, "score"):
            # A decoder's head reads the last token but for padding, so padding is one of its own.
            used = torch.bincount(input_ids[real], minlength=self.config.vocab_size)
            self.config.pad_token_id = int(used.argmin())
            input_ids = input_ids.masked_fill(~real, self.config.pad_token_id)
        return self.hf(input_ids, **inputs).logits.to(self.dtype)

    @classmethod
    def from_pretrained(cls, folder, kind, labels, dtype=torch.float32, device="cpu", anew=False):
        """
        Load a Hugging Face folder with its head, or, if it holds none or `anew`, with a fresh one.
        Raises FileNotFoundError or ValueError, as for a head of another size.
        """
        settings = {"num_labels": labels, "problem_type": PROBLEMS.get(kind)}
        hf, own, lost, misshapen = load(folder, kind, dtype, device, **settings)
        if misshapen and not anew:
            name, theirs, ours = misshapen[0]
            raise ValueError(
                f"{folder}: tensor {name} is {(*theirs,)}, but {labels} labels need {(*ours,)}: "
                f"give the file's labels, or anew=True for a fresh head"
            )
        return cls(hf, kind, labels, own, lost, anew)

    def save_pretrained(self, folder, names=()):
        """As transformers' …ForSequenceClassification or …ForTokenClassification. names: labels."""
        if names:
            self.config.id2label = dict(enumerate(names))
            self.config.label2id = {name: i for i, name in enumerate(names)}
        if self.own["pad_token_id"] is None:  # without one, a decoder's head takes single rows
            self.own["pad_token_id"] = self.config.eos_token_id
        super().save_pretrained(folder)


def to_its_dtype(layer, inputs):
    """A head is in fp32 or finer, also over a bf16 model: small updates would round to nothing."""
    return inputs[0].to(layer.weight.dtype), *inputs[1:]


class AnyLanguageModel(Borrowed):
    """A language model with the methods of model.Transformer, frozen."""

    def __init__(self, hf, own=()):
        super().__init__()
        self.borrow(hf, own)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Load a Hugging Face folder. Raises FileNotFoundError or ValueError."""
        hf, own, *_ = load(folder, None, dtype, device)
        return cls(hf, own)

    @property
    def lm_head(self):
        return self.hf.get_output_embeddings()

    def predictions(self, rows, wanted):
        """
        Logits after some tokens of each row, (N, vocab), in fp32 or finer. rows: lists of ids;
        wanted: for each row, the places of these tokens. What the rows begin with in common passes
        once, except in training.
        """
        rows = [ids[: max(some, default=0) + 1] for ids, some in zip(rows, wanted)]
        device, places = self.lm_head.weight.device, sorted(set().union(*wanted))
        ids = pad_sequence([torch.tensor(row) for row in rows], True).to(device)
        real = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)
        options = {"attention_mask": real.to(device), "use_cache": False}

        shared = min([len(os.path.commonprefix(rows)), *places[:1]])
        if len(rows) > 1 and shared >= Rows.MIN_SHARED and not torch.is_grad_enabled():
            name = "cache" if "cache" in self.accepts else "past_key_values"  # versions differ
            cached = {name: library().DynamicCache(config=self.config), "use_cache": True}
            self.hf.base_model(ids[:1, :shared], **cached)
            cached[name].batch_repeat_interleave(len(rows))
            options |= cached
            ids, places = ids[:, shared:], [t - shared for t in places]
            wanted = [[t - shared for t in some] for some in wanted]

        kept = "logits_to_keep" in self.accepts
        if kept:  # the head reads these places of every row, not all tokens
            options["logits_to_keep"] = torch.tensor(places, device=device)
        logits = self.hf(ids, **options).logits
        column = {t: i if kept else t for i, t in enumerate(places)}
        row = [i for i, some in enumerate(wanted) for _ in some]
        logits = logits[row, [column[t] for some in wanted for t in some]]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def in_parts(self, rows, wanted):
        """Yield predictions for a few rows at a time."""
        size = max(1, LOGITS // (max(map(len, rows)) * self.config.vocab_size))
        for i in range(0, len(rows), size):
            yield self.predictions(rows[i : i + size], wanted[i : i + size])

    def forward(self, input_ids, labels=None):
        """As Transformer.forward."""
        if labels is None:
            return self.hf(input_ids, use_cache=False).logits
        rows, wanted, targets = likelihood.supervised(input_ids, labels)
        logits = self.predictions(rows, wanted)
        return F.cross_entropy(logits, targets.to(logits.device))

    totals = likelihood.totals  # (rows, labels) -> summed loss, right predictions, their number
    score = likelihood.score  # (prompts, answers) -> log p(answer | prompt)

    @torch.no_grad()
    def generate(
        self, input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_ids=()
    ):
        """As Transformer.generate, by transformers' own."""
        options = dict(do_sample=False)
        if temperature:
            options = dict(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
        inputs = dict(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        return self.continued(inputs, max_new_tokens, stop_ids, **options)

    def continued(self, inputs, max_new_tokens, stop_ids, **options):
        """transformers' generate, with these options alone, not those of the model's file."""
        options |= dict(max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids) or None)
        fill, own = next(iter(stop_ids), 0), self.hf.generation_config
        self.hf.generation_config = library().GenerationConfig(pad_token_id=fill, **options)
        try:
            return self.hf.generate(**inputs)
        finally:
            self.hf.generation_config = own

    @torch.no_grad()
    def beam_search(
        self, prompts, stop_ids, max_new_tokens, num_beams, length_penalty, no_repeat_ngram_size
    ):
        """
        The best continuation of each prompt (a list of token ids): the new ids, without the stop
        token. length_penalty: a sequence's sum of log p is divided by its length to this power;
        no_repeat_ngram_size: the length of n-grams that an answer may not repeat, or 0; those of
        the prompt do not count, as in LoRA's code (2106.09685). ValueError: a prompt is empty.
        """
        if not all(prompts):
            raise ValueError(f"prompt {prompts.index([])} (from 0) is empty: give it a token")
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        real = torch.arange(longest) >= longest - torch.tensor([[len(row)] for row in prompts])
        device = self.lm_head.weight.device
        # It does not know the n-grams of embeddings.
        embedded = self.hf.get_input_embeddings()(ids.to(device))
        inputs = dict(inputs_embeds=embedded, attention_mask=real.long().to(device))
        options = dict(num_beams=num_beams, do_sample=False)
        options |= dict(no_repeat_ngram_size=no_repeat_ngram_size)
        options |= dict(length_penalty=length_penalty) if num_beams > 1 else {}
        with warnings.catch_warnings(action="ignore"):  # of just these n-grams
            rows = self.continued(inputs, max_new_tokens, stop_ids, **options).tolist()
        return [list(itertools.takewhile(lambda token: token not in stop_ids, row)) for row in rows]


def as_any(model):
    """A model.Transformer as an AnyLanguageModel in eval mode: the same layers, adapted or not."""
    with in_one_line("config.json"), torch.device("meta"):
        config = library().AutoConfig.for_model(**model.config.hf)
        hf = library().AutoModelForCausalLM.from_config(config)
    own = dict(model.named_modules())
    for name in [name for name, x in hf.named_modules() if name in own and not list(x.children())]:
        hf.set_submodule(name, own[name])
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config).to(model.lm_head.weight.device)
    return AnyLanguageModel(hf)
