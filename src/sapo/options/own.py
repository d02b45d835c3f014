"""The options that SAPO adds to `transformers.TrainingArguments`, and those whose default or meaning differs here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from sapo.options.declare import declared, time_fraction
from sapo.options.keeping import KeepOptions

Objective = Literal["dpo", "orpo", "sft"]
PairSourceName = Literal["self_play", "paired", "none"]
GenerationBackend = Literal["transformers", "vllm_server", "vllm_colocate"]
Reference = Literal["initial", "opponent_copy", "opponent", "none"]

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "nce", "sft")

VLLM_URL = "http://127.0.0.1:8000"
"""Default address of vLLM."""

MIN_REPORT_PAIRS = 12
"""Minimum number of pairs that a report with pairs keeps from the start and the end of a run."""

_objective = partial(declared, section="Objective")
_self_play = partial(declared, section="Self-play")
_backend = partial(declared, section="Generation backend")
_opponent = partial(declared, section="Opponent and reference")
_buffer = partial(declared, section="Replay buffer")
_data = partial(declared, section="Data")
_speed = partial(declared, section="Speed and memory", resume="free")
_evaluation = partial(declared, section="Evaluation", resume="free")
_logging = partial(declared, section="Logging and report", resume="free")
_output = partial(declared, section="Checkpoints and output", resume="free")
_hub = partial(declared, section="Hub", resume="free")

_SERVER = "generation_backend=vllm_server"
_ANY_VLLM = "generation_backend=vllm_server or vllm_colocate"


@dataclass
class OwnOptions(KeepOptions):
    """Fields of `SAPOConfig` with their declarations. Fields are fixed on resume unless declared `free`."""

    # Fields of TrainingArguments with another default or meaning.
    learning_rate: float = declared(
        5e-7,
        "Peak learning rate. The paper uses 5e-7 for DPO and 5e-6 for ORPO.",
        "Optimizer",
        kind="inherited",
        low=0,
        common=True,
    )
    logging_steps: float = _logging(
        0.05,
        "Log metrics every N optimizer steps; below 1, a fraction of all steps. The first and the last step are logged "
        "in any case.",
        kind="inherited",
        common=True,
    )
    logging_first_step: bool = _logging(True, "Log the first optimizer step too.", kind="inherited")
    gradient_checkpointing: bool | str = _speed(
        "auto",
        "Recompute activations in the backward pass: much less memory for about 20% more time. auto: only where the "
        "run would not fit into memory without it, by estimate.",
        kind="inherited",
        common=True,
    )
    bf16: bool | None = declared(
        None,
        "Train in bfloat16 mixed precision. Unset: on if the accelerator supports it, and on a CPU with the matrix "
        "units of AMX.",
        "Speed and memory",
        kind="inherited",
        common=True,
    )
    remove_unused_columns: bool | None = declared(
        False,
        "",
        "Data loading",
        kind="inherited",
        status="refused",
        reason="the prepared data has its own columns. Leave the option out.",
        one_start=True,
    )
    hub_strategy: str = declared(
        "end",
        "",
        "Hub",
        kind="inherited",
        status="refused",
        reason="a run is pushed when it has ended; checkpoints are not pushed. Leave the option out.",
    )
    resume_from_checkpoint: str | None = _output(
        None,
        'Checkpoint folder to continue from; "true" for the newest in output_dir; "auto" for the newest if there is '
        "one and a fresh start otherwise, for jobs that restart automatically.",
        kind="inherited",
        one_start=True,
        common=True,
    )

    # Model
    adapter: Literal["continue", "merge"] = declared(
        "continue",
        "What happens to the adapter that model_name_or_path names: continue trains it further, merge adds it to its "
        "base model in memory and trains a new adapter (use_peft) or all weights.",
        "Model",
    )

    # Objective
    objective: Objective = _objective(
        "dpo",
        'Loss on the pairs: "dpo" (with a reference model) or "orpo" (without). "sft" trains on the chosen responses '
        "alone, without an opponent or pairs.",
        common=True,
    )
    loss_type: list[str] = _objective(
        ["sigmoid"],
        "Form of the DPO loss, or several to add up. ipo divides log-ratios by the response length, as trl does; nce "
        "scores each response by itself instead of their margin (SPACE, GSIL, NCA); sft beside another one is trl's "
        "name for chosen_nll_weight.",
        needs="objective=dpo",
        choices=LOSS_TYPES,
    )
    loss_weights: list[float] | None = _objective(
        None,
        "Weight of each form in loss_type, in its order. Unset: 1 each.",
        low=0,
        needs="objective=dpo",
    )
    beta: float = _objective(
        0.1,
        "Strength of the penalty for moving away from the reference (DPO), or weight of the odds-ratio term (ORPO).",
        low=0,
        common=True,
    )
    chosen_nll_weight: float = _objective(
        0.0,
        "Guard for DPO: weight of the chosen response's negative log-likelihood per token, added to the loss.",
        low=0,
        common=True,
        needs="objective=dpo",
    )
    dpop_weight: float = _objective(
        0.0,
        "Guard for DPO (DPOP): weight of max(0, fall of the chosen log-probability below the reference), subtracted "
        "from the margin.",
        low=0,
        needs="objective=dpo",
    )
    chosen_drop_limit: float | None = _objective(
        None,
        "Stop the run when the chosen log-probability has fallen by more than this many nats per response.",
        low=0,
        resume="free",
    )
    max_nonfinite_steps: int = _objective(
        10,
        "Maximum number of consecutive optimizer steps with a non-finite loss or gradient before the run stops. Such a "
        "step changes no weights.",
        low=1,
        resume="free",
    )
    chosen_probe_size: int | None = _objective(
        None,
        "Number of training examples whose chosen log-probability is tracked from the start of the run, at every log "
        "line; 0 for none. Unset: up to 16, at log lines so far apart that tracking takes about 1% of the run's time.",
        low=0,
    )
    nll_scope: Literal["response", "all"] = _objective(
        "response",
        'Tokens in ORPO\'s likelihood term: the response, or "all" to add prompt and padding, as published.',
        needs="objective=orpo",
    )

    # Self-play
    pair_source: PairSourceName = _self_play(
        "self_play",
        'Where pairs come from: generated by the opponent ("self_play"), or the chosen and rejected responses of the '
        'data ("paired"). objective=sft uses no pairs and sets "none".',
    )
    num_rounds: int | None = _self_play(
        None,
        "Number of SPIN rounds. In each, a frozen opponent generates pairs for the full dataset, the policy trains on "
        "them for num_train_epochs and becomes the next opponent and reference. Unset: one run with a moving opponent.",
        low=1,
        resume="free",
    )
    mix_previous_round: bool = _self_play(
        False, "From round 1 on, train on the pairs of the previous round too.", needs="num_rounds"
    )
    segment_length: float | None = _self_play(
        256,
        "Number of tokens to regenerate in each response; between 0 and 1, a fraction of the response; none for the "
        "full response.",
        low=0,
        common=True,
        shapes_pairs=True,
    )
    tail_margin: int = _self_play(
        3,
        "Number of tokens at the end of a long response that a segment never includes (published: 3).",
        low=0,
        shapes_pairs=True,
    )
    suffix: Literal["keep", "drop", "mask"] = _self_play(
        "keep",
        "Text after the regenerated segment in the rejected response: kept, dropped, or kept but not scored (mask).",
        common=True,
        shapes_pairs=True,
    )
    max_new_tokens: int | None = _self_play(
        None,
        "Maximum number of tokens that the opponent generates for a full response. Unset: the length of the chosen "
        "response, as in SAPO, so that no rejected response is longer.",
        low=1,
        needs="segment_length=none",
        shapes_pairs=True,
    )
    assistant_turns: Literal["last", "random", "all"] = _self_play(
        "last", "Assistant turns of a conversation to train on; random draws one per conversation and epoch."
    )
    num_generations: int = _self_play(
        1,
        "Number of pairs generated from each example, each with its own segment.",
        low=1,
        shapes_pairs=True,
    )
    generation_interval: int = _self_play(
        1, "Generate at every N-th optimizer step; the examples of the steps between are skipped.", low=1
    )
    steps_per_generation: int = _self_play(
        1,
        "Number of optimizer steps whose segments are generated in one call. Larger batches; samples are up to this "
        "many steps stale.",
        low=1,
    )
    generation_batch_size: int | None = _self_play(
        None,
        "Maximum number of rows that the opponent generates at a time. Unset: all at once.",
        low=1,
        resume="free",
        needs="generation_backend=transformers",
    )
    opponent_system_prompt: str | None = _self_play(
        None,
        "System message that only the opponent is given, in place of the row's own if there is one; pairs are trained "
        "without it. Such as: You are an unhelpful assistant.",
        shapes_pairs=True,
    )
    temperature: float = _self_play(
        0.7, "Sampling temperature of the opponent; 0 for greedy.", low=0, shapes_pairs=True
    )
    top_k: int = _self_play(
        50, "Number of most probable tokens that the opponent samples from; 0 for all.", low=0, shapes_pairs=True
    )
    top_p: float = _self_play(
        0.95,
        "Probability of the smallest set of tokens that the opponent samples from; 1 for all.",
        low=0,
        high=1,
        shapes_pairs=True,
    )
    skip_identical: bool = _self_play(
        True,
        "Do not store a pair whose regenerated segment equals the original: it carries no signal.",
        shapes_pairs=True,
    )

    # Generation backend
    generation_backend: GenerationBackend = _backend(
        "transformers",
        "What generates for the opponent: transformers in this process, one or more vLLM servers (sapo serve starts "
        "them), or vLLM in this process.",
        common=True,
        shapes_pairs=True,
    )
    vllm_server_url: list[str] | None = _backend(
        None,
        f"URL of a vLLM server; may be repeated. Unset: {VLLM_URL}.",
        resume="free",
        repeatable=True,
        needs=_SERVER,
    )
    vllm_server_timeout: float | None = _backend(
        None,
        "Seconds to wait for a vLLM server that does not respond, at the start and later. Unset: 240, and none for one "
        "that cannot be there: on this machine, without vLLM.",
        low=0,
        resume="free",
        needs=_SERVER,
    )
    vllm_request_timeout: float = _backend(
        300.0,
        "Seconds until one request to a vLLM server is aborted and retried.",
        low=0.001,
        resume="free",
        needs=_SERVER,
    )
    vllm_weights_transfer: Literal["folder", "stream"] = _backend(
        "folder",
        "How the opponent's weights reach the vLLM servers: through a shared folder, or as a stream over the network "
        "from the main memory of the first process (full models only).",
        resume="free",
        needs=_SERVER,
    )
    vllm_weights_dir: str | None = _backend(
        None,
        "Folder for the opponent's weights that the vLLM servers see under the same path; one in memory (/dev/shm) is "
        "fastest. Unset: engine/ in output_dir.",
        resume="free",
        needs=_SERVER,
    )
    vllm_gpu_memory_utilization: float = _backend(
        0.3,
        "Fraction of the GPU's memory that vLLM uses in this process; sapo serve uses 0.9.",
        low=0,
        high=1,
        resume="free",
        needs="generation_backend=vllm_colocate",
    )
    sync_opponent_steps: int = _backend(
        1, "Update the opponent's weights in vLLM every N optimizer steps.", low=1, needs=_ANY_VLLM
    )
    max_staleness: int = _backend(
        0,
        "Maximum policy lag, in optimizer steps, of a newly generated pair. Above 0, generation overlaps training.",
        low=0,
        needs=_SERVER,
    )

    # Opponent and reference
    ema_decay: float = _opponent(
        0.5,
        "Decay of the moving average: opponent = decay x opponent + (1 - decay) x policy after each optimizer step. 1 "
        "freezes the opponent, 0 copies the policy.",
        low=0,
        high=1,
        common=True,
    )
    opponent_refresh_steps: int | None = _opponent(
        None,
        "Copy the policy to the frozen opponent every N optimizer steps (IRFT). Unset: it stays as it is.",
        low=1,
        needs="ema_decay=1",
    )
    reference: Reference | None = _opponent(
        None,
        "Reference model of DPO: initial; opponent_copy (updated every ref_model_sync_steps, as published); opponent "
        "(moving, one model fewer); none. Unset: opponent_copy for self-play DPO, initial for paired data and rounds, "
        "none for ORPO and SFT.",
        common=True,
        needs="objective=dpo",
    )
    ref_model_sync_steps: int = _opponent(
        108,
        "Number of optimizer steps between two copies of the opponent to the reference (published: 108).",
        low=1,
        needs="reference=opponent_copy",
    )

    # Replay buffer
    replay_buffer_size: int = _buffer(
        2000,
        "Maximum number of pairs in the replay buffer of each process; if full, the oldest is removed.",
        low=1,
    )
    replay_draw: Literal["inverse_count", "uniform"] = _buffer(
        "inverse_count",
        "Probability of drawing a pair: proportional to 1 / (times drawn + 1), or uniform.",
    )
    replay_replacement: bool = _buffer(True, "Whether a batch may contain the same pair twice (as published).")
    replay_max_age: int | None = _buffer(
        None, "Maximum age of a pair in optimizer steps; older ones are discarded. Unset: no limit.", low=0
    )

    # Data
    max_length: int = _data(
        2048, "Maximum number of tokens of prompt and response together.", low=2, common=True, shapes_pairs=True
    )
    max_prompt_length: int | None = _data(
        None,
        "Maximum number of tokens of a prompt, where prompt and response exceed max_length. Unset: max_length less "
        "segment_length (less a quarter of max_length if that is not in tokens), and at least half of max_length.",
        low=1,
    )
    chat_template_path: str | None = _data(
        None,
        "Chat template to use instead of the model's: chatml or zephyr (shipped; with -bos: begun by the BOS token), a "
        "Jinja file, or a folder or Hub id whose tokenizer has one. Its tokens are added, the embeddings grow, its EOS "
        "token is set, and all of it is saved with the model.",
    )
    prompt_truncation: Literal["keep_end", "keep_start"] = _data(
        "keep_end", "End of a prompt that is kept when it is truncated."
    )
    max_length_policy: Literal["auto", "truncate", "drop", "error"] = _data(
        "auto",
        "What to do with rows longer than max_length. They are counted and reported in any case. auto truncates them, "
        "and stops before training if they are more than half.",
    )
    dataset_num_proc: int | None = _data(
        None,
        "Number of processes that tokenize the data. Unset: one a core from 20000 rows on, whose result is kept in the "
        "user's cache (SAPO_CACHE_DIR) and used again while rows, tokenizer and options stay the same.",
        low=1,
        resume="free",
    )
    template_date: str | None = _data(
        None,
        "Date (YYYY-MM-DD) for chat templates that print it. Unset: the day the run began; a resumed run keeps it.",
    )

    # Speed and memory: none of these changes the result beyond floating point.
    layout: Literal["auto", "shared", "plain"] = _speed(
        "auto",
        "Batch layout: shared computes the common prefix of a pair once, in one row without padding; plain uses one "
        "row per response. auto is shared where the model's attention supports it.",
    )
    pairs_per_forward: int | None = _speed(
        None,
        "Maximum number of pairs in one forward and backward pass; fewer need less memory. Unset: no limit.",
        low=1,
    )
    tokens_per_forward: int | None = _speed(
        None,
        "Maximum number of tokens in one forward and backward pass, padding included; a longer pair is computed alone. "
        "Unset: no limit.",
        low=1,
    )
    fused_lm_head: bool | None = _speed(
        None,
        "Compute log-probabilities with trl's fused head, which never materializes all logits. Unset: on CUDA only; it "
        "is slower on a CPU.",
        needs="trl 1.16 or newer",
    )

    # Evaluation
    eval_local: bool = _evaluation(
        False,
        "At evaluations also sample from the policy and log eval_local/...: likelihood, EOS rate, lengths, repetition, "
        "variety, distance to the data, self-play gap.",
        needs="eval_strategy=steps or epoch",
    )
    eval_local_size: int = _evaluation(
        32, "Number of evaluation rows that eval_local samples.", low=1, needs="eval_local"
    )
    eval_local_max_time_fraction: float = time_fraction(
        0.05,
        "eval_local",
        ". The first and the last evaluation are measured in any case; others are left out until there is time.",
    )

    # The run
    disable_dropout: bool = declared(True, "Set every dropout of the model to 0, as trl's DPOTrainer does.", "Training")
    model_init_kwargs: dict | str | None = declared(
        None, "Keyword arguments for from_pretrained, as JSON, when the model is given by name.", "Model"
    )
    log_pairs_steps: int = _logging(50, "Print a table of a few new pairs every N optimizer steps; 0 for never.", low=0)
    num_pairs_to_print: int = _logging(3, "Number of pairs in the printed table.", low=1)
    push_opponent_to_hub: bool = _hub(
        False, "Push the opponent too, into the folder opponent/ of the same repository.", needs="push_to_hub"
    )
    report_steps: int = _logging(
        100,
        "Refresh report.html every N optimizer steps (throttled to at most 2% of wall time); 0: at the end of the run "
        "only.",
        low=0,
    )
    report_pairs: int | None = _logging(
        None,
        "Maximum number of pairs kept in pairs.jsonl for the report: a few prompts tracked through the run, and pairs "
        "trained on at evenly spaced steps; 0 for none. Unset: 200, with prompts tracked only as often as takes about "
        "1% of the run's time.",
        low=0,
    )
    overwrite_output_dir: bool = _output(
        False,
        "Start over in an output folder that contains an earlier run: its checkpoints and results are deleted.",
        one_start=True,
        common=True,
    )
    skip_memory_check: bool = _speed(
        False,
        "Load the model even if its copies are estimated not to fit into memory.",
    )
