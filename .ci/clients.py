"""Checks of a server by clients that other people wrote. See .ci/clients."""

import asyncio
import json
import sys

import anthropic
import litellm
import openai

from serving import serving

litellm.suppress_debug_info = True

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}]


def check_weather(arguments):
    assert arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9, arguments


def chats(client):
    options = {"model": "m", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "length" and len(whole.choices[0].logprobs.content) == 12
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == 12
    several = client.chat.completions.create(**{**options, "temperature": 0.9}, n=3, seed=3, stop=["e"])
    assert [c.index for c in several.choices] == [0, 1, 2]
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(**{**options, "max_tokens": 400}, response_format=form)
    check_weather(json.loads(answer.choices[0].message.content))


def chat_tools(client):
    options = {"model": "m", "messages": MESSAGES, "max_tokens": 200, "temperature": 0, "tools": TOOLS}
    options["tool_choice"] = "required"
    options["parallel_tool_calls"] = False
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    check_weather(json.loads(call.function.arguments))
    with client.chat.completions.stream(**options) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
    assert len(done) == 1 and done[0].arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    more = MESSAGES + [answer.choices[0].message.model_dump(exclude_none=True), result]
    client.chat.completions.create(**{**options, "messages": more, "tool_choice": "auto", "max_tokens": 4})


def completions(client):
    options = {"model": "m", "prompt": "In the beginning", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**options, logprobs=2)
    assert len(whole.choices[0].logprobs.tokens) == 12
    stream = client.completions.create(**options, stream=True)
    assert "".join(c.choices[0].text for c in stream if c.choices) == whole.choices[0].text


def responses(client):
    options = {"model": "m", "instructions": "s", "input": "Hello", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**options)
    assert whole.output_text and whole.status == "incomplete" and whole.usage.output_tokens == 12
    events = list(client.responses.create(**options, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))
    tool = {"type": "function", "name": "weather", "description": "Tells it.", "parameters": SCHEMA, "strict": True}
    options.update(max_output_tokens=200, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    answer = client.responses.create(**options)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    check_weather(json.loads(call.arguments))
    with client.responses.stream(**options) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output[0].arguments == call.arguments
    items = [{"role": "user", "content": "Hello"}, call.model_dump(exclude_none=True)]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "It rains."})
    client.responses.create(**{**options, "input": items, "tool_choice": "auto", "max_output_tokens": 4})
    form = {"format": {"type": "json_schema", "name": "w", "schema": SCHEMA, "strict": True}}
    answer = client.responses.create(model="m", input="Hello", max_output_tokens=400, text=form)
    check_weather(json.loads(answer.output_text))


def errors(client):
    for ask, kind in [
        (lambda: client.chat.completions.create(model="m", messages=[]), openai.BadRequestError),
        (lambda: client.embeddings.create(model="m", input="a"), openai.InternalServerError),
        (lambda: client.with_options(api_key="x").models.list(), openai.AuthenticationError),
        (lambda: client.models.retrieve("none"), openai.NotFoundError),
    ]:
        try:
            ask()
        except kind:
            continue
        sys.exit(f"no {kind}")


def messages(client):
    options = {"model": "m", "max_tokens": 12, "system": "s"}
    options["messages"] = [{"role": "user", "content": "Hello"}]
    whole = client.messages.create(**options)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 12
    with client.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == 12
    count = client.messages.count_tokens(model="m", system="s", messages=options["messages"]).input_tokens
    assert count == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    tool = {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}
    options.update(max_tokens=200, tools=[tool], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    answer = client.messages.create(**options)
    assert answer.stop_reason == "tool_use"
    check_weather(answer.content[-1].input)
    with client.messages.stream(**options) as stream:
        assert stream.get_final_message().content[-1].input == answer.content[-1].input
    result = {"type": "tool_result", "tool_use_id": answer.content[-1].id, "content": "It rains."}
    options["messages"] += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    client.messages.create(**{**options, "max_tokens": 4, "tool_choice": {"type": "auto"}})
    try:
        client.messages.create(model="m", max_tokens=1, messages=[])
    except anthropic.BadRequestError:
        return
    sys.exit("no error of Anthropic's")


def through_litellm(url):
    for model, base in [("openai/m", f"{url}/v1"), ("anthropic/m", url)]:
        options = {"model": model, "api_base": base, "api_key": "k", "messages": MESSAGES, "temperature": 0}
        whole = litellm.completion(**options, max_tokens=12)
        chunks = litellm.completion(**options, max_tokens=12, stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert text == whole.choices[0].message.content, (model, text, whole)
        answer = litellm.completion(**options, max_tokens=200, tools=TOOLS, tool_choice="required")
        check_weather(json.loads(answer.choices[0].message.tool_calls[0].function.arguments))


async def at_once(url):
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k")
    options = {"model": "m", "max_tokens": 16, "temperature": 0}
    prompts = ["In the beginning", "a", "And God said"] * 4
    asked = [client.completions.create(**options, prompt=prompt) for prompt in prompts]
    texts = [answer.choices[0].text for answer in await asyncio.gather(*asked)]
    assert texts[:3] * 4 == texts


def main(program):
    with serving(program, "--parallel", "3") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        assert [m.id for m in client.models.list()] == ["demo"]
        for check in [chats, chat_tools, completions, responses, errors]:
            check(client)
            print(f"openai: {check.__name__}", flush=True)
        messages(anthropic.Anthropic(base_url=url, api_key="k", max_retries=0))
        print("anthropic: messages", flush=True)
        through_litellm(url)
        print("litellm", flush=True)
        asyncio.run(at_once(url))
        print("openai: many at once", flush=True)


main(*sys.argv[1:])
