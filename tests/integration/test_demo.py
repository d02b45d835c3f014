import pytest

from sapo.commands.main import main
from sapo.demo import run
from sapo.demo.score import ScoreReport


def test_demo_runs_every_arm_in_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "HELDOUT", 20)
    run.run_demo(max_steps=1, output_dir=str(tmp_path))
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {"sapo-orpo", "continued-sft", "sapo-dpo-guarded", "sapo-dpo-no-guard"}
    assert all((tmp_path / name / "model.safetensors").is_file() for name in folders)
    shown = capsys.readouterr().out
    assert all(shown.count(name) >= 2 for name in run.ARMS)


@pytest.mark.parametrize(
    ("right", "said"),
    [
        (950, "moved the checkpoint by +0.130 and is above continued SFT"),
        (905, "moved the checkpoint by +0.085 and is not distinguishable from continued SFT"),
        (500, "moved the checkpoint by -0.320 and is below continued SFT"),
    ],
)
def test_closing_sentence_follows_the_figures(right, said):
    figures = {"checkpoint": 820, "continued SFT": 900}
    results = {name: ScoreReport(figures.get(name, right), 1000, {}) for name in ("checkpoint", *run.ARMS)}
    assert run._reading(results).count(said) == 3


def test_unknown_demo_option_is_refused(capsys):
    assert main(["demo", "--max_stpes", "3"]) == 2
    assert "unknown option --max_stpes; nearest: --max_steps." in capsys.readouterr().err
