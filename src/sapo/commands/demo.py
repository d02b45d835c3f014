"""`sapo demo`, and `sapo demo --chat`."""

from __future__ import annotations

from sapo.commands.notices import loading_libraries
from sapo.commands.parser import Parsed
from sapo.errors import ConfigurationError


def run_demo_command(given: Parsed) -> None:
    """Run one of the two demos, with its own defaults for what is not given.

    Raises:
        ConfigurationError: a model of one's own without --chat.
    """
    options = vars(given.own)
    chat, model = options.pop("chat"), options.pop("model_name_or_path")
    options = {name: value for name, value in options.items() if value is not None}
    if model is not None and not chat:
        raise ConfigurationError("--model_name_or_path without --chat: the built-in task has a model. Add --chat.")
    with loading_libraries():
        from sapo.commands.inputs import quiet_libraries
        from sapo.demo.chat import run_chat_demo
        from sapo.demo.run import run_demo

    quiet_libraries()
    if chat:
        run_chat_demo(**options, model_name_or_path=model)
    else:
        run_demo(**options)
