"""Laws of runs whose opponent is on a vLLM server: equal to those in this process, whatever the server does."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sapo.errors import ConfigurationError, GenerationError
from tests.integration.test_engine_queue import same
from tests.integration.test_resume import weights
from tests.vllm_servers import LONG_WITH_A_REAL_ONE, save_servable, servable_llama, version


@pytest.fixture
def make(make_trainer, served):
    def with_server(name, server, **options):
        options = {"learning_rate": 1e-3} | options
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(served)
        if server is not None:
            options |= {
                "generation_backend": "vllm_server",
                "vllm_server_url": [server.url],
                "vllm_server_timeout": 90.0,
            }
        return make_trainer(name, model=model, temperature=0.0, **options)

    return with_server


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": True},
        pytest.param({"vllm_weights_transfer": "stream"}, marks=pytest.mark.slow),
        pytest.param({"sync_opponent_steps": 2, "max_staleness": 3}, marks=pytest.mark.slow),
        {"sync_opponent_steps": 2, "max_staleness": 2, "vllm_weights_transfer": "stream"},
    ],
)
def test_run_on_a_server_equals_one_in_this_process_and_resumes(options, server, make, served, servers_of):
    """Greedy, since servers draw with other numbers. Ahead of time there is nothing to compare with but itself."""
    servers_of(server.url).load(served, version())
    options = {"save_strategy": "steps", "save_steps": 1, **options}
    whole = make("whole", server, **options)
    whole.train()
    if "max_staleness" not in options:
        plain = make("plain", None, **options)
        plain.train()
        assert same(weights(whole), weights(plain))
    resumed = make("resumed", server, **options)
    resumed.train(resume_from_checkpoint=str(whole.run_folder.path / "checkpoint-3"))
    assert same(weights(resumed), weights(whole))
    assert resumed.source.play.buffer.entries() == whole.source.play.buffer.entries()


@LONG_WITH_A_REAL_ONE
@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_server_that_restarts_in_the_middle_changes_nothing(lora, server, make, served, servers_of):
    options = {"lora": lora, "max_staleness": 1}
    servers_of(server.url).load(served, version())
    usual = make("usual", server, **options)
    usual.train()
    disturbed = make("disturbed", server, **options)
    moved = disturbed.source.opponent_moved

    def restart_after_the_third_step(step):
        moved(step)
        if step == 3:
            server.restart()

    disturbed.source.opponent_moved = restart_after_the_third_step
    disturbed.train()
    assert same(weights(disturbed), weights(usual))


def test_another_base_model_under_an_adapter_is_refused(stand_in, make, tmp_path):
    save_servable(tmp_path / "other", 9)
    stand_in._folder = tmp_path / "other"
    stand_in.restart()
    with pytest.raises(GenerationError, match=r"gives other probabilities than the opponent, \S+ nats a token"):
        make("run", stand_in, lora=True).train()


def test_tied_weights_are_refused_on_a_cpu_server(real, make_trainer):
    """There vLLM 0.32 computes on with the head it was started with."""
    real.wait()
    options = {"generation_backend": "vllm_server", "vllm_server_url": [real.url]}
    with pytest.raises(ConfigurationError, match="runs on a CPU, where vLLM does not apply all new weights"):
        make_trainer("run", model=servable_llama(tie_word_embeddings=True), **options)


def test_no_server_is_an_error_of_one_line(make_trainer):
    options = {"generation_backend": "vllm_server", "vllm_server_url": ["http://127.0.0.1:9"]}
    with pytest.raises(GenerationError, match=r"no vLLM server responds there after 0.1 s\. Start one with sapo serve"):
        make_trainer("run", vllm_server_timeout=0.1, **options)
