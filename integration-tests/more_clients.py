"""Drives langchain-huggingface or litellm and prints what it saw as JSON. Run by test_more_clients.py, elsewhere.

.venv-more-clients/bin/python integration-tests/more_clients.py langchain|litellm URL PROMPT
"""

import asyncio
import json
import sys
from typing import Any

QUESTION = "What is the weather in Paris?"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get weather.", "parameters": CITY},
}


# langchain-huggingface ------------------------------------------------------------------------------------------------


def langchain(url: str, prompt: str) -> dict[str, Any]:
    from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint  # type: ignore[import-not-found]

    # Greedy needs its own defaults (0.8, 0.95, 0.95) taken back; `usual` samples with them.
    greedy = HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=12, temperature=None, top_p=None, typical_p=None)
    usual = HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=12, seed=7)
    text = greedy.invoke(prompt)
    stop = text[6:8]
    chat = ChatHuggingFace(llm=greedy, model_id="tgi", temperature=0, max_tokens=60)
    called = chat.bind_tools([WEATHER], tool_choice="get_weather").invoke(QUESTION)
    message = chat.invoke(QUESTION)
    return {
        "text": text,
        "stream": list(greedy.stream(prompt)),
        "async": asyncio.run(greedy.ainvoke(prompt)),
        "stop": stop,
        "stopped": greedy.invoke(prompt, stop=[stop]),
        "sampled": usual.invoke(prompt),
        "sampled_stream": "".join(usual.stream(prompt)),
        "chat": message.content,
        "usage": message.usage_metadata,
        "chat_stream": [chunk.content for chunk in chat.stream(QUESTION)],
        "tool_calls": called.tool_calls,
        "error": error_of(lambda: HuggingFaceEndpoint(endpoint_url=url, top_p=7.0).invoke(prompt)),
    }


# litellm --------------------------------------------------------------------------------------------------------------


def litellm(url: str, prompt: str) -> dict[str, Any]:
    import litellm as client  # type: ignore[import-not-found]

    providers = {"openai/tgi": f"{url}/v1", "huggingface/tgi": url}
    text = client.text_completion(
        model="text-completion-openai/tgi",
        api_base=f"{url}/v1",
        api_key="-",
        prompt=prompt,
        max_tokens=8,
        temperature=0,
    )
    return {"text": text.choices[0].text} | {
        model: litellm_chat(client, {"model": model, "api_base": base, "api_key": "-", "max_retries": 0})
        for model, base in providers.items()
    }


def litellm_chat(client: Any, where: dict[str, Any]) -> dict[str, Any]:
    options = {**where, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 60}
    with_tools = {**options, "tools": [WEATHER], "tool_choice": "required"}
    answer = client.completion(**options)
    called = client.completion(**with_tools)
    chunks = list(client.completion(**options, stream=True))
    return {
        "content": answer.choices[0].message.content,
        "usage": {k: answer.usage[k] for k in ("prompt_tokens", "completion_tokens")},
        "stream": [chunk.choices[0].delta.content or "" for chunk in chunks],
        "stream_finish_reason": chunks[-1].choices[0].finish_reason,
        "tool_calls": calls_of(called),
        "streamed_tool_calls": calls_of(
            client.stream_chunk_builder(list(client.completion(**with_tools, stream=True)))
        ),
        "error": error_of(lambda: client.completion(**options, top_p=7)),
    }


def calls_of(answer: Any) -> list[tuple[str, Any]]:
    calls = answer.choices[0].message.tool_calls or []
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def error_of(call: Any) -> tuple[str, str] | None:
    """Class and message of what `call` raises, whatever it is: which class is the client's business."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


if __name__ == "__main__":
    client, *arguments = sys.argv[1:]
    print(json.dumps({"langchain": langchain, "litellm": litellm}[client](*arguments)), flush=True)
