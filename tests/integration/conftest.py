import pytest

from sapo.generation.sampling import Sampling
from sapo.generation.vllm.servers import VLLMServers
from tests.tiny import tiny_tokenizer
from tests.vllm_servers import LENGTH, NO_VLLM, PORT, RealVLLM, StandIn, save_servable, vllm_python


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The folder of a model that vLLM can serve."""
    folder = tmp_path_factory.mktemp("served") / "model"
    save_servable(folder)
    return folder


@pytest.fixture(scope="session")
def real(served, tmp_path_factory):
    if vllm_python() is None:
        pytest.skip(NO_VLLM)
    server = RealVLLM(served, tmp_path_factory.mktemp("vllm"), PORT)
    yield server
    server.stop()


@pytest.fixture
def stand_in(served):
    server = StandIn(served)
    yield server
    server.stop()


@pytest.fixture(params=["stand-in", "real"])
def server(request):
    return request.getfixturevalue(request.param.replace("-", "_")).wait()


@pytest.fixture
def servers_of():
    made = []

    def make(*urls, sampling=None, **options):
        settings = {"eos_ids": [1], "vocabulary_size": len(tiny_tokenizer()), "timeout": 20.0, "request_timeout": 20.0}
        settings |= options
        made.append(VLLMServers(urls, sampling or Sampling(0, 0, 1.0), **settings))
        made[-1].check(tiny_tokenizer(), LENGTH)
        return made[-1]

    yield make
    for servers in made:
        servers.close()
