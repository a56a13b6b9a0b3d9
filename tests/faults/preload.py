"""Imports what a run of ngeval imports, for processes that are forked from here."""

import pandas as pd
import pyarrow as pa
import pyarrow.pandas_compat
import torch
import torch._decomp.decompositions_for_jvp
import torch.distributed
import torch.fx.experimental.symbolic_shapes

import ngeval.cli.app
import ngeval.runs.execute
from tests.faults import processes

_ = (processes, pd, pa, torch, ngeval.cli)
