"""LlamaIndex over LiteLLM, which takes ConServe's openai client. Needs `llama-index-llms-litellm`.

(`llama-index-llms-openai` 0.8 wants openai 1 or 2 and cannot be installed beside ConServe, which wants openai 3.)

conserve demo --serve &
CONSERVE_BROKER_URL=http://127.0.0.1:7070 python examples/llamaindex_llm.py
"""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else LiteLLM's import fetches a price list

from llama_index.core.llms import ChatMessage
from llama_index.llms.litellm import LiteLLM

import conserve_sdk

MODEL = os.environ.get("CONSERVE_MODEL", "emulated")


def main() -> None:
    client = conserve_sdk.openai_client()  # for `chat`; `achat` wants `async_openai_client()`
    llm = LiteLLM(model=f"openai/{MODEL}", max_tokens=40, additional_kwargs={"client": client})
    said = [ChatMessage(role="system", content="You answer in one sentence.")]
    with conserve_sdk.conversation("example-llamaindex"):
        for question in ("What is a lease?", "And who renews it?"):
            said.append(ChatMessage(role="user", content=question))
            said.append(llm.chat(said).message)
            print(f"{question} {said[-1].content}")


if __name__ == "__main__":
    main()
