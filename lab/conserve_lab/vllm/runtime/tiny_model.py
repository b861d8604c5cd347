"""Make a tiny Llama with random weights, a tokenizer of its own and a chat template with tools.

Run inside vLLM's environment: `python tiny_model.py DIRECTORY '{"seed": 0, ...}'`. Needs no network. The weights
follow from the seed alone, so two machines make the same model. The model says nothing sensible, and that is
fine: what is measured is where its KV cache goes.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

UNKNOWN, START, END = "<|unknown|>", "<|im_start|>", "<|im_end|>"
TOOL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
VOCABULARY = 512

# Words an agent's prompts are full of, so that they cost about one token each.
WORDS = """a an and answer append argument assistant cache call column count create decode directory each echo
    edit engine error example false file find first from function given have into issue item json length line
    list look make message model name need next none not number object of on one open output path please print
    property query read repository request required result return row run search select sentence server set
    should start step string system table task test text that the them then there this time to token tool total
    true turn type update use user value was what when where which with word work write you""".split()  # noqa: SIM905  a list of 120 lines says no more

# ChatML with the tool marks of the Hermes format, which vLLM's `hermes` parser reads back.
TEMPLATE = r"""
{%- macro say(role, text) -%}<|im_start|>{{ role }}{{ "\n" }}{{ text }}<|im_end|>{{ "\n" }}{%- endmacro -%}
{%- set opening = messages[0].content if messages[0].role == "system" else "" -%}
{%- if tools -%}
  {%- set listing = namespace(text="") -%}
  {%- for tool in tools -%}{%- set listing.text = listing.text + "\n" + (tool | tojson) -%}{%- endfor -%}
  {{- say("system", opening + "\nTools:" + listing.text + "\nAnswer with <tool_call>{name, arguments}</tool_call>") -}}
{%- elif opening -%}
  {{- say("system", opening) -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == "tool" -%}
    {{- say("user", "<tool_response>" + message.content + "</tool_response>") -}}
  {%- elif message.role == "assistant" -%}
    {%- set made = namespace(text=message.content or "") -%}
    {%- for call in message.tool_calls or [] -%}
      {%- set body = {"name": call.function.name, "arguments": call.function.arguments} -%}
      {%- set made.text = made.text + "<tool_call>\n" + (body | tojson) + "\n</tool_call>" -%}
    {%- endfor -%}
    {{- say("assistant", made.text) -}}
  {%- elif message.role == "user" or not loop.first -%}
    {{- say(message.role, message.content) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ "\n" }}{%- endif -%}
"""


def sentences(count: int) -> Iterator[str]:
    """Text to train the tokenizer on: prose and JSON over the same words."""
    dice = random.Random(0)  # noqa: S311  the same words on every machine
    for _ in range(count):
        yield " ".join(dice.choices(WORDS, k=30))
        yield json.dumps({"name": dice.choice(WORDS), "arguments": {dice.choice(WORDS): dice.choice(WORDS)}})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: it can say any byte, so any answer of a random model is some text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TOOL_MARKS),
        special_tokens=[UNKNOWN, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences(300), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=UNKNOWN, bos_token=START, eos_token=END, pad_token=END
    )
    tokenizer.add_tokens(list(TOOL_MARKS))
    tokenizer.chat_template = TEMPLATE.strip()
    return tokenizer


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    positions: int,
) -> LlamaForCausalLM:
    """Random weights wide enough (0.35) that greedy answers differ from prompt to prompt."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        initializer_range=0.35,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def main() -> None:
    """Write model and tokenizer into the directory named on the command line."""
    directory, shape = Path(sys.argv[1]), json.loads(sys.argv[2])
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, **shape)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


if __name__ == "__main__":
    main()
