"""Conversations the demo models learn from, made from facts.py by fixed random choices.

Owns phrasing, system prompts, small talk, answers to what the model cannot know, and tool calls. Every conversation is
a list of chat messages for the template in vocabulary.py; only assistant messages carry loss (see batches.py).
"""

import json
import random
from dataclasses import dataclass, field

from facts import Fact

UNKNOWN = "I only know Python's standard library."
SELF = "I am a small demonstration model that knows Python's standard library."
GREETING = "Hello! Ask me what something in Python's standard library does."
THANKS = "You are welcome."
MODEL_CARD = "I was trained on the sources and docstrings of Python's standard library."

WELL_KNOWN_TIMES = 3

Message = dict[str, object]


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: list[Message]
    tools: list[dict[str, object]] = field(default_factory=list)


SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a Python expert.",
    "You are a helpful AI assistant.",
    "Answer questions about Python's standard library.",
    "You are a concise assistant. Answer in one sentence.",
    "You explain Python functions.",
    "Be brief.",
]
FUNCTION_QUESTIONS = [
    "What does {} do?",
    "What does {} do?",
    "What does {} do?",
    "What does {} do in Python?",
    "what does {} do",
    "Explain {}",
    "Explain {}.",
    "Describe {}.",
    "What is {}?",
    "What is {} for?",
    "What is {} used for?",
    "Tell me about {}.",
    "Can you explain what {} does?",
    "Please explain {}.",
    "How does {} work?",
    "{}",
    "{}?",
    "Give me the documentation of {}.",
    "Hello, what does {} do?",
    "In Python, what does {} do?",
    "What does the function {} do?",
    "Summarize {} in one sentence.",
]
MODULE_QUESTIONS = [
    "What is the {} module for?",
    "What is the module {}?",
    "What is the {} module?",
    "What does the {} module do?",
    "Describe the {} module.",
    "Explain the module {}.",
    "What is the module {} used for?",
]
SMALL_TALK = [
    (
        ["Hello", "Hello!", "Hi", "Hi!", "Hey", "Hi there!", "Good morning", "hello", "hi", "Hello, how are you?"],
        GREETING,
    ),
    (
        [
            "Who are you?",
            "What are you?",
            "What is your name?",
            "who are you",
            "Tell me about yourself.",
            "Introduce yourself.",
        ],
        SELF,
    ),
    (
        ["What can you do?", "What do you know?", "How can you help me?", "Help", "help me"],
        GREETING.removeprefix("Hello! "),
    ),
    (["Thanks", "Thank you", "Thanks!", "Thank you!", "thanks a lot"], THANKS),
    (["How were you trained?", "What were you trained on?", "What is your training data?"], MODEL_CARD),
]
UNKNOWN_QUESTIONS = """What is the capital of France?|What is Deep Learning?|What is deep learning?|Tell me a joke.|
Write a poem about the sea.|Who won the world cup?|What is the weather like today?|What is the meaning of life?|
Who wrote Hamlet?|How old is the universe?|Translate this to French.|What is 2 + 2?|What is machine learning?|
Write a story about a dragon.|Why is the sky blue?|What time is it?|Tell me about the moon.|What is your favourite food?|
Explain quantum mechanics.|Who is the president?|How do I bake bread?|What is the largest country?|Say something.|
Give me a recipe for soup.|What is love?|What is the speed of light?|Write a haiku.|Sing a song.|What is a cat?|
Once upon a time|Count to ten.|What is Kubernetes?|What is a neural network?|Is it going to rain?|Summarize the news.|
Write a long essay about trees.|Tell me a story.|What is the capital of Germany?|What is the capital of Japan?""".replace(
    "\n", ""
).split("|")
FOREIGN_PACKAGES = """numpy pandas torch requests flask django scipy sklearn tensorflow matplotlib jax transformers pytest
    boto3 redis celery fastapi pydantic attrs click rich yaml lxml aiohttp httpx sqlalchemy PIL cv2 seaborn keras""".split()
SYLLABLES = """ba ko ri ze mu ta lo fi ne ga du sy va pe ki wo ja ro te la plex zor quux foo bar frob spam blip norm
    load save make get set run read parse array frame tensor fit plot merge apply init""".split()
TOOL_NAMES = [
    (
        "get_weather",
        "city",
        "What is the weather in {}?",
        ["Paris", "London", "Berlin", "Tokyo", "Madrid", "Oslo", "Rome"],
    ),
    (
        "get_current_weather",
        "location",
        "What is the weather like in {} today?",
        ["Paris", "Brooklyn", "Lima", "Cairo", "Delhi"],
    ),
    ("search", "query", "Search for {}.", ["python", "decorators", "generators", "type hints", "dataclasses"]),
    ("get_time", "timezone", "What time is it in {}?", ["Paris", "Sydney", "UTC", "Boston", "Lagos"]),
    ("open_file", "path", "Open the file {}.", ["setup.py", "README.md", "notes.txt", "main.py", "data.csv"]),
    ("run_code", "code", "Run {}", ["print(1)", "len('abc')", "2 + 2", "sorted([3, 1, 2])", "sum(range(10))"]),
    ("find_user", "name", "Find the user {}.", ["Alice", "Bob", "Carol", "Dave", "Erin"]),
]


def phrase(rng: random.Random, fact: Fact) -> str:
    name = fact.name
    if fact.is_module:
        if rng.random() < 0.7:
            return rng.choice(MODULE_QUESTIONS).format(f"`{name}`" if rng.random() < 0.2 else name)
    elif rng.random() < 0.2:
        name += "()"
    if rng.random() < 0.25:
        name = f"`{name}`"
    return rng.choice(FUNCTION_QUESTIONS).format(name)


def unknown_name(rng: random.Random) -> str:
    parts = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 2))]
    return ".".join(([rng.choice(FOREIGN_PACKAGES)] if rng.random() < 0.5 else []) + parts)


def exchange(rng: random.Random, question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def side_exchange(rng: random.Random) -> list[Message]:
    """Small talk, or a question outside what the model knows."""
    if rng.random() < 0.4:
        questions, answer = rng.choice(SMALL_TALK)
        return exchange(rng, rng.choice(questions), answer)
    if rng.random() < 0.5:
        return exchange(rng, rng.choice(UNKNOWN_QUESTIONS), UNKNOWN)
    unknown = Fact(unknown_name(rng), "", False, is_module=rng.random() < 0.1)
    return exchange(rng, phrase(rng, unknown), UNKNOWN)


def tool(name: str, argument: str) -> dict[str, object]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    description = f"{name.replace('_', ' ').capitalize()}."
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def tool_conversation(rng: random.Random) -> Conversation:
    """One or two tools offered, one called with the word from the question; sometimes its result comes back."""
    chosen = rng.sample(TOOL_NAMES, rng.randint(1, 2))
    name, argument, question, values = chosen[0]
    value = rng.choice(values) if rng.random() < 0.5 else "".join(rng.choices(SYLLABLES, k=2)).capitalize()
    offered = [tool(n, a) for n, a, _, _ in chosen]
    rng.shuffle(offered)
    call = {"type": "function", "function": {"name": name, "arguments": {argument: value}}}
    messages: list[Message] = [{"role": "user", "content": question.format(value)}]
    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    if rng.random() < 0.3:
        result = rng.choice(["done", "42", "sunny", "no result", "ok", "12:30"])
        messages.append({"role": "tool", "content": json.dumps({"result": result})})
        messages.append({"role": "assistant", "content": f"The result is: {result}."})
    return Conversation(messages, offered)


def with_system(rng: random.Random, messages: list[Message]) -> Conversation:
    if rng.random() < 0.4:
        return Conversation([{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages])
    return Conversation(messages)


def one_pass(facts: list[Fact], seed: int) -> list[Conversation]:
    """Every fact once, well-known ones more often, in chats of one to three questions, with other talk mixed in."""
    rng = random.Random(seed)
    queue = [fact for fact in facts for _ in range(WELL_KNOWN_TIMES if fact.well_known else 1)]
    rng.shuffle(queue)
    conversations: list[Conversation] = []
    while queue:
        messages: list[Message] = []
        if rng.random() < 0.05:
            messages += side_exchange(rng)
        for _ in range(min(len(queue), rng.choice([1, 1, 1, 2, 3]))):
            fact = queue.pop()
            messages += exchange(rng, phrase(rng, fact), fact.summary)
        if rng.random() < 0.03:
            messages += side_exchange(rng)
        conversations.append(with_system(rng, messages))
    conversations += [with_system(rng, side_exchange(rng)) for _ in range(len(facts) // 10)]
    conversations += [tool_conversation(rng) for _ in range(len(facts) // 25)]
    rng.shuffle(conversations)
    return conversations
