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

_OTHER_NAMES = {
    "--model_name_or_path my-sft-model": (
        "model model_name model_path base_model model_id pretrained_model_name_or_path"
    ),
    "--model_revision main": "revision",
    "--dtype bfloat16": "torch_dtype bnb_4bit_compute_dtype model_dtype",
    "--attn_implementation flash_attention_2": (
        "flash_attn flash_attention flash_attn2 attn_impl attention sdp_attention use_flash_attention "
        "use_flash_attention_2 use_flash_attn"
    ),
    "--dataset_name train.jsonl": (
        "dataset data train_file dataset_path train_data training_data train_dataset data_path data_file "
        "data_files dataset_file"
    ),
    "--eval_dataset_name test.jsonl": (
        "eval_dataset test_datasets val_data val_dataset eval_data eval_file test_file test_data validation_file "
        "validation_data val_file"
    ),
    "--dataset_train_split train": "split dataset_split",
    "--output_dir runs/mine": "output out out_dir save_dir checkpoint_dir run_dir log_dir logging_dir",
    "--learning_rate 1e-6": "lr",
    "--lr_scheduler_type cosine": "lr_schedule learning_rate_scheduler scheduler lr_scheduler cosine",
    "--warmup_steps 0.1": "warmup warmup_ratio warmup_fraction warmup_proportion",
    "--per_device_train_batch_size 4": (
        "bs batch_size train_batch_size per_gpu_train_batch_size micro_batch_size bsz train_bs micro_bs "
        "global_batch_size effective_batch_size mini_batch_size minibatch_size per_device_batch_size "
        "device_batch_size micro_batch_size_per_gpu train_micro_batch_size_per_gpu"
    ),
    "--per_device_eval_batch_size 4": "eval_batch_size",
    "--gradient_accumulation_steps 8": "grad_accum accumulation_steps gas grad_acc grad_acc_steps",
    "--num_train_epochs 1": "num_epoch n_epochs epochs num_epochs max_epochs",
    "--max_steps 100": "steps total_steps num_train_steps train_steps max_train_steps max_iters iters num_steps",
    "--optim adamw_torch": "optimizer",
    "--eval_strategy steps": "evaluation_strategy",
    "--resume_from_checkpoint true": (
        "resume resume_from auto_resume_from_checkpoints ckpt load_checkpoint from_checkpoint resume_ckpt"
    ),
    "--overwrite_output_dir": "overwrite",
    "--use_cpu": "cpu device no_cuda",
    "--run_name first": "name experiment_name exp_name wandb_name",
    "--report_to wandb": "wandb use_wandb",
    "--report_to trackio": "tracker",
    "--objective orpo": "loss algorithm method trainer task",
    "--chosen_nll_weight 1": (
        "rpo_alpha pref_ftx sft_weight nll_weight sft_loss_weight rpo_weight ftx_gamma nll_loss_weight"
    ),
    "--dpop_weight 50": "dpop_lambda",
    "--reference initial": "ref_model ref_model_name_or_path reference_model ref_model_path ref_policy",
    "--ema_decay 0.5": "ref_model_mixup_alpha ema ema_rate tau opponent_decay ema_beta",
    "--reference opponent_copy": "sync_ref_model",
    "--max_length 2048": (
        "max_completion_length max_seq_length max_seq_len seq_len seq_length context_length sequence_len "
        "cutoff_len max_target_length max_output_length max_response_length block_size model_max_length"
    ),
    "--max_new_tokens 256": "max_generation_tokens max_tokens generation_max_tokens max_gen_len generation_max_length",
    "--num_generations 2": "num_samples num_return_sequences n_samples",
    "--use_peft": "peft lora use_lora finetuning_type",
    "--lora_r 16": "lora_rank rank",
    "--lora_alpha 32": "alpha",
    "--lora_dropout 0.05": "dropout",
    "--lora_target_modules all-linear": "target_modules lora_target lora_target_linear",
    "--use_peft --load_in_4bit": (
        "quantize quantization_bit bnb quantization quant qlora use_qlora load_4bit quant_method"
    ),
    "--generation_backend vllm_colocate": "use_vllm vllm",
    "--generation_backend vllm_server": "vllm_mode",
    "--vllm_server_url http://127.0.0.1:8000": "vllm_server_base_url vllm_server_host vllm_server_port port host",
    "--fused_lm_head": "use_liger_loss",
    "--accelerate_config zero3": "zero3 zero zero_stage offload cpu_offload ds_config",
    "--accelerate_config zero2": "zero2",
    "--accelerate_config multi_gpu": "accelerate multi_gpu ddp distributed",
    "--accelerate_config multi_gpu --num_processes 8": "gpus num_gpus world_size nproc_per_node nproc devices",
    "--config guarded-dpo": "recipe",
    "--objective dpo": "rl stage",
    "--loss_type sigmoid": "pref_loss loss_fn dpo_loss",
    "--beta 0.1": "pref_beta rl_beta kl_coef kl_coeff kl_penalty lambda",
    "--model_name_or_path my-adapter": "adapter_name_or_path lora_model_dir lora_path adapter_path lora_weights",
    "--chat_template_path chatml": "prompt_template conversation_template template",
    "--dataset_num_proc 4": "preprocessing_num_workers dataset_processes",
    "--dataloader_num_workers 4": "workers",
    "--dataset_config main": "subset config_name dataset_config_name",
    "--save_steps 100": "checkpoint_every ckpt_steps",
    "--temperature 0.7": "temp do_sample",
    "--num_machines 2": "nnodes num_nodes",
    "--accelerate_config fsdp2": "fsdp2",
    "--report_to tensorboard": "tensorboard use_tensorboard",
    "--push_to_hub": "push",
    "--hub_model_id me/my-model": "hub_repo_id hub_repo repo_id push_to_hub_model_id",
    "--weight_decay 0.01": "wd",
    "--adam_beta2 0.95": "beta2",
    "--adam_beta1 0.9": "beta1",
    "--adam_epsilon 1e-6": "eps",
    "--optim_args momentum=0.9": "momentum",
    "--lr_scheduler_type cosine_with_min_lr": "min_lr lr_min min_learning_rate",
    "--segment_length 0.5": "segment_size span_length",
    "--num_rounds 3": "iterations num_iters spin_iterations",
    "--max_grad_norm 1": "gradient_clipping grad_clip max_grad_clip clip_grad_norm",
    "--gradient_checkpointing true": "grad_ckpt",
    "--bf16": "precision mixed_precision",
    "--bf16 false": "fp32 no_bf16",
    "--quiet": "silent",
    "--log_level info": "verbose",
    "--logging_steps 10": "log_freq print_every",
}
"""An example of each option, and what other tools call it: trl, axolotl, LLaMA-Factory, unsloth and others."""
ALIASES = {name: example for example, names in _OTHER_NAMES.items() for name in names.split()}

_WITHOUT = {
    "reference log-probabilities are kept with each pair anyway; leave it out": "precompute_ref_log_probs",
    "layout=shared, the default where the model supports it, has no padding; leave it out": (
        "padding_free packing sample_packing"
    ),
    "code from a model folder is never run; use an architecture that transformers has": "trust_remote_code",
    "use train_sampling_strategy=sequential for the order of the file": "dataloader_shuffle",
    "only the reverse KL divergence is supported; leave it out": "f_divergence_type",
    "activation offloading is not supported; use gradient_checkpointing and pairs_per_forward": (
        "activation_offloading"
    ),
    "set eval_local=true to sample from the policy at evaluations": "generate_during_eval",
    "put the rows to evaluate on into a file, and name it with eval_dataset_name": (
        "val_set_size val_size eval_ratio val_ratio validation_split"
    ),
    "sapo train trains; leave it out": "do_train",
    "sapo generate writes pairs, sapo evaluate scores a model; leave it out": "do_predict",
    "put a slice into dataset_train_split, such as train[:1000]": (
        "max_samples limit num_rows max_train_samples max_eval_samples sample_size num_samples_train"
    ),
    "set report_to to wandb, and the environment variable WANDB_PROJECT": "wandb_project",
    "set report_to to wandb, and the environment variable WANDB_ENTITY": "wandb_entity",
    "every run has a report with curves; leave it out": "plot_loss",
    "prepared rows are found by the content of files and options; leave it out": "overwrite_cache",
    "prepared rows are kept by themselves; leave it out": "dataset_prepared_path",
    "the architecture is in the model's config.json; leave it out": "model_type",
    "the tokenizer is the model's; leave it out": (
        "tokenizer_type tokenizer tokenizer_name tokenizer_path tokenizer_name_or_path"
    ),
    "the format is found from the columns; `sapo data check` shows what it found": (
        "dataset_text_field prompt_column response_column input_column text_column messages_column dataset_format "
        "data_format formatting chosen_column rejected_column field_messages"
    ),
    "rows are padded and truncated as needed; leave it out": (
        "padding padding_side pad_to_max_length truncation truncation_side"
    ),
    "put a system message into the rows": "system_prompt system default_system",
    "only responses are trained on, and `sapo data check` shows them; leave it out": (
        "train_on_inputs train_on_input mask_prompt completion_only_loss response_template assistant_only_loss "
        "train_on_responses_only"
    ),
    "`sapo export` merges an adapter into an ordinary model": "merge_lora save_merged export_dir merge_adapter",
    "set load_best_model_at_end=true, which keeps the best model of the run": (
        "early_stopping early_stopping_patience patience"
    ),
    "set the environment variable CUDA_VISIBLE_DEVICES": "gpu gpu_id gpu_ids cuda cuda_device",
    "set the environment variable HF_HOME": "cache_dir hf_home",
    "set the environment variable MLFLOW_TRACKING_URI": "mlflow_tracking_uri",
    "`sapo data check` tries the data, `sapo estimate` memory and time, before a run": (
        "dry_run test_run fast_dev_run"
    ),
    "rows of unequal length cost little with layout=shared; leave it out": "group_by_length",
    "not supported; layout=shared and fused_lm_head save time and memory here": (
        "unsloth use_unsloth liger use_liger liger_kernel"
    ),
    "set it in the model's config.json": "rope_scaling rope_theta",
    "`sapo serve --devices 0,1` puts a server on two GPUs": "tensor_parallel_size tp vllm_tensor_parallel_size",
    "only the losses of `--help loss_type` and `--help objective` are supported; leave it out": (
        "gamma simpo_gamma cpo_alpha desirable_weight undesirable_weight"
    ),
}
"""Advice, and options of other tools that have no counterpart."""
MISSING = {name: advice for advice, names in _WITHOUT.items() for name in names.split()}


_SYNONYMS = {
    **dict.fromkeys(("every", "interval", "freq", "frequency"), "steps"),
    **dict.fromkeys(("val", "valid", "validation", "test"), "eval"),
    "log": "logging", "len": "length", "grad": "gradient", "ckpt": "checkpoint", "iterations": "rounds",
}  # fmt: skip
"""Words of other tools in names of options."""


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
    if key not in {*RENAMED, *ALIASES, *MISSING}:
        # Without the line between two words: --batchsize.
        key = {one.replace("_", ""): one for one in (*ALIASES, *(each.name for each in accepted()))}.get(key, key)
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
    close = _nearest(key, names)
    if close:
        return f"unknown option {dashes}{name}; nearest: {', '.join(f'{dashes}{one}' for one in close)}."
    return f"unknown option {dashes}{name}. --help{'-all' if options else ''} lists what there is."


def _nearest(key: str, names: Iterable[str]) -> list[str]:
    """The name that differs by a slip of the fingers; else up to three of the same words, more or fewer of them."""
    spelled = {_in_our_words(name): name for name in names}
    words = _in_our_words(key)
    slip, short = (difflib.get_close_matches(words, spelled, n=1, cutoff=cutoff) for cutoff in (0.8, 0.75))
    typed = set(words.split())
    shared = {
        other: len(typed & its) / len(typed | its)
        for other, its in ((other, set(other.split())) for other in spelled)
        if its <= typed or (typed <= its and max(map(len, typed), default=0) > 4)
    }
    best = [other for other, share in shared.items() if share == max(shared.values())]
    return [spelled[other] for other in (slip or best[:3] or short)]


def _in_our_words(name: str) -> str:
    return " ".join(_SYNONYMS.get(word, word) for word in name.split("_") if word)


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
