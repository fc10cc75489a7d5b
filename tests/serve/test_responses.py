"""/v1/responses with OpenAI's own client."""

from __future__ import annotations

import openai
import pytest
from serving import chat_ids, text_alone


def test_whole_and_streamed(client, alone, tokenizer):
    expected = text_alone(alone["red"], tokenizer, chat_ids(tokenizer, "Who?"), 12)
    options = {"model": "red", "temperature": 0, "max_output_tokens": 12}
    answer = client.responses.create(input="Who?", **options)
    assert answer.output_text == expected
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 12
    assert answer.usage.input_tokens == len(chat_ids(tokenizer, "Who?"))
    again = client.responses.create(input=[{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}],
                                    **options)  # fmt: skip
    assert again.output_text == expected
    events = list(client.responses.create(input="Who?", stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == expected
    assert events[-1].response.usage == answer.usage
    with client.responses.stream(input="Who?", **options) as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == expected


def test_turns_and_instructions(client, alone, tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "Why?"},
    ]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = text_alone(alone["blue"], tokenizer, prompt, 8)
    answer = client.responses.create(model="blue", instructions="Be brief.", input=chat[1:], temperature=0,
                                     max_output_tokens=8, store=False)  # fmt: skip
    assert answer.output_text == expected
    parts = [item.model_dump() for item in answer.output]
    more = client.responses.create(model="blue", input=[*chat[1:], *parts, chat[1]], max_output_tokens=2)
    assert more.usage.output_tokens == 2


@pytest.mark.parametrize(
    "options",
    [
        {"store": True}, {"previous_response_id": "x"}, {"tools": []}, {"background": True}, {"truncation": "auto"},
        {"reasoning": {"effort": "low"}}, {"text": {"format": {"type": "text"}}}, {"include": []}, {"seed": 1},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(client, options):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="red", input="Who?", extra_body=options)
    assert caught.value.body["param"] == next(iter(options))


def test_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="yellow", input="Who?")
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="red", input="word " * 3000)
    assert (caught.value.body["code"], caught.value.body["param"]) == ("context_length_exceeded", "input")
