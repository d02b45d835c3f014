"""Laws of the opponent on vLLM servers: with a stand-in always, with a real server where there is one."""

import copy
import json
import socket
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sapo.errors import ConfigurationError, GenerationError
from sapo.generation.protocol import Engine
from sapo.generation.sampling import Sampling, filtered_probabilities
from sapo.generation.vllm.weight_stream import send_weights
from sapo.generation.vllm.worker import receive
from tests.integration.test_engine_queue import same
from tests.tiny import tiny_tokenizer
from tests.vllm_servers import (
    BUDGETS,
    CONTEXTS,
    LENGTH,
    LONG_WITH_A_REAL_ONE,
    SEEDS,
    StandIn,
    own_text,
    save_servable,
    servable_llama,
    version,
)


def adapted(folder):
    base = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def check_logps(servers, model):
    """Servers and model give each token of a context the same probability."""
    with torch.no_grad():
        logps = model(torch.tensor([CONTEXTS[2]])).logits[0].log_softmax(-1)
    (given,) = servers.token_logps(CONTEXTS[2])
    assert given == pytest.approx([logps[i, t].item() for i, t in enumerate(CONTEXTS[2][1:])], abs=1e-4)


def test_greedy_text_equals_transformers_after_each_load(server, served, servers_of, tmp_path):
    servers = servers_of(server.url)
    assert isinstance(servers, Engine)
    seen = []
    for seed in (0, 1, 2):
        model = save_servable(tmp_path / f"{seed}", seed)
        servers.load(tmp_path / f"{seed}", version())
        # Twice: the second time from the keys and values that the server has kept of the first.
        for _ in range(2):
            seen.append(servers.generate(CONTEXTS, BUDGETS, SEEDS))
            assert seen[-1] == own_text(model)
    assert seen[0] != seen[2] != seen[4]


def test_greedy_text_of_an_adapter_equals_transformers_after_each_swap(server, served, servers_of, tmp_path):
    # A real server may have been given other weights by another test: an adapter needs those it was started with.
    whole = servers_of(server.url)
    whole.load(served, version())
    servers = servers_of(server.url, adapter=True)
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = adapted(served)
        for name, weight in model.named_parameters():
            weight.data *= 5 if "lora_B" in name else 1
        model.save_pretrained(tmp_path / f"{seed}")
        servers.load(tmp_path / f"{seed}", version())
        for _ in range(2):
            seen.append(servers.generate(CONTEXTS, BUDGETS, SEEDS))
            assert seen[-1] == own_text(model)
    assert seen[0] != seen[2]
    check_logps(servers, model)


def test_greedy_text_equals_transformers_after_weights_were_sent(server, servers_of):
    """No folder is seen by both; bytes come in pieces, as a network likes them."""
    servers = servers_of(server.url, stream=True)
    seen = []
    for seed in (0, 1, 2):
        model = servable_llama(seed)
        weights = {name: weight.detach() * (4 if weight.dim() > 1 else 1) for name, weight in model.named_parameters()}
        servers.load(weights, version())
        model.load_state_dict(weights)
        for _ in range(2):
            seen.append(servers.generate(CONTEXTS, BUDGETS, SEEDS))
            assert seen[-1] == own_text(model)
    assert seen[0] != seen[2] != seen[4]


def test_weights_are_sent_to_nobody_without_the_key():
    sent = []

    def ask(where):
        with socket.create_connection((where["host"], where["port"])) as stranger:
            stranger.sendall(b"\0" * 16)
            sent.append(stranger.recv(100))
        with socket.create_connection((where["host"], where["port"])) as line:
            line.sendall(bytes.fromhex(where["key"]))
            sent.append(dict(receive(line, json.loads(where["weights"]))))

    weights = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
        "none": torch.zeros(0, 4),
        "large": torch.arange(3_000_000, dtype=torch.float32),
        "number": torch.tensor(3, dtype=torch.int64),
    }
    send_weights(weights, "http://127.0.0.1:1", 1, ask, 10.0)
    assert sent[0] == b""
    assert same(sent[1], weights)
    assert all(sent[1][name].dtype == weights[name].dtype for name in weights)


def test_line_that_breaks_is_a_passing_trouble(stand_in, servers_of):
    servers = servers_of(stand_in.url, stream=True)
    left = [2]

    def broken(path, body):
        if path == "/collective_rpc" and left[0] > 0:
            left[0] -= 1
            with socket.create_connection((body["kwargs"]["host"], body["kwargs"]["port"])) as line:
                line.sendall(bytes.fromhex(body["kwargs"]["key"]))
            return 500
        return None

    stand_in.fault = broken
    model = servable_llama(4)
    servers.load(dict(model.named_parameters()), version())
    assert servers.generate(CONTEXTS, BUDGETS, SEEDS) == own_text(model)
    assert left == [0]


def test_server_that_cannot_be_sent_weights_is_refused(stand_in, servers_of):
    stand_in.extension = ""
    with pytest.raises(ConfigurationError, match=r"does not accept streamed weights\. Start it with sapo serve"):
        servers_of(stand_in.url, stream=True)


def test_row_depends_on_its_own_seed_alone(server, served, servers_of):
    servers = servers_of(server.url, sampling=Sampling(0.7, 50, 0.95))
    servers.load(served, version())
    together = servers.generate([[5, 6]] * 12, [15] * 12, list(range(12)))
    assert together == servers.generate([[5, 6]] * 12, [15] * 12, list(range(12)))
    assert [together[7]] == servers.generate([[5, 6]], [15], [7])
    assert len({tuple(row) for row in together}) > 6


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0, 1.0), Sampling(0.5, 5, 1.0), Sampling(1.5, 0, 0.6)])
def test_first_token_has_the_distribution_of_the_other_backends(sampling, server, served, servers_of):
    """Chi-square of many first tokens; the seeds are fixed, so that it cannot pass today and fail tomorrow."""
    servers = servers_of(server.url, sampling=sampling)
    servers.load(served, version())
    rows = 300 if isinstance(server, StandIn) else 1500
    drawn = servers.generate([[5, 6, 7]] * rows, [1] * rows, list(range(rows)))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(served)(torch.tensor([[5, 6, 7]])).logits[:, -1]
    kept, ids = filtered_probabilities(logits, sampling)
    expected = torch.zeros(logits.shape[1]).scatter(0, ids[0], rows * kept[0]).double()
    found = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(expected)).double()
    assert not found[expected == 0].any()
    # Cells of fewer than five are one cell together.
    often = expected >= 5
    table = torch.stack([expected, found])
    table = torch.cat([table[:, often], table[:, ~often].sum(1, keepdim=True)], 1)
    table = table[:, table[0] > 0]
    statistic = ((table[1] - table[0]) ** 2 / table[0]).sum()
    freedom = torch.tensor((table.shape[1] - 1) / 2, dtype=torch.float64)
    chance = 1 - float(torch.special.gammainc(freedom, statistic / 2)) if freedom > 0 else 1.0
    assert chance > 1e-4


@LONG_WITH_A_REAL_ONE
def test_restarted_server_is_given_its_weights_again(server, servers_of, tmp_path):
    servers = servers_of(server.url, timeout=120.0)
    model = save_servable(tmp_path / "other", 5)
    servers.load(tmp_path / "other", version())
    server.restart()
    assert servers.generate(CONTEXTS, BUDGETS, SEEDS) == own_text(model)


def test_restart_between_two_answers_throws_both_away(stand_in, servers_of, tmp_path):
    """The server comes back with the weights it was started with in the middle of a batch."""
    servers = servers_of(stand_in.url)
    model = save_servable(tmp_path / "other", 5)
    servers.load(tmp_path / "other", version())
    answered = []

    def restart_after_the_first(path, body):
        if path == "/v1/completions":
            answered.append(path)
            if len(answered) == 2:
                stand_in.restart()

    stand_in.fault = restart_after_the_first
    assert servers.generate(CONTEXTS, BUDGETS, SEEDS) == own_text(model)
    assert len(answered) == 6


def test_weights_of_another_run_end_the_run(stand_in, served, servers_of):
    servers = servers_of(stand_in.url)
    servers.load(served, version())

    def another_run(path, body):
        if path == "/v1/completions":
            stand_in.version = "other-run-3"

    stand_in.fault = another_run
    with pytest.raises(GenerationError, match="serves weights other-run-3, which this run did not load"):
        servers.generate(CONTEXTS, BUDGETS, SEEDS)


@pytest.mark.parametrize("trouble", ["drop", 500, 503, 429])
def test_passing_trouble_is_outlived(trouble, stand_in, served, servers_of):
    waits = []
    servers = servers_of(stand_in.url, sleep=waits.append)
    servers.load(served, version())
    left = [5]

    def sometimes(path, body):
        left[0] -= 1
        return trouble if left[0] > 0 and left[0] % 2 == 0 else None

    stand_in.fault = sometimes
    model = AutoModelForCausalLM.from_pretrained(served)
    assert servers.generate(CONTEXTS, BUDGETS, SEEDS) == own_text(model)


def test_waiting_is_bounded_and_backs_off(served, servers_of):
    server = StandIn(served)
    waits = []
    servers = servers_of(server.url, timeout=0.4, sleep=lambda seconds: (waits.append(seconds), time.sleep(0.1)))
    servers.load(served, version())
    server.stop()
    servers._clients[0].close()
    servers._clients[0].open()
    with pytest.raises(GenerationError, match=r"waited 0.4 s\. Start vLLM again"):
        servers.generate(CONTEXTS, BUDGETS, SEEDS)
    assert waits[:3] == [0.25, 0.5, 1.0]


def test_server_that_hangs_is_given_up_and_named(stand_in, served, servers_of):
    servers = servers_of(stand_in.url, request_timeout=0.2)
    servers.load(served, version())
    over = threading.Event()
    stand_in.fault = lambda path, body: over.wait(30) and "drop" if path == "/v1/completions" else None
    with pytest.raises(GenerationError, match=r"3 rows failed after 6 attempts"):
        servers.generate(CONTEXTS, BUDGETS, SEEDS)
    over.set()


def test_of_several_servers_one_may_die(served, servers_of, tmp_path):
    first, second = StandIn(served), StandIn(served)
    servers = servers_of(first.url, second.url)
    model = save_servable(tmp_path / "other", 5)
    servers.load(tmp_path / "other", version())
    second.fault = lambda path, body: "drop" if path == "/v1/completions" else None
    expected = own_text(model)
    assert servers.generate(CONTEXTS, BUDGETS, SEEDS) == expected
    assert {path for path, _ in first.asked} > {"/v1/completions"}
    # Dead for good, while weights are handed over; and back with the weights it was started with.
    second.fault = lambda path, body: "drop"
    model = save_servable(tmp_path / "newer", 6)
    servers.load(tmp_path / "newer", version())
    assert servers.generate(CONTEXTS, BUDGETS, SEEDS) == own_text(model)
    second.fault = lambda path, body: None
    second.restart()
    second.asked.clear()
    assert servers.generate(CONTEXTS, BUDGETS, SEEDS) == own_text(model)
    assert "/v1/completions" in {path for path, _ in second.asked}
    first.stop()
    second.stop()


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([5, 6], "generated 2 of 9 tokens and no EOS token"),
        ([5] * 10, "generated 10 of 9 tokens"),
        ([5, 1, 6, 7, 8, 9, 10, 11, 12], "generated tokens after an EOS token"),
        ([5] * 8 + [500], "generated tokens outside the policy's vocabulary"),
        (["5"] * 9, "contains no token ids"),
    ],
)
def test_answers_that_cannot_be_are_refused(tokens, says, stand_in, served, servers_of):
    servers = servers_of(stand_in.url)
    servers.load(served, version())
    answer = {"choices": [{"token_ids": tokens, "prompt_token_ids": [5, 6, 7], "finish_reason": "length"}]}
    stand_in.fault = lambda path, body: answer if path == "/v1/completions" else None
    with pytest.raises(GenerationError, match=says):
        servers.generate([[5, 6, 7]], [9], [1])


def test_row_longer_than_the_server_takes_is_refused(server, served, servers_of):
    servers = servers_of(server.url)
    servers.load(served, version())
    with pytest.raises(ConfigurationError, match=r"60 tokens and 9 new ones exceed the 64.*--max-model-len 69"):
        servers.generate([[5] * 60], [9], [1])


def test_other_tokenizer_is_refused(server, served, servers_of):
    servers = servers_of(server.url)
    other = copy.deepcopy(tiny_tokenizer())
    content = json.loads(other.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)
    vocabulary[words[7]], vocabulary[words[9]] = vocabulary[words[9]], vocabulary[words[7]]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), pad_token="<pad>", eos_token="<eos>"
    )
    with pytest.raises(ConfigurationError, match=f"another tokenizer: token 7 is '{words[7]}' there and '{words[9]}'"):
        servers.check(swapped, LENGTH)


def test_server_with_too_little_room_is_refused(server, servers_of):
    servers = servers_of(server.url)
    with pytest.raises(ConfigurationError, match=r"serves at most 64 tokens, and max_length=65"):
        servers.check(tiny_tokenizer(), 65)


def test_server_without_the_needed_endpoints_says_how_to_start_it(stand_in, served, servers_of):
    servers = servers_of(stand_in.url)
    stand_in.fault = lambda path, body: 404 if path == "/weight_info" else None
    with pytest.raises(GenerationError, match=r"has no /weight_info.*VLLM_SERVER_DEV_MODE=1"):
        servers.load(served, version())


def test_key_is_sent_and_never_shown(stand_in, served, servers_of, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret-key")
    servers = servers_of(stand_in.url)
    assert servers._clients[0]._http.headers["Authorization"] == "Bearer secret-key"
    stand_in.fault = lambda path, body: 401
    with pytest.raises(GenerationError) as raised:
        servers.load(served, version())
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("moment", ["load", "tag", "cache", "prompt", "text"])
def test_no_moment_of_a_restart_changes_what_is_generated(moment, lora, stand_in, served, servers_of, tmp_path):
    """Started anew just before the named request is answered: it serves its own weights, and no adapter."""
    path, body = {
        "load": ("/v1/load_lora_adapter" if lora else "/collective_rpc", ""),
        "tag": ("/update_weight_version", "loading"),
        "cache": ("/reset_prefix_cache", ""),
        "prompt": ("/v1/completions", "'prompt_logprobs': 0"),
        "text": ("/v1/completions", "'seed': "),
    }[moment]
    torch.manual_seed(3)
    model = adapted(served) if lora else servable_llama()
    model.save_pretrained(tmp_path / "weights")
    restarts = []

    def fault(asked, given):
        if asked == path and body in str(given) and not restarts:
            restarts.append(asked)
            stand_in.restart()

    servers = servers_of(stand_in.url, adapter=lora)
    stand_in.fault = fault
    servers.load(tmp_path / "weights", version())
    check_logps(servers, model)
    assert servers.generate(CONTEXTS, BUDGETS, SEEDS) == own_text(model)
    assert restarts


def test_a_path_that_is_missing_for_good_is_named_at_the_end(stand_in, served, servers_of):
    servers = servers_of(stand_in.url)
    servers.load(served, version())
    stand_in.fault = lambda path, body: 404 if path == "/v1/completions" else None
    with pytest.raises(GenerationError, match=r"failed after 6 attempts .*\(last: \S+completions: 404 as told\)"):
        servers.generate(CONTEXTS, BUDGETS, SEEDS)
