"""Adapters and hypergradients on others' random models, against float64 differences and PEFT."""

import copy

import pytest
import torch
import torch.nn as nn
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.sparse.linalg import LinearOperator, minres
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import bidora
from bidora import load_adapter, merge, replace_linear_with_bidora, save_adapter
from bilevel import HYPERGRADIENTS, create_bilevel_optimizer
from hypergrad import first_order

BASE = dict(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
BASE |= dict(num_attention_heads=4)
DECODER = BASE | dict(num_key_value_heads=2)
ENCODER = BASE | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1)
T5 = dict(vocab_size=41, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0)
T5["decoder_start_token_id"] = 0
GPT2 = dict(vocab_size=41, n_embd=16, n_layer=2, n_head=4)
GPT2 |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
DISTILBERT = dict(vocab_size=41, dim=16, hidden_dim=24, n_layers=2, n_heads=4)
DISTILBERT |= dict(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
BERT_TARGETS = ["query", "value", "intermediate.dense"]
VIT = ENCODER | dict(image_size=8, patch_size=4)
AST = ENCODER | dict(patch_size=4, max_length=16, num_mel_bins=8, frequency_stride=2, time_stride=4)
WHISPER = dict(d_model=16, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=24)
WHISPER |= dict(num_mel_bins=8, max_source_positions=10)
WAV2VEC2 = ENCODER | dict(conv_dim=(16,), conv_stride=(4,), conv_kernel=(8,), layerdrop=0.0)
WAV2VEC2 |= dict(feat_extract_norm="layer", num_conv_pos_embedding_groups=2, hidden_dropout=0.0)
WAV2VEC2 |= dict(attention_dropout=0.0, final_dropout=0.0, feat_proj_dropout=0.0)
WAV2VEC2 |= dict(activation_dropout=0.0, apply_spec_augment=False, num_conv_pos_embeddings=4)

# a class of transformers: (its settings, target modules, the head that is trained beside adapters)
ARCHITECTURES = {
    "LlamaForCausalLM": (DECODER, ["q_proj", "v_proj", "down_proj"], None),
    "Qwen2ForCausalLM": (DECODER, ["q_proj", "k_proj", "up_proj"], None),
    "BertForSequenceClassification": (ENCODER, BERT_TARGETS, "classifier"),
    "T5ForConditionalGeneration": (T5, ["q", "v", "wo"], None),
    "GPT2LMHeadModel": (GPT2, ["c_attn", "c_proj"], None),
    "DistilBertForSequenceClassification": (DISTILBERT, ["q_lin", "v_lin", "lin1"], "classifier"),
    "ViTForImageClassification": (VIT, ["q_proj", "fc1"], "classifier"),
    "ASTForAudioClassification": (AST, ["q_proj", "fc1"], "classifier"),
    "WhisperForAudioClassification": (WHISPER, ["q_proj", "v_proj", "fc1"], "classifier"),
    "Wav2Vec2ForSequenceClassification": (WAV2VEC2, ["q_proj", "output_dense"], "classifier"),
    "torch.nn.TransformerEncoder": ({}, ["linear1", "linear2"], None),
}
# {a class whose inputs are not token ids: (their name, their shape)}
SIGNALS = {
    "ViTForImageClassification": ("pixel_values", (3, 3, 8, 8)),
    "ASTForAudioClassification": ("input_values", (3, 16, 8)),
    "WhisperForAudioClassification": ("input_features", (3, 8, 20)),
    "Wav2Vec2ForSequenceClassification": ("input_values", (3, 64)),
    "torch.nn.TransformerEncoder": ("src", (3, 7, 16)),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    """(base in eval mode, its inputs for a seed, target modules, head)."""
    settings, targets, head = ARCHITECTURES[request.param]
    if settings:
        build = getattr(transformers, request.param)
        model = build(build.config_class(**settings, initializer_range=0.1))
    else:
        layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2)

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        if request.param in SIGNALS:
            name, shape = SIGNALS[request.param]
            return {name: torch.randn(shape, generator=generator)}
        ids = torch.randint(2, 41, (3, 7), generator=generator)
        return {"input_ids": ids} | ({"labels": ids.flip(1)} if settings is T5 else {})

    return model.eval().requires_grad_(False), inputs, targets, head


def outputs(model, inputs):
    """The logits, or torch's own encoder's output."""
    with torch.no_grad():
        result = model(**inputs)
    return getattr(result, "logits", result)


def loss_of(result):
    """Cross-entropy of class 0."""
    y = getattr(result, "logits", result)
    return F.cross_entropy(y.flatten(0, -2), y.new_zeros(y[..., 0].numel()).long())


def moved(model, targets):
    """The model with adapters that have been moved."""
    replace_linear_with_bidora(model, 2, 8, target_modules=targets)
    for layer in bidora.adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
        m = layer.lora_magnitude_vector.data
        m.mul_(torch.linspace(0.8, 1.2, len(m)))
    return model


def adapted(base, targets):
    return moved(copy.deepcopy(base), targets)


def perturbed(peer):
    """PEFT's model with trained parameters that have been moved."""
    for parameter in peer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return peer


def test_new_adapters_change_nothing(architecture):
    """Within 1e-6: a bias is added after the magnitude, in another order than the base's."""
    base, inputs, targets, _ = architecture
    before = outputs(base, inputs(0))
    model = replace_linear_with_bidora(copy.deepcopy(base), 2, target_modules=targets)
    torch.testing.assert_close(outputs(model, inputs(0)), before, rtol=0, atol=1e-6)


def test_three_bilevel_steps_move_what_each_level_trains_and_nothing_else(architecture):
    base, inputs, targets, _ = architecture
    model = replace_linear_with_bidora(copy.deepcopy(base), 2, target_modules=targets)
    optimizer = create_bilevel_optimizer(model, lower_lr=1e-2, upper_lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for step in range(3):
        optimizer.bilevel_step(lambda m, x: loss_of(m(**x)), inputs(2 * step), inputs(2 * step + 1))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_training_and_evaluation_mode_agree(architecture):
    """To a thousandth of what adapters change. Dropout is 0: only a model's fast paths differ."""
    base, inputs, targets, _ = architecture
    model = adapted(base, targets)
    training, evaluating = outputs(model.train(), inputs(0)), outputs(model.eval(), inputs(0))
    change = (training - outputs(base, inputs(0))).abs().max()
    assert (training - evaluating).abs().max() < 1e-3 * change


def test_saved_loaded_merged_and_read_by_peft(architecture, tmp_path):
    """A trained head is saved along. Within 1e-5 of logits of about 1."""
    base, inputs, targets, head = architecture
    model = adapted(base, targets)
    if head:
        for parameter in getattr(model, head).parameters():
            parameter.requires_grad_(True).data.add_(0.1)
    expected = outputs(model, inputs(0))
    save_adapter(model, tmp_path)

    loaded = load_adapter(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, inputs(0)), expected, rtol=0, atol=1e-5)
    merged = merge(loaded)
    torch.testing.assert_close(outputs(merged, inputs(0)), expected, rtol=0, atol=1e-5)
    shapes = {name: p.shape for name, p in base.named_parameters()}
    assert {name: p.shape for name, p in merged.named_parameters()} == shapes

    # In training mode, since PEFT's adapters vanish in torch's fast path; dropout is 0.
    peer = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).train()
    torch.testing.assert_close(outputs(peer, inputs(0)), expected, rtol=0, atol=1e-5)


def test_what_peft_trained_is_loaded(architecture, tmp_path):
    """Heads included, within 1e-5 of logits of about 1."""
    base, inputs, targets, head = architecture
    task_type = "SEQ_CLS" if head and "input_ids" in inputs(0) else None
    options = dict(modules_to_save=[head] if head else None, fan_in_fan_out="c_attn" in targets)
    config = LoraConfig(task_type=task_type, target_modules=targets, use_dora=True, **options)
    peer = perturbed(get_peft_model(copy.deepcopy(base), config))
    expected = outputs(peer.train(), inputs(0))
    peer.save_pretrained(tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(outputs(loaded, inputs(0)), expected, rtol=0, atol=1e-5)


class Problem:
    """A float64 bi-level problem, with all derivatives by finite differences of gradients."""

    def __init__(self, base, inputs, targets):
        self.model = adapted(base, targets).double()
        self.lower = bidora.lower_parameters(self.model)
        self.upper = bidora.upper_parameters(self.model)
        self.train, self.val = (self.loss(inputs(seed)) for seed in (0, 1))

    def loss(self, inputs):
        inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
        return lambda: loss_of(self.model(**inputs))

    def at(self, function, moves):
        """function() with parameters moved by {parameter: change}."""
        for p, change in moves:
            p.data = p.data + change
        value = function()
        for p, change in moves:
            p.data = p.data - change
        return value

    def gradient(self, loss, parameters):
        return torch.autograd.grad(loss(), parameters)

    def along(self, xs, epsilon=1e-5):
        """(H·x, the first entry of ∂²L/∂m∂V · x), from train gradients at V ± ε·x."""
        wanted = [*self.lower, self.upper[0]]
        scale = epsilon / sum(x.square().sum() for x in xs).sqrt()

        def moved(step):
            moves = [(p, step * x) for p, x in zip(self.lower, xs)]
            return self.at(lambda: self.gradient(self.train, wanted), moves)

        plus, minus = moved(scale), moved(-scale)
        difference = [(p - q) / (2 * scale) for p, q in zip(plus, minus)]
        return difference[:-1], difference[-1][0].item()

    def slope(self, function, epsilon=1e-5):
        """d function / d (first magnitude) by a central difference."""
        one = torch.zeros_like(self.upper[0])
        one[0] = epsilon
        plus, minus = (self.at(function, [(self.upper[0], sign * one)]).item() for sign in (1, -1))
        return (plus - minus) / (2 * epsilon)

    def after_steps(self, steps, lr):
        """The val loss after gradient steps on the train loss, as a function of the magnitudes."""
        before = [p.data for p in self.lower]
        for _ in range(steps):
            for p, g in zip(self.lower, self.gradient(self.train, self.lower)):
                p.data = p.data - lr * g
        value = self.val().detach()
        for p, data in zip(self.lower, before):
            p.data = data
        return value

    def slope_after(self, steps):
        return self.slope(lambda: self.after_steps(steps, 0.5))

    def implicit(self, solve):
        """∂F/∂m - ∂²L/∂m∂V · solve(∂F/∂V), its first entry."""
        q = solve(self.gradient(self.val, self.lower))
        return self.slope(lambda: self.val().detach()) - self.along(q)[1]

    def hypergradient(self, variant, options):
        """By the function that a variant names."""
        function = HYPERGRADIENTS[variant.partition(",")[0]].function
        return function(self.train, self.val, self.lower, self.upper, **options)

    def check(self, h, truth, crosses=True):
        """To 1e-6 of the largest number, which differences leave; the cross term is far above."""
        scale = max(x.abs().max().item() for x in h)
        assert abs(h[0][0].item() - truth) < 1e-6 * scale
        direct = first_order(self.train, self.val, self.lower, self.upper)
        cross = max((a - b).abs().max().item() for a, b in zip(h, direct))
        assert not crosses or cross > 1e-4 * scale

    def series(self, v, terms, alpha):
        """alpha · Σ_{j<terms} (I - alpha·H)^j · v."""
        power = total = list(v)
        for _ in range(terms - 1):
            power = [x - alpha * h for x, h in zip(power, self.along(power)[0])]
            total = [a + b for a, b in zip(total, power)]
        return [alpha * x for x in total]

    def solution(self, v, damping):
        """The q of (H + damping·I)·q = v, by scipy's MINRES."""

        def shaped(flat):
            parts = torch.from_numpy(flat.copy()).split([x.numel() for x in v])
            return [part.view_as(x) for part, x in zip(parts, v)]

        def product(flat):
            xs = shaped(flat)
            damped = [h + damping * x for h, x in zip(self.along(xs)[0], xs)]
            return parameters_to_vector(damped).numpy()

        b = parameters_to_vector(v).numpy()
        system = LinearOperator((len(b), len(b)), product, dtype=b.dtype)
        return shaped(minres(system, b, rtol=1e-10)[0])


VARIANTS = {
    "first_order": ({}, lambda p: p.slope_after(0)),
    "unrolled": (dict(lr=0.5), lambda p: p.slope_after(1)),
    "unrolled, two steps": (dict(lr=0.5, steps=2), lambda p: p.slope_after(2)),
    "finite_difference": (dict(lr=0.5, radius=1e-4), lambda p: p.slope_after(1)),
    "neumann": (dict(terms=3, alpha=0.5), lambda p: p.implicit(lambda v: p.series(v, 3, 0.5))),
}
DAMPED = dict(iterations=30, damping=20.0)
VARIANTS["conjugate_gradient"] = DAMPED, lambda p: p.implicit(lambda v: p.solution(v, 20.0))


def in_float64(monkeypatch):
    """The models' norms and softmaxes say torch.float32, which leaves differences only noise."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.filterwarnings("ignore:the terms of the Neumann series grow")
@pytest.mark.parametrize("variant", VARIANTS)
def test_hypergradients_equal_finite_differences(architecture, variant, monkeypatch):
    in_float64(monkeypatch)
    problem = Problem(*architecture[:3])
    options, truth = VARIANTS[variant]
    problem.check(problem.hypergradient(variant, options), truth(problem), variant != "first_order")
