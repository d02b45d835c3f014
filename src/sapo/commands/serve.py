"""`sapo serve`: vLLM servers for a recipe, started so that weights can be handed over; with `--train` for one run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import httpx2
from rich.console import Console

from sapo.commands.arguments import RunArguments, build
from sapo.commands.parser import Parsed
from sapo.config import VLLM_URL
from sapo.errors import ConfigurationError, GenerationError, TrainingError, brief
from sapo.generation.vllm.installed import HOW_TO_INSTALL, find_vllm
from sapo.generation.vllm.limits import max_lora_rank
from sapo.generation.vllm.weight_stream import RECEIVER
from sapo.text.terminal import say
from sapo.weights.description import load_config
from sapo.weights.loading import with_stored_adapter

RESTARTS = 3
"""Times that a server which has died is started again, in all."""

_SERVER_SHARE = 0.9
"""Of a GPU's memory, where a server has it for itself."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server to start.

    Attributes:
        url: where it will listen.
        command: that starts it.
        environment: variables added to this process's.
        log: file that takes what it prints.
    """

    url: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path


def run_serve(given: Parsed) -> int:
    """Start the servers of a recipe and, with `--train`, its run; stop them with it, or at Ctrl-C.

    Args:
        given: options of `sapo train`; `--train`; `--vllm_python`, an interpreter that has vLLM; `--devices`, the GPUs
            of each server in turn; and after `--` flags for vLLM itself.

    Returns:
        The exit status: of the run, or 0 once the servers were stopped.

    Raises:
        ConfigurationError: no vLLM, flags that do not fit.
        GenerationError: a server ended by itself; says what it last printed.
    """
    own = given.own
    run = build(given.values() | {"report_to": ["none"]})
    if run.config.generation_backend != "vllm_server":
        raise ConfigurationError(
            f"generation_backend={run.config.generation_backend}: no server is used. "
            "Add --generation_backend vllm_server."
        )
    # vLLM is not told to trust code either; here the reason is one line.
    load_config(run.model)
    run.model = with_stored_adapter(run.model, merge=run.config.adapter == "merge")
    python = own.vllm_python or _python_with_vllm()
    servers = servers_for(run, python, own.devices or (), given.extra)
    console = Console()
    with _Running(servers, console) as running:
        running.wait_until_ready()
        if own.train:
            return running.during([sys.executable, "-m", "sapo", "train", *given.rest])
        urls = ", ".join(server.url for server in servers)
        say(console, f"Ready: {urls}. Ctrl-C stops. In another terminal: sapo train {shlex.join(given.rest)}")
        running.forever()
    return 0


def servers_for(run: RunArguments, python: str, devices: Sequence[str] = (), extra: Sequence[str] = ()) -> list[Server]:
    """How the servers of a run are started, one for each `vllm_server_url`.

    Args:
        run: gives model, lengths, precision, adapter and addresses.
        python: interpreter that has vLLM.
        devices: for each server the GPUs that it may use, separated by commas; none: those that this process sees.
        extra: flags for vLLM.

    Raises:
        ConfigurationError: an address without port, another number of devices than of servers, too large a rank.
    """
    config, model = run.config, run.model
    urls = config.vllm_server_url or [VLLM_URL]
    if devices and len(devices) != len(urls):
        raise ConfigurationError(
            f"--devices is given {len(devices)} times and there are {len(urls)} servers. Give it once for each."
        )
    dtype = "bfloat16" if config.bf16 else "float16" if config.fp16 else str(model.dtype or "auto")
    flags = [
        "--model", str(model.model_name_or_path), "--revision", model.model_revision, "--dtype", dtype,
        "--max-model-len", str(config.max_length), "--seed", str(config.seed), "--generation-config", "vllm",
    ]  # fmt: skip
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if config.vllm_weights_transfer == "stream":
        flags += ["--worker-extension-cls", RECEIVER]
        # vLLM's own environment need not have this package installed.
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    if config.use_cpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    else:
        flags += ["--gpu-memory-utilization", str(_SERVER_SHARE)]
    if model.use_peft:
        flags += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(max_lora_rank(model.lora_r))]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    found = []
    for place, url in enumerate(urls):
        address = urlsplit(url)
        if not address.hostname or not address.port:
            raise ConfigurationError(f"vllm_server_url={url}: give host and port, such as {VLLM_URL}.")
        own, at = dict(environment), ["--host", address.hostname, "--port", str(address.port)]
        if devices:
            own["CUDA_VISIBLE_DEVICES"] = devices[place]
            at += ["--tensor-parallel-size", str(devices[place].count(",") + 1)]
        folder = Path(config.output_dir or "run")
        log = folder.with_name(f"{folder.name}-vllm-{address.port}.log")
        command = (python, "-m", "vllm.entrypoints.openai.api_server", *flags, *at, *extra)
        found.append(Server(url, command, own, log))
    return found


class _Running:
    """Servers as child processes: started at the beginning, started again if they die, stopped at the end."""

    def __init__(self, servers: Sequence[Server], console: Console) -> None:
        self._servers = servers
        self._console = console
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts = 0
        self._asked_to_stop = False
        self._child: subprocess.Popen[bytes] | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> _Running:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._stop)
        try:
            for server in self._servers:
                self._start(server)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, server: Server) -> None:
        with suppress(httpx2.HTTPError):
            httpx2.get(f"{server.url}/health", trust_env=False, timeout=2)
            raise ConfigurationError(f"{server.url}: something listens there already. Stop it, or use another port.")
        server.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with server.log.open("ab") as log:
                # A group of its own: Ctrl-C is for this process, which stops the run before its servers.
                self._processes[server.url] = subprocess.Popen(  # noqa: S603
                    server.command,
                    env={**os.environ, **server.environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise ConfigurationError(f"--vllm_python {server.command[0]}: cannot be started ({error}).") from error
        self._say(f"Starting vLLM at {server.url}; it writes to {server.log}")

    def _say(self, line: str) -> None:
        say(self._console, line)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop = True
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def wait_until_ready(self) -> None:
        """Return when all answer, or a stop was asked for; loading a large model takes as long as it takes.

        Raises:
            GenerationError: one ended.
        """
        for server in self._servers:
            while not self._asked_to_stop:
                if self._processes[server.url].poll() is not None:
                    raise GenerationError(self._death(server))
                with suppress(httpx2.HTTPError):
                    if httpx2.get(f"{server.url}/health", trust_env=False, timeout=5).status_code == 200:
                        break
                time.sleep(0.5)

    def forever(self) -> None:
        """Return when a stop is asked for."""
        while not self._asked_to_stop:
            self._look_after()
            time.sleep(0.5)

    def during(self, command: Sequence[str]) -> int:
        """Run `command` beside the servers; its exit status.

        Raises:
            TrainingError: a signal that nobody sent through this process ended it.
        """
        if self._asked_to_stop:
            return 130
        self._child = subprocess.Popen(command, start_new_session=True)  # noqa: S603
        while (status := self._child.poll()) is None:
            self._look_after()
            time.sleep(0.2)
        if status < 0 and not self._asked_to_stop:
            raise TrainingError(f"the run was ended by signal {-status}. Continue with --resume_from_checkpoint true.")
        return status

    def _look_after(self) -> None:
        """Start again what has died, up to `RESTARTS` times; the run gives it its weights when it is back."""
        for server in self._servers:
            if self._processes[server.url].poll() is None:
                continue
            if self._restarts == RESTARTS:
                if self._child is None:
                    raise GenerationError(self._death(server))
                # The run finds out by itself, and may have other servers.
                continue
            self._restarts += 1
            self._say(f"{self._death(server)} Starting it again.")
            self._start(server)

    def _death(self, server: Server) -> str:
        lines = server.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines[-80:] if "Error" in line] or lines[-1:]
        said, status = brief(errors[-1] if errors else "", 200), self._processes[server.url].returncode
        return f"vLLM at {server.url} ended with status {status} ({said}); see {server.log}."

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            _signal_group(process, signal.SIGTERM)
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            # What its own children have left behind holds memory of the GPU.
            _signal_group(process, signal.SIGKILL)
            process.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _python_with_vllm() -> str:
    python = find_vllm()
    if python is None:
        raise ConfigurationError(
            f"vLLM is not installed here, and there is no .venv-vllm beside. Run: {HOW_TO_INSTALL}; or name an "
            "interpreter that has vLLM with --vllm_python."
        )
    return python
