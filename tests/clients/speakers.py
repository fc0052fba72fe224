"""What other people's clients get from a server, as JSON: `python tests/clients/speakers.py litellm http://127.0.0.1:8000`.

Run by test_other_clients.py with whichever Python has the client, as they do not all go into one environment. Each is
asked for the same: an answer, a stream, a conversation, and what else it offers.
"""

import importlib
import json
import sys
from typing import Any, Literal

MODEL, KEY = "twin", "none needed"
CITY = {
    "title": "weather",
    "description": "The weather of a city.",
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Bonn"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "It rains.", "parameters": CITY}}
USER = {"role": "user", "content": "Hello"}
MORE = {"role": "user", "content": "more"}


def litellm(url: str) -> dict[str, Any]:
    client = importlib.import_module("litellm")
    base: dict[str, Any] = {
        "model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": KEY, "max_tokens": 8, "temperature": 0,
    }  # fmt: skip

    def ask(messages: list[Any], **more: Any) -> Any:
        return client.completion(**{**base, "messages": messages, **more})

    said = ask([USER]).choices[0].message
    scored = ask([USER], logprobs=True, top_logprobs=3).choices[0].logprobs.content
    shape = {"type": "json_schema", "json_schema": {"name": "weather", "schema": CITY}}
    called = ask([USER], tools=[TOOL], tool_choice="required", max_tokens=60).choices[0]
    call = called.message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    return {
        "chat": said.content,
        "stream": [chunk.choices[0].delta.content or "" for chunk in ask([USER], stream=True)],
        "history": ask([USER, said, MORE]).choices[0].message.content,
        "several": [choice.message.content for choice in ask([USER], n=5, temperature=1, seed=1).choices],
        "logprobs": [[token.logprob, len(token.top_logprobs)] for token in scored],
        "schema": ask([USER], response_format=shape, max_tokens=60).choices[0].message.content,
        "tool": [call.function.name, json.loads(call.function.arguments)],
        "after the tool": ask([USER, called.message, result], tools=[TOOL]).choices[0].message.content,
    }


def langchain(url: str) -> dict[str, Any]:
    client = importlib.import_module("langchain_openai")
    model = client.ChatOpenAI(
        model=MODEL, base_url=f"{url}/v1", api_key=KEY, max_tokens=8, temperature=0, max_retries=0
    )
    (message,) = importlib.import_module("langchain_core.messages").convert_to_messages([USER])
    long = model.model_copy(update={"max_tokens": 60})
    said = model.invoke([USER])
    scored = model.bind(logprobs=True, top_logprobs=3).invoke([USER]).response_metadata["logprobs"]["content"]
    several = model.model_copy(update={"n": 5, "temperature": 1, "seed": 1}).generate([[message]])
    called = long.bind_tools([TOOL], tool_choice="weather").invoke([USER])
    (call,) = called.tool_calls
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    return {
        "chat": said.content,
        "stream": [chunk.content for chunk in model.stream([USER])],
        "history": model.invoke([USER, said, MORE]).content,
        "several": [each.text for each in several.generations[0]],
        "logprobs": [[token["logprob"], len(token["top_logprobs"])] for token in scored],
        "schema": json.dumps(long.with_structured_output(CITY, method="json_schema").invoke([USER])),
        "tool": [call["name"], call["args"]],
        "after the tool": model.bind_tools([TOOL]).invoke([USER, called, result]).content,
    }


def llama_index(url: str) -> dict[str, Any]:
    """It has no n."""
    client = importlib.import_module("llama_index.llms.openai_like")
    core, tools = (importlib.import_module(f"llama_index.core.{name}") for name in ("llms", "tools"))
    own: dict[str, Any] = {"is_chat_model": True, "is_function_calling_model": True, "max_retries": 0}
    own |= {"model": MODEL, "api_base": f"{url}/v1", "api_key": KEY, "temperature": 0}
    model = client.OpenAILike(**own, max_tokens=8)
    long = client.OpenAILike(**own, max_tokens=60)
    scoring = client.OpenAILike(**own, max_tokens=8, logprobs=True, top_logprobs=3)

    def weather(city: Literal["Oslo", "Bonn"]) -> str:
        """The weather of a city."""
        return f"rain in {city}"

    tool = tools.FunctionTool.from_defaults(fn=weather)
    user, more = (core.ChatMessage(role=each["role"], content=each["content"]) for each in (USER, MORE))
    said = model.chat([user])
    shape = {"type": "json_schema", "json_schema": {"name": "weather", "schema": CITY}}
    called = long.chat_with_tools([tool], "Hello", tool_required=True)
    (call,) = long.get_tool_calls_from_response(called)
    result = core.ChatMessage(role="tool", content="rain", additional_kwargs={"tool_call_id": call.tool_id})
    return {
        "chat": said.message.content,
        "stream": [chunk.delta for chunk in model.stream_chat([user])],
        "history": model.chat([user, said.message, more]).message.content,
        "logprobs": [[each[0].logprob, len(each)] for each in scoring.chat([user]).logprobs],
        "schema": long.chat([user], response_format=shape).message.content,
        "tool": [call.tool_name, call.tool_kwargs],
        "after the tool": model.chat([user, called.message, result], tools=[TOOL]).message.content,
    }


if __name__ == "__main__":
    _, name, url = sys.argv
    print(json.dumps({"litellm": litellm, "langchain": langchain, "llama-index": llama_index}[name](url)))
