"""From traces and a device to memory and seconds by part."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel

from sapo.config import HAS_FUSED_LM_HEAD, SAPOConfig
from sapo.estimate.devices import Device
from sapo.estimate.passes import Lengths, Passes, trace_passes
from sapo.estimate.tracing import Trace
from sapo.generation.decoding import TOKENS_PER_READ
from sapo.weights.footprint import (
    RunModels,
    gather_shell_memory,
    gathered_memory,
    model_memory,
    optimizer_scratch,
)

RESERVED = 1e9
"""Bytes of a GPU that its driver and libraries are assumed to take."""

LIBRARIES = 0.65e9
"""Bytes of a CPU's memory that Python, torch and transformers take, measured when training begins."""

KEPT = 0.8
"""Share of a CPU's transient memory that its allocator keeps besides at worst, where the lengths of rows differ.

Measured: 0.5 and 0.8 in two runs of glibc; next to none where all blocks have the same size (docs/estimate.md).
"""

POLICY, OPTIMIZER = "policy, forward and backward", "optimizer and moving average"
"""Parts of a step that others than this module name."""

FRAGMENTED = 0.05
"""Share of the memory in use that the allocator is assumed to leave unused between blocks."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device.

    Attributes:
        lasting: of models and optimizer from step to step, by part.
        passing: of what comes and goes, each at its largest, by part.
        phases: everything together at the worst time of each phase.
        on_gpu: whether the device is a GPU; else a CPU's memory.
    """

    lasting: dict[str, int]
    passing: dict[str, int]
    phases: dict[str, int]
    on_gpu: bool

    @property
    def most(self) -> int:
        """Bytes at the worst time."""
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase of that time."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def transient(self) -> int:
        """Bytes at the worst time of what does not last."""
        return self.most - sum(self.lasting.values())

    @property
    def needed(self) -> float:
        """Bytes, with what driver and allocator take of a GPU, and Python and its libraries of a CPU's memory."""
        return self.most * (1 + FRAGMENTED) + RESERVED if self.on_gpu else self.most + LIBRARIES

    @property
    def at_worst(self) -> float:
        """Bytes, with what the allocator of a CPU may keep; of a GPU the same."""
        return self.needed if self.on_gpu else self.needed + KEPT * self.transient


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one optimizer step on one of the devices, all of them at work.

    Attributes:
        memory: in bytes.
        seconds: by part.
        limits: seconds of each part below which the device cannot come: products at its full matrix rate, nothing
            computed twice; weights, keys and values read once a token at its full bandwidth; nothing else.
        flops: operations of matrix products in a step, by part; what is computed twice included.
        launches: operations that start for each token of decoding; 1 as a CUDA graph; None without generation.
        waits: times that each token of decoding waits for the device.
        layout: of the batches.
        why_plain: what keeps them from being shared.
        parameters: of the policy.
        trained: of these.
        recomputes: whether activations are computed again in the backward pass.
    """

    memory: Memory
    seconds: dict[str, float]
    limits: dict[str, float]
    flops: dict[str, float]
    launches: int | None
    waits: float
    layout: str
    why_plain: str | None
    parameters: int
    trained: int
    recomputes: bool


def longest(args: SAPOConfig, prompt: int | None = None, response: int | None = None) -> Lengths:
    """The longest pair that a run can meet: a prompt of `max_prompt_length`, a segment at the response's start."""
    prompt = min(prompt or int(args.max_prompt_length or 1), args.max_length - 1)
    response = min(response or args.max_length - prompt, args.max_length - prompt)
    wanted = args.segment_length
    if wanted is None:
        segment = response
    elif wanted < 1:
        segment = max(1, int(wanted * response))
    else:
        segment = min(int(wanted), response)
    return Lengths(prompt, 0, segment, response - segment)


def usual(longest: Lengths, args: SAPOConfig) -> Lengths:
    """The same lengths with the segment where it lies on average."""
    before = max(0, longest.response - args.tail_margin - longest.segment) // 2
    return Lengths(longest.prompt, before, longest.segment, longest.after - before)


def estimate(roles: RunModels, device: Device, lengths: Lengths, usual_lengths: Lengths | None = None) -> Estimate:
    """Memory and seconds of an optimizer step.

    Args:
        roles: of the run.
        device: what it runs on, `strategy.processes` of them.
        lengths: of every pair, for the memory.
        usual_lengths: of every pair, for the seconds, with the segment in the middle of where it may lie; unset, the
            same.
    """
    on_gpu = device.overlaps
    passes = _traced(roles, lengths, on_gpu=on_gpu)
    common = usual(usual_lengths or lengths, roles.args)
    timed = passes if common == lengths else _traced(roles, common, on_gpu=on_gpu)
    memory = _memory(passes, roles, on_gpu=on_gpu)
    step = _Step(timed, roles, device, common, memory)
    limits, flops = step.limits()
    launches = None if timed.token is None else 1 if step.graph else len(timed.token.work)
    weights = {id(weight): weight for weight in roles.policy.parameters()}
    return Estimate(
        memory=memory,
        seconds=step.seconds(),
        limits=limits,
        flops=flops,
        launches=launches,
        waits=(1 / TOKENS_PER_READ if timed.masked else 1.0) if on_gpu and timed.token is not None else 0.0,
        layout=passes.layout,
        why_plain=passes.why_plain,
        parameters=sum(weight.numel() for weight in weights.values()),
        trained=sum(weight.numel() for weight in roles.trained),
        recomputes=recomputes(roles.args),
    )


def memory_of(roles: RunModels, lengths: Lengths, *, on_gpu: bool, generates: bool = True) -> Memory:
    """The memory alone of what `estimate` estimates; perhaps without generation, which takes long to trace."""
    return _memory(_traced(roles, lengths, on_gpu=on_gpu, generates=generates), roles, on_gpu=on_gpu)


def _traced(roles: RunModels, lengths: Lengths, *, on_gpu: bool, generates: bool = True) -> Passes:
    args = roles.args
    fused = args.fused_lm_head if args.fused_lm_head is not None else on_gpu and HAS_FUSED_LM_HEAD
    rows = _rows(args) if generates else 0
    rows = min(rows, args.generation_batch_size or rows)
    return trace_passes(roles, lengths, rows=rows, fused_lm_head=bool(fused), on_gpu=on_gpu)


def _rows(args: SAPOConfig) -> int:
    """Rows written in one pool; 0 without self-play."""
    if args.pair_source != "self_play":
        return 0
    micro = args.pairs_per_micro_batch * args.gradient_accumulation_steps
    steps = max(1, args.steps_per_generation // args.generation_interval)
    return int(micro * steps * args.num_generations)


def _memory(passes: Passes, roles: RunModels, *, on_gpu: bool) -> Memory:
    parts = model_memory(roles)
    gradients = parts.pop("gradients", 0)
    lasting = sum(parts.values())
    shell, gathered = gather_shell_memory(roles), gathered_memory(roles)
    training = passes.training
    beside = gradients - training.most["gradients"]
    phases = {"training": lasting + gathered + training.bytes + beside}
    phases["optimizer"] = lasting + gradients + optimizer_scratch(roles, on_gpu=on_gpu)
    passing = {
        "gradients": gradients,
        "activations": training.most["activations"],
        "logits and working space": training.most["logits"] + training.most["working"],
    }
    if passes.reference is not None:
        # It scores a micro-batch before the policy trains on it; only earlier micro-batches have left gradients.
        earlier = gradients if roles.args.gradient_accumulation_steps > 1 else 0
        phases["reference"] = lasting + shell + passes.reference.bytes + earlier
    if passes.prefill is not None:
        phases["generation"] = lasting + shell + passes.cast + max(passes.prefill.bytes, passes.cache)
        if passes.cast:
            passing["weights cast to generate"] = passes.cast
        passing["keys and values of generation"] = passes.cache
    if gathered:
        passing["weights gathered to train"] = gathered
    if shell and ("reference" in phases or "generation" in phases):
        passing["weights gathered for opponent and reference"] = shell
    return Memory(parts, passing, phases, on_gpu)


@dataclass(frozen=True, slots=True)
class _Step:
    """What the seconds of an optimizer step follow from; see `estimate`."""

    passes: Passes
    roles: RunModels
    device: Device
    lengths: Lengths
    memory: Memory

    @property
    def number(self) -> float:
        """Passes in a step."""
        return float(
            self.roles.args.pairs_per_micro_batch * self.roles.args.gradient_accumulation_steps / self.passes.pairs
        )

    @property
    def calls(self) -> float:
        """Times that a step has rows decoded; below 1 where one call writes for several steps."""
        rows = _rows(self.roles.args)
        return -(-rows // (self.roles.args.generation_batch_size or rows)) / _steps_of_a_call(self.roles.args)

    @property
    def graph(self) -> bool:
        """Whether a token is decoded by one launch of a CUDA graph."""
        return self.passes.captured and self.device.overlaps

    @property
    def optimizer_bytes(self) -> float:
        """Read and written after the backward pass."""
        states = self.memory.lasting.get("optimizer", 0) + self.memory.lasting.get("float32 master", 0)
        trained = sum(weight.numel() * weight.element_size() for weight in self.roles.trained)
        trained //= self.roles.strategy.processes if self.roles.strategy.shards_gradients else 1
        followed = sum(size for name, size in self.memory.lasting.items() if name.startswith("opponent"))
        # Weights, gradients and states are read, the first and last written; the average reads itself and the policy.
        return 3 * trained + 2 * states + 3 * followed

    def seconds(self) -> dict[str, float]:
        """By part."""
        passes, device, seconds = self.passes, self.device, dict[str, float]()
        if passes.prefill is not None and passes.token is not None:
            token = trace_seconds(passes.token, device, launches=1 if self.graph else None)
            one = trace_seconds(passes.prefill, device) + self.lengths.segment * token
            seconds["generation"] = self.calls * one
        if passes.reference is not None:
            seconds["reference"] = self.number * trace_seconds(passes.reference, device)
        seconds[POLICY] = self.number * trace_seconds(passes.training, device)
        seconds[OPTIMIZER] = self.optimizer_bytes / device.bandwidth
        if self.roles.strategy.processes > 1:
            seconds["communication"] = self._communication(seconds[POLICY])
        return seconds

    def limits(self) -> tuple[dict[str, float], dict[str, float]]:
        """`limits` and `flops` of an `Estimate`."""
        passes, device, roles = self.passes, self.device, self.roles
        weights = list({id(weight): weight for weight in roles.policy.parameters()}.values())
        half = bool(self.roles.args.bf16 or self.roles.args.fp16) or all(
            weight.element_size() == 2 for weight in weights
        )
        limits: dict[str, float] = {}
        flops: dict[str, float] = {}
        forward = 0.0
        if passes.prefill is not None and passes.token is not None:
            segment = self.lengths.segment
            # Of the input embeddings a token reads a row, unless they are the head too.
            embeddings, head = roles.policy.get_input_embeddings(), roles.policy.get_output_embeddings()  # type: ignore[operator]
            aside = embeddings.weight.numel() if embeddings.weight is not head.weight else 0
            read = (sum(weight.numel() for weight in weights) - aside) * (2 if half else 4) + passes.cache
            token = device.limit(passes.token.flops, read, half=half)
            limits["generation"] = self.calls * (device.limit(passes.prefill.flops, 0, half=half) + segment * token)
            flops["generation"] = self.calls * (passes.prefill.flops + segment * passes.token.flops)
        if passes.reference is not None:
            forward = passes.reference.flops
            flops["reference"] = self.number * forward
            limits["reference"] = device.limit(flops["reference"], 0, half=half)
        training = passes.training.flops
        flops[POLICY] = self.number * training
        # A full model's backward pass is twice its forward pass, an adapter's once and a little.
        share = 3 if isinstance(roles.policy, PeftModel) else 4
        twice = (forward or training / share) if recomputes(self.roles.args) else 0.0
        limits[POLICY] = device.limit(self.number * (training - twice), 0, half=half)
        limits[OPTIMIZER] = self.optimizer_bytes * device.reached[1] / device.bandwidth
        flops[OPTIMIZER] = 0.0
        return limits, flops

    def _communication(self, computing: float) -> float:
        """Seconds that are not hidden behind the policy's `computing`; the ring's share of each device."""
        args, strategy = self.roles.args, self.roles.strategy
        share = (strategy.processes - 1) / strategy.processes
        width = self.roles.width
        trained = sum(weight.numel() for weight in self.roles.trained)
        everything = sum(weight.numel() for weight in self.roles.policy.parameters())
        if strategy.shards_weights:
            # Gathered forwards and backwards; gradients scattered once in each pass, with FSDP2 in the last.
            scattered = self.number if strategy.name == "zero3" else 1
            hidden = (2 * self.number * everything + scattered * trained) * width
            calls = args.gradient_accumulation_steps if self.passes.reference is not None else 0
            shown = (
                (calls + (1 / _steps_of_a_call(args) if self.passes.prefill is not None else 0)) * everything * width
            )
        else:
            hidden, shown = 2 * trained * (width if strategy.name == "zero2" else 4), 0.0
        link = self.device.link
        return share * shown / link + max(0.0, share * hidden / link - computing)


def _steps_of_a_call(args: SAPOConfig) -> int:
    return max(args.steps_per_generation, args.generation_interval)


def recomputes(args: SAPOConfig) -> bool:
    """Whether activations are computed again in the backward pass."""
    return args.gradient_checkpointing is True


def trace_seconds(trace: Trace, device: Device, *, launches: int | None = None) -> float:
    """Each operation takes what its arithmetic or its traffic with memory takes, whichever is more, and its start.

    `launches` are the operations that are started, where several start as one.
    """
    computing = sum(
        max(
            work.flops / device.rate(work.thin, work.width, attention=work.attention),
            work.moved / device.bandwidth,
            device.least,
        )
        + work.fresh * device.fault
        for work in trace.work
    )
    starting = (len(trace.work) if launches is None else launches) * device.launch
    return max(computing, starting) if device.overlaps else computing + starting
