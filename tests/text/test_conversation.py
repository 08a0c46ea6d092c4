"""Templates and training transforms as literal strings; each malformed conversation has its own error."""

import pytest

from llamavid_jax.text.chat import read_messages
from llamavid_jax.text.conversation import (
    TEMPLATES,
    ConversationError,
    draw_image_sides,
    long_video_text,
    movie_inputs,
    prompt,
    question_per_image,
    template_named,
    training_turns,
)

USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def record(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


RENDERED = {
    "vicuna_v1": USER + " USER: a ASSISTANT: b</s>USER: c ASSISTANT:",
    "imgsp_v1": USER + " USER: a ASSISTANT: b</s>USER: c ASSISTANT:",
    "llava_v1": USER.replace("user", "human") + " USER: a ASSISTANT: b</s>USER: c ASSISTANT:",
    "llava_v0": USER.replace("user", "human") + "###Human: a###Assistant: b###Human: c###Assistant:",
    "llava_llama_2": "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.\n"
    "<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]",
    "plain": "b\n",
    "plain_guided": "b\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering(name):
    assert prompt(template_named(name), ["a", "b", "c"]) == RENDERED[name]


def test_closed_answers_and_empty_turns():
    template = template_named("vicuna_v1")
    assert prompt(template, ["a", "b"]) == USER + " USER: a ASSISTANT: b</s>"
    assert prompt(template, ["a"], open_answer=False) == USER + " USER: a "
    assert prompt(template, ["", "b"]) == USER + " USER:ASSISTANT: b</s>"  # as the original writes an empty turn


def test_plain_keeps_only_the_placeholder():
    assert prompt(template_named("plain_guided"), ["<image>\nDescribe."]) == "<image>"


def test_image_goes_first_and_newlines_are_deleted_for_the_qformer():
    turns, prompts = training_turns(
        template_named("imgsp_v1"), record("red\nblue <image> now? ", "No <image>"), True, []
    )
    assert turns == ["<image>\nred\nblue  now?", "<image>\nNo"]
    assert prompts == ["redblue  now?"]


def test_later_turns_get_the_image_at_the_drawn_side():
    sample = record("Hi", "Hello", "<image>\nWhat?", "Dog", "Why?", "So", "Where?", "There")
    turns, prompts = training_turns(template_named("imgsp_v1"), sample, True, [1, 0])
    assert turns[::2] == ["Hi", "<image>\nWhat?", "Why?\n<image>", "<image>\nWhere?"]
    assert prompts == ["Hi", "What?", "Why?", "Where?"]
    same_turns, prompts = training_turns(template_named("vicuna_v1"), sample, True, [])
    assert same_turns == [turn["value"] for turn in sample]
    assert prompts == ["What?"]


def test_first_turn_of_the_assistant_is_dropped():
    turns, _ = training_turns(
        template_named("vicuna_v1"), [{"from": "gpt", "value": "x"}, *record("a", "b")], False, []
    )
    assert turns == ["a", "b"]


def test_movie_replaces_the_placeholder_and_repeats_nothing():
    movie = movie_inputs("<image>Hello...<image>", 2, training=True)
    assert movie == "<image><image>Hello<image><image>"
    turns, prompts = training_turns(
        template_named("imgsp_v1"), record("<image>\nWho\nspeaks? ", "Ann", "Why?", "So"), True, [], movie
    )
    assert turns == [movie + "\nWho\nspeaks? ", "Ann", "Why?", "So"]
    assert prompts == ["Who\nspeaks?"]


def test_caption_sample():
    turns, prompts = training_turns(template_named("plain_guided"), record("Say\nit.\n<image>", "a dog"), True, [])
    assert (turns, prompts) == (["<image>", "a dog"], ["Sayit."])


def test_draws_are_reproducible_and_fair():
    assert draw_image_sides(3, 8) == draw_image_sides(3, 8)
    assert 40 < sum(draw_image_sides(0, 100)) < 60


def test_long_video_text():
    assert long_video_text("<image>he...<image>", "Why?\n", 2) == (
        "Below is a movie. Memorize the content and answer my question after watching this movie."
        "<image><image>he...<image><image>Now the movie end.\nWhy?\n"
    )


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1", "llava_v0", "llava_llama_2"])
def test_question_per_image_finds_each_turn(name):
    template = template_named(name)
    text = prompt(template, ["<image>\nred\nblue?", "yes", "no image", "ok", "<image>\n<image>\nSame?"])
    assert question_per_image(template, text) == ["red\nblue?", "Same?", "Same?"]


def test_question_of_text_without_template():
    assert question_per_image(template_named("vicuna_v1"), "<image>\nWhat is this?") == ["What is this?"]


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts) if not (len(parts) == 1 and isinstance(parts[0], str)) else parts[0]}


def test_messages_of_chat_apis():
    chat = read_messages(
        [
            {"role": "system", "content": "Be brief."},
            user(
                {"type": "text", "text": "Compare"}, {"type": "video", "path": "a.mp4"}, {"type": "image", "url": "b"}
            ),
            {"role": "assistant", "content": [{"type": "text", "text": "Fine."}]},
            user({"type": "image_url", "image_url": {"url": "c"}}),
            {"role": "assistant", "content": "A cat."},
            user("Sure?"),
        ]
    )
    assert chat.system == "Be brief."
    assert chat.turns == [
        "<image>\n<image>\nCompare",
        "Fine.",
        "<image>",
        "A cat.",
        "<image>\n<image>\n<image>\nSure?",  # for all visuals shown before
    ]
    assert (chat.images, chat.videos) == ([None, "b", "c"] * 2, ["a.mp4", None, None] * 2)
    assert chat.prompts == ["Compare", "Compare", "", *["Sure?"] * 3]
    assert chat.text("vicuna_v1").endswith(
        "Fine.</s>USER: <image> ASSISTANT: A cat.</s>USER: " + chat.turns[-1] + " ASSISTANT:"
    )
    assert chat.text("llava_v1").startswith("Be brief. USER: <image>")


def test_a_later_turn_is_laid_out_as_in_training():
    """If training draws the front for its placeholder."""
    chat = read_messages(
        [
            user("Hi"),
            {"role": "assistant", "content": "Hello"},
            user({"type": "video", "path": "a.mp4"}, {"type": "text", "text": "What?"}),
            {"role": "assistant", "content": "Dog"},
            user("Why?"),
        ]
    )
    turns, prompts = training_turns(
        template_named("imgsp_v1"), record("Hi", "Hello", "<image>\nWhat?", "Dog", "Why?"), True, [0]
    )
    assert (chat.turns, chat.prompts) == (turns, prompts[1:])
    assert chat.videos == ["a.mp4"] * 2


MALFORMED_RECORDS = {
    "conversations is \\[\\]; give a list": ("vicuna_v1", []),
    "conversations is 'hi'": ("vicuna_v1", "hi"),
    "turn 0 is 'hi'; it needs the keys": ("vicuna_v1", ["hi"]),
    "turn 1 is from 'bot'; use 'human' or 'gpt'": ("vicuna_v1", [*record("a"), {"from": "bot", "value": "b"}]),
    "the value of turn 0 is 3, of type int": ("vicuna_v1", [{"from": "human", "value": 3}]),
    "half a surrogate pair at character 1": ("vicuna_v1", record("a\ud83d", "b")),
    "must alternate human, gpt": ("vicuna_v1", [*record("a"), *record("b")]),
    "these are none": ("vicuna_v1", [{"from": "gpt", "value": "b"}]),
    "one human turn with <image> and one gpt turn, but this one has 1 turns": ("plain_guided", record("<image>")),
    "a caption sample": ("plain", record("no image", "caption")),
    "image_sides gives None for turn 2": ("imgsp_v1", record("<image>", "b", "c", "d")),
}


@pytest.mark.parametrize("message", MALFORMED_RECORDS)
def test_malformed_record(message):
    name, conversations = MALFORMED_RECORDS[message]
    with pytest.raises(ConversationError, match=message):
        training_turns(template_named(name), conversations, True, [])


MALFORMED_MESSAGES = {
    "messages is \\[\\]; give a list of messages": [],
    "message 0 is 'hi'; it needs the keys": ["hi"],
    "message 0 is {'role': 'user'}": [{"role": "user"}],
    "message 0 has the role 'tool', but 'user' is next": [{"role": "tool", "content": "x"}],
    "message 1 has the role 'user', but 'assistant' is next": [user("a"), user("b")],
    "message 1 has the role 'system'": [user("a"), {"role": "system", "content": "late"}],
    "hold no user's message": [{"role": "system", "content": "alone"}],
    "the content of message 0 is 5; give a string": [{"role": "user", "content": 5}],
    "message 0 is empty": [user("")],
    "part 0 of message 0 is 'x'; it needs a 'type'": [user("x", "y")],
    "has the type 'audio'; use 'text', 'image' or 'video'": [user({"type": "audio", "path": "x"})],
    "part 0 of message 0 is None, of type NoneType": [user({"type": "text"})],
    "part 0 of message 0 names 0 sources": [user({"type": "image"})],
    "part 0 of message 0 names 2 sources": [user({"type": "image", "path": "a", "url": "b"})],
    "has no 'url' in its 'image_url'": [user({"type": "image_url", "image_url": {}})],
    "has 'num_frames', which is not read here": [user({"type": "video", "path": "a", "num_frames": 8}, "b")],
    "has 'subtitles', which is not read here": [user({"type": "video", "path": "a", "subtitles": "b.srt"}, "b")],
    "has <image> in its text": [user("<image> what?")],
    "shows the system an image": [{"role": "system", "content": [{"type": "image", "url": "a"}]}, user("b")],
    "is the assistant's and has an image": [
        user("a"),
        {"role": "assistant", "content": [{"type": "image", "url": "a"}]},
    ],
}


@pytest.mark.parametrize("message", MALFORMED_MESSAGES)
def test_malformed_messages(message):
    with pytest.raises(ConversationError, match=message):
        read_messages(MALFORMED_MESSAGES[message])


def test_other_malformed_text():
    with pytest.raises(ConversationError, match="no conversation template 'v9'; the templates are vicuna_v1"):
        template_named("v9")
    with pytest.raises(ConversationError, match="has no turns"):
        prompt(template_named("vicuna_v1"), [])
    with pytest.raises(ConversationError, match="none of its 1 has it"):
        training_turns(template_named("imgsp_v1"), record("a"), True, [], movie="<image>")
