"""Option names of earlier versions, trl and other tools, and their names here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from sapo.options.declare import Option
from sapo.options.table import accepted, option

RENAMED = {
    "num_iterations": "num_rounds",
    "chat_template": "chat_template_path",
    "truncation_mode": "prompt_truncation",
    "reference_sync_steps": "ref_model_sync_steps",
    "mix_previous_iteration": "mix_previous_round",
    "max_bad_steps": "max_nonfinite_steps",
    "nll_positions": "nll_scope",
    "overlong": "max_length_policy",
    "eval_local_share": "eval_local_max_time_fraction",
}
"""Earlier names of options."""

ALIASES = {
    # Short forms
    "model": "--model_name_or_path my-sft-model",
    "model_name": "--model_name_or_path my-sft-model",
    "model_path": "--model_name_or_path my-sft-model",
    "base_model": "--model_name_or_path my-sft-model",
    "revision": "--model_revision main",
    "torch_dtype": "--dtype bfloat16",
    "flash_attn": "--attn_implementation flash_attention_2",
    "dataset": "--dataset_name train.jsonl",
    "data": "--dataset_name train.jsonl",
    "train_file": "--dataset_name train.jsonl",
    "dataset_path": "--dataset_name train.jsonl",
    "eval_dataset": "--eval_dataset_name test.jsonl",
    "split": "--dataset_train_split train",
    "dataset_split": "--dataset_train_split train",
    "output": "--output_dir runs/mine",
    "out": "--output_dir runs/mine",
    "out_dir": "--output_dir runs/mine",
    "save_dir": "--output_dir runs/mine",
    "lr": "--learning_rate 1e-6",
    "scheduler": "--lr_scheduler_type cosine",
    "lr_scheduler": "--lr_scheduler_type cosine",
    "warmup": "--warmup_steps 0.1",
    "warmup_ratio": "--warmup_steps 0.1",
    "bs": "--per_device_train_batch_size 4",
    "batch_size": "--per_device_train_batch_size 4",
    "train_batch_size": "--per_device_train_batch_size 4",
    "per_gpu_train_batch_size": "--per_device_train_batch_size 4",
    "eval_batch_size": "--per_device_eval_batch_size 4",
    "grad_accum": "--gradient_accumulation_steps 8",
    "accumulation_steps": "--gradient_accumulation_steps 8",
    "epochs": "--num_train_epochs 1",
    "num_epochs": "--num_train_epochs 1",
    "steps": "--max_steps 100",
    "optimizer": "--optim adamw_torch",
    "evaluation_strategy": "--eval_strategy steps",
    "resume": "--resume_from_checkpoint true",
    "resume_from": "--resume_from_checkpoint true",
    "overwrite": "--overwrite_output_dir",
    "cpu": "--use_cpu",
    "device": "--use_cpu",
    "name": "--run_name first",
    "experiment_name": "--run_name first",
    "no_cuda": "--use_cpu",
    "wandb": "--report_to wandb",
    "tracker": "--report_to trackio",
    # trl and its relatives
    "loss": "--objective orpo",
    "rpo_alpha": "--chosen_nll_weight 1",
    "dpop_lambda": "--dpop_weight 50",
    "ref_model": "--reference initial",
    "ref_model_name_or_path": "--reference initial",
    "ref_model_mixup_alpha": "--ema_decay 0.5",
    "sync_ref_model": "--reference opponent_copy",
    "max_completion_length": "--max_length 2048",
    "max_seq_length": "--max_length 2048",
    "max_seq_len": "--max_length 2048",
    "seq_len": "--max_length 2048",
    "seq_length": "--max_length 2048",
    "context_length": "--max_length 2048",
    "max_tokens": "--max_new_tokens 256",
    "num_samples": "--num_generations 2",
    "lora": "--use_peft",
    "use_lora": "--use_peft",
    "lora_rank": "--lora_r 16",
    "rank": "--lora_r 16",
    "alpha": "--lora_alpha 32",
    "dropout": "--lora_dropout 0.05",
    "target_modules": "--lora_target_modules all-linear",
    "quantize": "--use_peft --load_in_4bit",
    "use_vllm": "--generation_backend vllm_colocate",
    "vllm": "--generation_backend vllm_colocate",
    "vllm_mode": "--generation_backend vllm_server",
    "vllm_server_base_url": "--vllm_server_url http://127.0.0.1:8000",
    "vllm_server_host": "--vllm_server_url http://127.0.0.1:8000",
    "vllm_server_port": "--vllm_server_url http://127.0.0.1:8000",
    "port": "--vllm_server_url http://127.0.0.1:8000",
    "host": "--vllm_server_url http://127.0.0.1:8000",
    "use_liger_loss": "--fused_lm_head",
    "zero3": "--accelerate_config zero3",
    "zero2": "--accelerate_config zero2",
    "accelerate": "--accelerate_config multi_gpu",
    "gpus": "--accelerate_config multi_gpu --num_processes 8",
    "num_gpus": "--accelerate_config multi_gpu --num_processes 8",
    "multi_gpu": "--accelerate_config multi_gpu",
    "recipe": "--config guarded-dpo",
    # axolotl and LLaMA-Factory
    "rl": "--objective dpo",
    "stage": "--objective dpo",
    "pref_loss": "--loss_type sigmoid",
    "pref_beta": "--beta 0.1",
    "rl_beta": "--beta 0.1",
    "pref_ftx": "--chosen_nll_weight 1",
    "sequence_len": "--max_length 2048",
    "cutoff_len": "--max_length 2048",
    "micro_batch_size": "--per_device_train_batch_size 4",
    "test_datasets": "--eval_dataset_name test.jsonl",
    "finetuning_type": "--use_peft",
    "adapter_name_or_path": "--model_name_or_path my-adapter",
    "lora_target": "--lora_target_modules all-linear",
    "lora_target_linear": "--lora_target_modules all-linear",
    "lora_model_dir": "--model_name_or_path my-adapter",
    "quantization_bit": "--use_peft --load_in_4bit",
    "template": "--chat_template_path chatml",
    "flash_attention": "--attn_implementation flash_attention_2",
    "preprocessing_num_workers": "--dataset_num_proc 4",
    "dataset_processes": "--dataset_num_proc 4",
    "auto_resume_from_checkpoints": "--resume_from_checkpoint true",
}
"""Names of other tools, each with an example of the option that does it here."""

MISSING = {
    "precompute_ref_log_probs": "reference log-probabilities are kept with each pair anyway; leave it out",
    "padding_free": "layout=shared, the default where the model supports it, has no padding; leave it out",
    "packing": "layout=shared, the default where the model supports it, has no padding; leave it out",
    "trust_remote_code": "code from a model folder is never run; use an architecture that transformers has",
    "dataloader_shuffle": "use train_sampling_strategy=sequential for the order of the file",
    "f_divergence_type": "only the reverse KL divergence is supported; leave it out",
    "activation_offloading": "activation offloading is not supported; use gradient_checkpointing and pairs_per_forward",
    "generate_during_eval": "set eval_local=true to sample from the policy at evaluations",
    "sample_packing": "layout=shared, the default where the model supports it, has no padding; leave it out",
    "val_set_size": "put the rows to evaluate on into a file, and name it with eval_dataset_name",
    "val_size": "put the rows to evaluate on into a file, and name it with eval_dataset_name",
    "do_train": "sapo train trains; leave it out",
    "do_predict": "sapo generate writes pairs, sapo evaluate scores a model; leave it out",
    "max_samples": "put a slice into dataset_train_split, such as train[:1000]",
    "wandb_project": "set report_to to wandb, and the environment variable WANDB_PROJECT",
    "wandb_entity": "set report_to to wandb, and the environment variable WANDB_ENTITY",
    "plot_loss": "every run has a report with curves; leave it out",
    "overwrite_cache": "prepared rows are found by the content of files and options; leave it out",
    "dataset_prepared_path": "prepared rows are kept by themselves; leave it out",
    "model_type": "the architecture is in the model's config.json; leave it out",
    "tokenizer_type": "the tokenizer is the model's; leave it out",
    "dataset_text_field": "the format is found from the columns; `sapo data check` shows what it found",
}
"""Options of other tools without a counterpart, with advice."""


def counterpart(name: str) -> Option | None:
    """The option that does here what `name` does in other tools or did in earlier versions; None if there is none."""
    key = name.replace("-", "_").lower()
    first = RENAMED.get(key) or ALIASES.get(key, "").partition(" ")[0].removeprefix("--")
    return option(first)


def unknown(name: str, known: Iterable[str] = (), *, flag: bool = False, options: bool = True) -> str:
    """Message for an unknown option: its new name, its counterpart, or the most similar option.

    Args:
        name: without dashes.
        known: further valid names, such as a command's own flags.
        flag: whether it came from the command line, not from a recipe.
        options: whether options of a run are valid there.

    Returns:
        One sentence.
    """
    known = list(known)
    dashes = "--" if flag else ""
    key = name.replace("-", "_").lower()
    if key in RENAMED and (options or RENAMED[key] in known):
        return f"{dashes}{name} is called {dashes}{RENAMED[key]} now."
    names = [*known, *(one.name for one in accepted() if options)]
    typo = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
    if typo:
        return f"unknown option {dashes}{name}; nearest: {dashes}{typo[0]}."
    if key in ALIASES and (example := _usable(ALIASES[key], names)):
        return f"unknown option {dashes}{name}; use {example if flag else _as_lines(example)}."
    if options and key in MISSING:
        return f"unknown option {dashes}{name}: {MISSING[key]}."
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"unknown option {dashes}{name}{f'; nearest: {dashes}{close[0]}' if close else ''}."


def _usable(example: str, names: Iterable[str]) -> str:
    """The example, if its option is valid here."""
    first = example.split()[0].removeprefix("--")
    return example if first in set(names) else ""


def _as_lines(example: str) -> str:
    """An example for the command line as lines of a recipe."""
    lines = []
    for part in f" {example}".split(" --")[1:]:
        name, _, value = part.partition(" ")
        one = option(name)
        lines.append(f"`{name}: {value or 'true'}`" if one is not None else f"--{part} on the command line")
    return ", ".join(lines)
