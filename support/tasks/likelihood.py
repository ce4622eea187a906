"""
The likelihood of answers: of the same ones to many prompts, and of each example's own choices.

    score(model, prompts, answers)         log p(answer | prompt)
    tokenize(example, tokenizer, size)     {"prompt", "choices", "answer"} as token ids
    evaluate(model, rows)                  which choice is the likeliest, by each of NAMES

A choice follows its prompt after a blank, without a chat template, and blanks at the prompt's end
count with the choice, all as in EleutherAI's lm-evaluation-harness, which names the first two:

    acc         the right choice has the highest log p
    acc_norm    the highest log p divided by the choice's characters (without that blank)
    acc_token   the highest log p divided by its tokens
"""

from statistics import fmean

import torch

NAMES = ("acc", "acc_norm", "acc_token")


@torch.no_grad()
def score(model, prompts, answers):
    """
    log p(answer | prompt) in nats, (prompts, answers). Both are lists of lists of token ids.

    Answers that differ in their last token alone share a forward pass: one-token labels cost one in
    all. All answers to a single prompt share one, in which the prompt passes once.
    """
    heads = list(dict.fromkeys(tuple(answer[:-1]) for answer in answers))
    scores = torch.zeros(len(prompts), len(answers), device=model.lm_head.weight.device)
    for some in [heads] if len(prompts) == 1 else [[head] for head in heads]:
        pairs = [(prompt, head) for head in some for prompt in prompts]
        wanted = [range(len(prompt) - 1, len(prompt) + len(head)) for prompt, head in pairs]
        logits = model.predictions([[*prompt, *head] for prompt, head in pairs], wanted)

        log_p = logits.log_softmax(-1).split([len(prompts) * (len(head) + 1) for head in some])
        for head, own in zip(some, log_p):
            own = own.unflatten(0, (len(prompts), -1))  # (prompts, the answer's tokens, vocab)
            for column, answer in enumerate(answers):
                if tuple(answer[:-1]) == head:
                    scores[:, column] = own[:, range(len(answer)), answer].sum(1)
    return scores


def tokenize(example, tokenizer, block_size):
    """
    (token ids of the prompt, a list of those of each choice, whether the prompt was cut on the left
    to leave room for every choice in block_size tokens). Raises ValueError if there is no room.
    """
    prompt, choices = example["prompt"].rstrip(), []
    for choice in example["choices"]:
        whole = f"{example['prompt']} {choice}"
        choices.append(tokenizer.encode_cut(whole, [len(prompt)])[1])
    ids = tokenizer.prefix_ids + tokenizer.encode(prompt) or [tokenizer.eos_id]

    room = block_size - max(map(len, choices))
    if room < 1:
        raise ValueError(
            f"block_size={block_size} must hold some prompt and the longest choice, which takes "
            f"{block_size - room} tokens: raise block_size; the prompt is {prompt!r:.60}"
        )
    return ids[-room:], choices, len(ids) > room


def evaluate(model, rows, scored=True):
    """
    (summed loss in nats of the right choices' tokens, their number, for each row which of NAMES'
    measures finds the right choice) of a few rows of data.encode.
    """
    loss, count, found = 0.0, 0, []
    for row in rows:
        tokens, texts = zip(*row.choices)
        log_p = score(model, [row.prompt_ids], tokens)[0].double().cpu()
        sizes = (1, *(torch.tensor([len(x) for x in part]) for part in (texts, tokens)))
        found.append([(log_p / size).argmax().item() == row.answer for size in sizes])
        loss, count = loss - log_p[row.answer].item(), count + len(tokens[row.answer])
    return loss, count, found


def scores(found):
    """{name: share of the rows} of what `evaluate` finds."""
    return dict(zip(NAMES, map(fmean, zip(*found))))


def rank(model, tokenizer, prompt, choices, block_size):
    """(probability, choice) of every choice, likeliest first; the probabilities sum to 1."""
    if not choices:
        raise ValueError('the task is multiple_choice: give --labels="one choice,another"')
    ids, tokens, _ = tokenize({"prompt": prompt, "choices": choices}, tokenizer, block_size)
    p = score(model, [ids], tokens)[0].softmax(-1)
    return sorted(zip(p.tolist(), choices), reverse=True)
