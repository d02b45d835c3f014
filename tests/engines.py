"""An engine without a server: it loads the folders that it is given with transformers, in this process."""

import copy
from contextlib import nullcontext
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

from sapo.errors import GenerationError
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from tests.tiny import tiny_llama


class FolderEngine:
    """An `Engine` for tests.

    Attributes:
        events: ("load", step) and ("rows", number of rows), in the order in which they happened.
        trouble: raised by `generate` instead of an answer, if set.
    """

    def __init__(self, base=None, sampling=None):
        self.events = []
        self.trouble = None
        self.before = lambda what: None
        self.closed = 0
        self._base = base or tiny_llama()
        self._sampling = sampling or Sampling()
        self._generator = None
        self._version = None

    def load(self, folder, version: str) -> None:
        self.before("load")
        assert version != self._version
        if not isinstance(folder, Path):
            model = copy.deepcopy(self._base)
            model.load_state_dict(folder)
        elif (folder / "adapter_config.json").is_file():
            model = PeftModel.from_pretrained(copy.deepcopy(self._base), str(folder))
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        model.eval()
        self._version = version
        self.events.append(("load", int(version.rsplit("-", 1)[1])))
        self._generator = TransformersGenerator(lambda: nullcontext(model), self._sampling, eos_ids=[1], pad_token_id=0)

    def generate(self, contexts, max_new_tokens, seeds):
        self.before("rows")
        if self.trouble is not None:
            raise GenerationError(self.trouble)
        self.events.append(("rows", len(contexts)))
        return self._generator.generate(contexts, max_new_tokens, seeds)

    def close(self) -> None:
        self.closed += 1


class TurnsEngine(FolderEngine):
    """An engine in this process that takes weights in memory: an `InProcessEngine` for tests."""

    def load_tensors(self, named_tensors, version: str) -> None:
        self.before("load")
        model = copy.deepcopy(self._base)
        model.load_state_dict(dict(named_tensors))
        model.eval()
        self.events.append(("tensors", int(version.rsplit("-", 1)[1])))
        self._generator = TransformersGenerator(lambda: nullcontext(model), self._sampling, eos_ids=[1], pad_token_id=0)
