"""Every field of `transformers.TrainingArguments` but those in `own`: used, harmless, or refused with the reason.

The defaults are those of transformers, only for the help: a run uses those of the class; a test compares the two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sapo.options.declare import Option

_NO_COMPILE = (
    "row lengths differ in every pass, so a graph would be compiled for each. Leave it out; decoding is "
    "captured as a CUDA graph without it."
)
_NO_METRICS = "evaluation takes no compute_metrics, so this has no effect. Leave the option out."
_NO_PARTS = (
    "optimizers for parts of the model (GaLore, APOLLO) are not supported. Use adamw_torch or adamw_8bit, or train "
    "fewer weights with --use_peft."
)
_PARTIAL_OPTIMIZERS = [
    *(f"galore_{kind}{layers}" for kind in ("adamw", "adamw_8bit", "adafactor") for layers in ("", "_layerwise")),
    *("apollo_adamw", "apollo_adamw_layerwise"),
]
_JOB_SCRIPT = "transformers leaves this to the calling script; sapo train always trains. Leave the option out"

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
)
STRATEGIES = ("no", "steps", "epoch")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")

_inherited = partial(Option, kind="inherited")
_training = partial(_inherited, section="Training")
_optimizer = partial(_inherited, section="Optimizer")
_speed = partial(_inherited, section="Speed and memory", resume="free")
_evaluation = partial(_inherited, section="Evaluation", resume="free")
_logging = partial(_inherited, section="Logging and report", resume="free")
_output = partial(_inherited, section="Checkpoints and output", resume="free")
_hub = partial(_inherited, section="Hub", resume="free")
_processes = partial(_inherited, section="Several processes", resume="free")
_loading = partial(_inherited, section="Data loading", resume="free")


def _refused(name: str, type: Any, default: Any, reason: str, section: str = "Training", **more: Any) -> Option:
    return _inherited(
        name=name, type=type, default=default, help="", section=section, status="refused", reason=reason, **more
    )


INHERITED: tuple[Option, ...] = (
    # Training
    _output("output_dir", None, "Folder for checkpoints, metrics, report and the trained model.", type="str",
            optional=True, common=True),
    _training("per_device_train_batch_size", 8, "Number of pairs per device and forward step.", type="int", low=1,
              common=True),
    _training("gradient_accumulation_steps", 1, "Number of micro-batches whose gradients are added before the weights "
              "are updated.", type="int", low=1, common=True),
    _training("num_train_epochs", 3.0, "Number of epochs.", type="float", low=0, resume="free", common=True),
    _training("max_steps", -1, "Number of optimizer steps; overrides num_train_epochs. -1: train for "
              "num_train_epochs.", type="int", low=-1, resume="free", common=True),
    _training("seed", 42, "Random seed of the run: segments, sampling, replay draws and initialization.", type="int",
              low=0, common=True, shapes_pairs=True),
    _training("data_seed", None, "Random seed of the order of the data. Unset: seed.", type="int", optional=True),
    _training("train_sampling_strategy", "random", "Order of the training data in an epoch: random or sequential.",
              type="str", choices=("random", "sequential", "group_by_length"),
              refuses={"group_by_length": "rows are grouped after their pairs were generated, not before. Use random "
                       "or sequential."}),
    _training("full_determinism", False, "Use deterministic algorithms of torch where there are any; slower.",
              type="bool", resume="free"),
    _training("max_grad_norm", 1.0, "Maximum gradient norm; larger gradients are scaled down. 0 for no clipping.",
              type="float", low=0),
    # Optimizer
    _optimizer("lr_scheduler_type", "linear", "Learning rate schedule.", type="str", choices=SCHEDULERS),
    _optimizer("lr_scheduler_kwargs", None, "Further arguments of the schedule, as JSON.", type="mapping",
               optional=True),
    _optimizer("warmup_steps", 0, "Number of optimizer steps over which the learning rate rises from 0; below 1, a "
               "fraction of all steps.", type="float", low=0, common=True),
    _optimizer("optim", "adamw_torch_fused", "Optimizer, by transformers' name, such as adamw_torch, adamw_8bit or "
               "adafactor.", type="str", refuses=dict.fromkeys(_PARTIAL_OPTIMIZERS, _NO_PARTS)),
    _optimizer("optim_args", None, "Further arguments of the optimizer, as name=value pairs separated by commas.",
               type="str", optional=True),
    _optimizer("weight_decay", 0.0, "Weight decay of the optimizer, applied to all weights but biases and norms.",
               type="float", low=0),
    _optimizer("adam_beta1", 0.9, "Decay rate of Adam's first moment.", type="float", low=0, high=1),
    _optimizer("adam_beta2", 0.999, "Decay rate of Adam's second moment.", type="float", low=0, high=1),
    _optimizer("adam_epsilon", 1e-8, "Term added to the denominator of Adam's update.", type="float", low=0),
    # Speed and memory
    _inherited("fp16", False, "Train in float16 mixed precision.", type="bool", section="Speed and memory"),
    _speed("tf32", None, "Allow TF32 matrix products on NVIDIA GPUs from Ampere on. Unset: torch's default.",
           type="bool", optional=True),
    _speed("gradient_checkpointing_kwargs", None, "Arguments of gradient checkpointing, as JSON, such as "
           '{"use_reentrant": false}.', type="mapping", optional=True),
    _speed("activation_checkpointing", None, "Newer name of gradient_checkpointing, which it follows.", type="bool",
           optional=True, one_start=True, since="5.23"),
    _speed("activation_checkpointing_kwargs", None, "Newer name of gradient_checkpointing_kwargs.", type="mapping",
           optional=True, one_start=True, since="5.23"),
    _speed("torch_empty_cache_steps", None, "Empty the accelerator's memory cache every N optimizer steps. Unset: "
           "never.", type="int", optional=True, low=1),
    _speed("use_cpu", False, "Train on the CPU even if there is an accelerator.", type="bool", common=True),
    # Evaluation
    _evaluation("eval_strategy", "no", "When to evaluate: never, every eval_steps, or after each epoch.", type="str",
                choices=STRATEGIES, common=True),
    _evaluation("do_eval", False, "Set by eval_strategy.", type="bool", status="harmless", one_start=True),
    _evaluation("eval_steps", None, "Number of optimizer steps between evaluations; below 1, a fraction of all steps. "
                "Unset: logging_steps; with load_best_model_at_end, save_steps.", type="float", optional=True, low=0,
                common=True, needs="eval_strategy=steps"),
    _evaluation("eval_delay", 0, "Number of epochs or steps, by eval_strategy, before the first evaluation.",
                type="float", low=0, needs="eval_strategy=steps or epoch"),
    _evaluation("eval_on_start", False, "Evaluate before the first step.", type="bool"),
    _evaluation("per_device_eval_batch_size", 8, "Number of pairs per device in an evaluation step.", type="int",
                low=1),
    # Logging and report
    _logging("logging_strategy", "steps", "When to log: never, every logging_steps, or after each epoch.", type="str",
             choices=STRATEGIES),
    _logging("logging_nan_inf_filter", True, "Leave non-finite losses out of the logged average.", type="bool"),
    _logging("report_to", "none", "Trackers to log to, such as trackio, wandb, tensorboard or mlflow; none or all.",
             type="list", common=True),
    _logging("run_name", None, "Name of the run at the tracker.", type="str", optional=True, one_start=True),
    _logging("project", "huggingface", "Project of the run at trackio.", type="str"),
    _logging("trackio_space_id", None, "Hub space that shows the run's trackio metrics.", type="str", optional=True),
    _logging("trackio_bucket_id", None, "Hub bucket for the run's trackio metrics.", type="str", optional=True),
    _logging("trackio_static_space_id", None, "Hub space with a read-only copy of the run's trackio metrics; false for "
             "none.", type="str_or_false", optional=True),
    _logging("disable_tqdm", None, "Hide transformers' progress bar; sapo train shows its own.", type="bool",
             optional=True, status="harmless", one_start=True),
    _logging("log_level", "passive", "Log level of transformers in the first process.", type="str",
             choices=LOG_LEVELS, status="harmless"),
    _logging("log_level_replica", "warning", "Log level of transformers in the other processes.", type="str",
             choices=LOG_LEVELS, status="harmless"),
    _logging("log_on_each_node", True, "With several machines, let the first process of each log.", type="bool",
             status="harmless"),
    _logging("skip_memory_metrics", True, "Leave transformers' memory metrics out of the results.", type="bool",
             status="harmless"),
    _logging("debug", "", "transformers' debug features: underflow_overflow or tpu_metrics_debug.", type="str",
             status="harmless", one_start=True),
    # Checkpoints and output
    _output("save_strategy", "steps", "When to save a checkpoint: never, every save_steps, after each epoch, or when "
            "the evaluation improves (best).", type="str", choices=(*STRATEGIES, "best")),
    _output("save_steps", 500, "Number of optimizer steps between checkpoints; below 1, a fraction of all steps.",
            type="float", low=0, common=True),
    _output("save_total_limit", None, "Maximum number of checkpoints kept; the oldest are deleted. Unset: all.",
            type="int", optional=True, low=1, common=True),
    _output("save_on_each_node", False, "With several machines, save checkpoints on each and not on the first alone.",
            type="bool"),
    _output("load_best_model_at_end", False, "Load the best checkpoint when the run ends.", type="bool",
            needs="eval_strategy and save_strategy that agree"),
    _inherited("metric_for_best_model", None, "Evaluation metric that decides which checkpoint is best. Unset: loss.",
               type="str", optional=True, section="Checkpoints and output"),
    _inherited("greater_is_better", None, "Whether a higher metric_for_best_model is better. Unset: unless its name "
               "ends in loss.", type="bool", optional=True, section="Checkpoints and output",
               needs="metric_for_best_model"),
    _output("restore_callback_states_from_checkpoint", False, "Restore the state of your own callbacks on resume.",
            type="bool", status="harmless"),
    # Hub
    _hub("push_to_hub", False, "Push the trained model to the Hugging Face Hub when the run ends.", type="bool",
         common=True),
    _hub("hub_model_id", None, "Repository on the Hub. Unset: the name of output_dir, in your namespace.", type="str",
         optional=True, needs="push_to_hub"),
    _hub("hub_token", None, "Token for the Hub. Unset: that of `hf auth login` or HF_TOKEN.", type="str",
         optional=True, one_start=True),
    _hub("hub_private_repo", None, "Whether a new repository is private. Unset: the namespace's default.",
         type="bool", optional=True, needs="push_to_hub"),
    _hub("hub_always_push", False, "Push even if the previous push is not finished.", type="bool", status="harmless"),
    _hub("hub_revision", None, "Branch of the repository to push to. Unset: main.", type="str", optional=True,
         needs="push_to_hub"),
    # Several processes
    _processes("ddp_backend", None, "Communication backend of several processes: nccl, gloo, ...", type="str",
               optional=True),
    _processes("ddp_timeout", 1800, "Timeout of one collective operation, in seconds.", type="int", low=1),
    _processes("ddp_find_unused_parameters", None, "DDP: look for weights without gradient in each backward pass.",
               type="bool", optional=True),
    _processes("ddp_bucket_cap_mb", None, "DDP: maximum size of a gradient bucket, in MB.", type="int",
               optional=True, low=1),
    _processes("ddp_broadcast_buffers", None, "DDP: broadcast buffers before each forward pass.", type="bool",
               optional=True),
    _processes("ddp_static_graph", None, "DDP: assume that the same weights are used in each step.", type="bool",
               optional=True),
    _processes("fsdp", None, "FSDP options of transformers; --accelerate_config fsdp2 sets all of them.", type="str",
               optional=True),
    _processes("fsdp_config", None, "FSDP configuration of transformers: a JSON file, or JSON.", type="mapping_or_file",
               optional=True),
    _processes("deepspeed", None, "DeepSpeed configuration: a JSON file, or JSON; --accelerate_config zero3 sets a "
               "complete one.", type="mapping_or_file", optional=True,
               refuses={name: f"not a file. Use --accelerate_config {name}." for name in ("zero2", "zero3")}),
    _processes("local_rank", -1, "Set by the launcher.", type="int", status="harmless", one_start=True),
    # Data loading
    _inherited("dataloader_drop_last", False, "Leave out the last batch of an epoch if it is incomplete.", type="bool",
               section="Data loading"),
    _loading("dataloader_num_workers", 0, "Number of processes that load data; 0 loads in the training process.",
             type="int", low=0),
    _loading("dataloader_pin_memory", True, "Pin the memory of loaded batches for faster copies to the GPU.",
             type="bool"),
    _loading("dataloader_persistent_workers", False, "Keep the loading processes between epochs.", type="bool",
             needs="dataloader_num_workers"),
    _loading("dataloader_prefetch_factor", None, "Number of batches that each loading process loads ahead.",
             type="int", optional=True, low=1, needs="dataloader_num_workers"),
    _loading("dataloader_multiprocessing_context", None, "How loading processes are started: fork, spawn or "
             "forkserver.", type="str", optional=True, needs="dataloader_num_workers"),
    # Refused
    _refused("label_smoothing_factor", "float", 0.0, "the loss is computed on pairs and does not use it. Leave it "
             "out."),
    _refused("neftune_noise_alpha", "float", None, "the noise would reach the policy and not the reference, so that "
             "the margin is wrong from the first step. Leave it out.", optional=True),
    _refused("torch_compile", "bool", False, _NO_COMPILE, "Speed and memory"),
    _refused("torch_compile_backend", "str", None, _NO_COMPILE, "Speed and memory", optional=True),
    _refused("torch_compile_mode", "str", None, _NO_COMPILE, "Speed and memory", optional=True),
    _refused("length_column_name", "str", "length", "rows are not grouped by length. Leave it out.", "Data loading"),
    _refused("label_names", "list", None, _NO_METRICS, "Evaluation", optional=True),
    _refused("include_for_metrics", "list", [], _NO_METRICS, "Evaluation"),
    _refused("batch_eval_metrics", "bool", False, _NO_METRICS, "Evaluation"),
    _refused("prediction_loss_only", "bool", False, _NO_METRICS, "Evaluation"),
    _refused("eval_accumulation_steps", "int", None, "evaluation keeps no logits, so this has no effect. Lower "
             "per_device_eval_batch_size or pairs_per_forward to save memory.", "Evaluation", optional=True),
    _refused("eval_do_concat_batches", "bool", True, _NO_METRICS, "Evaluation"),
    _refused("eval_use_gather_object", "bool", False, _NO_METRICS, "Evaluation"),
    _refused("bf16_full_eval", "bool", False, "it would convert the policy's weights for good. Evaluation uses the "
             "precision of training; leave it out.", "Evaluation"),
    _refused("fp16_full_eval", "bool", False, "it would convert the policy's weights for good. Evaluation uses the "
             "precision of training; leave it out.", "Evaluation"),
    _refused("do_train", "bool", False, f"{_JOB_SCRIPT}."),
    _refused("do_predict", "bool", False, f"{_JOB_SCRIPT}; sapo evaluate measures a trained model.", "Evaluation"),
    _refused("average_tokens_across_devices", "bool", True, "the loss is a mean over pairs, so this has no effect. "
             "Leave it out."),
    _refused("ignore_data_skip", "bool", False, "a resumed run would see other rows than an uninterrupted one. Leave "
             "it out.", "Checkpoints and output"),
    _refused("auto_find_batch_size", "bool", False, "it would change the batch in the middle of a run. Run `sapo "
             "estimate` to find a batch that fits, or lower pairs_per_forward, which does not change the result."),
    _refused("optim_target_modules", "list", None, _NO_PARTS, "Optimizer", optional=True),
    _refused("parallelism_config", "mapping", None, "tensor, context and sequence parallelism are not supported. Use "
             "--accelerate_config fsdp2 or zero3 for models that do not fit on one device.", "Several processes",
             optional=True),
    _refused("accelerator_config", "mapping", None, "batches are divided among processes so that a run can be resumed "
             "exactly; accelerate's own settings would change them. Leave it out.", "Several processes",
             optional=True, one_start=True),
    _refused("use_liger_kernel", "bool", False, "it replaces the forward pass that log-probabilities are taken from. "
             "Set fused_lm_head=true, which saves the same memory.", "Speed and memory"),
    _refused("liger_kernel_config", "mapping", None, "Liger kernels are not supported. Set fused_lm_head=true instead.",
             "Speed and memory", optional=True),
    _refused("use_cache", "bool", False, "training never needs a key-value cache, and generation always uses its own. "
             "Leave it out.", "Speed and memory"),
    _refused("save_only_model", "bool", False, "a checkpoint without optimizer state cannot be resumed. Lower "
             "save_total_limit to save space, or set save_strategy=no: the final model is saved in any case.",
             "Checkpoints and output"),
    _refused("enable_jit_checkpoint", "bool", False, "sapo train saves a checkpoint at SIGTERM and Ctrl-C anyway. "
             "Leave it out.", "Checkpoints and output"),
    _refused("include_num_input_tokens_seen", "str", "no", "transformers cannot count the tokens of pairs. Leave it "
             "out: the metric tokens counts them.", "Logging and report"),
    _refused("dataloader_in_order", "bool", True, "the order of the rows would depend on the speed of the loading "
             "processes, and a resumed run would differ. Leave it out.", "Data loading"),
)  # fmt: skip
