"""Conversations as others write them, against transformers; and what a run says of what is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers
from test_checkpoint import KILLED, ROOT, TINY, assert_same_run
from test_merge import generated
from test_tokenizer import CHATML, Listener, both, llama2_tokenizer, per_turn, trained_tokenizer

import data
import sample
import train
from config import Config
from support.tasks.head_task import load_tokenizer
from support.text.splits import Examples, left_out
from support.text.tokenizer import Tokenizer
from support.weights.pretrained import find_model
from tools import merge

# Tools and documents, thoughts by the name that gpt-oss reads, tool calls; {% generation %} marks
# what transformers counts as the assistant's, here without the turns that are not to be learnt.
ANSWER = (
    "{% if m.thinking %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}"
    "{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>' }}"
)
AGENT = per_turn(
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role != 'assistant' %}{{ m.content }}<|im_end|>"
    "{% elif m.weight == 0 or m.train == false %}" + ANSWER + "{% else %}"
    "{% generation %}" + ANSWER + "{% endgeneration %}{% endif %}{{ '\n' }}",
    before="{% for t in tools or [] %}{{ t.function | tojson }}{% endfor %}"
    "{% for d in documents or [] %}{{ d.title ~ ': ' ~ d.text }}{% endfor %}",
)
# For a talk with tools, a template of its own.
NAMED = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": AGENT}]
USER = {"role": "user", "content": "the weather in 12 films?"}
CALL = {"function": {"name": "look_up", "arguments": {"place": "café", "days": 2}}, "type": "x"}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
DOCUMENTS = [{"title": "Films", "text": "It rains."}]


def answer(content="good film", **more):
    return {"role": "assistant", "content": content} | more


CALLS = [answer(None, tool_calls=[CALL, CALL]), {"role": "tool", "content": "rain"}]

TALKS = {
    "tools": dict(messages=[USER, *CALLS, answer()], tools=TOOLS),
    "a call after words": dict(messages=[USER, answer("One moment.", tool_calls=[CALL])]),
    "a call without content": dict(messages=[USER, {"role": "assistant", "tool_calls": [CALL]}]),
    "documents": dict(messages=[USER, answer()], documents=DOCUMENTS, tools=None),
    "thoughts": dict(messages=[USER, answer(reasoning_content="hm"), USER, answer(thinking="ah")]),
    "older thoughts": dict(messages=[USER, answer(reasoning="hm", name=None)]),
    "weights": dict(messages=[USER, answer("a", weight=0), USER, answer("b", weight=1)]),
    "train": dict(messages=[USER, answer("a", train=False), USER, answer("b", train=True)]),
    "an empty turn": dict(messages=[USER, answer("", weight=0), USER, answer("b")]),
    "no content": dict(messages=[USER, answer(None, train=False), USER, answer("b")]),
    "the last turn": dict(messages=[USER, answer("a"), USER, answer("b", weight=0)]),
}


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("name", TALKS)
def test_a_talk_s_tokens_and_labels_are_those_of_transformers(tmp_path, name, train_on_prompt):
    """Up to the last turn that is learnt. A turn of weight 0 is not learnt as a prompt either."""
    talk = TALKS[name]
    _, ours = both(tmp_path, template=NAMED if talk.get("tools") else AGENT)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    more = {key: value for key, value in talk.items() if key != "messages"}
    [row], _ = data.encode([talk], ours, 800, train_on_prompt=train_on_prompt)
    learnt = talk["messages"][: 2 if name == "the last turn" else None]
    options = dict(return_dict=True, return_assistant_tokens_mask=True) | more
    expected = peer.apply_chat_template(learnt, **options)
    ids, mask = (expected[key][: len(row.input_ids)] for key in ("input_ids", "assistant_masks"))
    assert row.input_ids == ids and sum(mask) == sum(expected["assistant_masks"]) > 0
    unlearnt = [t for t in learnt if t.get("weight") == 0 or t.get("train") is False]
    if not train_on_prompt:
        assert row.labels == [token if yes else -100 for token, yes in zip(ids, mask)]
    elif unlearnt:  # one turn: "a" or nothing, and its end
        hidden = [i for i, label in enumerate(row.labels) if label == -100]
        said = unlearnt[0]["content"] or ""
        assert ours.decode([ids[i] for i in hidden], skip_special=False) == said + "<|im_end|>"
        assert hidden == [*range(hidden[0], hidden[0] + len(said) + 1)]
    assert row.notes == ()


def drops(what, messages, template=CHATML, **row):
    return pytest.param(template, dict(messages=messages, **row), what, id=what)


AFTER_THOUGHTS = per_turn(
    "{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
)
NO_SYSTEM = per_turn(
    "{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}"
)
THOUGHT = answer("<think>1 + 3 is\n4</think>\n\n4")


@pytest.mark.parametrize(
    "template, talk, lost",
    [
        drops("the system turn", [{"role": "system", "content": "a"}, USER, answer()], NO_SYSTEM),
        drops("a part of the assistant turn", [USER, THOUGHT], AFTER_THOUGHTS),
        drops("'tools'", [USER, answer()], tools=TOOLS),
        drops("'documents'", [USER, answer()], documents=DOCUMENTS),
        drops("'name' of the user turn", [USER | {"name": "Bob"}, answer()]),
        drops("'weight' of the user turn", [USER | {"weight": 1}, answer()]),
        drops("'tool_calls' of the assistant turn", [USER, answer(tool_calls=[CALL])]),
        drops("'reasoning_content' of the assistant turn", [USER, answer(reasoning_content="hm")]),
    ],
)
def test_what_a_chat_template_drops_is_counted(tmp_path, template, talk, lost):
    """The rest is learnt as if nothing had been dropped."""
    (_, ours), whole = both(tmp_path, template=template), {"messages": [USER, answer("Fine.")]}
    rows, _ = data.encode([talk, whole, talk], ours, 400)
    encoded = {"train": rows[:2], "test": rows[2:]}
    examples = Examples.of({"train": [talk, whole], "val": [], "test": [talk]}, Config())
    said = f"the chat template drops {lost} in 2 of 3 examples"
    assert [*left_out(examples, encoded, [])] == [said]
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = peer.apply_chat_template(talk["messages"], tokenize=False)
    assert ours.decode(rows[0].input_ids, skip_special=False) == expected.removesuffix("\n")


@pytest.mark.parametrize("opening", ["<|im_start|>assistant\n" + x for x in ("", "<think>\n")])
def test_a_prompt_that_ends_otherwise_than_training_texts_is_said(tmp_path, opening):
    """transformers' prompt against its training text; written thoughts follow it."""
    turn = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    _, ours = both(tmp_path, template=per_turn(turn, opening))
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in [[USER, answer()], [USER, answer("<think>\nhm</think>Fine.")]]:
        [row], _ = data.encode([{"messages": talk}], ours, 400)
        asked = peer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
        whole = peer.apply_chat_template(talk, tokenize=False)
        tail = asked[len(os.path.commonprefix([asked, whole])) :]
        said = f"the prompt for an answer ends with {tail!r}, after which no answer is learnt"
        assert row.notes == ((said,) if tail else ())


def test_a_template_for_tools_may_be_a_file_of_its_own(tmp_path):
    """As transformers saves it, and as it is copied into a trained model's folder."""
    trained_tokenizer(tmp_path / "a", template=NAMED)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b/additional_chat_templates/tool_use.jinja").exists()
    (tmp_path / "c").mkdir()
    Tokenizer.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    for folder in ("b", "c"):
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        expected = peer.apply_chat_template([USER, answer()], tools=TOOLS, tokenize=False)
        chat = Tokenizer.from_pretrained(tmp_path / folder).chat
        assert chat.given(tools=TOOLS).render([USER, answer()]) == expected
        assert chat.render([USER]) == peer.apply_chat_template([USER], tokenize=False)


def test_parts_of_a_content_are_joined_as_transformers_joins_them(tmp_path):
    from transformers.cli.serving.utils import BaseHandler, Modality

    parts = [{"type": "text", "text": text} for text in ("good", "film")]
    write, turn = (tmp_path / "a.jsonl").write_text, {"role": "user", "content": parts}
    write(json.dumps({"messages": [turn, answer()]}))
    [talk] = data.load_examples(tmp_path / "a.jsonl")
    peer = BaseHandler.get_processor_inputs_from_messages([turn], Modality.LLM)
    assert talk["messages"][:1] == peer
    picture = {"role": "user", "content": [{"type": "image_url"}]}
    write(json.dumps({"messages": [picture, answer()]}))
    with pytest.raises(ValueError, match="a.jsonl:1: .*'image_url': only texts can be learnt"):
        data.load_examples(tmp_path / "a.jsonl")


def test_an_answer_that_vanishes_is_refused(tmp_path):
    """Its tool calls are all that it has, and the template does not write them."""
    _, ours = both(tmp_path)
    with pytest.raises(ValueError, match="the chat template omits an answer"):
        data.encode([{"messages": [USER, answer("", tool_calls=[CALL])]}], ours, 400)


@pytest.mark.parametrize("tokenizer", ["llama3", "llama2"])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_a_rendered_text_gets_no_second_begin_or_end(tmp_path, tokenizer, begun, ended):
    """Written as text, as prompt and completion, or asked with --raw: one of each at its ends."""
    if tokenizer == "llama2":
        llama2_tokenizer(tmp_path)
        begin, end = "<s>", "</s>"
    else:
        trained_tokenizer(tmp_path, "llama3")
        begin, end = "<|im_start|>", "<|im_end|>"
    ours = Tokenizer.from_pretrained(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = peer.encode(f"{begin}a good{end}", add_special_tokens=False)
    head = peer.encode(f"{begin}a", add_special_tokens=False)
    prompt, answer = begin * begun + "a", " good" + end * ended
    examples = [{"text": prompt + answer}, {"prompt": prompt, "completion": answer}]
    for example, unlearnt in zip(examples, (1, len(head))):
        [row], _ = data.encode([example], ours, 400)
        assert row.input_ids == expected
        assert row.labels[unlearnt:] == expected[unlearnt:]
    model = Listener()
    sample.answer(model, ours, prompt, sample.Sample())
    assert model.heard == [head]


def test_references_are_compared_without_their_end_token(tmp_path):
    _, ours = both(tmp_path)
    ended, bare = ([{"prompt": "a", "references": ["good" + x]}] for x in ("<|im_end|>", ""))
    [row], [expected] = (data.encode(x, ours, 400)[0] for x in (ended, bare))
    assert row == expected


@pytest.mark.parametrize("cased", [True, False])
@pytest.mark.parametrize("named", [{}, {"do_lower_case": True}, {"do_lower_case": False}])
@pytest.mark.parametrize("accents", [None, True, False])
def test_a_head_s_tokenizer_lowers_and_strips_as_transformers_does(tmp_path, cased, named, accents):
    """Whatever tokenizer.json says: BertTokenizer takes the settings, or their defaults."""
    vocab = {token: i for i, token in enumerate("[UNK] hello Hello é e".split())}
    written = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    written.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=not cased)
    written.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    written.save(str(tmp_path / "tokenizer.json"))
    named = named | {"tokenizer_class": "BertTokenizer", "strip_accents": accents}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    ours, _ = load_tokenizer(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("Hello é").tokens == peer.tokenize("Hello é")


def test_an_answer_that_ends_already_is_said(tmp_path):
    _, ours = both(tmp_path)
    [row], _ = data.encode([{"messages": [USER, answer("Fine.<|im_end|>")]}], ours, 400)
    assert row.notes == ("the chat template ends an answer that has an end token already",)


def test_white_space_may_follow_the_end_of_a_rendered_text(tmp_path):
    _, ours = both(tmp_path)
    text = ours.apply_chat_template([USER, answer()])
    [row], _ = data.encode([{"text": text}], ours, 400)
    assert text.endswith("<|im_end|>\n") and row.input_ids == ours.encode(text)


THOUGHTFUL = answer("good", reasoning_content="hm")
WITH_TOOLS = dict(messages=[USER, *CALLS, answer("good")], tools=TOOLS)
SYSTEM = {"role": "system", "content": "short"}


@pytest.mark.parametrize(
    "talk, written",
    [
        (WITH_TOOLS, "good"),
        (dict(messages=[USER, THOUGHTFUL]), "<think>hm</think>good"),
        (dict(messages=[USER, answer("bad", weight=0), USER, answer("good")]), "good"),
        (dict(messages=[SYSTEM, USER, answer("good")]), "good"),
        (dict(messages=[USER, answer("2 films")]), "2 films"),
    ],
    ids=["tools", "thoughts", "weights", "system", "dated template"],
)
def test_each_talk_s_answer_ends_where_it_should(elsewhere, talk, written):
    """Through train.py, sample.py, tools.merge, and transformers' generate on the merged folder."""
    shutil.copytree(find_model("tiny-random"), "model")
    dated = written == "2 films"
    template = AGENT.replace("{% for t", "{{ strftime_now('%Y') }}{% for t", 1) if dated else AGENT
    Path("model/chat_template.jinja").write_text(template)
    Path("talks.jsonl").write_text("\n".join([json.dumps(talk)] * 20))
    arguments = ["--model=model", "--train_file=talks.jsonl", "--method=lora", "--dtype=float32"]
    arguments += ["--search_steps=30", "--retrain_steps=60", "--lower_lr=2e-2", "--out_dir=run"]
    assert train.main([*arguments, "--block_size=512"]) == 0
    asked, tools = talk["messages"][:-1], talk.get("tools")
    adapted, tokenizer, _ = sample.load("run", "", "cpu", "")
    tokenizer.chat = tokenizer.chat.given(tools=tools)
    assert sample.answer(adapted, tokenizer, asked, sample.Sample()) == written
    assert merge.main(["--adapter=run", "--out_dir=merged"]) == 0
    assert generated("merged", asked, tools) == f"{written}<|im_end|>"


def test_a_run_keeps_the_date_on_which_it_began(elsewhere):
    """Killed in one time zone and resumed in another, 26 hours ahead; as if it had not been."""
    shutil.copytree(find_model("tiny-random"), "model")
    dated = per_turn("{{ m.content }}", before="{{ strftime_now('%d %b %Y') }}")
    Path("model/chat_template.jinja").write_text(dated)
    arguments = [f"--{key}={value}" for key, value in (TINY | {"model": "model"}).items()]

    def run(out, zone, *program):
        command = [sys.executable, *program, *arguments, f"--out_dir={out}", "--resume=True"]
        subprocess.run(command, env=os.environ | {"TZ": zone}, check=True)

    run("whole", "Etc/GMT+12", ROOT / "train.py")
    run("killed", "Etc/GMT+12", "-c", KILLED.format(root=str(ROOT), kills=[(30, 0)]))
    assert [*Path("killed/checkpoints").iterdir()]
    run("killed", "Etc/GMT-14", ROOT / "train.py")
    assert_same_run("whole", "killed")
