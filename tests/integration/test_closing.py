"""Laws of what a run says: numbers from the first step to the last, no claims from a few pairs, commands that work."""

import re
import shlex

import pytest
import yaml

from sapo.commands.closing import results
from sapo.commands.main import main
from sapo.report.summary import ENOUGH_PAIRS, change_of, figures, sentences, warnings
from sapo.runs.metrics import ACCURACY, LOSS
from sapo.runs.reading import read_run
from tests.integration.test_cli import command, data, model  # noqa: F401 - fixtures
from tests.reports import write_run
from tests.tiny import write_rows


def defaults(arguments):
    """The arguments without their --logging_steps."""
    at = arguments.index("--logging_steps")
    return [*arguments[:at], *arguments[at + 2 :]]


def test_every_command_of_the_closing_screen_works_when_pasted(model, data, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", interrupted)
    out = tmp_path / "a run"
    assert main(command(model, data, out)) == 0
    shown = capsys.readouterr().out
    assert f"Follow this run: sapo report '{out}' --serve" in shown
    assert "Loss " in shown
    assert "per token" in shown
    typed = dict(re.findall(r"^(\w+): +sapo (.+)$", shown, re.MULTILINE))
    assert list(typed) == ["Report", "Chat", "Evaluate", "Compare", "Export", "Longer"]
    for label, line in typed.items():
        small = {
            "Chat": ["--prompt", "w1", "--max_new_tokens", "3"],
            "Evaluate": ["--limit", "4"],
            "Report": ["--port", "0"],
        }
        assert main([*shlex.split(line, comments=True), *small.get(label, [])]) == 0, line
    (program,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    exec(program.replace("max_new_tokens=128", "max_new_tokens=2"), {})
    assert re.search(rf"^Page: +{re.escape(str(out / 'report.html'))}$", shown, re.MULTILINE)


def interrupted(server):
    raise KeyboardInterrupt


def test_the_first_and_the_last_step_are_logged_and_about_twenty_in_between(model, data, tmp_path, capsys):  # noqa: F811
    for steps, most in ((3, 3), (50, 21)):
        out = tmp_path / f"run-{steps}"
        arguments = [*defaults(command(model, data, out)), "--max_steps", str(steps), "--report_pairs", "0"]
        assert main(arguments) == 0
        logged = [step for step, _ in read_run(out).curve(LOSS)]
        assert logged[0] == 1
        assert logged[-1] == steps
        assert min(steps, 15) <= len(logged) <= most
        assert read_run(out).last("optimizer/moved_fraction") is not None


def test_the_recipe_is_there_before_the_first_step(model, data, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "run"
    seen = []

    def stop(*arguments, **more):
        seen.append(yaml.safe_load((out / "recipe.yaml").read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr("sapo.training.trainer.SAPOTrainer.training_step", stop)
    assert main(command(model, data, out)) == 130
    assert seen[0]["model_name_or_path"] == str(model)
    assert "sapo_config.yaml" in {file.name for file in out.iterdir()}


@pytest.mark.parametrize("steps", [2, 8, 15])
def test_a_handful_of_pairs_makes_no_share(steps, tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=steps, **{"rewards/accuracies": lambda step: 1.0}))
    assert steps * run.pairs_per_step < 2 * ENOUGH_PAIRS
    assert not change_of(run, ACCURACY).is_certain
    assert not re.search(r"\d%", " ".join([*sentences(run), *results(run)]))
    assert "accuracy" not in {figure.name for figure in figures(run)}
    assert not warnings(run)


def test_enough_pairs_make_one_and_say_how_many(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=16))
    assert "of the first 64 pairs" in " ".join(sentences(run))
    assert any(line.startswith("Of the last 64 pairs") for line in results(run))


def test_means_of_start_and_end_weigh_log_lines_by_their_pairs(tmp_path):
    folder = write_run(tmp_path / "run", steps=40)
    rows = [{"step": step, "loss": loss} for step, loss in ((1, 8.0), (11, 2.0), (21, 2.0), (31, 2.0), (40, 1.0))]
    write_rows(folder / "metrics.jsonl", rows)
    change = change_of(read_run(folder), LOSS)
    # 1 step and 10 steps of 8 pairs each; the last 9 have enough alone.
    assert change.first == pytest.approx((8.0 + 10 * 2.0) / 11)
    assert change.last == 1.0


def test_harm_is_told_per_token_and_noise_is_not_told(tmp_path):
    for change, level in ((-0.005, None), (-0.05, "warning"), (-0.5, "bad")):
        run = write_run(tmp_path / f"{change}", **{"self_play/chosen_logp_change_per_token": lambda step, c=change: c})
        assert [warn.level for warn in warnings(read_run(run))] == ([level] if level else [])


def test_a_margin_of_nothing_is_called_that(tmp_path):
    small = {"rewards/margins": lambda step: 0.002, "rewards/accuracies": lambda step: 1.0}
    assert "no preference between the responses yet" in " ".join(
        sentences(read_run(write_run(tmp_path / "a", **small)))
    )
