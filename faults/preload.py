"""Imports what a run of ngeval imports, for processes that are forked from here."""

import pandas as pd
import pyarrow as pa
import torch
import torch.distributed

import faults.processes
import ngeval.cli
import ngeval.commands.collect

_ = (faults.processes, pd, pa, torch, ngeval.cli)
