"""Small chat templates in the manner of well-known ones, and a tokenizer that has their tokens."""

import json
import pathlib

import tokenizers

CHATML = (
  "{% for message in messages %}"
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{%- if not date_string is defined %}
  {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- bos_token }}
{%- if messages[0].role == "system" %}
  {%- set system_message = messages[0].content | trim %}
  {%- set messages = messages[1:] %}
{%- else %}
  {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot|>" }}
{%- for message in messages %}
  {{- "<|start|>" + message.role + "<|end|>\\n\\n" + message.content | trim + "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- "<|start|>assistant<|end|>\\n\\n" }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {{ raise_exception('System role not supported') }}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (message['content'] | trim) + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""
MISTRAL = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and messages[0]['role'] == 'system' %}
            {{- '[INST] ' + messages[0]['content'] + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# Like Qwen3's it leaves out what earlier turns thought.
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.last = loop.index0 %}
{%- endfor %}
{%- set ns.last = messages | map(attribute='role') | list | length - 1 %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}{{ call | tojson }}{% endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Qwen3's in the manner of TRL: what the assistant says is marked.
MARKED = (
  "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
  "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
  "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
  "{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Phi-3's it writes an EOS behind everything.
PHI3 = (
  "{% for message in messages %}{{ '<|start|>' + message.role + '\n' + message.content }}"
  "{{ '<|end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3_MARKED = (
  "{% for message in messages %}<|start|>{{ message.role + '\n' }}"
  "{% if message.role == 'assistant' %}"
  "{% generation %}{{ message.content + '<|end|>\n' }}{% endgeneration %}"
  "{% else %}{{ message.content + '<|end|>\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
  "{% else %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
)
TEMPLATES = {
  "chatml": CHATML,
  "llama3": LLAMA3,
  "gemma": GEMMA,
  "mistral": MISTRAL,
  "qwen3": QWEN3,
  "marked": MARKED,
  "phi3": PHI3,
  "phi3_marked": PHI3_MARKED,
}
SPECIAL = (
  *("<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"),
  *("<start_of_turn>", "<end_of_turn>", "<think>", "</think>"),
)
NUM_TOKENS = 256 + len(SPECIAL)


def write_tokenizer(directory: pathlib.Path, template: str | None = None, **names) -> pathlib.Path:
  """Writes a tokenizer whose tokens are bytes, and the special tokens above, with a template.

  It puts a BOS before every text. `names` are further fields of tokenizer_config.json.
  """
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(list(SPECIAL))
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", 256)]
  )
  named = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    **names,
  }
  directory.mkdir(exist_ok=True)
  (directory / "tokenizer.json").write_text(tokenizer.to_str())
  (directory / "tokenizer_config.json").write_text(json.dumps(named))
  (directory / "config.json").write_text(
    json.dumps({"model_type": "llama", "vocab_size": NUM_TOKENS, "pad_token_id": -1})
  )
  if template is not None:
    (directory / "chat_template.jinja").write_text(template)
  return directory
