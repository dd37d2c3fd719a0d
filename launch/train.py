#!/usr/bin/env python3
"""Train one configuration under any launcher that sets RANK and WORLD_SIZE.

    deepspeed --num_accelerators 2 launch/train.py --config configs/quickstart.yaml [a.b=c ...]
    torchrun --nproc-per-node 2 launch/train.py --config configs/quickstart.yaml [a.b=c ...]

The same job as ``longctx train configs/quickstart.yaml``, which starts the ranks itself.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("longctx") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longctx.launch.rank import main  # noqa: E402
from longctx.launch.rank_process import end  # noqa: E402

if __name__ == "__main__":
    end(main())
