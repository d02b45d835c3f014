"""Commands in a real terminal (a pty), of 80 and of 120 columns: what a person sees, and types."""

import codecs
import fcntl
import itertools
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from sapo.commands.catalog import COMMANDS
from sapo.options import options
from tests.integration.test_cli import command, data, model  # noqa: F401 - fixtures
from tests.reports import write_run

LIGHT = """
import sys
from sapo.commands.main import main
for line in sys.argv[1].split(";"):
    print(f"$ {line}", flush=True)
    main(line.split())
"""


class Terminal:
    """A program on a pty of a given width; what it prints is drawn as a terminal would draw it."""

    def __init__(self, arguments, width, height=40):
        own, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=its, stdout=its, stderr=its, close_fds=True, start_new_session=True,
            env=environment | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(its)
        self._fd, self.width, self.raw = own, width, ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        # Where the last text waited for ends: one read may bring that text and the next one together.
        self._passed = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        os.close(self._fd)
        self.process.kill()
        self.process.wait(timeout=60)

    def until(self, text, seconds=120):
        """Read on until `text` was printed after the text waited for last, or the program has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if text is not None and text in self.raw[self._passed :]:
                self._passed = self.raw.index(text, self._passed) + len(text)
                return
            ready, _, _ = select.select([self._fd], [], [], 0.2)
            if ready:
                try:
                    piece = os.read(self._fd, 65536)
                except OSError:
                    piece = b""
                if not piece:
                    break
                self.raw += self._decode(piece)
        assert text is None, f"{text!r} was not printed:\n{self.raw[-2000:]}"

    def type(self, text):
        os.write(self._fd, text.encode())

    def end(self):
        self.until(None)
        return self.process.wait(timeout=60)

    def screen(self):
        """Lines as they stand at the end; a line that was too long goes on in the next, marked by a backslash."""
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\x1b.|[^\x1b]", self.raw):
            if part == "\r":
                column = 0
            elif part == "\n":
                row, lines = row + 1, lines + [""] * (row + 2 - len(lines))
            elif part.startswith("\x1b["):
                count = int(re.findall(r"\d+", part)[0]) if re.search(r"\d", part) else 1
                if part.endswith("A"):
                    row = max(0, row - count)
                elif part.endswith("K"):
                    lines[row] = "" if part == "\x1b[2K" else lines[row][:column]
            elif part >= " " and not part.startswith("\x1b"):
                if column >= self.width:
                    lines[row] += "\\"
                    row, column, lines = row + 1, 0, lines + [""] * (row + 2 - len(lines))
                line = lines[row].ljust(column)
                lines[row] = line[:column] + part + line[column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]

    def broken(self):
        """Words that the terminal broke at its edge; of a path that is longer than a line nothing else is possible."""
        screen = self.screen()
        ends = [
            (line[:-1].split(" ")[-1], below.split(" ")[0]) for line, below in itertools.pairwise(screen)
            if len(line) == self.width + 1 and line.endswith("\\")
        ]  # fmt: skip
        return [head + tail for head, tail in ends if head and tail and "/" not in head + tail]


@pytest.mark.parametrize("width", [80, 120])
def test_tables_and_help_fit_and_lose_nothing(width, tmp_path):
    runs = [str(write_run(tmp_path / name, steps=30)) for name in ("one", "another", "third")]
    helped = [f"train --help {one.name}" for one in options()]
    lines = [
        "--help",
        *(f"{name} --help" for name in COMMANDS),
        *helped,
        "train --help-all",
        "data",
        "train",
        "recipes",
    ]
    lines += ["train --lr 1", "train --beta much", f"compare {' '.join(runs)}", "report nowhere"]
    with Terminal(["-c", LIGHT, ";".join(lines)], width) as terminal:
        assert terminal.end() == 0
    shown = "\n".join(terminal.screen())
    assert not terminal.broken()
    assert "…" not in shown
    assert "Traceback" not in shown
    assert "another" in shown
    assert "rewards/accuracies" in shown
    assert "no such folder" in shown


SESSION = """
import sys
from sapo.commands.main import main
train, run = sys.argv[1].split(), sys.argv[2]
assert main(train) == 0
assert main(["export", run, f"{run}-exported"]) == 0
assert main(["evaluate", run, "--suite", "local", "--dataset_name", sys.argv[3], "--max_length", "32", "--limit", "8",
             "--max_new_tokens", "4"]) == 0
print("NOW CHAT", flush=True)
sys.exit(main(["chat", run, "--max_new_tokens", "3"]))
"""


def test_a_run_its_evaluation_and_a_talk_at_80_columns(model, data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    evaluated = ("--eval_strategy", "steps", "--eval_steps", "2", "--eval_dataset_name", str(data), "--eval_local")
    never = ("--eval_local_max_time_fraction", "0.00001")
    arguments = command(model, data, out, "--max_steps", "6", "--log_pairs_steps", "3", *evaluated, *never)
    with Terminal(["-c", SESSION, " ".join(arguments), str(out), str(data)], 80) as terminal:
        terminal.until("NOW CHAT", seconds=300)
        # A warning of the run, above the bar.
        assert "they are left out, except" in " ".join(terminal.screen())
        assert not terminal.broken()
        seen = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", terminal.raw)
        screen = terminal.screen()
        assert "Loading torch and transformers ..." in seen
        assert not [line for line in screen if "Loading torch" in line]
        # The bar stayed in its place, with step, time left and whole numbers.
        (bar,) = [line for line in screen if re.match(r"step \d+/6 ━", line)]
        assert re.fullmatch(r"step 6/6 ━+ 0:00:00 left  [\d.e-]+ s/step", bar)
        numbers = screen[screen.index(bar) + 1]
        assert re.match(r"loss [\d.-]+  margin [\d.e-]+  accuracy [\d.]+", numbers)
        assert re.search(r"step [1-5]/6 .*\d:\d\d:\d\d left", seen)
        assert "pairs drawn at step 3" in seen
        table = screen[screen.index("local (value ±standard error)") :]
        assert not [line for line in table if line.endswith("\\") and "/" not in line]
        assert "…" not in "\n".join(table)
        assert any(line.startswith("Verdict on run policy:") for line in screen)
        terminal.until("you> ")
        terminal.type("w1 w2\n")
        terminal.until("policy> ")
        terminal.until("you> ")
        # The arrow up brings back the last line.
        terminal.type("\x1b[A\n")
        terminal.until("policy> ")
        terminal.until("you> ")
        terminal.type("/hlep\n")
        terminal.until("nearest: /help")
        terminal.until("you> ")
        terminal.type("/quit\n")
        assert terminal.end() == 0
    assert terminal.raw.count("w1 w2") >= 2
    assert "Traceback" not in terminal.raw
