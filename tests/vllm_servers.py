"""vLLM servers for tests: a real one where its environment exists, and a stand-in for faults that are rare in it.

The stand-in answers the few endpoints that are used, with transformers; the laws that it is tested by hold for the real
one too, by the same tests.
"""

import copy
import itertools
import json
import os
import subprocess
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo.commands.arguments import parse
from sapo.commands.serve import servers_for
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.generation.vllm.weight_stream import RECEIVER
from sapo.generation.vllm.worker import WeightReceiver
from tests.tiny import tiny_llama, tiny_tokenizer

LENGTH = 64
SERVABLE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
"""vLLM has no kernels for heads of less than 32."""
NO_VLLM = "no vLLM: make install-vllm, or name an interpreter that has it by SAPO_VLLM_PYTHON"
PORT = 8211 + 2 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
CONTEXTS = [[5, 6, 7], [8, 9], [10] * 20, [3]]
BUDGETS = [9, 12, 20, 0]
SEEDS = [1, 2, 3, 4]
LONG_WITH_A_REAL_ONE = pytest.mark.parametrize(
    "server", ["stand-in", pytest.param("real", marks=pytest.mark.slow)], indirect=True
)
"""A real server takes most of a minute to start."""
_versions = itertools.count()


def servable_llama(seed=0, **overrides):
    return tiny_llama(seed, **(SERVABLE | {"max_position_embeddings": LENGTH} | overrides))


def save_servable(folder, seed=0):
    """A model folder that vLLM can serve."""
    model = servable_llama(seed)
    with torch.no_grad():
        for weight in model.parameters():
            # So small a random model is otherwise nearly uniform, and a wrong one would not be noticed.
            weight.mul_(4) if weight.dim() > 1 else None
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def vllm_python():
    """An interpreter that has vLLM, or None."""
    named = os.environ.get("SAPO_VLLM_PYTHON")
    beside = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    return named or (str(beside) if beside.is_file() else None)


class RealVLLM:
    """A vLLM server as `sapo serve` starts it, with room for adapters."""

    def __init__(self, model, folder, port):
        flags = [
            "--model_name_or_path", str(model), "--output_dir", str(folder / "run"), "--use_cpu", "--use_peft",
            "--lora_r", "4", "--max_length", str(LENGTH), "--generation_backend", "vllm_server",
            "--vllm_server_url", f"http://127.0.0.1:{port}", "--report_to", "none",
            "--vllm_weights_transfer", "stream",
        ]  # fmt: skip
        (self.server,) = servers_for(parse(flags, "test"), vllm_python(), extra=["--enforce-eager"])
        self.url = self.server.url
        self.start()

    def start(self):
        with self.server.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.server.command,
                env={**os.environ, **self.server.environment, "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self):
        for _ in range(600):
            assert self._process.poll() is None, self.server.log.read_text()[-3000:]
            try:
                if httpx2.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return self
            except httpx2.HTTPError:
                time.sleep(0.25)
        raise TimeoutError(self.url)

    def stop(self):
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()

    def restart(self):
        self.stop()
        self.start()


class StandIn:
    """What answers like a vLLM server, with a model folder of its own.

    Attributes:
        asked: (path, body) of every request.
        fault: a function of (path, body) that returns None, "drop", a status, or the answer to give instead.
    """

    def __init__(self, model, port=0):
        self._folder = model
        self.asked = []
        self.fault = lambda path, body: None
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.lengths = LENGTH
        self.extension = RECEIVER
        self._lock = threading.Lock()
        self._reset()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._answer(None)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                self._answer(json.loads(body) if body else None)

            def _answer(self, body):
                stand_in.asked.append((self.path, body))
                found = stand_in.fault(self.path, body)
                if found == "drop":
                    self.close_connection = True
                    return
                status, content = (found, {"error": {"message": "as told"}}) if isinstance(found, int) else (200, found)
                if content is None:
                    status, content = stand_in.answer(self.path, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 512

        self._server = Server(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def _reset(self):
        self.version = "default"
        self._base = AutoModelForCausalLM.from_pretrained(self._folder).eval()
        self._model = self._base
        self.adapter = None

    def wait(self):
        return self

    def restart(self):
        with self._lock:
            self._reset()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path, body):
        with self._lock:
            match path.split("?")[0]:
                case "/v1/models":
                    return 200, {"data": [{"id": "base", "parent": None, "max_model_len": self.lengths}]}
                case "/weight_info":
                    return 200, {"weight_version": self.version}
                case "/update_weight_version":
                    self.version = body["new_version"]
                    return 200, {"success": True}
                case "/get_world_size":
                    return 200, {"world_size": 1}
                case "/collective_rpc" if body["method"] == "sapo_receive":
                    self._model = copy.deepcopy(self._base)
                    self.model_runner = self
                    WeightReceiver.sapo_receive(self, **body["kwargs"])
                    return 200, {"results": [None]}
                case "/collective_rpc":
                    self._model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
                    return 200, {"results": [None]}
                case "/v1/load_lora_adapter":
                    self.adapter = body["lora_name"]
                    base = copy.deepcopy(self._base)
                    self._model = PeftModel.from_pretrained(base, body["lora_path"]).eval()
                    return 200, "Success"
                case "/reset_prefix_cache":
                    return 200, {"success": True}
                case "/server_info":
                    return 200, {"vllm_config": f"device_config=cuda {self.extension}"}
                case "/detokenize":
                    return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
                case "/v1/completions":
                    return self._complete(body)
        return 404, {"error": {"message": "no such path"}}

    def reload_weights(self, weights_iterator):
        """Of vLLM's worker, for `WeightReceiver`."""
        self._model.load_state_dict(dict(weights_iterator))

    def _complete(self, body):
        if body["model"] not in ("base", self.adapter):
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        prompt = body["prompt"]
        if "prompt_logprobs" in body:
            with torch.no_grad():
                logps = self._model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            given = [None, *({str(t): {"logprob": logps[i, t].item()}} for i, t in enumerate(prompt[1:]))]
            return 200, {"choices": [{"prompt_logprobs": given}]}
        sampling = Sampling(body["temperature"], body["top_k"], body["top_p"])
        ends = body["stop_token_ids"]
        generator = TransformersGenerator(lambda: nullcontext(self._model), sampling, eos_ids=ends, pad_token_id=0)
        (tokens,) = generator.generate([prompt], [body["max_tokens"]], [body["seed"]])
        reason = "stop" if tokens[-1] in ends else "length"
        return 200, {"choices": [{"token_ids": tokens, "prompt_token_ids": prompt, "finish_reason": reason}]}


def own_text(model, sampling=None, contexts=CONTEXTS, budgets=BUDGETS, seeds=SEEDS):
    generator = TransformersGenerator(
        lambda: nullcontext(model.eval()), sampling or Sampling(0, 0, 1.0), eos_ids=[1], pad_token_id=0
    )
    return generator.generate(contexts, budgets, seeds)


def version():
    return f"test-{next(_versions)}"
