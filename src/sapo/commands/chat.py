"""`sapo chat MODEL` and `sapo chat RUN`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sapo.commands.chat_models import (
    ChatModel,
    ChatModels,
    ConversationFullError,
    Message,
    load_chat_models,
    prompt_ids,
    reply,
)
from sapo.commands.inputs import quiet_libraries
from sapo.commands.parser import Parsed
from sapo.errors import ConfigurationError, nearest
from sapo.generation.sampling import Sampling
from sapo.runs.files import write_atomically
from sapo.text.escape import visible

_COLUMN = 32
"""With fewer characters per model the replies stand one below the other."""
_COMMANDS = {
    "/help": "show these commands",
    "/new": "start a new conversation",
    "/system TEXT": "start a new conversation with a system message; without TEXT, with none",
    "/regenerate": "sample the last reply again, with another seed",
    "/temp X": "set the sampling temperature; 0 for greedy",
    "/save FILE": "write the conversation to a file, one JSON line per model",
    "/quit": "end (also Ctrl-D)",
}
_QUIT = ("/quit", "/exit")


def run_chat(given: Parsed, begin: Callable[[], None]) -> None:
    """Chat with a model or with a run's models, in the terminal or line by line from a pipe.

    Args:
        given: the command line.
        begin: called when the models are ready; without a terminal, after their first replies.

    Raises:
        ConfigurationError, ModelError, TokenizerError: what is missing, and the way out.
    """
    quiet_libraries()
    options = given.own
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(f"Loading {options.target} ...", markup=False, style="dim")
    cast = load_chat_models(
        options.target,
        revision=options.revision,
        device=options.device,
        chat_template_path=options.chat_template_path,
    )
    talk = ChatSession(
        cast, console, sampling, options.max_new_tokens, options.seed, options.system, plain=options.plain
    )
    interactive = not options.prompt and sys.stdin.isatty()
    if not options.plain and cast.tokenizer.chat_template is None:
        talk.note("This model has no chat template: each line is sent alone, as it is.")
    if not interactive:
        for said in options.prompt or (line.rstrip("\n") for line in sys.stdin if line.strip()):
            if said in _QUIT:
                return
            talk.say(said)
            begin()
        return
    begin()
    names = ", ".join(model.name for model in cast.models)
    talk.note(f"{names}. Ctrl-C stops a reply, Ctrl-D ends; /help lists the commands.")
    for said in _typed(console):
        if said in _QUIT:
            return
        _say(talk, said, console)


def _say(talk: ChatSession, said: str, console: Console) -> None:
    """One turn; a full conversation and a mistyped command do not end the talk."""
    try:
        talk.say(said)
    except ConversationFullError as error:
        talk.note(f"{str(error)[:1].upper()}{str(error)[1:]}")
        if _asked("Start a new conversation with this message? [Y/n] ", console):
            talk.say("/new")
            _say(talk, said, console)
    except (ConfigurationError, OSError) as error:
        talk.note(f"{error}")


def _asked(question: str, console: Console) -> bool:
    try:
        return input(question).strip().lower() in ("", "y", "yes")
    except (EOFError, KeyboardInterrupt):
        console.print()
        return False


def _typed(console: Console) -> Iterator[str]:
    """What the user types, with line editing and history; a line that ends in a backslash goes on in the next."""
    with suppress(ImportError):  # not built into every Python
        import readline  # noqa: F401 - gives input() line editing and history
    plain = "NO_COLOR" in os.environ or console.is_dumb_terminal
    # Between \001 and \002 is what readline must not count as characters of the prompt.
    prompt = "you> " if plain else "\001\033[1m\002you> \001\033[0m\002"
    while True:
        try:
            said = input(prompt)
            while said.endswith("\\"):
                said = f"{said[:-1]}\n{input('...> ')}"
        except KeyboardInterrupt:
            # Of a line half typed: it is forgotten, as a shell does.
            console.print()
            continue
        except EOFError:
            console.print()
            return
        if said.strip():
            yield said.strip()


class ChatSession:
    """A conversation with each of several models: all hear the user, and each its own replies.

    Args:
        cast: the models.
        console: where to print.
        sampling: how tokens are sampled.
        max_new_tokens: maximum number of tokens of a reply.
        seed: random seed of the first turn; the next ones count up.
        system: a system message, or None.
        plain: see `prompt_ids`.
    """

    def __init__(
        self,
        cast: ChatModels,
        console: Console,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        system: str | None,
        *,
        plain: bool,
    ) -> None:
        self._cast = cast
        self._console = console
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._system = system
        self._plain = plain
        self.turns: dict[str, list[Message]] = {}
        """The conversation of each model, by its name."""
        self._begin()

    def _begin(self) -> None:
        first = [{"role": "system", "content": self._system}] if self._system else []
        self.turns = {model.name: list(first) for model in self._cast.models}

    def note(self, text: str) -> None:
        """Print a remark of the program."""
        self._console.print(Text(text, style="dim"))

    def say(self, text: str) -> None:
        """One turn of the user, answered by all models; or a command.

        Raises:
            ConversationFullError: no tokens left for a reply; the conversation is as it was before.
            ConfigurationError: a command with a value that is out of range.
        """
        command, _, rest = text.partition(" ")
        rest = rest.strip()
        match command:
            case "/help":
                width = max(map(len, _COMMANDS))
                for name, meaning in _COMMANDS.items():
                    self.note(f"{name:<{width}}  {meaning}")
            case "/new":
                self._begin()
                self.note("New conversation.")
            case "/system":
                self._system = rest or None
                self._begin()
                self.note("New conversation, " + ("with this system message." if rest else "without a system message."))
            case "/regenerate":
                self._regenerate()
            case "/temp":
                self._set_temperature(rest)
            case "/save":
                self._save(rest)
            case _ if command.startswith("/") and command[1:].isalpha():
                close = nearest(command, [name.split()[0] for name in _COMMANDS])
                self.note(f"Unknown command {command}{close}. /help lists them.")
            case _:
                self._answer(text)

    def _set_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            self.note(f"The temperature is {self._sampling.temperature:g}. /temp 0.7 changes it.")
            return
        self._sampling = Sampling(value, self._sampling.top_k, self._sampling.top_p)
        self.note(f"Temperature {value:g}.")

    def _save(self, name: str) -> None:
        if not name:
            self.note("Give a file: /save talk.jsonl")
            return
        file = Path(name).expanduser()
        if file.exists():
            self.note(f"{name} exists already. Give another name.")
            return
        talks = [{"model": model, "messages": turns} for model, turns in self.turns.items()]
        write_atomically(file, "".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in talks))
        self.note(f"Written to {name}.")

    def _regenerate(self) -> None:
        asked = [turn["content"] for turns in self.turns.values() for turn in turns if turn["role"] == "user"]
        if not asked:
            self.note("There is no reply yet.")
            return
        said = asked[-1]
        for turns in self.turns.values():
            while turns and turns[-1]["role"] != "system":
                if turns.pop()["role"] == "user":
                    break
        self._answer(said)

    def _answer(self, text: str) -> None:
        before = {name: list(turns) for name, turns in self.turns.items()}
        for turns in self.turns.values():
            turns.append({"role": "user", "content": text})
        try:
            self._replies()
        except ConversationFullError:
            self.turns = before
            raise
        for name, turns in self.turns.items():
            if turns[-1]["role"] == "user":
                # Ctrl-C came before its reply began: as if it had not been asked.
                self.turns[name] = before[name]
        self._seed += 1

    def _replies(self) -> None:
        models = self._cast.models
        room = self._console.width // len(models)
        if len(models) == 1 or not self._console.is_terminal or room < _COLUMN:
            for model in models:
                self._console.print(Text(f"{model.name}> ", style="bold"), end="")
                wrapped = _Wrapped(self._console, start=len(model.name) + 2)
                stopped = self._reply(model, wrapped.write)
                wrapped.close()
                if stopped:
                    return
            return
        written = {model.name: Text() for model in models}
        with Live(_columns(written), console=self._console, refresh_per_second=12, vertical_overflow="visible") as live:
            for model in models:

                def show(piece: str, name: str = model.name) -> None:
                    written[name].append(visible(piece))
                    live.update(_columns(written))

                if self._reply(model, show):
                    return

    def _reply(self, model: ChatModel, write: Callable[[str], None]) -> bool:
        """Let one model answer; whether Ctrl-C stopped it."""
        prompt = prompt_ids(self._cast.tokenizer, self.turns[model.name], plain=self._plain)
        answer = reply(
            model,
            self._cast.tokenizer,
            prompt,
            self._sampling,
            max_new_tokens=self._max_new_tokens,
            seed=self._seed,
            write=write,
        )
        if answer.end != "complete":
            write(" [stopped]" if answer.end == "stopped" else f" [cut after {self._max_new_tokens} tokens]")
        if answer.text or answer.end == "complete":
            self.turns[model.name].append({"role": "assistant", "content": answer.text})
        return answer.end == "stopped"


class _Wrapped:
    """Text that comes in pieces, printed so that no word is broken at the edge of the terminal."""

    def __init__(self, console: Console, start: int) -> None:
        self._console = console
        self._column = start
        self._word = ""

    def write(self, piece: str) -> None:
        """Print the words that are complete."""
        for char in visible(piece, self._console.encoding):
            if char.isspace():
                self._flush()
                # A space at the edge would begin the next line.
                char = "\n" if self._console.is_terminal and self._column >= self._console.width else char
                self._print(char)
                self._column = 0 if char == "\n" else self._column + 1
            else:
                self._word += char
                if cell_len(char) > 1:
                    # Scripts without spaces may be broken anywhere.
                    self._flush()

    def close(self) -> None:
        """Print what is left, and end the line."""
        self._flush()
        self._console.print()

    def _flush(self) -> None:
        width = cell_len(self._word)
        if self._console.is_terminal and self._column + width > self._console.width and self._column:
            self._print("\n")
            self._column = 0
        self._print(self._word)
        self._column += width
        self._word = ""

    def _print(self, text: str) -> None:
        self._console.print(Text(text), end="", soft_wrap=True)


def _columns(written: dict[str, Text]) -> Table:
    table = Table(expand=True, show_lines=True)
    for name in written:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*written.values())
    return table
