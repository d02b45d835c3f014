"""Laws of a long run: what a process holds does not grow with its steps."""

import gc
import threading

import psutil
import pytest
from transformers import TrainerCallback

from tests.faults.children import build
from tests.faults.trials import trials

STEPS = trials(100, 2000)


class Held(TrainerCallback):
    """Memory, open files and threads every so many steps."""

    def __init__(self, every):
        self.every, self.process, self.seen = every, psutil.Process(), {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            gc.collect()
            held = (self.process.memory_info().rss / 1e6, self.process.num_fds(), threading.active_count())
            self.seen[state.global_step] = held


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_memory_files_and_threads_do_not_grow(lora, tmp_path, capsys):
    # A small buffer, so that it is full long before the first look.
    trainer = build(
        tmp_path / "run",
        lora=lora,
        max_steps=STEPS,
        save_steps=STEPS // 10,
        replay_buffer_size=32,
        logging_steps=5,
    )
    held = Held(STEPS // 10)
    trainer.add_callback(held)
    trainer.train()
    # The first looks include what libraries set up at first use, the first checkpoint among it.
    early, late = held.seen[3 * STEPS // 10], held.seen[STEPS]
    with capsys.disabled():
        print(f"\n{STEPS} steps, lora={lora}: MB {early[0]:.1f} -> {late[0]:.1f}, files {early[1]} -> {late[1]}")
    assert late[0] - early[0] < 8, held.seen
    assert late[1] <= early[1], held.seen
    assert late[2] <= early[2], held.seen
