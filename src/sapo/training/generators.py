"""Pair sources and the generators behind them, made as the options ask for, and checked against the opponent."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel

from sapo.config import VLLM_URL, SAPOConfig
from sapo.data.examples import Example, collate_examples
from sapo.errors import ConfigurationError, GenerationError, SapoError
from sapo.generation.protocol import Engine, Generator
from sapo.generation.sampling import Sampling
from sapo.preference.pairs import PairedData, PairSource, SFTSource
from sapo.preference.replay_buffer import ReplayBuffer
from sapo.preference.self_play import SelfPlay, SelfPlaySettings
from sapo.training.context import RunContext
from sapo.training.engine_queue import EngineQueue
from sapo.training.engine_tasks import EngineTasks
from sapo.training.engine_weights import EngineWeights
from sapo.weights.opponent import POLICY_ADAPTER

if TYPE_CHECKING:
    from sapo.generation.vllm.servers import VLLMServers

PROBE_TOKENS = 64
"""Tokens of the text on which an engine and the opponent are compared."""
LARGEST_DIFFERENCE = 0.1
"""Mean absolute difference in nats a token between an engine and the opponent at which they are not the same model.

In float32 the two differ by about 1e-6; two bfloat16 implementations of one model by some hundredths.
"""


def make_source(
    context: RunContext, generator: Generator | None, record: Callable[[str, float], None], dataset: Any
) -> PairSource:
    """The pair source that the options ask for.

    Args:
        context: of the run.
        generator: generates the rejected text; None for what `generation_backend` names.
        record: receives metrics.
        dataset: prepared training rows; an engine is checked on the first.

    Raises:
        ConfigurationError, GenerationError: an engine that is not there, or serves something else.
    """
    args, roles, world = context.args, context.roles, context.world
    if args.pair_source != "self_play":
        return PairedData() if args.pair_source == "paired" else SFTSource(seed=args.seed)
    if generator is None:
        generator = opponent_generator(context)
    if not isinstance(generator, Engine):
        # Sharded weights are gathered to generate with, which takes all processes.
        together = (lambda empty: any(world.gather(empty))) if roles.sharded else bool
        return self_play(generator, args, eos_ids=context.eos_ids, record=record, any_process=together)
    tasks = EngineTasks(generator)
    weights = EngineWeights(tasks, args, roles, world, record)
    play = self_play(tasks, args, eos_ids=context.eos_ids, record=record, opponent_step=weights.opponent_step)
    return EngineQueue(play, tasks, weights, args, record, partial(check_engine, context, generator, dataset))


def self_play(
    generator: Generator,
    args: SAPOConfig,
    *,
    eos_ids: Collection[int],
    record: Callable[[str, float], None] = lambda name, value: None,
    any_process: Callable[[bool], bool] = bool,
    opponent_step: Callable[[int], int] = int,
) -> SelfPlay:
    """Create `SelfPlay` with an empty buffer from the options of a run."""
    return SelfPlay(
        generator,
        ReplayBuffer(args.replay_buffer_size, draw=args.replay_draw, replacement=args.replay_replacement),
        SelfPlaySettings(**{name: getattr(args, name) for name in SelfPlaySettings.__slots__}),
        eos_ids=eos_ids,
        seed=args.seed,
        batch_size=args.per_device_train_batch_size,
        process=args.process_index,
        record=record,
        any_process=any_process,
        opponent_step=opponent_step,
    )


def opponent_generator(context: RunContext) -> Generator:
    """The generator that the options ask for; servers are looked for and asked what they serve.

    Raises:
        ConfigurationError, GenerationError: servers that are not there, or serve something else.
    """
    args = context.args
    if args.generation_backend != "transformers":
        _check_adapter(context)
    if args.generation_backend == "vllm_server":
        return checked_servers(
            args,
            context.tokenizer,
            context.model_config,
            eos_ids=context.eos_ids,
            adapter=context.roles.is_adapter,
            stream=args.vllm_weights_transfer == "stream",
        )
    if args.generation_backend == "vllm_colocate":
        from sapo.generation.vllm.colocated import ColocatedVLLM

        policy = context.roles.policy()
        if context.model_config.to_dict().get("quantization_config"):
            raise ConfigurationError(
                "generation_backend=vllm_colocate with a quantized model is not supported. Leave load_in_4bit and "
                "load_in_8bit out, or serve the base model apart with vllm_server."
            )
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        return ColocatedVLLM(
            context.model_config.name_or_path,
            context.sampling,
            eos_ids=context.eos_ids,
            max_model_len=args.max_length,
            dtype=half or next(policy.parameters()).dtype,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            lora_rank=policy.peft_config[POLICY_ADAPTER].r if isinstance(policy, PeftModel) else None,
        )
    return context.generator(context.roles.opponent_module, context.sampling, args.generation_batch_size)


def checked_servers(
    args: SAPOConfig,
    tokenizer: Any,
    model_config: Any,
    *,
    eos_ids: Collection[int],
    adapter: bool,
    stream: bool = False,
) -> VLLMServers:
    """The vLLM servers of a run, found and asked what they serve; the first process gives them weights.

    Raises:
        ConfigurationError, GenerationError: they are not there, or serve something else; all connections are closed.
    """
    from sapo.generation.vllm.servers import SERVER_TIMEOUT, VLLMServers

    servers = VLLMServers(
        args.vllm_server_url or [VLLM_URL],
        Sampling(args.temperature, args.top_k, args.top_p),
        eos_ids=eos_ids,
        vocabulary_size=model_config.get_text_config().vocab_size,
        stream=stream,
        adapter=adapter,
        loads=args.process_index == 0,
        timeout=SERVER_TIMEOUT if args.vllm_server_timeout is None else args.vllm_server_timeout,
        request_timeout=args.vllm_request_timeout,
    )
    try:
        servers.check(tokenizer, args.max_length, model_config)
    except SapoError:
        servers.close()
        raise
    return servers


def check_engine(context: RunContext, engine: Engine, dataset: Any) -> None:
    """Compare what vLLM servers and opponent think of the first training example; all processes take part.

    Args:
        context: whose opponent has been loaded.
        engine: any; one that is no vLLM server is taken at its word.
        dataset: prepared training rows.

    Raises:
        GenerationError: they are not the same model, though the weights were loaded.
    """
    from sapo.generation.vllm.servers import VLLMServers

    if not isinstance(engine, VLLMServers):
        return
    (example,) = collate_examples([dataset[0]])["examples"]
    tokens = _tokens(example)[: context.args.max_length - 1]
    with context.roles.opponent_module() as model, torch.no_grad():
        device = next(model.parameters()).device
        logits = model(input_ids=torch.tensor([tokens], device=device)).logits[0].float()
        logps = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:], device=device)[:, None])[:, 0].cpu()
    for url, given in zip(engine.urls, engine.token_logps(tokens), strict=True):
        difference = float((torch.tensor(given) - logps).abs().mean())
        if not difference <= LARGEST_DIFFERENCE:
            name = context.model_config.name_or_path or "the model that is trained"
            raise GenerationError(
                f"{url}: with the opponent's weights it gives other probabilities than the opponent, {difference:.2g} "
                f"nats a token on the first example. Serve {name} itself: same configuration, same base, not quantized."
            )


def _check_adapter(context: RunContext) -> None:
    """Refuse an adapter that vLLM would refuse at the first hand-over; a server says so as if it had a passing trouble.

    Raises:
        ConfigurationError: anything that vLLM 0.32 does not compute (its `lora/peft_helper.py`).
    """
    policy = context.roles.policy()
    if not isinstance(policy, PeftModel):
        return
    if context.args.vllm_weights_transfer == "stream":
        raise ConfigurationError(
            "vllm_weights_transfer=stream with an adapter: vLLM reads adapters from folders. Leave it out, and name a "
            "folder that the servers see by vllm_weights_dir."
        )
    adapter = policy.peft_config[POLICY_ADAPTER]
    if not isinstance(adapter, LoraConfig):
        raise ConfigurationError(f"an adapter of type {adapter.peft_type}: vLLM serves LoRA alone.")
    start = adapter.init_lora_weights
    refused = {
        "use_dora": adapter.use_dora,
        "modules_to_save": adapter.modules_to_save,
        "trainable_token_indices (from chat_template_path)": getattr(adapter, "trainable_token_indices", None),
        # Others change the base model.
        "init_lora_weights": isinstance(start, str)
        and start.lower() not in ("gaussian", "eva", "orthogonal")
        and start,
    }
    for name, value in refused.items():
        if value:
            raise ConfigurationError(
                f"{name}={value} with generation_backend={context.args.generation_backend}: vLLM does not serve such "
                "adapters. Leave one of the two out."
            )


def _tokens(example: Example) -> list[int]:
    turn = example.turns[0]
    return [*turn.prompt_ids, *turn.response_ids][:PROBE_TOKENS]
