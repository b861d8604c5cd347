"""A conversation with the plain `openai` client: one call to make the client, the rest is OpenAI's API.

conserve demo --serve &
CONSERVE_BROKER_URL=http://127.0.0.1:7070 python examples/plain_openai.py
"""

import os

from openai.types.chat import ChatCompletionMessageParam

from conserve_sdk import conversation, openai_client

MODEL = os.environ.get("CONSERVE_MODEL", "emulated")


def main() -> None:
    client = openai_client()  # the broker's address comes from CONSERVE_BROKER_URL
    history: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "You answer in one sentence."},
    ]
    with conversation("example-plain"):
        for question in ("What is a lease?", "And who renews it?", "What happens when it ends?"):
            history.append({"role": "user", "content": question})
            raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=history, max_tokens=40)
            answer = raw.parse().choices[0].message.content or ""
            history.append({"role": "assistant", "content": answer})
            print(f"turn {raw.headers['x-conserve-turn']} on {raw.headers['x-conserve-decoder']}: {answer}")


if __name__ == "__main__":
    main()
