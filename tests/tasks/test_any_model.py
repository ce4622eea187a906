"""Random models of transformers against it and PEFT. Logits are about 1; fp32 leaves 1e-5."""

import copy
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_architectures import VARIANTS, Problem, in_float64, moved, perturbed

import bidora
from bilevel import BilevelOptimizer
from model import Transformer
from support.tasks.any_model import AnyLanguageModel, AnyWithHead, as_any, read_shape
from support.tasks.heads import IGNORED
from support.weights.pretrained import find_model

ROOT = Path(__file__).parents[2]
LABELS = 3
SIZES = dict(vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=4, max_position_embeddings=64)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
ESM = dict(pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", token_dropout=True)
DEBERTA = dict(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"])
V3 = DEBERTA | dict(share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False)
GROUPED = SPECIAL | dict(num_key_value_heads=2)
GPT2 = dict(vocab_size=41, n_embd=32, n_layer=3, n_head=4, n_positions=64)
GPT2 |= dict(bos_token_id=1, eos_token_id=2)
T5 = dict(vocab_size=41, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)

# name: (transformers' family, settings, the adapters' targets by default)
BERT_LINEAR = ("query", "key", "value", "output.dense", "intermediate.dense")
DEBERTA_LINEAR = ("query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense")
V2_LINEAR = (*DEBERTA_LINEAR, "pos_key_proj", "pos_query_proj")
LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2_LINEAR = ("c_attn", "c_proj", "c_fc")
ENCODERS = {
    "bert": ("Bert", SIZES, BERT_LINEAR),
    "roberta": ("Roberta", SIZES | dict(pad_token_id=1), BERT_LINEAR),
    "esm": ("Esm", SIZES | ESM, BERT_LINEAR),
    "deberta-v2": ("DebertaV2", SIZES | DEBERTA, V2_LINEAR),
    "deberta-v3": ("DebertaV2", SIZES | V3, DEBERTA_LINEAR),
    "modernbert": ("ModernBert", SIZES | SPECIAL | dict(local_attention=4), ("Wqkv", "Wo", "Wi")),
    "gpt2": ("GPT2", GPT2, GPT2_LINEAR),
}
T5_ENCODER = ("T5", T5, ("q", "k", "v", "o", "wi", "wo"))  # classes of tokens alone
WRITERS = {
    "gpt2": ("GPT2", GPT2, GPT2_LINEAR),
    "gemma3": ("Gemma3Text", SIZES | GROUPED | dict(head_dim=8, sliding_window=4), LLAMA_LINEAR),
    "phi3": ("Phi3", SIZES | GROUPED, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "olmo2": ("Olmo2", SIZES | GROUPED, LLAMA_LINEAR),
    "smollm3": ("SmolLM3", SIZES | GROUPED, LLAMA_LINEAR),
}
CLASSES = {"classification": "ForSequenceClassification", "tagging": "ForTokenClassification"}
CAUSAL = {"gpt2": "GPT2LMHeadModel", "gemma3": "Gemma3ForCausalLM"}


def checkpoint(folder, name, head="Model", save=None, **changes):
    """A random model that transformers makes, and saves if a folder is given."""
    family, settings, _ = (ENCODERS | WRITERS | {"t5": T5_ENCODER})[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(settings | changes))
    name = CAUSAL.get(name, family + head) if head == "ForCausalLM" else family + head
    peer = getattr(transformers, name)(config).eval()
    # Biases and norms start at 0 and 1, which would hide a mistake.
    for parameter_name, parameter in peer.named_parameters():
        norm = any(x in parameter_name.lower() for x in ("norm", "ln_")) and parameter.ndim == 1
        wide = norm or "bias" in parameter_name
        mean = float(norm and "weight" in parameter_name and family != "Gemma3Text")
        torch.nn.init.normal_(parameter, mean=mean, std=0.3 if wide else 0.15)
    if folder:
        peer.save_pretrained(folder, **(save or {}))
    return peer


def batch(peer, seed=0):
    """Rows of 11, 6 and 2 tokens, with mask tokens and, where a model has them, token types."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 41, (3, 11), generator=generator)
    ids[0, 5] = ids[1, 2] = ids[1, 3] = 32
    mask = (torch.arange(11) < torch.tensor([[11], [6], [2]])).long()
    ids[mask == 0] = peer.config.pad_token_id or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if types := getattr(peer.config, "type_vocab_size", 0):
        inputs["token_type_ids"] = torch.randint(types, ids.shape, generator=generator)
    return inputs


def load(folder, kind="classification", **options):
    labels = 1 if kind == "regression" else LABELS
    return AnyWithHead.from_pretrained(folder, kind, labels, **options)


def assert_alike(model, peer, inputs):
    """Logits at real tokens. A decoder's head needs to know what padding is."""
    if hasattr(peer, "score"):
        peer.config.pad_token_id = 0
    with torch.no_grad():
        logits, expected = model(**inputs), peer(**inputs).logits
    assert logits.shape == expected.shape
    if logits.dim() == 3:
        real = inputs["attention_mask"].bool()
        logits, expected = logits[real], expected[real]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def adapted(model, targets):
    """The model with BiDoRA adapters that have moved, and a head far from a fresh one."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return moved(model, targets)


def refused(message):
    """A context that expects a ValueError with the message."""
    return pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$")


EACH = [(name, kind) for name in ENCODERS for kind in CLASSES] + [("t5", "tagging")]


@pytest.mark.parametrize("name, kind", EACH)
def test_logits_equal_transformers_and_dropouts_are_off(name, kind, tmp_path):
    """On padded rows, with the file's head, in training mode; the files have dropouts of 0.1."""
    peer = checkpoint(tmp_path, name, CLASSES[kind], num_labels=LABELS)
    model, inputs = load(tmp_path, kind), batch(peer)
    assert_alike(model, peer, inputs)
    assert_alike(model.train(), peer, inputs)
    assert model.dtype == torch.float32 and model(**inputs).requires_grad


@pytest.mark.parametrize("name", ["bert", "roberta", "esm"])
def test_shards_and_a_file_with_another_head_load(name, tmp_path):
    peer = checkpoint(tmp_path, name, "ForMaskedLM", save=dict(max_shard_size="20KB"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    hidden = load(tmp_path, "tagging").hf.base_model(**batch(peer)).last_hidden_state
    expected = peer.base_model(**batch(peer)).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*ENCODERS, *WRITERS, "t5"])
def test_the_shape_is_read_from_config_json(name, tmp_path):
    family, settings, targets = (ENCODERS | WRITERS | {"t5": T5_ENCODER})[name]
    getattr(transformers, f"{family}Config")(**settings).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    positions = {"roberta": 62, "t5": 10**6}.get(name, 64)  # RoBERTa's first two are never used
    assert (shape.vocab_size, shape.max_position_embeddings) == (41, positions)
    assert shape.writes == (name in WRITERS)
    assert set(shape.targets) == set(targets)


def targets_for(kind, mask):
    """Random targets for a batch with this attention mask."""
    generator = torch.Generator().manual_seed(7)
    rows = len(mask)
    if kind == "classification":
        return torch.randint(LABELS, (rows,), generator=generator)
    if kind == "multi_label":
        return torch.randint(2, (rows, LABELS), generator=generator)
    if kind == "regression":
        return torch.randn(rows, generator=generator)
    tags = torch.randint(LABELS, mask.shape, generator=generator)
    tags[:, ::3] = IGNORED
    return tags.masked_fill(mask == 0, IGNORED)


PROBLEMS = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
    "tagging": None,
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_equal_transformers_and_the_head_is_in_float32_or_finer(kind, dtype, tmp_path):
    """Losses are about 1; in bf16 within its 0.8 %, since the peer's head is in bf16, too."""
    options = dict(num_labels=1 if kind == "regression" else LABELS, problem_type=PROBLEMS[kind])
    head = CLASSES.get(kind, CLASSES["classification"])
    peer = checkpoint(tmp_path, "bert", head, **options).to(dtype)
    model, inputs = load(tmp_path, kind, dtype=dtype), batch(peer)
    targets = targets_for(kind, inputs["attention_mask"])
    loss = model(**inputs, targets=targets)
    fine = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == fine and {p.dtype for p in model.classifier.parameters()} == {fine}
    assert model.bert.embeddings.word_embeddings.weight.dtype == dtype
    theirs = targets.to(dtype) if kind in ("multi_label", "regression") else targets
    expected = peer(**inputs, labels=theirs).loss.to(fine)
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["bert", "roberta", "esm"])
def test_a_fresh_head_is_drawn_by_torch_generator_as_transformers_draws_it(name, tmp_path):
    """Weights from N(0, 0.02): of 1024 numbers, the deviation is within 0.002, 4 of its errors."""
    checkpoint(tmp_path, name, "ForSequenceClassification", hidden_size=64, num_labels=16)

    def head(seed):
        torch.manual_seed(seed)
        model = AnyWithHead.from_pretrained(tmp_path, "classification", 16, anew=True)
        return dict(model.classifier.named_parameters())

    first, again, other = head(0), head(0), head(1)
    for key, parameter in first.items():
        assert torch.equal(parameter, again[key])
        if key.endswith("bias"):
            assert not parameter.any()
        else:
            assert not torch.equal(parameter, other[key])
            assert abs(parameter.std() - 0.02) < 0.002 and abs(parameter.mean()) < 0.003


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


def both(layer):
    return {f"{layer}.weight", f"{layer}.bias"}


TRAINED = {
    ("bert", "classification"): both("classifier"),
    ("bert", "tagging"): both("classifier"),
    ("roberta", "classification"): both("classifier.dense") | both("classifier.out_proj"),
    ("esm", "classification"): both("classifier.dense") | both("classifier.out_proj"),
    ("deberta-v3", "classification"): both("pooler.dense") | both("classifier"),
    ("modernbert", "tagging"): {"head.dense.weight", "head.norm.weight"} | both("classifier"),
    ("gpt2", "regression"): {"score.weight"},
}


@pytest.mark.parametrize("name, kind", TRAINED)
def test_a_bilevel_step_moves_the_head_with_the_directions(name, kind, tmp_path):
    """And the magnitudes on val data; nothing else. BERT's pooler stays, since the file has it."""
    peer = checkpoint(tmp_path, name)
    model = load(tmp_path, kind)
    assert trained(model) == TRAINED[name, kind]
    bidora.replace_linear_with_bidora(model, 2, target_modules=read_shape(tmp_path).targets)
    batches = [batch(peer, seed) for seed in (0, 1)]
    batches = [x | {"targets": targets_for(kind, x["attention_mask"])} for x in batches]

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = BilevelOptimizer(model)
    for _ in range(2):  # in the first step B = 0, so that no gradient reaches A
        optimizer.bilevel_step(lambda model, inputs: model(**inputs), *batches)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_pooler_that_the_checkpoint_lacks_trains_too(tmp_path):
    checkpoint(tmp_path, "bert", "ForMaskedLM")
    assert trained(load(tmp_path)) == both("classifier") | both("bert.pooler.dense")


class HeadProblem(Problem):
    """Problem's derivatives, of a task's own loss, times `scale`."""

    scale = 1.0

    def __init__(self, model, inputs):
        self.model = model
        self.lower, self.upper = bidora.lower_parameters(model), bidora.upper_parameters(model)
        self.train, self.val = (self.loss(inputs(seed)) for seed in (0, 1))

    def loss(self, inputs):
        if isinstance(self.model, AnyLanguageModel):
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
            return lambda: self.scale * self.model(inputs["input_ids"], labels)
        targets = targets_for(self.model.kind, inputs["attention_mask"])
        return lambda: self.scale * self.model(**inputs, targets=targets)


def problem_of(name, folder, monkeypatch):
    """A float64 problem on padded rows of a model, adapted in all linear layers of its blocks."""
    if name in ENCODERS:
        inputs = functools.partial(batch, checkpoint(folder, name))
        model = load(folder, "classification", dtype=torch.float64)
    else:
        inputs = functools.partial(batch, checkpoint(folder, name, "ForCausalLM"))
        model = AnyLanguageModel.from_pretrained(folder, torch.float64)
    problem = HeadProblem(adapted(model, read_shape(folder).targets).train(), inputs)
    in_float64(monkeypatch)
    return problem


MODELS = [*ENCODERS, *(name for name in WRITERS if name not in ENCODERS)]


@pytest.mark.filterwarnings("ignore:the terms of the Neumann series grow")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_hypergradients_equal_finite_differences(name, variant, tmp_path, monkeypatch):
    """conjugate_gradient's losses are small, so that damping makes their Hessian positive."""
    problem, (options, truth) = problem_of(name, tmp_path, monkeypatch), VARIANTS[variant]
    problem.scale = 0.05 if variant == "conjugate_gradient" else 1.0
    problem.check(problem.hypergradient(variant, options), truth(problem), variant != "first_order")


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_leaves_hypergradients_as_they_are(name, tmp_path, monkeypatch):
    """Within 1e-12 of the largest, in float64; every block is computed again."""
    problem, calls = problem_of(name, tmp_path, monkeypatch), []
    layer = next(iter(bidora.adapter_layers(problem.model).values()))
    layer.register_forward_hook(lambda *_: calls.append(1) and None)
    plain, once = problem.hypergradient("unrolled", dict(lr=0.5)), len(calls)
    problem.model.gradient_checkpointing = True
    again = problem.hypergradient("unrolled", dict(lr=0.5))
    assert len(calls) - once > once
    scale = max(x.abs().max().item() for x in plain)
    for a, b in zip(again, plain):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name, kind", EACH)
def test_the_adapter_is_peft_and_the_merged_model_transformers(name, kind, tmp_path):
    """And what PEFT trained is loaded. The merged model's config.json has the file's dropouts."""
    checkpoint(tmp_path, name)
    peer = batch(checkpoint(None, name))
    model = adapted(load(tmp_path, kind), read_shape(tmp_path).targets)
    bidora.save_adapter(model, tmp_path / "adapter")
    auto = getattr(transformers, f"AutoModel{CLASSES[kind]}")
    base = auto.from_pretrained(tmp_path, num_labels=LABELS)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_alike(model, theirs.eval(), peer)
    loaded = bidora.load_adapter(load(tmp_path, kind), tmp_path / "adapter")
    assert_alike(loaded, theirs, peer)
    assert trained(loaded) == trained(model)

    with refused("call merge"):
        model.save_pretrained(tmp_path / "merged")
    bidora.merge(model).save_pretrained(tmp_path / "merged", ["p", "q", "r"])
    merged = auto.from_pretrained(tmp_path / "merged")
    assert_alike(load(tmp_path / "merged", kind), theirs, peer)
    assert_alike(loaded, merged.eval(), peer)
    files = tmp_path / "config.json", tmp_path / "merged/config.json"
    before, after = (json.loads(path.read_text()) for path in files)
    assert all(before[key] == after[key] for key in before if "drop" in key)
    assert after["id2label"] == {"0": "p", "1": "q", "2": "r"}


def test_a_saved_classifier_of_gpt2_names_its_padding_so_transformers_takes_batches(tmp_path):
    inputs = batch(checkpoint(tmp_path, "gpt2", eos_token_id=3))
    load(tmp_path).save_pretrained(tmp_path / "saved")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    ids[~real] = 3
    alone = torch.cat([peer(row[mask][None]).logits for row, mask in zip(ids, real)])
    torch.testing.assert_close(peer.eval()(**inputs).logits, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, kind", EACH)
def test_what_peft_trained_is_loaded_with_its_head(name, kind, tmp_path):
    base = checkpoint(tmp_path, name, CLASSES[kind], num_labels=LABELS)
    options = dict(task_type="TOKEN_CLS" if kind == "tagging" else "SEQ_CLS", r=2, use_dora=True)
    targets = list(read_shape(tmp_path).targets)
    config = LoraConfig(target_modules=targets, fan_in_fan_out=name == "gpt2", **options)
    peer = perturbed(get_peft_model(copy.deepcopy(base), config).eval())
    peer.save_pretrained(tmp_path / "adapter")
    assert_alike(bidora.load_adapter(load(tmp_path, kind), tmp_path / "adapter"), peer, batch(base))


def writer(folder, name):
    """Transformers' model of a folder, and ours."""
    return checkpoint(folder, name, "ForCausalLM"), AnyLanguageModel.from_pretrained(folder)


ROWS = [[5, 9, 7, 4, 30, 8], [6, 7], [11, 12, 13, 14]]
ANSWERS = [[3], [4], [5, 6], [5, 8, 9]]


@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("name", WRITERS)
def test_losses_and_scores_are_those_of_transformers_row_by_row(name, shared, tmp_path):
    """Of rows of unequal length, with one supervised position or several, and what they share."""
    peer, model = writer(tmp_path, name)
    rows = [[*range(20, 20 + shared), *row] for row in ROWS]
    starts = [shared + 4, shared + 1, shared + 2]
    labels = [[IGNORED] * start + row[start:] for start, row in zip(starts, rows)]
    losses, right = [], 0
    for row, wanted in zip(rows, labels):
        logits = peer(torch.tensor([row])).logits[0, :-1]
        target = torch.tensor(wanted[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum").item())
        right += (logits.argmax(-1) == target).sum().item()
    count = 2 + 1 + 2
    assert model(rows, labels).item() == pytest.approx(sum(losses) / count, abs=1e-5)
    assert model.totals(rows, labels) == (pytest.approx(sum(losses), abs=1e-4), right, count)
    ids = torch.tensor(rows[:1])
    torch.testing.assert_close(model(ids), peer(ids).logits, rtol=0, atol=1e-5)

    scores = model.score(rows, ANSWERS)
    for i, row in enumerate(rows):
        for j, answer in enumerate(ANSWERS):
            log_p = peer(torch.tensor([[*row, *answer]])).logits[0].log_softmax(-1)
            expected = sum(log_p[len(row) - 1 + k, token] for k, token in enumerate(answer))
            assert scores[i, j].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("name", WRITERS)
def test_what_it_writes_is_what_transformers_writes(name, tmp_path):
    """Greedily; and the best of four beams, without repeated 2-grams in the answer."""
    peer, model = writer(tmp_path, name)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    for row in ROWS:
        ids = torch.tensor([row])
        expected = peer.generate(ids, **options)
        assert torch.equal(model.generate(ids, 8, temperature=0), expected)
        embeds = peer.get_input_embeddings()(ids)
        search = options | dict(num_beams=4, length_penalty=0.9, no_repeat_ngram_size=2)
        [expected] = peer.generate(inputs_embeds=embeds, **search).tolist()
        assert model.beam_search([row, ROWS[0]], (), 8, 4, 0.9, 2)[0] == expected


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_two_back_ends_are_equal(family, tmp_path):
    """model.py and transformers, in fp32: losses, scores, beams, and the adapters' gradients."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **GROUPED)
    config.sliding_window = 4 if family == "Mistral" else None
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    models = Transformer.from_pretrained(tmp_path), AnyLanguageModel.from_pretrained(tmp_path)
    own, other = (adapted(model.requires_grad_(False), ["q_proj", "down_proj"]) for model in models)
    alike = [[*range(4, 16), *row] for row in ROWS]  # and a beginning that they share
    for prompts, answers in itertools.product((ROWS, alike, alike[:1]), ([[3]], ANSWERS)):
        theirs = other.score(prompts, answers)
        torch.testing.assert_close(own.score(prompts, answers), theirs, rtol=0, atol=1e-5)
    search = dict(max_new_tokens=12, stop_ids=[2, 3], num_beams=3, length_penalty=0.9)
    for ngram in (0, 2):
        answers = as_any(own).beam_search(ROWS, **search, no_repeat_ngram_size=ngram)
        assert answers == other.beam_search(ROWS, **search, no_repeat_ngram_size=ngram)
    ids = torch.tensor(ROWS[:1])
    torch.testing.assert_close(as_any(own)(ids), own(ids), rtol=0, atol=1e-5)
    gradients = []
    for model in (own, other):
        loss = model(ROWS, ROWS)
        gradients.append([loss, *torch.autograd.grad(loss, bidora.lower_parameters(model))])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with refused("prompt 1 .from 0. is empty"):
        other.beam_search([[4], []], **search, no_repeat_ngram_size=0)


def test_a_language_models_adapter_is_peft_and_merges(tmp_path):
    for name in WRITERS:
        folder = tmp_path / name
        peer, model = writer(folder, name)
        adapted(model, read_shape(folder).targets)
        bidora.save_adapter(model, folder / "adapter")
        theirs = PeftModel.from_pretrained(peer, folder / "adapter").eval()
        ids = torch.tensor([ROWS[0]])
        expected = theirs(ids).logits
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
        bidora.merge(model).save_pretrained(folder / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)


QUERY, EXTRA = "encoder.layer.1.attention.self.query.weight", "encoder.layer.3.output.dense.bias"
NORM = "embeddings.LayerNorm.bias"
DAMAGED = [  # (a tensor, its size in the file or None if it is missing, message)
    (QUERY, None, f"{QUERY} is miss"),
    (EXTRA, 32, f"unexpected tensor {EXTRA}; config.json says fewer layers"),
    (NORM, 31, f"tensor bert.{NORM} is missing, or of another shape"),
]


@pytest.mark.parametrize("name, size, message", DAMAGED)
def test_a_file_that_does_not_fit_is_refused_in_one_line(name, size, message, tmp_path):
    checkpoint(tmp_path, "bert")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    tensors |= {name: torch.zeros(size)} if size else {}
    save_file(tensors, path, metadata={"format": "pt"})
    with refused(message):
        load(tmp_path)


def test_a_head_of_another_size_is_refused_unless_it_starts_anew(tmp_path):
    checkpoint(tmp_path, "roberta", CLASSES["classification"], num_labels=LABELS)
    with refused(r"out_proj.bias is \(3,\), but 2 labels need \(2,\): give"):
        AnyWithHead.from_pretrained(tmp_path, "classification", 2)
    model = AnyWithHead.from_pretrained(tmp_path, "classification", 2, anew=True)
    assert model.output.out_features == 2


REFUSED = [
    (dict(model_type="nothing"), "transformers .* can't load this model"),
    (dict(model_type="vit"), "can't load .*: ValueError: Unrecognized .*; supported is what AutoM"),
    (dict(quantization_config={"quant_method": "gptq"}), "is quantised already"),
    (dict(model_type=["llama"]), "can't load this model: TypeError"),
    (dict(num_attention_heads=5), "can't load this model: ValueError: The hidden size"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_what_transformers_does_not_compute_is_refused_in_one_line(changes, message, tmp_path):
    config = json.loads(checkpoint(None, "bert").config.to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with refused(message):
        read_shape(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    checkpoint(tmp_path, "bert")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="holds its weights as .bin files only"):
        load(tmp_path)


def test_minilm_finds_the_sentence_of_the_same_meaning():
    """By the cosine of mean hidden states, which is what it was trained for."""
    folder = find_model("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["A cat sits on the mat.", "A kitten rests on a rug.", "Shares fell sharply today."]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = load(folder).hf.base_model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    cosines = means @ means.T
    assert cosines[0, 1] > 0.4 > 0.2 > cosines[0, 2]


def test_an_encoder_without_a_head_is_refused_in_one_line_where_text_is_to_be_written(tmp_path):
    command = [sys.executable, ROOT / "sample.py", "--model=minilm", "--prompt=Hello"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]  # a first use downloads the model, and says so
    assert line.startswith("error: ") and "minilm is an encoder" in line
