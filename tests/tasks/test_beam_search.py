"""Beam search against transformers' and against all sequences there are, on tiny random models."""

import itertools

import pytest
import torch
from test_model import CHECKPOINTS, checkpoint

from model import Transformer
from support.tasks.beam_search import beam_search

LENGTHS = 3, 60, 9, 17, 9, 22  # in one batch, but for the second
STOP = [40, 41, 42, 43, 44, 45]  # so many that most answers end before max_new_tokens
SETTINGS = {  # beams, length penalty, n of the n-grams that are not repeated
    "as for E2E": (10, 0.9, 4),
    "long answers": (4, 2.0, 2),
    "short answers": (5, -1.0, 0),
    "no penalty": (3, 0.0, 3),
    "greedy": (1, 0.9, 2),
}


def models(folder, name="llama, llama3", **changes):
    """(transformers' model, ours)"""
    family, settings = CHECKPOINTS[name]
    peer = checkpoint(folder, family, **settings, **changes)
    peer.generation_config.eos_token_id = None
    return peer, Transformer.from_pretrained(folder)


def random_prompts(lengths=LENGTHS):
    return [torch.randint(0, 131, (length,)).tolist() for length in lengths]


def generated(peer, prompts, new, beams, penalty, ngram, stop=STOP, embedded=False):
    """
    transformers' answers to prompts in one batch, cut at a stop token. Padding is on the left, and
    a stop token: its n-grams count, so no other token would do.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([stop[:1] * n + prompt for n, prompt in zip(padding, prompts)])
    mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
    inputs = {"inputs_embeds": peer.get_input_embeddings()(ids)} if embedded else {"input_ids": ids}
    out = peer.generate(
        **inputs,
        attention_mask=mask.long(),
        max_new_tokens=new,
        do_sample=False,
        num_beams=beams,
        length_penalty=penalty if beams > 1 else None,
        no_repeat_ngram_size=ngram,
        eos_token_id=stop,
        pad_token_id=stop[0],
    )
    out = (out if embedded else out[:, longest:]).tolist()
    return [list(itertools.takewhile(lambda token: token not in stop, row)) for row in out]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama, llama3", "mistral, window", "qwen3"])
def test_answers_equal_transformers(tmp_path, name, settings):
    """Token for token: of prompts alone, and of unequal ones in one batch."""
    peer, ours = models(tmp_path, name)
    prompts, settings = random_prompts(), SETTINGS[settings]
    answers = beam_search(ours, prompts, 20, STOP, *settings)
    assert answers == [generated(peer, [prompt], 20, *settings)[0] for prompt in prompts]
    assert answers == generated(peer, prompts, 20, *settings)
    assert any(len(answer) < 20 for answer in answers)


def test_prompts_may_be_left_out_of_what_is_not_repeated(tmp_path):
    """As in transformers, to which a prompt of embeddings has no tokens that could be repeated."""
    peer, ours = models(tmp_path)
    prompts, settings = random_prompts((40, 31)), (4, 0.9, 1)
    answers = beam_search(ours, prompts, 12, STOP, *settings, within_prompt=False)
    assert answers == generated(peer, prompts, 12, *settings, embedded=True)
    assert answers != beam_search(ours, prompts, 12, STOP, *settings)


@pytest.mark.parametrize("stop, penalty", [(2, -0.5), (2, 0.9), (2, 1.3), (3, 0.9)])
def test_enough_beams_find_the_best_of_all_sequences(tmp_path, stop, penalty):
    """
    Of all answers of up to 4 tokens out of 5, one of which stops: the one with the largest sum of
    log p / number of tokens ** penalty, the stop token included in both.
    """
    peer, ours = models(tmp_path, vocab_size=5)
    prompts = [[3, 1], [4, 0, 2, 2], [0], [1, 1]]
    every = torch.tensor(list(itertools.product(range(5), repeat=4)))
    for prompt, answer in zip(prompts, beam_search(ours, prompts, 4, [stop], 700, penalty)):
        rows = torch.cat((torch.tensor([prompt]).expand(len(every), -1), every), dim=1)
        with torch.no_grad():
            log_p = peer(rows).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        log_p = log_p.gather(2, every[:, :, None])[:, :, 0]  # of each sequence's tokens
        scores = {}
        for ids, each in zip(every.tolist(), log_p):
            end = ids.index(stop) + 1 if stop in ids else 4
            scores[tuple(ids[:end])] = (each[:end].sum() / end**penalty).item()
        best = max(scores, key=scores.get)
        assert answer == [token for token in best if token != stop]


def test_no_token_of_a_prompt_is_computed_twice(tmp_path):
    """
    The model computes the prompts' tokens once, and all but the last of each beam's new ones.

    Prompts of 3, 9 and 9 tokens share forward passes, and so do those of 17 and 22. In each group
    the longest needs one for every token by which it exceeds the shortest, and one a new token.
    """
    _, ours = models(tmp_path)
    computed = []
    ours.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: computed.append(inputs[0].numel())
    )
    beam_search(ours, random_prompts(), 12, [], beams=6)
    assert sum(computed) == sum(LENGTHS) + len(LENGTHS) * 6 * (12 - 1)
    assert len(computed) == (9 - 3 + 12) + (22 - 17 + 12) + 12


def test_an_answer_ends_where_every_token_would_repeat_an_n_gram(tmp_path):
    _, ours = models(tmp_path, vocab_size=5)
    (answer,) = beam_search(ours, [[1, 1]], 9, [], 2, no_repeat_ngram=1, within_prompt=False)
    assert sorted(answer) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(beams=0), "beams=0 must be at least 1"),
        (dict(no_repeat_ngram=-1), "no_repeat_ngram=-1 must be at least 0"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
        (dict(prompts=[[1], []]), "prompt 1 .from 0. is empty"),
    ],
)
def test_what_has_no_answer_is_refused(change, said):
    given = dict(model=None, prompts=[[1]], max_new_tokens=5, stop_ids=[2]) | change
    with pytest.raises(ValueError, match=said):
        beam_search(**given)
