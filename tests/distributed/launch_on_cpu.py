"""The command line as on a machine with GPUs, of which there are none here: the launcher starts CPU processes."""

import sys

import torch

from sapo.commands.main import main

torch.accelerator.is_available = lambda: True
torch.accelerator.device_count = lambda: int(sys.argv[1])

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
