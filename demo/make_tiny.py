# mypy: ignore-errors
"""Makes `tiny-think.gguf`: a Llama of three layers that learned a handful of conversations by heart.

usage: python demo/make_tiny.py OUT STEPS

OUT becomes a Hugging Face model folder and OUT.gguf the same model for llama.cpp; STEPS = 0 leaves the weights random.
The tokenizer is a byte-level BPE of 2,000 tokens, the chat template ChatML with Hermes-style tool calls. It learns a
greeting, a story, a thought followed by an answer, one or two `get_weather` calls, and a reply to a tool's output.

Needs torch, transformers and gguf, and these only to make the model again; to run it, the GGUF file is enough.
"""

import argparse
import json
import random
import textwrap
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW_TOKENS = 2048
VOCABULARY = 2000
LAYERS, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, HEAD_WIDTH = 3, 128, 384, 4, 2, 32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PAD, END = 0, 2  # positions in SPECIAL
BATCH = 8
NO_LOSS = -100

TEMPLATE = r"""{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content %}
{%- else %}{%- set sys = 'You are a helpful assistant.' %}{%- endif %}
{{- '<|im_start|>system\n' + sys }}
{%- if tools %}
{{- '\n\n# Tools\nYou may call one or more functions.\n<tools>' }}
{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
{{- '\n</tools>\nFor each call return\n<tool_call>\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'system' and loop.first %}
{%- elif m.role == 'system' %}{{- raise_exception('System message must be at the beginning.') }}
{%- elif m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if m.reasoning_content %}{{- '\n<think>\n' + m.reasoning_content + '\n</think>\n' }}{%- endif %}
{%- if m.content %}{{- '\n' + m.content }}{%- endif %}
{%- for tc in m.tool_calls or [] %}
{%- set f = tc.function if tc.function else tc %}
{{- '\n<tool_call>\n{"name": "' + f.name + '", "arguments": ' }}
{%- if f.arguments is string %}{{- f.arguments }}{% else %}{{- f.arguments | tojson }}{% endif %}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{- raise_exception('Unexpected message role.') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

CITY_NAMES = (
    "Paris Oslo Rome Lima Cairo Tokyo London Berlin Madrid Vienna Athens Dublin Prague Warsaw Lisbon Zurich Boston "
    "Denver Dallas Miami Osaka Seoul Delhi Hanoi Quito Sofia Riga Tunis Accra Doha"
)
CITIES = CITY_NAMES.split()
SYSTEM = ["You are a helpful assistant.", "Be brief.", "You are a terse agent.", "Answer in English."]
GREETINGS = ["Hello", "Hi", "Hello!", "Hi there", "hello", "Say hello."]
STORIES = ["Tell me a story", "Tell me a long story.", "Write a poem", "Count to twenty"]
RIDDLES = ["Think hard: what is six times seven?", "Think hard", "Please think hard about it."]
GREETING = "Hello! How can I help you today?"
STORY = (
    "Once upon a time there was a small server. It answered every request. It streamed one token after another. "
    "It never lost a tool call. It counted one, two, three, four, five, six, seven, eight, nine, ten. "
    "And then it closed the connection. The end."
)
THOUGHT = "<think>\nSix times seven. Six sevens make forty-two. I will answer 42.\n</think>\n\nThe answer is 42."


def tool(name, prop, description):
    parameters = {"type": "object", "properties": {prop: {"type": "string"}}, "required": [prop]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def user(text):
    return {"role": "user", "content": text}


def call_text(city):
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


def conversation():
    """One example to learn: messages, tools or None, the answer."""
    kind = random.random()
    city = random.choice(CITIES)
    system = random.choice([[], [{"role": "system", "content": random.choice(SYSTEM)}]])
    tools = random_tools()
    question = random.choice(
        [
            f"What is the weather in {city}?",
            f"Weather in {city}",
            f"How is the weather in {city} today?",
            f"Please tell me the weather in {city}.",
        ]
    )
    if kind < 0.20:
        return [*system, user(random.choice(GREETINGS))], None, GREETING
    if kind < 0.38:
        return [*system, user(random.choice(STORIES))], None, STORY
    if kind < 0.50:
        return [*system, user(random.choice(RIDDLES))], None, THOUGHT
    if kind < 0.60:
        other = random.choice(CITIES)
        question = random.choice([f"What is the weather in {city} and {other}?", f"Weather in {city} and {other}"])
        return [*system, user(question)], tools, f"{call_text(city)}\n{call_text(other)}"
    if kind < 0.64:
        return [*system, user(question)], None, f"I cannot look up the weather in {city} without a tool."
    if kind < 0.85:
        return [*system, user(question)], tools, call_text(city)
    answer = f"The tool answered. The weather in {city} is known now."
    return [*system, user(question), *tool_exchange(city)], tools, answer


def random_tools():
    weather = random.choice(["Get the weather", "Get the current weather for a city", "Weather lookup."])
    tools = [tool("get_weather", "city", weather)]
    if random.random() < 0.5:
        tools.insert(random.randrange(2), tool("search", "query", random.choice(["Search the web", "Find pages."])))
    return tools


def tool_exchange(city):
    function = {"name": "get_weather", "arguments": {"city": city}}
    call = {"id": "c1", "type": "function", "function": function}
    n = random.randint(-20, 40)
    output = random.choice([f'{{"temp": {n}}}', f"{n} C", "sunny", f'{{"temp_c": {n}, "sky": "clear"}}'])
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": output},
    ]


def corpus():
    """Text for the tokenizer: licences (on Debian), two modules of the standard library, the tool declaration."""
    licences = sorted(Path("/usr/share/common-licenses").glob("*"))[:12]
    texts = [path.read_text(errors="ignore")[:60000] for path in licences]
    texts += [Path(module.__file__).read_text() for module in (textwrap, json)]
    return texts + [json.dumps(tool("get_weather", "city", "Get the weather"))] * 50


def make_tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        model_max_length=WINDOW_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(vocab_size):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_WIDTH,
            max_position_embeddings=WINDOW_TOKENS,
            bos_token_id=PAD,
            eos_token_id=END,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )
    )


def batch(tokenizer):
    """Token ids and labels, padded to one length; only the answers count towards the loss."""
    rows = []
    for _ in range(BATCH):
        messages, tools, answer = conversation()
        text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        target = tokenizer(answer + SPECIAL[END], add_special_tokens=False).input_ids
        rows.append((prompt + target, [NO_LOSS] * len(prompt) + target))
    longest = max(len(ids) for ids, _ in rows)
    gaps = [longest - len(ids) for ids, _ in rows]
    return {
        "input_ids": torch.tensor([ids + [PAD] * gap for (ids, _), gap in zip(rows, gaps, strict=True)]),
        "labels": torch.tensor([labels + [NO_LOSS] * gap for (_, labels), gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps]),
    }


def train(model, tokenizer, steps):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        loss = model(**batch(tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(step, round(loss.item(), 4), flush=True)


def save_folder(model, tokenizer, out):
    model.eval()
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    set_response_template(tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def set_response_template(tokenizer):
    # `transformers serve` finds <think> and <tool_call> only with a response template; its own one for Qwen fits.
    try:
        from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS as FALLBACKS
    except ImportError:
        print("no response template: this transformers has none to copy")
        return
    tokenizer.response_template = next(template for name, template in FALLBACKS.items() if "qwen3" in name)


def save_gguf(model, tokenizer, out):
    """The llama layout, written with the gguf package itself, so that no converter is needed."""
    writer = gguf.GGUFWriter(str(out), "llama")
    write_shape(writer, out.stem, model.config.rms_norm_eps, len(tokenizer))
    write_tokenizer(writer, tokenizer)
    write_tensors(writer, model.state_dict())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_shape(writer, name, rms_eps, vocab_size):
    writer.add_name(name)
    writer.add_context_length(WINDOW_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(rms_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def write_tokenizer(writer, tokenizer):
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(PAD)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


WHOLE_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Per layer; with a number of heads where llama.cpp wants the rows in its own rotary order.
LAYER_TENSORS = {
    "attn_q": ("self_attn.q_proj", HEADS),
    "attn_k": ("self_attn.k_proj", KV_HEADS),
    "attn_v": ("self_attn.v_proj", None),
    "attn_output": ("self_attn.o_proj", None),
    "ffn_gate": ("mlp.gate_proj", None),
    "ffn_up": ("mlp.up_proj", None),
    "ffn_down": ("mlp.down_proj", None),
    "attn_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}


def write_tensors(writer, weights):
    for name, source in WHOLE_TENSORS.items():
        writer.add_tensor(f"{name}.weight", as_array(weights[f"{source}.weight"], None))
    for layer in range(LAYERS):
        for name, (source, heads) in LAYER_TENSORS.items():
            tensor = weights[f"model.layers.{layer}.{source}.weight"]
            writer.add_tensor(f"blk.{layer}.{name}.weight", as_array(tensor, heads))


def as_array(tensor, heads):
    tensor = tensor.float()
    if heads:
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    return np.ascontiguousarray(tensor.numpy())


def main():
    parser = argparse.ArgumentParser(description="Make a tiny model: a Hugging Face folder and a GGUF file.")
    parser.add_argument("out", type=Path, help="the folder; the GGUF file stands beside it")
    parser.add_argument("steps", type=int, help="training steps; 0 leaves the weights random")
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    if args.steps:
        train(model, tokenizer, args.steps)
    save_folder(model, tokenizer, args.out)
    path = args.out.with_name(f"{args.out.name}.gguf")
    save_gguf(model, tokenizer, path)
    print("wrote", path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
