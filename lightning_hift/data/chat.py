"""Conversations as tokens, by a chat template, and which of them are answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_hift.data.bad_rows import BadRow
from lightning_hift.data.tokenizer import need_offsets

ANSWER_ROLE = "assistant"

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '' if loop.last else '\n\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
)
"""Headings and plain text, for tokenizers without a template: no token has to be learned for it."""

PLAIN_INPUT = "\n\n### Input:\n"
"""Stands between an instruction and its input where ``PLAIN_TEMPLATE`` is used."""

_ROLES = {"human": "user", "gpt": ANSWER_ROLE, "bot": ANSWER_ROLE, "model": ANSWER_ROLE, "chatgpt": ANSWER_ROLE}
_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatEncoder:
    """Turns conversations into tokens and tells which ones an assistant has to write.

    Answers are what the template puts between ``{% generation %}`` and ``{% endgeneration %}``. Where it marks nothing,
    an answer is what the conversation up to it has more than the conversation before it with the template's
    prompt to answer.

    Args:
        tokenizer: A fast one, which knows where in a text its tokens are.
        template: In Jinja, or a file with it whose name ends in .jinja; default: the tokenizer's own, or
            ``PLAIN_TEMPLATE`` if it has none.

    Raises:
        ValueError: The tokenizer is not a fast one, or has no end-of-sequence token for ``PLAIN_TEMPLATE``.
        FileNotFoundError: There is no such file.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if template is not None and template.endswith(".jinja"):
            if not Path(template).is_file():
                raise FileNotFoundError(f"Got chat_template={template!r}, which does not exist in {Path.cwd()}.")
            template = Path(template).read_text(encoding="utf-8")
        own = tokenizer.get_chat_template() if template is None and tokenizer.chat_template else None
        self.template: str = template or own or PLAIN_TEMPLATE
        self.is_plain = self.template == PLAIN_TEMPLATE
        if self.is_plain and tokenizer.eos_token is None:
            raise ValueError(
                "Got a tokenizer without chat template and without an end-of-sequence token, so nothing tells where an"
                " answer ends. Set eos_token in its tokenizer_config.json, or give a chat_template."
            )
        self._tokenizer = need_offsets(tokenizer)

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and of each whether it belongs to an answer.

        Args:
            messages: Mappings with ``role`` and ``content``.

        Raises:
            BadRow: The template refuses the conversation.
            ValueError: The template does not show where answers are.
        """
        text, spans = self._marked(messages) if _MARKED.search(self.template) else self._compared(messages)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens: list[int] = list(encoded["input_ids"])
        is_answer = [
            any(begin < stop and end > start for start, stop in spans) for begin, end in encoded["offset_mapping"]
        ]
        if self.is_plain:  # a template of the tokenizer's own says itself what a text begins with
            first = self._tokenizer("a")["input_ids"][:1]
            if first == [self._tokenizer.bos_token_id] and tokens[:1] != first:
                return first + tokens, [False, *is_answer]
        return tokens, is_answer

    def _marked(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        def render() -> tuple[list[str], list[list[tuple[int, int]]]]:
            found: tuple[list[str], list[list[tuple[int, int]]]] = render_jinja_template(
                [list(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
            return found

        (text,), (spans,) = self._refused_as_bad_row(render)
        return text, spans

    def _compared(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        whole = self._render(messages)
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != ANSWER_ROLE:
                continue
            if i == 0:
                raise BadRow(None, "the conversation begins with an answer")
            before = self._render(messages[:i], add_generation_prompt=True)
            after = self._render(messages[: i + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "Got a chat template that writes the beginning of a conversation in another way once it goes on, so"
                    f" answers cannot be found by comparing. Before answer {len(spans) + 1}: {before[-60:]!r}; with it:"
                    f" {after[-60:]!r}. Give a chat_template that marks answers with {{% generation %}} and"
                    " {% endgeneration %}."
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _render(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        def render() -> str:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, **options
            )
            return text

        text: str = self._refused_as_bad_row(render)
        return text

    @staticmethod
    def _refused_as_bad_row(render: Any) -> Any:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return render()
        except TemplateSyntaxError as error:
            raise ValueError(f"Got a chat template that is no Jinja: {error}.") from error
        except TemplateError as error:
            raise BadRow(None, f"the chat template refuses the conversation: {error}") from error


def read_messages(column: str, value: Any) -> list[dict[str, str]]:
    """Messages as ``role`` and ``content``, from these or from ShareGPT's ``from`` and ``value``.

    Raises:
        BadRow: It is no such list, or there is no answer in it.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRow(column, f"got {value!r}; it must be a list of messages")
    messages = [_read_message(column, number, message) for number, message in enumerate(value, 1)]
    if not any(message["role"] == ANSWER_ROLE for message in messages):
        raise BadRow(column, f"there is no answer: roles are {', '.join(message['role'] for message in messages)}")
    return messages


def _read_message(column: str, number: int, message: Any) -> dict[str, str]:
    found = message if isinstance(message, Mapping) else {}
    role, content = (found.get(a) or found.get(b) for a, b in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
        raise BadRow(column, f"message {number} is {message!r}; it must have a role and content (or from and value)")
    return {"role": _ROLES.get(role, role), "content": content}
