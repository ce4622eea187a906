"""
Beam search with a length penalty, for many prompts at once. For data-to-text on E2E, LoRA's paper
(arXiv 2106.09685) uses 10 beams, length penalty 0.9 and no repeated 4-grams:

    stop = [tokenizer.eos_id]
    answers = beam_search(model, prompts, 64, stop, 10, 0.9, no_repeat_ngram=4, within_prompt=False)

Each step extends every running beam of a prompt by its likeliest tokens and keeps the likeliest of
these sequences. A beam that stops is finished. Its score, where the stop token counts, is

    sum of log p over its tokens / number of its tokens ** length_penalty

The search ends when no running beam, at its present length, scores better than the worst finished
one, as in transformers 5 with early_stopping=False. One beam is greedy search.

Prompts of unequal length need no padding: the model reads the shortest prompt's length of each,
then a longer prompt's next tokens while the shorter ones' beams grow. So in every step all rows are
equally long and share a forward pass.
"""

import math

import torch


class Search:
    """
    The search for one prompt. A sequence is (sum of log p in nats, or the score once finished; the
    place in `running` of the sequence it extends; ids with the prompt's).
    """

    def __init__(self, prompt, start, max_new_tokens, stop_ids, beams, length_penalty):
        self.prompt, self.most, self.stop_ids = prompt, len(prompt) + max_new_tokens, stop_ids
        self.beams, self.length_penalty = beams, length_penalty
        self.candidates = max(2, 1 + len(stop_ids)) * beams  # so at least `beams` of them go on
        self.running = [(0.0, 0, prompt[:start])]  # best first; empty when the search has ended
        self.finished = []  # at most `beams`, best first

    def advance(self, log_p, tokens):
        """Extend the running sequences by their likeliest next tokens (a list for each of them)."""
        read = len(self.running[0][2])
        if read < len(self.prompt):
            self.running = [(0.0, 0, self.prompt[: read + 1])]
            return

        extended = [
            (total + p, parent, token)
            for parent, (total, _, _) in enumerate(self.running)
            for p, token in zip(log_p[parent], tokens[parent])
            if p > -math.inf
        ]
        extended.sort(key=lambda candidate: candidate[0], reverse=True)
        scale = (read + 1 - len(self.prompt)) ** self.length_penalty

        before, self.running = self.running, []
        for rank, (total, parent, token) in enumerate(extended[: self.candidates]):
            ids = [*before[parent][2], token]
            if token not in self.stop_ids and len(ids) < self.most:
                self.running.append((total, parent, ids))
            elif rank < self.beams:
                self.finished.append((total / scale, parent, ids))
        self.finished.sort(key=lambda sequence: sequence[0], reverse=True)
        del self.running[self.beams :], self.finished[self.beams :]

        if not extended and not self.finished:  # every token would repeat an n-gram
            self.finished = before[:1]
        full = len(self.finished) == self.beams
        if full and self.running and self.running[0][0] / scale <= self.finished[-1][0]:
            self.running = []

    def answer(self):
        """The best finished sequence's new tokens, without the stop token."""
        new = self.finished[0][2][len(self.prompt) :] if self.finished else []
        return new[:-1] if new and new[-1] in self.stop_ids else new


def repeating(ids, n):
    """The tokens that would repeat an n-gram of ids if they came next."""
    last = ids[len(ids) - n + 1 :]
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == last]


@torch.no_grad()
def search_together(model, searches, no_repeat_ngram, within_prompt):
    """Run searches, whose first rows are equally long, to their ends."""
    device, count = model.lm_head.weight.device, searches[0].candidates
    caches = [{} for _ in model.model.layers]
    new = [search.running[0][2] for search in searches]  # the tokens that the caches lack

    while searches:
        hidden = model.hidden_states(torch.tensor(new, device=device), caches)[:, -1]
        log_p = model.lm_head(hidden).float().log_softmax(-1)  # (rows, vocab)
        rows = [(search, ids) for search in searches for _, _, ids in search.running]
        for row, (search, ids) in enumerate(rows if no_repeat_ngram else ()):
            past = ids if within_prompt else ids[len(search.prompt) :]
            log_p[row, repeating(past, no_repeat_ngram)] = -math.inf
        likeliest = log_p.topk(min(count, log_p.size(-1)))
        log_p, tokens = likeliest.values.tolist(), likeliest.indices.tolist()

        parents, row = [], 0  # the rows that the next step's rows extend
        for search in searches:
            end = row + len(search.running)
            search.advance(log_p[row:end], tokens[row:end])
            parents += [row + parent for _, parent, _ in search.running]
            row = end
        searches = [search for search in searches if search.running]
        new = [ids[-1:] for search in searches for _, _, ids in search.running]
        if searches and parents != list(range(row)):
            order = torch.tensor(parents, device=device)
            for cache in caches:
                cache.update({name: x.index_select(0, order) for name, x in cache.items()})


def beam_search(
    model,
    prompts,
    max_new_tokens,
    stop_ids,
    beams=10,
    length_penalty=0.9,
    no_repeat_ngram=0,
    batch_size=16,
    *,
    within_prompt=True,
):
    """
    The best continuation of each prompt (a list of token ids): the new ids, without the stop token.

    model: a model.Transformer. length_penalty: above 0 it favours long answers, below 0 short ones.
    no_repeat_ngram: the length of n-grams that no answer may repeat, or 0; within_prompt: including
    the prompt's n-grams (transformers does, LoRA's code doesn't). batch_size: the prompts that
    share a forward pass. Raises ValueError for an empty prompt and for numbers out of range.
    """
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("beams", beams, 1),
        ("no_repeat_ngram", no_repeat_ngram, 0),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} (from 0) is empty: give it a token")

    settings = max_new_tokens, set(stop_ids), beams, length_penalty
    answers = [None] * len(prompts)
    left = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while left:
        start = len(prompts[left[0]])
        # Prompts that are longer by more take fewer steps in batches of their own.
        group = [i for i in left[:batch_size] if len(prompts[i]) - start <= max_new_tokens]
        left = left[len(group) :]
        searches = [Search(prompts[i], start, *settings) for i in group]
        search_together(model, searches, no_repeat_ngram, within_prompt)
        for i, search in zip(group, searches):
            answers[i] = search.answer()
    return answers
