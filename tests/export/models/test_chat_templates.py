"""Chat templates with the features of real models' ones: the same text and ids as transformers has."""

import pytest
from helpers.tiny_models import tiny_tokenizer

from edgemix.export.models.tokenizers import describe
from edgemix.runtime.text.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi\nthere, ab <b> & é"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALLS = [
    {"role": "user", "content": "2 + 3?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [3, None]}}}],
        "reasoning_content": "I add.",
    },
    {"role": "tool", "content": "5", "name": None},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}",
    "default system": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<s>system\nYou are a model</s>\n' }}{% endif %}{{ m.content }}{% endfor %}",
    "headers": "{%- set date = strftime_now('%Y') %}{{- bos_token }}{%- for m in messages %}"
    "{{- '<|' + m['role'] + '|>\n\n' + m['content'] | trim + eos_token }}{%- endfor %}{{ date }}",
    "alternating": "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[I] {{ m['content'] }} [/I]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}",
    "tools": "{%- if tools %}{% for tool in tools %}{{ tool | tojson }}\n{{ tool | tojson(indent=2) }}{% endfor %}"
    "{%- endif %}{%- for m in messages %}{%- if m.tool_calls %}{%- for call in m.tool_calls %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){%- endfor %}{%- endif %}{{ m.content }}"
    "{{ m.reasoning_content is defined }}{{ 'name' in m }}{{ m.thinking }}{%- endfor %}",
    "namespace": "{%- set ns = namespace(system='', last=-1) %}{%- for m in messages %}"
    "{%- if m['role'] == 'system' %}{%- set ns.system = m['content'] %}{% endif %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{{ ns.system }}{{ ns.last }}"
    "{%- for m in messages[::-1] %}{{ m.content }}{% endfor %}",
    "macro": "{%- macro say(m, end=true) -%}{{ m.role|upper }}: {{ m.content }}{% if end %}{{ eos_token }}{% endif %}"
    "{%- endmacro -%}{% for m in messages %}{{ say(m, not loop.last) }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user')"
    " | list | length }}{{ messages[0].content | replace('e', 'E') | title }}{{ [3, 1, 2] | sort | last }}"
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ messages[1].content.split('\n')[0].strip() }}{{ x | default('none') }}"
    "{{ '%s-%02d' | format('a', 7) }}{{ messages[0].items() | list | length }}{{ (messages | first).role[:2] }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}"
    "{{ cls_token is defined }}{{ documents is none }}{{ tools is none }}{{ messages[0].content }}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
    "whitespace": "{% for m in messages %}\n    {% if m.content %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
}


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny_tokenizer()
    found.pad_token = "</s>"
    return found


@pytest.mark.parametrize(
    ("template", "messages", "tools"),
    [(name, TALK, None) for name in TEMPLATES] + [(name, CALLS, [TOOL]) for name in TEMPLATES if name != "alternating"],
)
@pytest.mark.parametrize("answer", [True, False])
def test_a_conversation_is_what_transformers_makes_of_it(tokenizer, template, messages, tools, answer):
    tokenizer.chat_template = TEMPLATES[template]
    subject = Tokenizer(tokenizer.backend_tokenizer, describe(tokenizer, {0, 1}), tokenizer.chat_template)
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer)
    assert subject.write_chat(messages, answer=answer, tools=tools) == expected
    if answer:
        ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        assert subject.render(messages, tools=tools) == ids


def test_special_tokens_in_messages_are_encoded_as_transformers_encodes_them_when_asked(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    subject = Tokenizer(tokenizer.backend_tokenizer, describe(tokenizer, {0, 1}), tokenizer.chat_template)
    messages = [{"role": "user", "content": "a</s><s>b"}]
    parsed = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert subject.render(messages, parse_special=True) == parsed
    plain = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert subject.render(messages) == plain
