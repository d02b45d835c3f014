"""What is pushed to the hub, against a hub that is not there."""

import re
from pathlib import Path
from types import SimpleNamespace
from xml.dom import minidom

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

from sapo.errors import ConfigurationError
from sapo.hub import publish
from sapo.hub.card import write_card
from sapo.report.svg import curves_svg
from sapo.runs.reading import read_run
from tests.reports import HOSTILE, write_run


class Hub:
    """Remembers what it was asked, and keeps what was uploaded as the hub's client would pick it."""

    def __init__(self):
        self.created, self.files, self.tokens, self.refuses = [], {}, [], None

    def client(self, token=None):
        self.tokens.append(token)
        return self

    def create_repo(self, name, *, private, exist_ok):
        if self.refuses:
            raise HfHubHTTPError(self.refuses, response=SimpleNamespace(headers={}, request=None))
        self.created.append((name, private))
        return SimpleNamespace(repo_id=f"me/{name.split('/')[-1]}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision, allow_patterns, ignore_patterns):
        files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        kept = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        self.files[repo_id] = {name: (Path(folder_path) / name).read_bytes() for name in kept}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{revision}", message=commit_message)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(publish, "HfApi", hub.client)
    return hub


@pytest.mark.parametrize("opponent", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_models_and_card_are_pushed_and_no_text_of_the_data(lora, opponent, hub, make_trainer):
    trainer = make_trainer(
        lora=lora, push_to_hub=True, hub_private_repo=True, push_opponent_to_hub=opponent, report_pairs=12,
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    assert hub.created == [("run", True)]
    trainer.train()
    assert hub.files == {}
    answer = trainer.push_to_hub()
    assert answer.commit_url.startswith("https://hub/me/run")
    names = set(hub.files["me/run"])
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert {weights, "README.md", "curves.svg", "tokenizer.json"} <= names
    assert ("opponent/" + weights in names) == opponent
    assert not [name for name in names if "jsonl" in name or "html" in name or "checkpoint" in name or name[0] == "."]
    text = hub.files["me/run"]["README.md"].decode()
    assert 'from_pretrained("me/run")' in text
    assert str(trainer.run_folder.path) not in text


def test_a_hub_that_refuses_is_told_before_anything_is_trained(hub, make_trainer):
    hub.refuses = "403 Forbidden"
    with pytest.raises(ConfigurationError, match=r"cannot create the repository: .*403 Forbidden.*hf auth login"):
        make_trainer(push_to_hub=True)


def test_checkpoints_are_not_pushed_and_an_opponent_needs_self_play(make_trainer):
    with pytest.raises(ConfigurationError, match="hub_strategy=every_save"):
        make_trainer(hub_strategy="every_save")
    with pytest.raises(ConfigurationError, match="there is no opponent"):
        make_trainer(push_opponent_to_hub=True, pair_source="paired")


def card_of(folder, name="me/mine"):
    write_card(folder, name)
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_names_model_data_settings_curves_and_source(tmp_path):
    folder = write_run(tmp_path / "run", **{"self_play/chosen_logp_change_per_token": lambda step: -step / 2})
    recipe = {"model_name_or_path": "some/model", "dataset_name": "some/data", "beta": 0.25, "output_dir": "/home/me/x"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    front, body = card_of(folder)
    assert front == {
        "base_model": "some/model",
        "base_model_relation": "finetune",
        "datasets": ["some/data"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sapo", "trl", "dpo"],
    }
    assert "`some/data`: 7,000 rows" in body
    assert "beta: 0.25" in body
    assert "/home/me" not in body
    assert "The chosen responses became less likely." in body
    assert "![Training curves](curves.svg)" in body
    assert "2405.20830" in body
    assert "## Evaluation" not in body


def test_the_license_is_that_of_the_base_model(tmp_path):
    folder, base = write_run(tmp_path / "run"), tmp_path / "base"
    base.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(base)}))
    assert "license" not in card_of(folder)[0]
    (base / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\nlicense: other\n")
    assert card_of(folder)[0]["license"] == "mit"


def test_a_local_path_does_not_leave_the_machine(tmp_path):
    folder = write_run(tmp_path / "run")
    recipe = {"model_name_or_path": str(tmp_path / "secret/model"), "dataset_name": str(tmp_path / "secret/rows.jsonl")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    front, body = card_of(folder)
    assert "base_model" not in front
    assert "datasets" not in front
    assert "secret" not in body
    assert "`rows.jsonl`" in body


def test_evaluations_stand_in_the_card(tmp_path):
    folder = write_run(tmp_path / "run", evaluations=[(100, 0.4321)])
    measures = {"accuracy": {"value": 0.625, "stderr": 0.02}}
    results = '{"format": 1, "suites": {"ifeval": {"models": {"policy": {"measures": %s}}}}}'
    (folder / "evaluation").mkdir()
    (folder / "evaluation/results.json").write_text(results % str(measures).replace("'", '"'))
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 100, "eval_local/ended": 0.875, "eval_runtime": 3.0}\n')
    _, body = card_of(folder)
    assert "| fixed pairs of the training: local/ended | policy | 0.875 |" in body
    assert "runtime" not in body
    assert "| ifeval: accuracy | policy | 0.625 ±0.020 |" in body
    assert "| fixed pairs of the training: loss | policy | 0.4321 |" in body
    (folder / "evaluation/results.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="not results of an evaluation"):
        card_of(folder)


def test_the_curves_are_a_small_picture_of_what_was_logged(tmp_path):
    folder = write_run(tmp_path / "run", steps=5000)
    picture = curves_svg(read_run(folder))
    tree = minidom.parseString(picture)
    assert len(tree.getElementsByTagName("polyline")) == 5
    assert len(picture) < 40_000
    assert not re.search(r"<script|href|foreignObject", picture)
    alone = write_run(tmp_path / "alone", steps=1)
    minidom.parseString(curves_svg(read_run(alone)))


def test_hostile_names_stay_text(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model_name_or_path": HOSTILE}))
    front, _ = card_of(folder)
    assert front["tags"] == ["sapo", "trl", "dpo"]
