"""Run a program under FSDP on CPU processes, which Accelerate offers for accelerators only.

accelerate launch --config_file configs/accelerate/fsdp2.yaml ... on_cpu.py PROGRAM [arguments]
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
