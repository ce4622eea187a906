"""
The loss of supervised tokens, and the likelihood of answers to many prompts, or of each example's
own choices, by which EleutherAI's lm-evaluation-harness defines the first two of these scores:

    acc         the right choice has the highest log p(choice | prompt)
    acc_norm    it has the highest log p divided by the choice's characters
    acc_token   it has the highest log p divided by the choice's tokens
"""

from statistics import fmean

import torch
import torch.nn.functional as F


def supervised(input_ids, labels):
    """
    (rows as lists of ids; for each row, the places of the tokens before its supervised ones; these
    ones, (N,)). input_ids, labels: tensors (B, T), or lists of rows; -100: not supervised.
    """
    if isinstance(labels, torch.Tensor):
        input_ids, labels = input_ids.tolist(), labels.tolist()
    wanted = [[t for t, label in enumerate(row[1:]) if label != -100] for row in labels]
    targets = [row[t + 1] for row, places in zip(labels, wanted) for t in places]
    return input_ids, wanted, torch.tensor(targets, dtype=torch.long)


@torch.no_grad()
def totals(model, input_ids, labels):
    """(summed cross-entropy in nats, right predictions, supervised positions): numbers."""
    *rows, targets = supervised(input_ids, labels)
    loss = right = count = 0
    for logits in model.in_parts(*rows):  # not all logits at once
        answers = targets[count : count + len(logits)].to(logits.device)
        loss += F.cross_entropy(logits, answers, reduction="sum").item()
        right += (logits.argmax(1) == answers).sum().item()
        count += len(answers)
    return loss, right, count


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


def evaluate(model, rows, scored=True):
    """
    (summed loss of the right choices in nats, how many tokens these have, and for each of a few
    rows whether the right choice is the best one by each of the scores).
    """
    loss, count, found = 0.0, 0, []
    for row in rows:
        answers, texts = zip(*row.choices)
        log_p = score(model, [row.prompt_ids], answers)[0].double().cpu()
        sizes = [torch.tensor([len(x) for x in lists]) for lists in (texts, answers)]
        found.append([(log_p / size).argmax().item() == row.answer for size in (1, *sizes)])
        loss, count = loss - log_p[row.answer].item(), count + len(answers[row.answer])
    return loss, count, found


def scores(found):
    """{name: share} of what `evaluate` finds."""
    return dict(zip(("acc", "acc_norm", "acc_token"), map(fmean, zip(*found))))
