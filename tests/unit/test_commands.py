"""Laws of the command line: complete help, errors of one line that name the way out, and a quick start."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

from sapo.commands.arguments import build, parse
from sapo.commands.catalog import COMMANDS, GPUS
from sapo.commands.completion import script
from sapo.commands.data_arguments import all_values
from sapo.commands.main import main
from sapo.commands.parser import help_text, parse_command
from sapo.commands.recipes import shipped_names
from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError
from sapo.options import accepted, options
from sapo.options.idle import idle
from sapo.report import page
from tests.reports import write_run
from tests.runs import refused

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_all_its_own_flags_and_an_example(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    for action in COMMANDS[name].parser._actions:
        assert all(flag in shown for flag in action.option_strings or [action.metavar])
        assert action.help
    assert COMMANDS[name].example in " ".join(shown.replace("\\\n", "").split())
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_the_overview_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"sapo {name} " in shown for name in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["data", "--help"]) == 0
    assert "sapo data check" in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 50, 60])
def test_overview_and_help_fit_a_narrow_terminal(width, monkeypatch, capsys):
    monkeypatch.setattr("sapo.commands.main.width_of", lambda stream: width)
    monkeypatch.setenv("COLUMNS", str(width))
    for asked in ([], ["data", "--help"], *([*name.split(), "--help"] for name in COMMANDS)):
        assert main(asked) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= width, asked
        assert "\\\n      \\" not in shown


def test_short_help_of_train_has_the_most_used_options_and_help_all_has_every_one():
    train = COMMANDS["train"]
    short, everything = help_text(train, ["--help"]), help_text(train, ["--help-all"])
    shown = [one for one in accepted() if f"--{one.name} " in short]
    assert 25 <= len(shown) <= 35
    assert all(f"--{one.name} " in everything for one in accepted())
    assert not any(f"--{one.name} " in everything for one in options() if one.status == "refused")


@pytest.mark.parametrize("one", options(), ids=lambda one: one.name)
def test_each_option_is_explained_by_name(one):
    shown = help_text(COMMANDS["train"], ["--help", f"--{one.name}"])
    assert one.default_text in shown
    assert (one.reason if one.status == "refused" else one.help) in " ".join(shown.split())


def test_help_shows_what_may_be_left_out_and_begins_a_section_with_its_main_option(capsys):
    assert main(["recipes", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: sapo recipes [NAME]" in shown
    assert "--help NAME" not in shown
    everything = help_text(COMMANDS["train"], ["--help-all"])
    assert everything.index("--objective ") < everything.index("--kl_weight ")


def test_help_of_something_unknown_gives_the_nearest(capsys):
    assert "nearest: beta" in refused(["train", "--help", "betta"], capsys)
    assert main(["train", "--help", "lr"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("lr is called learning_rate here.")
    assert "Peak learning rate" in shown


def test_examples_parse():
    for command in COMMANDS.values():
        import shlex

        words = shlex.split(command.example.partition(" > ")[0])[1 + len(command.name.split()) :]
        parse_command(command, words)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("trian", "nearest: sapo train"),
        ("data chek", "nearest: sapo data check"),
        ("chekc", "nearest: sapo data check"),
        ("train --gpu 1", "CUDA_VISIBLE_DEVICES"),
        ("finetune", "nearest: sapo train"),
        ("infer", "nearest: sapo chat"),
        ("eval runs/x", "nearest: sapo evaluate"),
        ("zzz", "unknown command zzz. Run sapo --help."),
        ("data", None),
        ("train --lr 1", "use --learning_rate"),
        ("train --use_vllm", "use --generation_backend vllm_colocate"),
        ("train --deepspeed zero3", "Use --accelerate_config zero3"),
        ("train --batch_size 4", "use --per_device_train_batch_size 4"),
        ("train --lerning_rate 1", "nearest: --learning_rate"),
        ("train --beta", "--beta needs a value"),
        ("train --beta much", "Error: --beta: much is not valid; must be a number, 0 or more"),
        ("train --max_length 1.5", "must be a whole number, 2 or more"),
        ("train --objective ppo", "must be one of dpo, orpo, sft"),
        ("train --datasets x", "give it in a recipe"),
        ("train --optim_args", "--optim_args needs a value"),
        ("train 0.1", "unexpected argument 0.1. Example: sapo train --config"),
        (
            "train --quiet",
            "--model_name_or_path, --dataset_name and --output_dir are missing. Example: sapo train --con",
        ),
        ("train --config guarded-dpo --dataset_name a", "--model_name_or_path and --output_dir are missing."),
        ("data check rows.jsonl", "--model_name_or_path is missing. Example: sapo data check"),
        ("data check a.jsonl b.jsonl", "unexpected argument b.jsonl"),
        ("export a b --which it", "--which it: must be one of policy, opponent, start."),
        ("completion tcsh", "must be one of bash, zsh, fish"),
        ("report --prot 1 run", "nearest: --port"),
        ("report", "RUN is missing. Example: sapo report"),
        ("evaluate", "MODEL and --suite are missing. Example"),
        ("evaluate model --suite lokal", "nearest: local"),
        ("estimate", "--model_name_or_path or --model_config is missing"),
        ("report nowhere", "nowhere: no such folder"),
        ("train --config nowhere.yaml", "nowhere.yaml: no such file, and no shipped recipe. Run"),
        ("evaluate model", "--suite is missing. Example: sapo evaluate"),
        ("generate --model x", "use --model_name_or_path"),
        ("generate", "--model_name_or_path, --dataset_name or --self_replay and --output_file are missing"),
        ("chat", "MODEL|RUN is missing"),
        ("compare --lr 1 run", "unknown option --lr."),
        ("demo --max_steps none", "whole number"),
        ("TRAN --help", "nearest: sapo train"),
        ("chat model --temperature hot", "--temperature: hot is not valid; must be a number."),
        ("serve --port 8000", "use --vllm_server_url"),
        ("report pyproject.toml", "pyproject.toml: is a file. Use the output folder of a run."),
        ("train --config src", "src: is a folder. Use a recipe file."),
        ("train --config src/sapo/recipes", "src/sapo/recipes: is a folder. Use a file, such as src/sapo/recipes/"),
        ("serve --vllm_pyton x", "nearest: --vllm_python"),
        ("estimate --gpus h100", "nearest: --gpu"),
        ("train --eval_interval 5", "nearest: --eval_steps."),
        ("train --random_seed 5", "nearest: --seed."),
        ("train --vllm_gpu_memory 0.5", "nearest: --vllm_gpu_memory_utilization."),
        ("train --strategy no", "nearest: --eval_strategy, --logging_strategy, --save_strategy."),
        ("train --truncate", "unknown option --truncate. --help-all lists what there is."),
        ("train --train_on_inputs", "only responses are trained on"),
        ("report run --truncate", "unknown option --truncate. --help lists what there is."),
    ],
)
def test_a_mistyped_line_names_the_way_out(typed, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    if message is None:
        assert main(typed.split()) == 0
        return
    assert message in refused(typed.split(), capsys)


def recipe_error(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        parse(["--config", str(file)], "sapo train")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nseed: 1\nbeta: 0.2\n", "line 3: beta is set in line 1 already"),
        ("beta:\n", "line 1: beta: has no value; must be a number, 0 or more"),
        ("seed: 1\nbeta: null\n", "line 2: beta: has no value"),
        ("beta: [0.1, 0.2]\n", "line 1: beta: a list is not valid"),
        ("beta: {a: 1}\n", "line 1: beta: a mapping is not valid"),
        ("seed: 1\neval_strategy: no\n", "line 2: YAML reads eval_strategy: no as false. Put it in quotes: eval_str"),
        ("report_to: no\n", "Put it in quotes"),
        ("output_dir: yes\n", "Put it in quotes"),
        ("max_steps: true\n", "line 1: max_steps: True is not valid; must be a whole number"),
        ("use_cpu: maybe\n", "must be true or false"),
        ("seed: 1\nlr: 1\n", "line 2: unknown option lr; use `learning_rate: 1e-6`"),
        ("betta: 1\n", "nearest: beta"),
        (
            "base_model: m\nseed: 1\nsequence_len: 64\nval_set_size: 0.1\n",
            ": 3 unknown options. line 1: base_model, use `model_name_or_path: my-sft-model`; line 3: sequence_len, "
            "use `max_length: 2048`; line 4: val_set_size: put the rows",
        ),
        ("? [a, b]\n: 1\n", "unknown option"),
        ("- beta\n", "is a YAML list; a recipe consists of `option: value` lines, without dashes"),
        ("", "is empty; a recipe consists of `option: value` lines"),
        ("beta\n", "is text; a recipe consists of `option: value` lines"),
        ("beta: 0.1\n  seed: 1\n", "line 2: not valid YAML (mapping values are not allowed here). Check indentation"),
        ("label_smoothing_factor: 0.1\n", "line 1: label_smoothing_factor=0.1: the loss"),
        ("top_p: 3\n", "line 1: top_p=3.0: must be between 0 and 1"),
        ("datasets: rows.jsonl\n", "must be a list of mappings"),
        ("datasets:\n- path: a\n  splt: b\n", "splt"),
        ("lr_scheduler_kwargs: nothing\n", "must be a mapping"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_with_file_line_and_option(text, message, tmp_path):
    assert message in recipe_error(tmp_path, text)


def test_an_argument_that_is_no_text_is_one_line(capsys):
    assert "not text in UTF-8" in refused(["train", "--dataset_name", "caf\udce9.jsonl"], capsys)


def test_what_a_launcher_has_left_in_the_environment_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def answers(*_, **__):
        raise ValueError("`MASTER_ADDR` env was not set, please try exporting it")

    monkeypatch.setattr(TrainingArguments, "__post_init__", answers)
    with pytest.raises(ConfigurationError, match=r"WORLD_SIZE=2, RANK=1.*`unset WORLD_SIZE RANK`"):
        SAPOConfig(output_dir=str(tmp_path), use_cpu=True)


def test_a_text_that_yaml_reads_as_a_number_or_a_date_is_taken_as_it_is_written(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "use_cpu: true\noutput_dir: 12:30:00\nmodel_revision: 1.10\nrun_name: 2026-01-31\ndataset_config: 007\n"
        "lora_target_modules: [1_0, q_proj]\nuse_peft: true\n"
    )
    run = parse(["--config", str(file)], "sapo train")
    assert (run.config.output_dir, run.model.model_revision, run.config.run_name) == ("12:30:00", "1.10", "2026-01-31")
    assert (run.data.dataset_config, run.model.lora_target_modules) == ("007", ["1_0", "q_proj"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("5", "deepspeed=5: not a configuration of DeepSpeed"),
        ("[1]", "not a configuration of DeepSpeed"),
        ('{"zero_optimization": 5}', "not a configuration of DeepSpeed"),
        ('{"zero_optimization": {"stage": "a"}}', "zero_optimization.stage is a; it must be 0, 1, 2 or 3"),
    ],
)
def test_what_is_no_configuration_of_deepspeed_is_refused_in_one_line(given, message, monkeypatch):
    pytest.importorskip("deepspeed")
    # transformers sets it on the way.
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    with pytest.raises(ConfigurationError, match=message):
        build({"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "use_cpu": True, "deepspeed": given})


LAPTOP = {"device": "cpu", "processes": 1}


def idle_in(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("output_dir: runs/mine\nuse_cpu: true\nmax_length: 64\n" + text)
    parsed = parse_command(
        COMMANDS["train"], ["--config", str(file), "--model_name_or_path", "m", "--dataset_name", "d"]
    )
    return idle(parsed.chosen(), all_values(build(parsed.values())), **LAPTOP)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("temperature: 0.9\nema_decay: 0.1\nsegment_length: 8\n", []),
        (
            "pair_source: paired\ntemperature: 0.9\nsuffix: drop\nsegment_length: 8\n",
            ["No effect with pair_source=paired: suffix=drop, temperature=0.9."],
        ),
        (
            "pair_source: paired\nsegment_length: 8\nmax_prompt_length: 40\n",
            ["No effect with pair_source=paired: segment_length=8."],
        ),
        ("objective: sft\neval_local: true\neval_strategy: steps\ntemperature: 0.9\n", []),
        (
            "objective: sft\nema_decay: 0.1\nbeta: 0.3\n",
            ["No effect with objective=sft: ema_decay=0.1.", "No effect with objective=sft: beta=0.3."],
        ),
        ("objective: sft\nbeta: 0.1\n", []),
        ("num_rounds: 2\nema_decay: 1\nreplay_buffer_size: 9\ntemperature: 0.9\n",
         ["No effect with num_rounds=2: replay_buffer_size=9."]),
        ("lr_scheduler_type: constant\nwarmup_steps: 5\n",
         ["No effect with lr_scheduler_type=constant: warmup_steps=5."]),
        ("optim: sgd\nadam_beta1: 0.5\n", ["No effect with optim=sgd: adam_beta1=0.5."]),
        ("optim: adamw_torch\nadam_beta1: 0.5\n", []),
        ("use_peft: true\nlora_dropout: 0.2\n", ["No effect with disable_dropout=true: lora_dropout=0.2."]),
        ("use_peft: true\nlora_dropout: 0.2\ndisable_dropout: false\n", []),
        ("train_sampling_strategy: sequential\ndata_seed: 3\n",
         ["No effect with train_sampling_strategy=sequential: data_seed=3."]),
        ("save_strategy: epoch\nsave_steps: 7\n", ["No effect with save_strategy=epoch: save_steps=7."]),
        ("dataset_test_split: validation\n", ["No effect with eval_strategy=no: dataset_test_split=validation."]),
        ("torch_empty_cache_steps: 5\n", ["No effect with device cpu: torch_empty_cache_steps=5."]),
        ("ddp_timeout: 60\n", ["No effect with one process: ddp_timeout=60."]),
        ("project: mine\n", ["No effect with report_to without trackio: project=mine."]),
        ("max_length_policy: drop\nmax_prompt_length: 9\nsegment_length: 4\n",
         ["No effect with max_length_policy=drop: max_prompt_length=9."]),
    ],
)  # fmt: skip
def test_an_option_without_effect_in_this_run_is_said(text, lines, tmp_path):
    assert idle_in(text, tmp_path) == lines


@pytest.mark.parametrize(
    "recipe", [name for name in shipped_names() if not name.startswith("presets") and "trl" not in name]
)
def test_no_shipped_recipe_sets_what_has_no_effect(recipe, tmp_path):
    # Presets hold the same lines, so that they differ in one.
    arguments = ["--config", recipe, "--output_dir", str(tmp_path), "--model_name_or_path", "m", "--dataset_name", "d"]
    parsed = parse_command(COMMANDS["train"], [*arguments, "--use_cpu"])
    values = parsed.values() | {"bf16": False, "fp16": False, "report_to": ["none"]}
    assert idle(values, all_values(build(values)), device="cuda", processes=8) == []


def test_of_a_shipped_recipe_only_what_is_typed_beside_it_is_said_to_have_no_effect(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu"]
    for more, lines in (([], []), (["--suffix", "drop"], ["No effect with objective=sft: suffix=drop."])):
        parsed = parse_command(COMMANDS["train"], ["--config", "presets/sft-anchored", *arguments, *more])
        run = build(parsed.values() | {"report_to": ["none"]})
        assert idle(parsed.chosen(), all_values(run), **LAPTOP) == lines
        assert idle(parsed.values(), all_values(run), **LAPTOP)


def test_none_stands_for_no_value_where_there_is_such_a_thing(tmp_path):
    run = parse(["--segment_length", "none", "--use_cpu", "--report_to", "none"], "sapo train")
    assert run.config.segment_length is None
    with pytest.raises(ConfigurationError, match="must be a number"):
        parse(["--beta", "none"], "sapo train")


def test_flags_override_a_recipe_and_dashes_and_equals_signs_are_understood(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("beta: 0.2\nseed: 7\nreport_to: none\nuse_cpu: true\n")
    run = parse(["--config", str(file), "--beta=0.3", "--learning-rate", "1e-4", "--no_disable_dropout"], "sapo train")
    assert (run.config.beta, run.config.seed, run.config.learning_rate) == (0.3, 7, 1e-4)
    assert not run.config.disable_dropout


def test_a_repeated_flag_adds_up_and_replaces_the_recipes_value(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("generation_backend: vllm_server\nvllm_server_url: http://a:1\nreport_to: none\nuse_cpu: true\n")
    urls = ["--vllm_server_url", "http://b:1", "--vllm_server_url", "http://c:1"]
    assert parse(["--config", str(file)], "sapo train").config.vllm_server_url == ["http://a:1"]
    assert parse(["--config", str(file), *urls], "sapo train").config.vllm_server_url == ["http://b:1", "http://c:1"]


def test_own_flags_are_taken_out_and_the_rest_is_a_command_line_for_train():
    line = [
        "--train",
        "--config",
        "r.yaml",
        "--devices",
        "1",
        "--beta=0.2",
        "--devices",
        "2,3",
        "--",
        "--enforce-eager",
    ]
    given = parse_command(COMMANDS["serve"], line)
    assert (given.own.train, given.own.devices, list(given.extra)) == (True, ["1", "2,3"], ["--enforce-eager"])
    assert given.rest == ["--config", "r.yaml", "--beta", "0.2"]


def completed(*words):
    """What bash offers for the last word."""
    typed = f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _sapo; echo ${{COMPREPLY[@]}}"
    program = f"{script('bash', COMMANDS)}\n{typed}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_flags_values_and_recipes():
    assert completed("sapo", "") == list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    assert completed("sapo", "data", "") == ["check"]
    assert completed("sapo", "train", "--obj") == ["--objective"]
    assert completed("sapo", "train", "--objective", "") == ["dpo", "orpo", "sft"]
    assert completed("sapo", "train", "--config", "gua") == ["guarded-dpo"]
    assert completed("sapo", "data", "check", "--segment") == ["--segment_length"]
    assert completed("sapo", "train", "--help", "segment") == ["segment_length"]
    assert completed("sapo", "export", "a", "b", "--gguf", "q4_k") == ["q4_k_m", "q4_k_s"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_have_every_flag(shell):
    made = script(shell, COMMANDS)
    for one in accepted():
        assert re.search(rf"(-l |--){one.name}\b", made), one.name


def test_devices_in_the_help_are_those_of_the_estimate():
    from sapo.estimate.devices import DEVICES

    assert list(DEVICES) == list(GPUS)


LIGHT = [
    [],
    ["--version"],
    *([*name.split(), "--help"] for name in COMMANDS),
    ["train", "--help-all"],
    ["train", "--help", "beta"],
    *([*name.split(), "--betta", "1"] for name in COMMANDS),
    ["train", "--beta", "much"],
    ["train", "--label_smoothing_factor", "1"],
    ["trian"],
]


def test_help_version_and_mistakes_import_nothing_heavy_and_take_less_than_07_cpu_seconds():
    code = f"""
import json, resource, sys
from sapo.commands.main import main
light = json.loads(sys.argv[1])
for arguments in light:
    main(arguments)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (arguments, heavy)
used = resource.getrusage(resource.RUSAGE_SELF)
sys.stderr.write(f"\\nCPU {{used.ru_utime + used.ru_stime}}\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(LIGHT)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # All of them together; each alone takes a fraction.
    one = subprocess.run(
        [sys.executable, "-c", code, json.dumps([["train", "--help"]])], capture_output=True, text=True, check=True
    )
    assert float(one.stderr.split("CPU ")[1]) < 0.7


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sapo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sapo ")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written_is_said_in_one_line(code, tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", steps=2)

    def refuse(file, content):
        raise OSError(code, os.strerror(code), str(file))

    monkeypatch.setattr(page, "write_atomically", refuse)
    message = refused(["report", tmp_path / "run"], capsys)
    assert f"{os.strerror(code)}: '{tmp_path / 'run' / 'report.html'}'. Name a place that you may use" in message
