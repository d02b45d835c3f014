"""`sapo chat MODEL` and `sapo chat RUN`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sapo.commands.chat_models import ChatModels, Message, load_chat_models, prompt_ids, reply
from sapo.commands.inputs import quiet_libraries
from sapo.commands.parser import Parsed
from sapo.generation.sampling import Sampling
from sapo.text import visible

_COLUMN = 32
"""Below this many characters for each model they answer one below the other."""
_HELP = "/new starts anew, /system TEXT sets a system message, /quit or Ctrl-D ends."


def run_chat(given: Parsed) -> None:
    """Chat with a model or with a run's models, in the terminal or line by line from a pipe.

    Raises:
        ConfigurationError, ModelError, TokenizerError: what is missing, and the way out.
    """
    quiet_libraries()
    options = given.own
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    console = Console(highlight=False)
    cast = load_chat_models(
        options.target,
        revision=options.revision,
        device=options.device,
        chat_template_path=options.chat_template_path,
    )
    talk = ChatSession(
        cast, console, sampling, options.max_new_tokens, options.seed, options.system, plain=options.plain
    )
    for said in options.prompt or _lines(console, [model.name for model in cast.models]):
        if said in ("/quit", "/exit"):
            return
        talk.say(said)


def _lines(console: Console, names: list[str]) -> Iterator[str]:
    """What the user types, or the lines of a pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n")
        return
    console.print(f"{', '.join(names)}. {_HELP}", markup=False)
    while True:
        try:
            said = console.input(Text("you> ", style="bold")).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if said:
            yield said


class ChatSession:
    """A conversation with each model of a cast: all hear the user, and each its own replies.

    Args:
        cast: who answers.
        console: where to.
        sampling: how tokens are drawn.
        max_new_tokens: of a reply.
        seed: of the first turn; the next ones count up.
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
        self._start_anew()

    def _start_anew(self) -> None:
        first = [{"role": "system", "content": self._system}] if self._system else []
        self.turns = {model.name: list(first) for model in self._cast.models}

    def say(self, text: str) -> None:
        """One turn of the user, answered by all models; or a command.

        Raises:
            ConfigurationError: an unknown command, or no room for a reply.
        """
        command, _, rest = text.partition(" ")
        if command == "/new":
            self._start_anew()
        elif command == "/system":
            self._system = rest.strip() or None
            self._start_anew()
        elif command.startswith("/"):
            self._console.print(f"Unknown command {command}. {_HELP}", markup=False)
        else:
            self._answer(text)
            self._seed += 1

    def _answer(self, text: str) -> None:
        names = [model.name for model in self._cast.models]
        for turns in self.turns.values():
            turns.append({"role": "user", "content": text})
        room = self._console.width // len(names)
        if len(names) == 1 or not self._console.is_terminal or room < _COLUMN:
            for name in names:
                self._console.print(Text(f"{name}> ", style="bold"), end="")
                self._reply(name, lambda piece: self._console.print(Text(visible(piece)), end="", soft_wrap=True))
                self._console.print()
            return
        written = {name: Text() for name in names}
        with Live(_columns(written), console=self._console, refresh_per_second=12) as live:
            for name in names:

                def show(piece: str, name: str = name) -> None:
                    written[name].append(visible(piece))
                    live.update(_columns(written))

                self._reply(name, show)

    def _reply(self, name: str, write: Callable[[str], None]) -> None:
        (model,) = (model for model in self._cast.models if model.name == name)
        prompt = prompt_ids(self._cast.tokenizer, self.turns[name], plain=self._plain)
        answer = reply(
            model,
            self._cast.tokenizer,
            prompt,
            self._sampling,
            max_new_tokens=self._max_new_tokens,
            seed=self._seed,
            write=write,
        )
        self.turns[name].append({"role": "assistant", "content": answer})


def _columns(written: dict[str, Text]) -> Table:
    table = Table(expand=True, show_lines=True)
    for name in written:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*written.values())
    return table
