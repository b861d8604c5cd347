"""LiteLLM takes an openai client, so it takes ConServe's. Needs `litellm`, which is no dependency of ConServe.

conserve demo --serve &
CONSERVE_BROKER_URL=http://127.0.0.1:7070 python examples/litellm_client.py
"""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import fetches a price list

import litellm

import conserve_sdk

MODEL = os.environ.get("CONSERVE_MODEL", "emulated")


def main() -> None:
    client = conserve_sdk.openai_client()  # the broker's address comes from CONSERVE_BROKER_URL
    messages = [{"role": "system", "content": "You answer in one sentence."}]
    with conserve_sdk.conversation("example-litellm"):
        for question in ("What is a lease?", "And who renews it?"):
            messages.append({"role": "user", "content": question})
            answer = litellm.completion(model=f"openai/{MODEL}", messages=messages, max_tokens=40, client=client)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            print(f"{question} {messages[-1]['content']}")
        for chunk in litellm.completion(model=f"openai/{MODEL}", messages=messages, stream=True, client=client):
            print(chunk.choices[0].delta.content or "", end="")
        print()


if __name__ == "__main__":
    main()
