"""Let accelerate run FSDP2 and DeepSpeed in CPU processes over gloo: without this it falls back to plain DDP.

Imported before anything makes an accelerator. accelerate ignores an FSDP plugin where the processes are CPU ones, and
finds no backend at all for processes without an accelerator that DeepSpeed is to run in.
"""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_backend = PartialState._prepare_backend
_initialise = AcceleratorState.__init__


def _gloo_where_none(self, cpu=False, sagemaker_dp=False, backend=None):
    found, kind = _backend(self, cpu, sagemaker_dp, backend)
    if found is None and "LOCAL_RANK" in os.environ:
        return "gloo", DistributedType.MULTI_CPU
    return found, kind


def _keeping_fsdp(self, *args, **kwargs):
    _initialise(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin") or self.__dict__.get("fsdp_plugin")
    if plugin is not None and self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
        if self.__dict__.get("_mixed_precision", "no") != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = plugin
        self.distributed_type = DistributedType.FSDP


def install():
    PartialState._prepare_backend = _gloo_where_none
    AcceleratorState.__init__ = _keeping_fsdp
