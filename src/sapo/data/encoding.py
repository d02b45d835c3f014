"""Conversations and plain text -> token ids: prompt and response of each turn.

The published code renders each message separately, so the assistant's header becomes part of the response. Here the
response is exactly what follows the generation prompt.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sapo.data.examples import DataReport, Turn
from sapo.data.messages import Conversation, PlainText
from sapo.data.rendering import TEMPLATE_FAULTS, Renderer, Unprinted, valid_unicode
from sapo.data.token_parts import TextTokens
from sapo.errors import DatasetError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SET_EOS = "Name its eos_token in tokenizer_config.json, or use --chat_template_path chatml, which sets one."


@dataclass(frozen=True, slots=True)
class Draft:
    """One turn as text, before it is tokenized.

    Attributes:
        row: row of the source dataset, from 0.
        index: index among the assistant messages of the row.
        prompt: the text before the reply.
        full_texts: prompt plus reply; if paired, also prompt plus rejected reply.
        plain: not rendered by a chat template, so the tokenizer's BOS token is still to be added.
        opponent_prompt: the prompt with the opponent's own system message, if it has one.
    """

    row: int
    index: int
    prompt: str
    full_texts: tuple[str, ...]
    plain: bool
    opponent_prompt: str | None = None


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None) -> frozenset[int]:
    """All EOS tokens: the tokenizer's, the generation configuration's and the chat template's.

    Args:
        tokenizer: the model's tokenizer.
        generation_eos: `eos_token_id` of the model's generation configuration.

    Raises:
        TokenizerError: there is no EOS token.
    """
    ids = {generation_eos} if isinstance(generation_eos, int) else set(generation_eos or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        ids.update(_template_end(tokenizer))
    if not ids:
        raise TokenizerError(
            "no EOS token: the tokenizer, the generation configuration and the chat template define none, so "
            f"generation would never stop. {_SET_EOS}"
        )
    return frozenset(ids)


def template_tail(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template prints after the text of a last reply; raises what the template does."""
    marker = "zebra quartz"
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
    _, found, tail = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(marker)
    return str(tail) if found else ""


def _template_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        tail = template_tail(tokenizer)
    except TEMPLATE_FAULTS:
        return []  # a template for talk of another shape: the rows themselves will tell
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        # Skipped before the test: some vocabularies hold line breaks as added tokens.
        if tokenizer.decode([token]).strip():
            special = token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder
            return [token] if special else []
    return []


class Encoder:
    """Renders and tokenizes turns; counts special cases in `report`.

    Args:
        tokenizer: the model's tokenizer.
        eos_ids: see `eos_token_ids`.
        report: the dataset's report.
        date: the date for chat templates that print one; None for today.
        opponent_system_prompt: the opponent's own system message; None for none.
        tokens: tokenizes with a tokenizer in Rust; None to call `tokenizer`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Collection[int],
        report: DataReport,
        date: datetime.date | None = None,
        opponent_system_prompt: str | None = None,
        tokens: TextTokens | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise TokenizerError(f"the tokenizer has no EOS token to end a response with. {_SET_EOS}")
        self.chat = bool(tokenizer.chat_template)
        """Whether the tokenizer has a chat template, so that conversations can be rendered."""
        self._tokenizer = tokenizer
        self._ends = frozenset({*eos_ids, tokenizer.eos_token_id})
        self._report = report
        self._opponent_system = opponent_system_prompt
        self._blank: dict[int, bool] = {}
        # Its own call resets truncation and padding that a tokenizer was saved with, here and in `_encode`.
        self._tokens = tokens
        self._start = self._start_ids()
        self._renderer = Renderer(tokenizer, self._ends, report.columns, date or datetime.date.today())

    def plain(self, text: PlainText, row: int, where: str) -> Draft:
        """One draft from a row without roles.

        Raises:
            DatasetError: the text contains an unpaired surrogate, or has no roles to put a system message before.
        """
        if self._opponent_system is not None:
            raise DatasetError(
                f"{where}: plain text has no system message, which opponent_system_prompt sets. Give rows of messages, "
                "or leave the option out."
            )
        replies = [text.completion, *([] if text.rejected is None else [text.rejected])]
        prompt, bos = text.prompt, self._tokenizer.bos_token
        if bos and prompt.lstrip().startswith(bos):
            prompt = prompt.lstrip()  # a BOS token after white space is still the first
        full_texts = tuple(valid_unicode(prompt + reply, where) for reply in replies)
        return Draft(row, 0, prompt, full_texts, plain=True)

    def render(
        self, talk: Conversation, row: int, chosen_turns: Literal["last", "random", "all"], where: str
    ) -> list[Draft]:
        """Render the turns to train on with the chat template; count the turns that are left out.

        Raises:
            TokenizerError: there is no chat template.
            DatasetError: the template refuses the conversation or omits part of its prompt.
        """
        if not self.chat:
            raise TokenizerError(
                f"{where}: holds messages, but the tokenizer has no chat template. Give one with "
                "--chat_template_path chatml (or zephyr, a Jinja file, a folder, a Hub id), or give rows of plain "
                "prompt and completion."
            )
        drafts = []
        for index, position in self._chosen(talk, row, chosen_turns):
            try:
                prompt, full_texts = self._renderer.turn(talk, position, where)
                opponent = self._opponent_prompt(talk, position, where)
            except Unprinted as reason:
                self._report.drop(str(reason), row)
            else:
                drafts.append(Draft(row, index, prompt, full_texts, plain=False, opponent_prompt=opponent))
        return drafts

    def _opponent_prompt(self, talk: Conversation, position: int, where: str) -> str | None:
        if self._opponent_system is None:
            return None
        message = {"role": "system", "content": self._opponent_system}
        first = int(talk.messages[0]["role"] in ("system", "developer"))
        changed = dataclasses.replace(talk, messages=(message, *talk.messages[first:]))
        try:
            return self._renderer.turn(changed, position + 1 - first, where)[0]
        except Unprinted as reason:
            raise Unprinted(f"{reason}, under opponent_system_prompt") from None
        except DatasetError as error:
            raise DatasetError(f"{error} This is so under opponent_system_prompt alone; leave it out.") from error

    def _chosen(self, talk: Conversation, row: int, chosen_turns: str) -> list[tuple[int, int]]:
        """The replies to train on: index among the replies, and index among the messages."""
        positions = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
        turns = [(index, position) for index, position in enumerate(positions) if position >= max(talk.first, 1)]
        if not turns:
            self._report.drop("reply without a prompt", row)
        last = chosen_turns == "last" or talk.rejected is not None
        chosen = []
        for index, position in reversed(turns):
            if position in talk.untrained:
                self._report.drop(f"reply {talk.untrained[position]}", row)
            else:
                chosen.append((index, position))
            # The rejected reply answers the same message as the last reply.
            if last and (chosen or talk.rejected is not None):
                break
        return chosen[::-1]

    def turns(self, drafts: Sequence[Draft]) -> Iterator[tuple[int, Turn]]:
        """Tokenize drafts; yield the row number and the turn of each.

        Raises:
            TokenizerError: the chat template renders a prompt differently once the reply follows.
        """
        texts = [text for draft in drafts for text in (draft.prompt, *draft.full_texts)]
        encoded = iter(self._encode(texts))
        others = iter(self._encode([draft.opponent_prompt for draft in drafts if draft.opponent_prompt is not None]))
        for draft in drafts:
            prompt = next(encoded)
            full_texts = [next(encoded) for _ in draft.full_texts]
            opponent = None if draft.opponent_prompt is None else tuple(next(others))
            try:
                replies = [
                    self._reply(draft, text, prompt, whole)
                    for text, whole in zip(draft.full_texts, full_texts, strict=True)
                ]
            except TokenizerError as error:
                self._report.refuse(error, draft.row)
                continue
            # Text from a chat template already contains the BOS token.
            start = self._start if draft.plain and prompt[: len(self._start)] != self._start else []
            rejected = replies[1] if len(replies) > 1 else None
            yield draft.row, Turn(draft.index, (*start, *prompt), replies[0], rejected, opponent)

    def _reply(self, draft: Draft, text: str, prompt: list[int], whole: list[int]) -> tuple[int, ...]:
        if whole[: len(prompt)] == prompt:
            return self._ended(whole[len(prompt) :])
        if not text.startswith(draft.prompt):
            raise self._rewritten(draft.row, prompt, whole)
        # Generation continues the prompt's tokens, so a token that spans prompt and reply could never be generated.
        self._report.boundary_merges += 1
        return self._ended(self._encode([text[len(draft.prompt) :]])[0])

    def _ended(self, reply: list[int]) -> tuple[int, ...]:
        """Truncate after the EOS token of the turn, or append one if there is none.

        Templates add white space after the EOS token, and some a second EOS token that closes the document. Both come
        after the point where generation stops.
        """
        end = None
        for position in range(len(reply) - 1, -1, -1):
            if reply[position] in self._ends:
                end = position
            elif not self._is_blank(reply[position]):
                break
        if end is not None:
            return tuple(reply[: end + 1])
        return (*reply, self._tokenizer.eos_token_id) if reply else ()

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]

    def _rewritten(self, row: int, prompt: list[int], whole: list[int]) -> TokenizerError:
        pairs = enumerate(zip(prompt, whole, strict=False))
        position = next((i for i, (mine, theirs) in pairs if mine != theirs), min(len(prompt), len(whole)))
        before, after = (
            repr(self._tokenizer.decode(ids[position : position + 3])) if position < len(ids) else "nothing"
            for ids in (prompt, whole)
        )
        way_out = "Use a template that leaves the history unchanged, such as one from trl's get_training_chat_template."
        if "<think>" in self._tokenizer.decode(prompt[position:]):
            way_out = (
                "The prompt opens <think>, and the reply is printed without it: use replies with reasoning and a "
                "template that keeps it, such as one from trl's get_training_chat_template, or a template that does "
                "not open it."
            )
        return TokenizerError(
            f"row {row + 1} of {self._report.source}: the chat template renders the prompt differently "
            f"once the reply follows: token {position + 1} is {before} without the reply and {after} with it. {way_out}"
        )

    def _start_ids(self) -> list[int]:
        """The tokens that the tokenizer adds before plain text, such as a BOS token."""
        full = self._tokenizer("a")["input_ids"]
        bare = self._encode(["a"])[0]
        positions = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
        return list(full[: next(positions, 0)])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._tokens is not None:
            return self._tokens(texts)
        encoded: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # Lengths are checked here, not against the tokenizer's own limit.
        )["input_ids"]
        return encoded
