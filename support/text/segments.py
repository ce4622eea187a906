"""An example as segments of tokens: which of them are learnt, which only asked or read."""

import json

from support.text.jsonl import FORMATS, format_of, is_learnt
from support.text.question import prefix_of


def segments(example, tokenizer):
    """
    An example of any format but classification, as a list of (token ids, if supervised: None for an
    answer that must not be); and its notes, those of Encoded.
    """
    kind, eos = format_of(example), [tokenizer.eos_id]
    if kind in ("text", "code", "prompt", "generation"):
        prompt = example.get("prompt", "")
        answer = example[FORMATS[kind][-1]]
        answer = "\n" + answer[0] if kind == "generation" else answer
        cuts = [len(prompt)] if prompt else []
        *begin, rest = tokenizer.encode_cut(prompt + answer, cuts)
        begin = sum(begin, [])
        # A text that was rendered already has its first and its last token.
        begin = tokenizer.prefix_of(begin + rest) + begin
        rest += [] if answer.rstrip().endswith(tokenizer.ends) else eos
        return [(begin, False), (rest, True)], ()

    messages = example["messages"] if kind == "messages" else turns_of(example)
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    learnt = [is_learnt(messages[i]) for i in answers]
    last = max(i for i, yes in zip(answers, learnt) if yes)  # nothing is learnt from the rest
    messages = messages[: last + 1]
    lists = {key: example[key] for key in ("tools", "documents") if example.get(key)}
    chat = tokenizer.chat.given(**lists) if lists else tokenizer.chat
    try:
        text, spans, lost = chat.conversation(messages)
    except ValueError as error:
        quoted = f"the example {json.dumps(example, ensure_ascii=False):.80}…"
        raise ValueError(f"{getattr(example, 'where', quoted)}: {error}") from None

    pieces = tokenizer.encode_cut(text, [cut for span in spans for cut in span])
    pieces[0] = prefix_of(tokenizer) + pieces[0]
    pieces.pop()  # the end that the template writes after the last answer
    # The model must learn to stop, also where the template does not mark the end of an answer.
    if not chat.end_of_turn:
        pieces[-1] += eos
    notes = tuple(sorted(lost))
    contents = [messages[i].get("content") or "" for i in answers if i <= last]
    if any(content.rstrip().endswith(tokenizer.ends) for content in contents):
        notes += ("the chat template ends an answer that has an end token already",)
    supervised = [yes for learn in learnt for yes in (False, learn or None)]
    return list(zip(pieces, supervised)), notes


def turns_of(example):
    """An instruction, with the system message and the turns before it, as messages."""
    request = "\n\n".join(filter(None, (example["instruction"], example.get("input"))))
    turns = [("system", example["system"])] if example.get("system") else []
    for question, answer in (*example.get("history", ()), (request, example["output"])):
        turns += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": content} for role, content in turns]
