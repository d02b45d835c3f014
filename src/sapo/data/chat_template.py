"""Chat templates from elsewhere: a shipped one, a Jinja file, or that of another tokenizer.

A template is more than its text: the tokens that mark a message must be tokens of the tokenizer, and the one that ends
a reply must be its EOS token, or generation would not stop where training does. A Jinja file names the tokens to add
in a comment: `{#- added_tokens: <|im_start|> <|im_end|> -#}`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sapo.data.encoding import template_tail
from sapo.data.rendering import TEMPLATE_FAULTS
from sapo.errors import ConfigurationError, TokenizerError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[1] / "recipes" / "templates"
"""Templates that the package ships."""

TEMPLATE_FILE = "chat_template.jinja"
_BOS = "-bos"
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_added: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()
"""Ids of the tokens that templates have added to each tokenizer; who trains asks after who read the data."""
_ADDED = re.compile(r"\{#-?\s*added_tokens:(?P<tokens>[^#}]*?)-?#\}")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """What a tokenizer takes over.

    Attributes:
        text: the template.
        tokens: to add where the tokenizer lacks them: strings, or `AddedToken` of another tokenizer.
        eos: the token that ends a reply; None for the one that the template prints there.
    """

    text: str
    tokens: tuple[Any, ...] = ()
    eos: str | None = None


def use_chat_template(
    tokenizer: PreTrainedTokenizerBase, path: str | None, load: Callable[[str], Any]
) -> tuple[int, ...]:
    """Give `tokenizer` the chat template at `path`, with its tokens and its EOS token.

    Again changes nothing, and returns the same.

    Args:
        tokenizer: changed in place.
        path: a Jinja file, a folder, a shipped template (`chatml`, `zephyr`, or either with `-bos`: begun by the BOS
            token) or a Hub id; None leaves it as it is.
        load: loads the tokenizer of a folder or of a Hub id.

    Returns:
        Ids of the tokens that the tokenizer has from templates.

    Raises:
        ConfigurationError: there is no such template.
        TokenizerError: it cannot be used with this tokenizer.
    """
    if path is None:
        return ()
    found = read_chat_template(path, load)
    known = tokenizer.get_vocab()
    missing = [token for token in found.tokens if str(token) not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=isinstance(missing[0], str))
    tokenizer.chat_template = found.text
    eos = found.eos or _end_marker(tokenizer, path)
    if eos is not None:
        if eos not in tokenizer.get_vocab():
            raise TokenizerError(f"chat_template_path={path}: its EOS token {eos!r} is no token of the tokenizer.")
        tokenizer.eos_token = eos
    if tokenizer not in _added:
        _look_for_bos(tokenizer, path)
    added = _added.setdefault(tokenizer, set())
    added.update(tokenizer.convert_tokens_to_ids([str(token) for token in missing]))
    return tuple(sorted(added))


def read_chat_template(path: str, load: Callable[[str], Any]) -> ChatTemplate:
    """The template that `path` means: a file or folder that is there, a shipped template, else a Hub id.

    Args:
        path: see `use_chat_template`.
        load: see `use_chat_template`.

    Raises:
        ConfigurationError: there is no such template, or what is there has none.
    """
    place = Path(path)
    if place.is_file():
        return _of_file(place)
    if place.is_dir():
        if not any((place / name).is_file() for name in _TOKENIZER_FILES) and (place / TEMPLATE_FILE).is_file():
            return _of_file(place / TEMPLATE_FILE)
        return _of_tokenizer(load(path), path)
    shipped = {file.stem: file for file in sorted(FOLDER.glob("*.jinja"))}
    name = path.removesuffix(".jinja")
    if (plain := name.removesuffix(_BOS)) in shipped:
        found = _of_file(shipped[plain])
        return found if name == plain else replace(found, text="{{- bos_token -}}" + found.text)
    if "/" not in path or place.suffix in (".jinja", ".j2", ".txt"):
        raise ConfigurationError(
            f"chat_template_path={brief(path, 80)}: no such file, and no shipped template. Shipped are "
            f"{', '.join(shipped)}; otherwise name a Jinja file, a folder or a Hub id with its owner."
        )
    return _of_tokenizer(load(path), path)


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a chat template from another: its text, its EOS token and the added tokens, not where it was."""
    template: Any = tokenizer.chat_template
    content = [template, tokenizer.eos_token, sorted(tokenizer.get_added_vocab().items())]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _of_file(file: Path) -> ChatTemplate:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"chat_template_path={file}: cannot be read ({brief(error)}).") from error
    if not text.strip():
        raise ConfigurationError(f"chat_template_path={file}: is empty. Name a Jinja file.")
    named = _ADDED.search(text)
    return ChatTemplate(text, tuple(dict.fromkeys(named["tokens"].split())) if named else ())


def _of_tokenizer(source: Any, path: str) -> ChatTemplate:
    if not source.chat_template:
        raise ConfigurationError(f"chat_template_path={path}: its tokenizer has no chat template. Name another.")
    added = tuple(token for _, token in sorted(source.added_tokens_decoder.items()))
    return ChatTemplate(source.get_chat_template(), added, source.eos_token)


def _look_for_bos(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Warn of a template without the BOS token that the model has seen before every text.

    Raises:
        TokenizerError: a shipped template is to print it, and the tokenizer has none.
    """
    bos = tokenizer.bos_token_id
    if bos is None and path.removesuffix(".jinja").endswith(_BOS) and not Path(path).exists():
        raise TokenizerError(f"chat_template_path={path}: the tokenizer has no BOS token. Leave out {_BOS}.")
    question = [{"role": "user", "content": "a"}]
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return
    if bos not in tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)[:1]:
        logger.warning(
            "chat_template_path=%s prints no %s, with which the tokenizer begins plain text. Some models depend on it: "
            "without it Gemma 3 270M predicts replies 3 nats a token worse. The shipped chatml-bos and zephyr-bos "
            "print it; published recipes do without.",
            path,
            tokenizer.bos_token,
        )


def _end_marker(tokenizer: PreTrainedTokenizerBase, path: str) -> str | None:
    """The token with which the template ends a reply; None if it prints no marker.

    Raises:
        TokenizerError: the marker is no token, or the template cannot be rendered.
    """
    try:
        tail = template_tail(tokenizer)
    except TEMPLATE_FAULTS as error:
        raise TokenizerError(
            f"chat_template_path={path}: it cannot render a question and its reply ({brief(error).rstrip('.')}). Fix "
            "the template, or use a shipped one: chatml, zephyr."
        ) from error
    if not tail.strip():
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        # Some vocabularies hold line breaks as added tokens.
        if tokenizer.decode([token]).strip():
            if token in special:
                return str(tokenizer.convert_ids_to_tokens(token))
            break
    marker = tail.strip().split()[0]
    raise TokenizerError(
        f"chat_template_path={path}: it ends a reply with {marker!r}, which is no token of the tokenizer, so that "
        f"generation would not stop there. Add it by a first line {{#- added_tokens: {marker} -#}} in the template, or "
        "use the shipped chatml or zephyr."
    )
