import os
import re
import subprocess
import sys

import pytest
import yaml

from sapo.commands.arguments import as_recipe, parse
from sapo.commands.catalog import COMMANDS, LAUNCHER
from sapo.commands.main import main
from sapo.commands.recipes import CLUSTER, FOLDER, find_recipe, run_recipes
from sapo.errors import ConfigurationError
from sapo.options import option
from tests.runs import metrics_of
from tests.tiny import tiny_llama, tiny_tokenizer, write_rows

OF_TRL = [FOLDER / "trl-sft.yaml", FOLDER / "llama3-8b-trl-sft.yaml"]
PRESETS = sorted((FOLDER / "presets").glob("*.yaml"))
OWN = [file for file in sorted(FOLDER.glob("*.yaml")) if file not in OF_TRL]
RECIPES = OWN + PRESETS
NEIGHBOUR = re.compile(r"^# Differs from (\S+) in: (.+)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch):
    monkeypatch.setattr("sapo.config._accelerator_has_bf16", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads(recipe, tmp_path):
    run = parse(["--config", str(recipe), "--output_dir", str(tmp_path), "--report_to", "none"], "sapo train")
    assert run.config.output_dir == str(tmp_path)


@pytest.mark.parametrize("recipe", [*RECIPES, *OF_TRL], ids=lambda file: file.stem)
def test_every_recipe_line_is_commented(recipe):
    assert all("#" in line for line in recipe.read_text().splitlines())


@pytest.mark.parametrize("preset", PRESETS, ids=lambda file: file.stem)
def test_every_preset_differs_from_its_neighbour_in_the_named_line_only(preset):
    text = preset.read_text()
    found = NEIGHBOUR.search(text)
    if found is None:
        assert preset.stem == "sapo-dpo"
        return
    neighbour = (FOLDER / "presets" / found[1]).read_text()
    lines, others = ([line for line in content.splitlines() if line[0] != "#"] for content in (text, neighbour))
    changed = set(lines) - set(others)
    assert {line.split(":")[0] for line in changed} == {found[2]}
    assert len(changed) == 1
    assert {line.split(":")[0] for line in set(others) - set(lines)} <= {found[2]}


@pytest.mark.parametrize("recipe", [*RECIPES, *OF_TRL], ids=lambda file: file.stem)
def test_a_recipe_is_listed_with_its_machine_and_printed(recipe, capsys):
    name = recipe.relative_to(FOLDER).with_suffix("").as_posix()
    assert main(["recipes"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == name]
    described, machine = recipe.read_text().splitlines()[:2]
    assert described.removeprefix("# ") in line
    assert machine.removeprefix("# Machine: ") in line
    assert main(["recipes", name]) == 0
    assert capsys.readouterr().out == recipe.read_text()


def test_a_name_finds_the_file_here_first_then_the_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spin").mkdir()  # a folder is no recipe
    for name in ("presets/spin", "presets/spin.yaml", "recipes/presets/spin.yaml", "spin"):
        assert find_recipe(name) == FOLDER / "presets" / "spin.yaml"
    for name in ("guarded-dpo", "recipes/guarded-dpo.yaml"):
        assert find_recipe(name) == FOLDER / "guarded-dpo.yaml"
    (tmp_path / "guarded-dpo").write_text("beta: 0.1")
    assert find_recipe("guarded-dpo").read_text() == "beta: 0.1"


@pytest.mark.parametrize("name", ["", "guarded-dop", "guarded-dpo.yaml", "x" * 5000, "a\0b", "../presets/spin"])
def test_a_name_of_nothing_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="no shipped recipe") as refused:
        find_recipe(name)
    if name.startswith("guarded"):
        assert "nearest: guarded-dpo" in str(refused.value)


def test_the_nearest_may_be_a_file_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("beta: 0.1")
    with pytest.raises(ConfigurationError, match=r"mine\.yaml"):
        find_recipe("mime.yaml")


@pytest.mark.parametrize("arguments", [["a", "b"], ["--list"], ["--help", "x"]])
def test_recipes_takes_one_name(arguments, capsys):
    assert main(["recipes", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_presets_cover_every_method_and_ablation():
    configs = [parse(["--config", str(preset), "--report_to", "none"], "sapo train").config for preset in PRESETS]
    names = (
        "objective", "suffix", "pair_source", "reference", "ema_decay", "segment_length", "num_rounds",
        "chosen_nll_weight", "replay_buffer_size",
    )  # fmt: skip
    values = {name: {getattr(config, name) for config in configs} for name in names}
    assert values["objective"] == {"dpo", "orpo", "sft"}
    assert values["suffix"] == {"keep", "drop", "mask"}
    assert values["pair_source"] == {"self_play", "paired", "none"}
    assert values["reference"] == {"initial", "opponent", "opponent_copy", "none"}
    assert values["ema_decay"] == {0, 0.5, 1}
    assert None in values["segment_length"]
    assert 3 in values["num_rounds"]
    assert {0, 10} <= values["chosen_nll_weight"]
    assert {4, 2000} <= values["replay_buffer_size"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # trl's own default
@pytest.mark.parametrize("recipe", OF_TRL, ids=lambda file: file.stem)
def test_the_recipes_for_trl_load_there(recipe):
    from trl.scripts.sft import make_parser

    _, args = make_parser().parse_args_and_config(
        ["--config", str(recipe), "--dataset_name", "rows", "--output_dir", "run", "--report_to", "none"]
    )[:2]
    assert args.assistant_only_loss != args.packing


@pytest.mark.parametrize("model", ["llama3-8b", "mistral-7b"])
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_published_recipes_hold_published_settings(model, objective):
    run = parse(["--config", f"{RECIPES[0].parent / model}-{objective}.yaml", "--report_to", "none"], "sapo train")
    config = run.config
    own = {
        "dpo": ("dpo", 0.1, 5e-7, "linear", 0.1, "rmsprop", "opponent_copy", 108, "response"),
        "orpo": ("orpo", 0.05, 5e-6, "inverse_sqrt", 100, "adamw_bnb_8bit", "none", 108, "all"),
    }
    assert (
        config.objective,
        config.beta,
        config.learning_rate,
        config.lr_scheduler_type.value,
        config.warmup_steps,
        config.optim.value,
        config.reference,
        config.ref_model_sync_steps,
        config.nll_scope,
    ) == own[objective]
    assert run.data.dataset_name == "argilla/distilabel-capybara-dpo-7k-binarized"
    assert (config.assistant_turns, config.pair_source) == ("last", "self_play")
    assert (config.num_train_epochs, config.per_device_train_batch_size, config.gradient_accumulation_steps) == (
        4,
        8,
        1,
    )
    # Recomputation and the sizes of passes change no result.
    assert (config.bf16, config.gradient_checkpointing, run.model.dtype) == (True, "auto", "bfloat16")
    assert (config.max_length, config.max_prompt_length, config.segment_length) == (2048, 1792, 256)
    assert (config.temperature, config.top_k, config.top_p) == (0.7, 50, 0.95)
    assert (config.ema_decay, config.replay_buffer_size, config.replay_draw) == (0.5, 2000, "inverse_count")
    assert config.replay_replacement
    assert (config.suffix, config.tail_margin, config.skip_identical) == ("keep", 3, False)
    assert (config.chosen_nll_weight, config.dpop_weight, config.chosen_drop_limit) == (0, 0, None)


# A preset differs from another in one line, and leaves this to the flags.
FOR_GPUS = [file for file in OWN if "GPU" in file.read_text().split("\n")[1]]


@pytest.mark.parametrize("recipe", FOR_GPUS, ids=lambda file: file.stem)
def test_a_recipe_for_a_gpu_recomputes_pools_and_bounds_passes_as_one_needs(recipe):
    content, text = yaml.safe_load(recipe.read_text()), recipe.read_text()
    assert content.get("gradient_checkpointing", "auto") == "auto"
    # The published likelihood term counts the padding of its passes.
    assert ("tokens_per_forward" in content) == (content.get("nll_scope") != "all")
    plays = content["objective"] != "sft" and "num_rounds" not in content
    assert content.get("steps_per_generation", 1) == (8 if plays else 1)
    # vLLM in this process takes neither a quantized model nor rounds.
    assert ("vllm_colocate" in text) == (plays and "load_in_4bit" not in content)


def test_the_saved_recipe_gives_the_same_run(tmp_path):
    given = ["--output_dir", str(tmp_path), "--segment_length", "0.3", "--beta", "0.2", "--report_to", "none"]
    run = parse(given, "sapo train")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(as_recipe(run)))
    again = parse(["--config", str(tmp_path / "again.yaml"), "--report_to", "none"], "sapo train")
    assert again.config.to_dict() == run.config.to_dict()


def test_the_saved_recipe_keeps_a_segment_of_the_whole_response(tmp_path):
    run = parse(["--output_dir", str(tmp_path), "--segment_length", "none", "--report_to", "none"], "sapo train")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(as_recipe(run)))
    again = parse(["--config", str(tmp_path / "again.yaml"), "--report_to", "none"], "sapo train")
    assert again.config.segment_length is None


@pytest.mark.parametrize("name", ["sky.yaml", "k8s-job.yaml", "train.sbatch"])
def test_a_file_for_a_cluster_is_printed_and_is_no_recipe(name, capsys):
    file = CLUSTER / name
    for asked in (f"cluster/{name}", name):
        assert main(["recipes", asked]) == 0
        assert capsys.readouterr().out == file.read_text()
    assert main(["recipes"]) == 0
    assert name.split(".")[0] not in {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    with pytest.raises(ConfigurationError):
        find_recipe(f"cluster/{name}")
    # The command that it runs is one of ours, with a recipe that there is.
    text = file.read_text()
    assert "--resume_from_checkpoint auto" in text
    for flag in re.findall(r"(--[a-z_]+)", text.split("sapo train", 2)[-1].split("volume")[0]):
        assert option(flag.removeprefix("--")) or flag.removeprefix("--") in COMMANDS["train"].flags or flag in (
            "--config", *(f"--{one}" for one in LAUNCHER), "--accelerate_config"), flag  # fmt: skip


def _python_with(package):
    """A Python that has it: this one, or the one that SAPO_TOOLS_PYTHON names."""
    for python in (os.environ.get("SAPO_TOOLS_PYTHON"), sys.executable):
        found = python and subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False)
        if found and found.returncode == 0:
            return python
    pytest.skip(f"no {package} (SAPO_TOOLS_PYTHON names a Python that has it)")


def test_skypilot_reads_the_task():
    code = (
        "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); "
        "assert all(r.use_spot and r.accelerators for r in task.resources); "
        "assert task.storage_mounts or task.file_mounts; print(task.name)"
    )
    command = [_python_with("sky"), "-c", code, str(CLUSTER / "sky.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1] == "sapo"


def test_the_schema_of_kubernetes_takes_the_job():
    command = [
        _python_with("kubernetes_validate"),
        "-m",
        "kubernetes_validate",
        "--strict",
        str(CLUSTER / "k8s-job.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pods_and_volumes_of_the_job_name_each_other():
    service, job = yaml.safe_load_all((CLUSTER / "k8s-job.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 2
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (command,) = container["args"]
    assert f"--main_process_ip {job['metadata']['name']}-0.{pod['subdomain']} " in command
    assert f"--main_process_port {service['spec']['ports'][0]['port']} " in command
    assert f"--num_machines {spec['completions']} " in command


@pytest.mark.parametrize("name", ["sky.yaml", "train.sbatch"])
def test_shell_scripts_can_be_parsed(name, tmp_path):
    text = (CLUSTER / name).read_text()
    content = yaml.safe_load(text) if name.endswith("yaml") else {"run": text}
    for part in ("run", "setup"):
        done = subprocess.run(["bash", "-n"], input=content.get(part, ""), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


STAND_IN = """#!/bin/bash
while [ "$1" != --output_dir ]; do shift; done
ls "$2" > "$2.found"
for step in {steps}; do mkdir "$2/checkpoint-$step"; echo $step > "$2/checkpoint-$step/weights"; done
mkdir "$2/checkpoint-999.partial"
exit {status}
"""


def test_a_task_that_was_preempted_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path):
    """The script of sky.yaml on one machine after another, with a stand-in for `sapo`."""
    script = yaml.safe_load((CLUSTER / "sky.yaml").read_text())["run"].replace("/bucket", str(tmp_path / "bucket"))
    kept = tmp_path / "bucket" / "mistral"

    def machine(name, steps, status):
        home = tmp_path / name
        (home / "sapo/bin").mkdir(parents=True)
        (home / "sapo/bin/sapo").write_text(STAND_IN.format(steps=steps, status=status))
        (home / "sapo/bin/sapo").chmod(0o755)
        variables = {"HOME": str(home), "NAME": "mistral", "RECIPE": "mistral-7b-dpo", "PATH": os.environ["PATH"]}
        done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (status, "")
        return (home / "runs/mistral.found").read_text().split()

    assert machine("first", "100 200 300", 7) == []
    # Of the third, the copy was cut short on another machine: it has no mark.
    (kept / "checkpoint-300.complete").unlink()
    assert machine("second", "400", 7) == ["checkpoint-200"]
    assert machine("third", "500", 0) == ["checkpoint-400"]
    marked = {file.stem for file in kept.glob("*.complete")}
    assert marked == {"checkpoint-400", "checkpoint-500"}
    assert all((kept / name / "weights").is_file() for name in marked)
    assert (kept / "result/checkpoint-500/weights").is_file()


def test_the_baseline_of_a_laptop_has_the_adapter_the_rows_and_the_steps_of_the_recipe():
    mine, sft = (yaml.safe_load((FOLDER / f"laptop-{name}.yaml").read_text()) for name in ("lora", "sft"))
    assert {name: value for name, value in sft.items() if name != "objective"}.items() <= mine.items()
    assert sft["objective"] == "sft"


@pytest.mark.parametrize("name", ["laptop-lora", "laptop-full", "laptop-sft"])
def test_a_laptop_recipe_trains_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.undo()  # this machine's own precision
    model = tmp_path / "model"
    tiny_llama(max_position_embeddings=512).save_pretrained(model)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(model)
    rows = [{"prompt": "w1 w2", "completion": " w3 w4 w5 w6"}] * 8
    write_rows(tmp_path / "rows.jsonl", rows)
    assert main([
        "train", "--config", name, "--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "rows.jsonl"),
        "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--report_to", "none", "--quiet",
    ]) == 0  # fmt: skip
    steps = [row["step"] for row in metrics_of(tmp_path / "run")]
    assert max(steps) == 2
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert name == "laptop-sft" or recipe["steps_per_generation"] > 1
    assert recipe["tokens_per_forward"] > 0
    assert recipe["save_total_limit"] > 0


def test_a_recipe_names_its_files_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("talk.jinja", "a.jsonl", "b1.jsonl", "folder/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    mixture = [
        {"path": "json", "data_files": {"train": ["a.jsonl", "b*.jsonl"]}},
        {"path": "folder", "data_files": ["c.jsonl"]},
        {"path": "owner/hub-set", "data_files": "https://host/d.jsonl"},
    ]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": mixture}))
    options = ["--config", "mix.yaml", "--chat_template_path", "talk.jinja", "--model_name_or_path", "owner/model"]
    recipe = as_recipe(parse([*options, "--output_dir", "out", "--use_cpu"], "sapo train"))
    assert recipe["chat_template_path"] == str(tmp_path / "talk.jinja")
    assert recipe["model_name_or_path"] == "owner/model"
    assert recipe["output_dir"] == str(tmp_path / "out")
    files = [[one["path"], one["data_files"]] for one in recipe["datasets"]]
    assert files == [
        ["json", {"train": [str(tmp_path / "a.jsonl"), str(tmp_path / "b*.jsonl")]}],
        [str(tmp_path / "folder"), ["c.jsonl"]],
        ["owner/hub-set", "https://host/d.jsonl"],
    ]


def test_the_list_of_recipes_fits_a_terminal_of_80_columns(capsys, monkeypatch):
    monkeypatch.setattr("sapo.commands.recipes.width_of", lambda stream: 80)
    run_recipes(None)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) < 80
    assert "laptop-lora  (a laptop; a CPU is enough)\n    SAPO-DPO with LoRA" in shown
