"""
The other names of the `bidora` package (0.1.2 on PyPI): settings, loading functions and a trainer,
for transformers models and lists of dicts. bidora.py finds them here. Names, order and defaults are
the package's; docs/coming-from.md lists the differences.
"""

import itertools
import math
import random
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path

import torch

import bidora
from bidora import BiDoRALinear, replace_linear_with_bidora  # noqa: F401
from bilevel import BilevelOptimizer, MicroBatches
from data import load_examples
from support.text.jsonl import format_of
from support.text.official import loaded
from support.weights.quantized import kind_of


class BiLevelOptimizer(BilevelOptimizer):
    """BilevelOptimizer with the package's names for its steps."""

    upper_level_step = BilevelOptimizer.upper_step

    def lower_level_step(self, loss_fn, train_batch):
        return self.lower_step(loss_fn, train_batch)

    def final_finetune_step(self, loss_fn, combined_batch):
        """Freeze the upper parameters for good and take a lower_step."""
        for parameter in self.upper:
            parameter.requires_grad_(False)
        return self.lower_step(loss_fn, combined_batch)


create_bilevel_optimizer = BiLevelOptimizer


class ModelSize(str, Enum):
    TINY, SMALL, MEDIUM, LARGE, XLARGE = "1b", "7b", "14b", "20b", "34b"


class QuantizationMode(str, Enum):
    NONE, INT8, NF4 = "none", "8bit", "4bit"


def number(default, least, most=math.inf):
    return field(default=default, metadata={"span": (least, most)})


class Settings:
    """A dataclass that raises ValueError for a number out of its range."""

    def __post_init__(self):
        for setting in fields(self):
            value, span = getattr(self, setting.name), setting.metadata.get("span")
            if span and not span[0] <= value <= span[1]:
                name = f"{type(self).__name__}: {setting.name}"
                raise ValueError(f"{name}={value!r} must be from {span[0]} to {span[1]}")


@dataclass
class BiDoRAConfig(Settings):
    """use_bidora chooses BiDoRA; otherwise use_dora chooses DoRA, and LoRA remains."""

    rank: int = number(8, 1, 128)
    alpha: int = number(16, 1)
    dropout: float = number(0.05, 0, 0.5)
    target_modules: list = field(default_factory=lambda: list(bidora.ATTENTION))
    use_rslora: bool = True  # s = alpha / √rank (arXiv 2312.03732), not alpha / rank
    use_dora: bool = False
    use_bidora: bool = True
    lower_lr_multiplier: float = number(1.0, 0.1, 10)
    upper_lr_multiplier: float = number(2.0, 0.1, 10)
    lower_steps: int = number(1, 1, 10)


@dataclass
class TrainingConfig(Settings):
    batch_size: int = number(4, 1, 128)
    gradient_accumulation_steps: int = number(4, 1)
    learning_rate: float = number(2e-4, 1e-6, 1e-3)
    num_epochs: int = number(3, 1, 100)
    warmup_steps: int = number(100, 0)  # at most a tenth of all steps
    max_seq_length: int = number(2048, 128, 8192)
    save_steps: int = number(500, 1)  # without effect: the best and the last state are saved
    logging_steps: int = number(10, 1)
    eval_steps: int | None = None  # without effect: each epoch ends with an evaluation
    weight_decay: float = number(0.01, 0, 1)
    max_grad_norm: float = number(1.0, 0)


@dataclass
class ModelConfig(Settings):
    model_name: str = "Qwen/Qwen2.5-Coder-7B-Instruct"
    quantization: QuantizationMode = QuantizationMode.NF4
    trust_remote_code: bool = False
    use_flash_attention: bool = False  # for evaluation; second derivatives use no fused kernel

    def __post_init__(self):
        self.quantization = QuantizationMode(self.quantization)


@dataclass
class DataConfig(Settings):
    train_file: Path | None = None
    val_file: Path | None = None
    dataset_name: str | None = None
    dataset_split: str = "train"
    val_split_ratio: float = number(0.1, 0, 0.5)
    max_samples: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for path in filter(None, (self.train_file, self.val_file)):
            if not Path(path).exists():
                raise ValueError(f"DataConfig: file not found: {path}")


@dataclass
class FullConfig(Settings):
    model: ModelConfig = field(default_factory=ModelConfig)
    bidora: BiDoRAConfig = field(default_factory=BiDoRAConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output_dir: Path = Path("output")
    seed: int = 42
    resume_from_checkpoint: Path | None = None

    def auto_adjust_for_hardware(self):
        """Fit batch_size and max_seq_length to the GPU's memory; a step keeps 16 rows."""
        memory = get_hardware_info().get("gpu_memory_gb", 0)
        rows = 4 if memory >= 40 else 2 if memory >= 16 else 1
        self.training.batch_size, self.training.gradient_accumulation_steps = rows, 16 // rows
        if memory:
            self.training.max_seq_length = 4096 if memory >= 40 else 2048
        else:
            self.model.quantization = QuantizationMode.NONE


def get_hardware_info():
    """Torch's version, CUDA's, and the first GPU, as a dict."""
    info = {"cuda_available": torch.cuda.is_available(), "pytorch_version": torch.__version__}
    if not info["cuda_available"]:
        return info | {"cuda_version": None}
    gpu, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    info |= {"gpu_name": gpu.name, "gpu_memory_gb": gpu.total_memory / 1e9, "gpu_count": count}
    return info | {"cuda_version": torch.version.cuda}


def create_bnb_config(quantization):
    """transformers' BitsAndBytesConfig for a QuantizationMode, or None."""
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return BitsAndBytesConfig(**nf4) if quantization == "4bit" else None


def load_model_and_tokenizer(model_config):
    """(a causal language model, in bf16 if the GPU computes in it, else in fp32; its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    name, options = model_config.model_name, {"trust_remote_code": model_config.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if model_config.use_flash_attention:
        options["attn_implementation"] = "flash_attention_2"
    options |= dict(dtype=torch.bfloat16 if fast else torch.float32, use_safetensors=True)
    options |= dict(device_map={"": 0} if cuda else None)
    options |= dict(quantization_config=create_bnb_config(model_config.quantization))
    return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer


def prepare_bidora_model(model, bidora_config, quantized=None, use_gradient_checkpointing=False):
    """Freeze the model, then add the adapters of a BiDoRAConfig. Returns the model."""
    if quantized and not any(kind_of(p) or not p.is_floating_point() for p in model.parameters()):
        raise ValueError("quantized=True, but the model's weights are not quantised")

    c = bidora_config
    method = "bidora" if c.use_bidora else "dora" if c.use_dora else "lora"
    alpha = c.alpha * c.rank**0.5 if c.use_rslora else c.alpha
    model.requires_grad_(False)
    replace_linear_with_bidora(model, c.rank, alpha, c.dropout, c.target_modules, method)
    if use_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trainable parameters: {trained:,} of {every:,} ({trained / every:.2%})")
    return model


def load_and_prepare_dataset(data_config):
    """{"train", "validation"}: lists of dicts, from JSONL files or a data set of the hub."""
    c = data_config
    if c.train_file is not None:
        train = load_examples(str(c.train_file))
    elif c.dataset_name is not None:
        name, options = c.dataset_name, dict(split=c.dataset_split)
        train = list(loaded(name, "load_dataset", name, **options)["train"])
    else:
        raise ValueError("DataConfig: give train_file or dataset_name")

    train = train[: c.max_samples]
    if c.val_file is not None:
        return {"train": train, "validation": load_examples(str(c.val_file))}
    kept = round(len(train) * (1 - c.val_split_ratio))
    return {"train": train[:kept], "validation": train[kept:]}


def prompt_and_answer(example):
    """(prompt, answer) of an example. Only the answer is learnt; plain text has no prompt."""
    match format_of(example):
        case "instruction":
            extra = f"### Input:\n{example['input']}\n\n" if example.get("input") else ""
            prompt = f"### Instruction:\n{example['instruction']}\n\n{extra}### Response:\n"
            return prompt, example["output"]
        case "prompt":
            return f"{example['prompt']}\n\n", example["completion"]
        case "code" | "text" as key:
            return "", example[key]
    raise ValueError(f"an example has the keys {', '.join(example)}, which are no known format")


def prepare_dataset_for_training(dataset, tokenizer, max_length):
    """
    The splits as lists of {"input_ids", "labels"}, not padded. An answer ends with the end-of-text
    token. An example beyond max_length loses its beginning.
    """

    def row(example):
        prompt, answer = prompt_and_answer(example)
        before = tokenizer(prompt).input_ids
        after = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        labels = [-100] * len(before) + after
        return {"input_ids": (before + after)[-max_length:], "labels": labels[-max_length:]}

    return {split: [row(example) for example in examples] for split, examples in dataset.items()}


class BiDoRATrainer:
    """
    Trains num_epochs by bilevel_step, then one epoch on all rows by final_finetune_step. The rows
    come from prepare_dataset_for_training. Writes PEFT adapters into output_dir / "best_model" and
    "final_adapter", and the merged transformers model into "final_model".
    """

    def __init__(self, model, tokenizer, train_dataset, val_dataset, config, output_dir):
        if config.resume_from_checkpoint is not None:
            raise ValueError("resume_from_checkpoint: only train.py resumes (--resume=True)")
        self.model, self.tokenizer = model, tokenizer
        self.train_dataset, self.val_dataset = train_dataset, val_dataset
        self.config, self.output_dir = config, Path(output_dir)
        self.rng = random.Random(config.seed)

        c, b = config.training, config.bidora
        rates = c.learning_rate * b.lower_lr_multiplier, c.learning_rate * b.upper_lr_multiplier
        options = (*rates, b.lower_steps, c.weight_decay)
        self.bilevel_optimizer = BiLevelOptimizer(model, *options, grad_clip=c.max_grad_norm)
        if not val_dataset and self.bilevel_optimizer.upper:
            raise ValueError("BiDoRA needs validation rows: give a val_file or a val_split_ratio")
        if not train_dataset:
            raise ValueError("there are no training rows")

    def batches(self, rows, shuffle=True):
        """One epoch of MicroBatches of padded tensors, each with its share of the labels."""
        c, rows = self.config.training, self.rng.sample(rows, len(rows)) if shuffle else rows
        for start in range(0, len(rows), c.batch_size * c.gradient_accumulation_steps):
            firsts = range(start, len(rows), c.batch_size)[: c.gradient_accumulation_steps]
            parts = [rows[i : i + c.batch_size] for i in firsts]
            # transformers' loss shifts the labels, so a row's first one does not count.
            counts = [sum(y != -100 for row in part for y in row["labels"][1:]) for part in parts]
            shares = [count / sum(counts) for count in counts]
            yield MicroBatches(zip(map(self.collate, parts), shares))

    def collate(self, rows):
        """Rows as padded tensors. The model neither sees nor learns padding."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(self.tokenizer)(rows).to(self.model.device)

    @staticmethod
    def loss(model, micro_batch):
        tensors, share = micro_batch
        return model(**tensors).loss * share

    @torch.no_grad()
    def validate(self):
        """The mean loss of the validation batches, in nats."""
        self.model.eval()
        batches = self.batches(self.val_dataset, shuffle=False)
        losses = [sum(self.loss(self.model, part) for part in batch) for batch in batches]
        self.model.train()
        return (sum(losses) / len(losses)).item() if losses else math.nan

    def train(self):
        """Run all phases. Returns {"best_val_loss", "final_epoch", "global_step"}."""
        c, optimizer = self.config.training, self.bilevel_optimizer
        torch.manual_seed(self.config.seed)
        size = c.batch_size * c.gradient_accumulation_steps
        steps = c.num_epochs * math.ceil(len(self.train_dataset) / size)
        warmup = min(c.warmup_steps, steps // 10)
        epochs = map(self.batches, itertools.repeat(self.val_dataset))
        val_batches = itertools.chain.from_iterable(epochs)
        best, step = math.inf, 0

        self.model.train()
        for epoch in range(c.num_epochs):
            for batch in self.batches(self.train_dataset):
                step += 1
                optimizer.scale_lr(min(1.0, step / max(1, warmup)))
                if optimizer.upper:
                    train_loss, _ = optimizer.bilevel_step(self.loss, batch, next(val_batches))
                else:  # DoRA or LoRA
                    train_loss = optimizer.lower_step(self.loss, batch)
                if step % c.logging_steps == 0:
                    print(f"step {step} of {steps}: train loss {train_loss:.4f}")

            val_loss = self.validate()
            print(f"epoch {epoch + 1} of {c.num_epochs}: validation loss {val_loss:.4f}")
            if val_loss < best:
                best = val_loss
                bidora.save_adapter(self.model, self.output_dir / "best_model")

        for batch in self.batches([*self.train_dataset, *self.val_dataset]):
            optimizer.final_finetune_step(self.loss, batch)
        bidora.save_adapter(self.model, self.output_dir / "final_adapter")
        bidora.merge(self.model).save_pretrained(self.output_dir / "final_model")
        self.tokenizer.save_pretrained(self.output_dir / "final_model")
        print(f"saved in {self.output_dir}: best_model, final_adapter, final_model")
        return {"best_val_loss": best, "final_epoch": c.num_epochs - 1, "global_step": step}


def train_bidora(model, tokenizer, dataset, config):
    """Train on the splits "train" and "validation" of a data set. Returns the BiDoRATrainer."""
    rows = dataset["train"], dataset["validation"]
    trainer = BiDoRATrainer(model, tokenizer, *rows, config, config.output_dir)
    trainer.train()
    return trainer
