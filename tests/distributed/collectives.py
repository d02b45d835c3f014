"""See every collective that runs: none may go unnoticed where none is expected."""

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_FUNCTIONS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter_tensor",
)


class Collectives(TorchDispatchMode):
    """Notes the names of collectives: those called by name, and those dispatched below that."""

    def __init__(self):
        super().__init__()
        self.names = []
        self._inside = False

    def __enter__(self):
        self._saved = {name: getattr(dist, name) for name in _FUNCTIONS}
        for name, function in self._saved.items():
            setattr(dist, name, self._noting(name, function))
        return super().__enter__()

    def __exit__(self, *error):
        for name, function in self._saved.items():
            setattr(dist, name, function)
        return super().__exit__(*error)

    def _noting(self, name, function):
        def call(*args, **kwargs):
            self.names.append(name)
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        passive = "wait_tensor" in name or "wrap_tensor" in name
        if "c10d" in name and not passive and not self._inside:
            self.names.append(name)
        return function(*args, **(kwargs or {}))
