"""Checks of a server by LangChain and PydanticAI: answers with a structure by each of their methods, and agents.

The bundled model calls no tool by itself, so the agents demand a call first and take the tool away then."""

import asyncio
import sys
from typing import Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelSettings, NativeOutput, ToolOutput
from pydantic_ai.capabilities import PrepareOutputTools
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from serving import serving


class Weather(BaseModel):
    """How the weather is."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


@tool
def forecast(city: Literal["Paris", "Rome"]) -> str:
    """Tells the weather of a city."""
    return f"It rains in {city}."


def langchain(url, responses):
    options = {"base_url": f"{url}/v1", "api_key": "k", "max_retries": 0, "use_responses_api": responses}
    model = ChatOpenAI(model="m", temperature=0, max_tokens=200, **options)
    for method in ["json_schema", "function_calling"]:
        answer = model.with_structured_output(Weather, method=method, strict=True).invoke("How is the weather?")
        assert isinstance(answer, Weather), (method, answer)
    # This one tells the server no schema, so the answer is some object, which the model may not end.
    asked = model.with_structured_output(None, method="json_mode", include_raw=True)
    answer = asked.invoke("Answer in JSON: how is the weather?")
    assert answer["raw"].text.lstrip().startswith("{"), answer
    chunks = list(model.bind(max_tokens=12).stream("Hello"))
    text = "".join(chunk.text for chunk in chunks)
    assert text == model.bind(max_tokens=12).invoke("Hello").text and text

    @wrap_model_call
    def one_call(request, handler):
        if any(isinstance(message, ToolMessage) for message in request.messages):
            return handler(request.override(tools=[]))
        return handler(request.override(tool_choice="any", model_settings={"parallel_tool_calls": False}))

    agent = create_agent(model, [forecast], middleware=[one_call])
    messages = agent.invoke({"messages": [{"role": "user", "content": "How is the weather?"}]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"], messages
    assert messages[2].content.startswith("It rains in ") and messages[3].text


def pydantic_ai(url, kind):
    settings = ModelSettings(temperature=0, max_tokens=400)
    model = kind("m", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="k"), settings=settings)
    # A third way, PromptedOutput, hopes that the model follows the prompt.
    for output in [ToolOutput(Weather), NativeOutput(Weather)]:
        answer = Agent(model, output_type=output).run_sync("How is the weather?")
        assert isinstance(answer.output, Weather), answer

    def has_result(context):
        return any(isinstance(part, ToolReturnPart) for message in context.messages for part in message.parts)

    async def before(context, definition):
        return None if has_result(context) else definition

    async def afterwards(context, definitions):
        return definitions if has_result(context) else []

    called = []
    options = {"model_settings": {"parallel_tool_calls": False}, "capabilities": [PrepareOutputTools(afterwards)]}
    agent = Agent(model, output_type=ToolOutput(Weather), **options)

    @agent.tool_plain(prepare=before)
    def forecast(city: Literal["Paris", "Rome"]) -> str:
        """Tells the weather of a city."""
        called.append(city)
        return f"It rains in {city}."

    answer = agent.run_sync("How is the weather?")
    assert isinstance(answer.output, Weather) and len(called) == 1 and answer.usage.requests == 2, (called, answer)

    async def streamed():
        async with Agent(model, output_type=str).run_stream("Hello", model_settings={"max_tokens": 12}) as stream:
            return await stream.get_output()

    assert asyncio.run(streamed())


def main(program):
    with serving(program, "--parallel", "2") as url:
        for responses in [False, True]:
            langchain(url, responses)
            print(f"LangChain: {'responses' if responses else 'chats'}", flush=True)
        for kind in [OpenAIChatModel, OpenAIResponsesModel]:
            pydantic_ai(url, kind)
            print(f"PydanticAI: {kind.__name__}", flush=True)


main(*sys.argv[1:])
